"""Simulates annotation campaigns on labelled images, to estimate the work that the loop saves.

A simulated annotator gets one image after the other, in the order in which Label Studio would open
them, and corrects the boxes that are shown. The detector is trained by the code of a live project,
whenever the policy of a live project starts a training. The cost of the annotator's work is counted
under several prices of a box at once, because neither the order of the images nor the trainings
depend on the price.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ml_backend.acquisition.factory import make_strategy
from ml_backend.acquisition.farthest_first import farthest_first
from ml_backend.acquisition.random_share import in_random_share
from ml_backend.detection.costs import (
    CostModel,
    by_hand,
    cheapest_thresholds,
    human_seconds,
    shown,
    thresholds_by_index,
)
from ml_backend.detection.decoding import decode_image
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import evaluate
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.presets import preset_named
from ml_backend.detection.presets.live_head import PRESET as LIVE_HEAD
from ml_backend.detection.types import Detections, Sample
from ml_backend.jobs.schedule import Action, Situation, decide
from ml_backend.reasons import Code, Reason, reason
from ml_backend.settings import Settings
from ml_backend.simulation.results import Campaign, OnProgress, OnRound, Round
from ml_backend.simulation.state import State, Version
from ml_backend.store.tables import now
from ml_backend.training.dataset import Dataset
from ml_backend.training.live_head import LiveHead
from ml_backend.training.outcome import Live, TrainingOutcome, cost_model
from ml_backend.training.split import Item, assign, fingerprint
from ml_backend.training.trainer import Trainer

ONE_ROUND_IMAGES = 55
"""Images that are labelled by hand before the only training of `Simulation.one_round`."""


class Simulation:
    """Runs campaigns on one data set.

    Args:
        settings: the policy, the preset, and the costs except for the price of a box.
        device: where to train and predict.
        labels: label names.
        samples: images, with all boxes that are on them.
        prices: seconds that drawing a box takes; costs are counted for each.
        on_progress: receives the fraction done of a campaign, and the present stage.
        on_round: receives each round as it ends.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        labels: Sequence[str],
        samples: Sequence[Sample],
        prices: Sequence[float],
        on_progress: OnProgress,
        on_round: OnRound | None = None,
    ) -> None:
        self._settings = settings
        self._device = device
        self._labels = tuple(labels)
        self._samples = list(samples)
        self._costs: dict[float, CostModel] = {
            price: dataclasses.replace(cost_model(settings), draw=price) for price in prices
        }
        self._on_progress = on_progress
        self._on_round = on_round
        self._fingerprints: dict[int, str] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="simulation-")
        self._features = Path(self._folder.name) / "features"
        self._embeddings: npt.NDArray[np.float32] | None = None

    def loop(
        self,
        strategy: str,
        seed: int,
        *,
        stop_after: int | None = None,
        late: Mapping[str, int] | None = None,
    ) -> Campaign:
        """Runs a campaign as a live project does: a strategy orders, the policy starts trainings.

        Args:
            strategy: name in `ml_backend.extensions.STRATEGIES`.
            seed: seed of the first order and of the random share.
            stop_after: number of images after which the campaign ends; all of them where None.
            late: number of labelled images from which the annotator uses a label, by label; labels
                that are missing are used from the start.
        """
        first = self._first_order(strategy, seed)

        def due(state: State) -> bool:
            annotated = len(state.labelled)
            decision = decide(
                Situation(
                    annotated=annotated,
                    changes=annotated - state.trained_at,
                    last_change=None,
                    enough_since=None,
                    trained_before=state.trained_at > 0,
                ),
                moment=now(),
                every=self._settings.train_every,
                growth=self._settings.train_growth,
                minimum=self._settings.train_min,
                delay=0.0,
            )
            return decision.action is Action.START

        def ask(state: State) -> int:
            if state.version is None:
                return next(i for i in first if i not in state.items)
            scores = state.version.scores
            return min((i for i in scores if i not in state.items), key=lambda i: (scores[i], i))

        return self._run(strategy, strategy, seed, ask, due, stop_after, late or {}, is_loop=True)

    def one_round(self, seed: int, *, first: int = ONE_ROUND_IMAGES) -> Campaign:
        """Runs a campaign with one training, after `first` random images labelled by hand."""
        order = self._first_order("random", seed)

        def due(state: State) -> bool:
            return state.trained_at == 0 and len(state.labelled) == first

        def ask(state: State) -> int:
            return order[len(state.labelled)]

        name = f"one round after {first}"
        return self._run(name, "random", seed, ask, due, None, {}, is_loop=False)

    def _run(
        self,
        name: str,
        strategy: str,
        seed: int,
        ask: Callable[[State], int],
        due: Callable[[State], bool],
        stop_after: int | None,
        late: Mapping[str, int],
        *,
        is_loop: bool,
    ) -> Campaign:
        state = State()
        total = min(stop_after or len(self._samples), len(self._samples))
        human: dict[float, list[float]] = {price: [0.0] for price in self._costs}
        hand: dict[float, list[float]] = {price: [0.0] for price in self._costs}
        while len(state.labelled) < total:
            labels = self._known_labels(late, len(state.labelled))
            index = ask(state)
            sample = _with_labels(self._samples[index], self._labels, labels)
            for price, costs in self._costs.items():
                drawn = self._shown(state.version, index, labels, price)
                human[price].append(human[price][-1] + human_seconds(drawn, sample, costs))
                hand[price].append(hand[price][-1] + by_hand(sample, costs))
            state.labelled.append(index)
            self._add_item(state, index, sample, labels)
            # A version that is trained on all images would have no image left to predict.
            if len(state.labelled) == len(self._samples):
                break
            parts = (self._settings, self._device, self._teller(state, total), self._features)
            if is_loop and self._wants_live_head(state):
                # A training decides the sides, once, for more images at a time.
                dataset = self._dataset(replace(state, items=deepcopy(state.items)), labels, late)
                self._round(state, LiveHead(*parts), dataset, strategy, name, seed)
            if due(state):
                dataset = self._dataset(state, labels, late)
                self._round(state, Trainer(*parts), dataset, strategy, name, seed)
                state.trained_at = len(state.labelled)
        return Campaign(
            name,
            seed,
            {price: seconds[1:] for price, seconds in human.items()},
            {price: seconds[1:] for price, seconds in hand.items()},
            state.rounds,
            sum(r.seconds for r in state.rounds),
        )

    def _wants_live_head(self, state: State) -> bool:
        """Tells whether a live project would fit a live head after the newest annotation."""
        is_early = state.version is None or state.version.live.is_live_head
        enough = len(state.labelled) >= self._settings.live_min
        has_boxes = any(item.labels for item in state.items.values())
        return self._settings.makes_live_heads and is_early and enough and has_boxes

    def _round(
        self,
        state: State,
        maker: Trainer | LiveHead,
        dataset: Dataset,
        strategy: str,
        name: str,
        seed: int,
    ) -> None:
        """Makes a version, lets it go live if it should, and tells of both."""
        started = time.monotonic()
        outcome = maker.fit(dataset, state.version.live if state.version else None)
        if outcome.verdict.promote:
            state.version = self._go_live(outcome, state, strategy, name, seed)
        self._end_round(state, outcome, dataset.labels, name, seed, started)

    def _teller(self, state: State, total: int) -> Callable[[float, Reason], None]:
        done = len(state.labelled)

        def tell(fraction: float, stage: Reason) -> None:
            why = reason(Code.CAMPAIGN_ROUND, images=done, stage=stage, share=fraction)
            self._on_progress(done / total, why)

        return tell

    def _end_round(
        self,
        state: State,
        outcome: TrainingOutcome,
        labels: tuple[str, ...],
        name: str,
        seed: int,
        started: float,
    ) -> None:
        """Measures what is live on the images that are not labelled, and tells of the round."""
        rest = [i for i in range(len(self._samples)) if i not in state.items]
        whole = [_with_labels(self._samples[i], self._labels, labels) for i in rest]
        quality = None
        if state.version is not None:
            found = [state.version.found[s.key] for s in whole]
            quality = evaluate(found, whole, labels)
        finished = Round(
            images=len(state.labelled),
            promoted=outcome.verdict.promote,
            reason=outcome.verdict.reason,
            map50=outcome.assessment.evaluation.map50,
            map50_of_rest=quality.map50 if quality else 0.0,
            ap50_of_rest={
                label: quality.per_class[label].ap50 if quality else None for label in labels
            },
            seconds=round(time.monotonic() - started, 1),
            is_live_head=outcome.detector.preset == LIVE_HEAD,
        )
        state.rounds.append(finished)
        if self._on_round is not None:
            self._on_round(name, seed, finished)

    def _go_live(
        self, outcome: TrainingOutcome, state: State, strategy: str, name: str, seed: int
    ) -> Version:
        """Predicts and scores the unlabelled images, as auto-labelling does after a promotion."""
        rest = [i for i in range(len(self._samples)) if i not in state.items]
        name = f"{name}:{seed}:{len(state.labelled)}"
        detector = outcome.detector
        samples = [self._samples[i] for i in rest]
        found = predict_samples(detector, samples, max_pixels=self._settings.image_max_pixels)
        scorer = make_strategy(
            strategy,
            outcome.reference,
            name,
            0.0 if strategy == "random" else self._settings.random_share,
        )
        scores = scorer.score(rest, [found[s.key] for s in samples])
        thresholds = {
            price: thresholds_by_index(
                detector.labels,
                {
                    label: t
                    for label, t in cheapest_thresholds(
                        outcome.assessment.predictions,
                        outcome.assessment.samples,
                        detector.labels,
                        costs,
                    ).items()
                    if label in detector.thresholds
                },
            )
            for price, costs in self._costs.items()
        }
        live = Live(name, detector, outcome.out_of_fold)
        return Version(live, thresholds, found, dict(zip(rest, scores, strict=True)))

    def _shown(
        self, version: Version | None, index: int, labels: tuple[str, ...], price: float
    ) -> Detections:
        """Selects the boxes that the annotator is shown; their labels are indices into `labels`."""
        if version is None:
            return Detections.empty()
        found = version.found[self._samples[index].key]
        # Later versions only append labels, so that the indices of this one stay valid.
        return shown(found, version.thresholds[price][found.labels])

    def _dataset(self, state: State, labels: tuple[str, ...], late: Mapping[str, int]) -> Dataset:
        samples = tuple(
            # The annotation of that time: boxes of labels that came later are missing.
            _with_labels(self._samples[i], self._labels, self._known_labels(late, position))
            for position, i in enumerate(state.labelled)
        )
        assign(list(state.items.values()))
        task_of = {self._samples[i].key: i for i in state.labelled}
        return Dataset(
            labels=labels,
            samples=samples,
            task_of=task_of,
            clip_of={key: _clip(state.items[i]) for key, i in task_of.items()},
            holdout=frozenset(k for k, i in task_of.items() if state.items[i].side == "holdout"),
            revision=len(samples),
        )

    def _add_item(self, state: State, index: int, sample: Sample, labels: tuple[str, ...]) -> None:
        names = frozenset(labels[i] for i in sample.labels.tolist())
        if index not in self._fingerprints:
            image = decode_image(sample.image, max_pixels=self._settings.image_max_pixels)
            self._fingerprints[index] = fingerprint(image)
        state.items[index] = Item(
            index,
            sample.image.name,
            self._fingerprints[index],
            names,
            by_chance=in_random_share(index, self._settings.random_share),
        )

    def _first_order(self, strategy: str, seed: int) -> list[int]:
        """Orders the images before the first training: by diversity alone, or at random."""
        order = list(range(len(self._samples)))
        random.Random(seed).shuffle(order)
        if strategy == "random":
            return order
        if self._embeddings is None:
            self._on_progress(0.0, reason(Code.MEASURING, stage="embedding"))
            preset = preset_named(self._settings.preset, self._device)
            trunk = Detector.pretrained(preset, self._labels, self._settings.weights, self._device)
            seen = predict_samples(trunk, self._samples, max_pixels=self._settings.image_max_pixels)
            rows = [seen[s.key].embedding for s in self._samples]
            self._embeddings = np.stack([row for row in rows if row is not None])
        # A random half: otherwise every seed would begin with the same images.
        pool = order[: max(len(order) // 2, min(len(order), 50))]
        wanted = max(self._settings.train_min, 2)
        chosen = [pool[i] for i in farthest_first(self._embeddings[pool], wanted)]
        return chosen + [i for i in order if i not in set(chosen)]

    def _known_labels(self, late: Mapping[str, int], labelled: int) -> tuple[str, ...]:
        """Lists the labels that the annotator uses after a number of images, late ones last."""
        first = tuple(label for label in self._labels if label not in late)
        came = sorted((n, label) for label, n in late.items() if labelled >= n)
        return first + tuple(label for _, label in came)


def _with_labels(sample: Sample, labels: Sequence[str], known: Sequence[str]) -> Sample:
    """Keeps the boxes of known labels alone; the labels become indices into the known ones."""
    if tuple(labels) == tuple(known):
        return sample
    position = {label: i for i, label in enumerate(known)}
    mapping = np.array([position.get(label, -1) for label in labels], np.int64)
    mapped = mapping[sample.labels]
    keep = mapped >= 0
    return dataclasses.replace(sample.where(keep), labels=mapped[keep])


def _clip(item: Item) -> int:
    assert item.clip is not None, "`assign` sets it"
    return item.clip
