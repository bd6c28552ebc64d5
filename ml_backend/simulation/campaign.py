"""A whole campaign on labelled images, without a server: what would the loop have saved?

A simulated annotator is asked for one image after the other, as Label Studio would ask; makes the
boxes right that are shown; and the detector is trained by the same code, when the same policy says
so, as in a live project. What the annotator's work costs is counted under several prices of a box
at once: which image is asked, and what is learned, does not depend on them.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ml_backend.acquisition.acquisition import farthest_first, is_left_to_chance, strategy_named
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
from ml_backend.detection.types import Detections, Sample
from ml_backend.jobs.schedule import Situation, decide
from ml_backend.settings import Settings
from ml_backend.store.tables import now
from ml_backend.training.dataset import Dataset
from ml_backend.training.split import Item, assign, fingerprint
from ml_backend.training.trainer import Live, Trainer, TrainingOutcome, cost_model

FIRST = 55
"""Images labelled by hand in the story, before its one training."""

Tell = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Round:
    """One training of a campaign.

    Attributes:
        images: labelled by then.
        promoted: whether it went live.
        reason: why, in words.
        map50: mean AP50 as the loop itself measured it.
        map50_of_rest: mean AP50 of what is live now, on the images that are not labelled yet.
        ap50_of_rest: the same by label; None where the rest holds no box of one.
        seconds: that training, measuring and predicting took.
    """

    images: int
    promoted: bool
    reason: str
    map50: float
    map50_of_rest: float
    ap50_of_rest: dict[str, float | None]
    seconds: float


@dataclass(frozen=True, slots=True)
class Campaign:
    """What a campaign came to.

    Attributes:
        name: strategy, or what else it was.
        seed: of its order.
        human: cumulative seconds of the annotator after each image, by price of a box.
        by_hand: the same where every box is drawn, by price of a box.
        rounds: its trainings.
        machine: seconds that they took in all.
    """

    name: str
    seed: int
    human: dict[float, list[float]]
    by_hand: dict[float, list[float]]
    rounds: list[Round]
    machine: float

    def saving(self, price: float) -> float:
        """How many times less the annotator worked than by hand."""
        return self.by_hand[price][-1] / self.human[price][-1]


@dataclass(slots=True)
class _Version:
    """What is live: what it shows of each image, at each price, and what it would ask first."""

    live: Live
    thresholds: dict[float, npt.NDArray[np.float64]]
    found: dict[str, Detections]
    scores: dict[int, float]


@dataclass(slots=True)
class _State:
    labelled: list[int] = field(default_factory=list)
    sides: dict[int, Item] = field(default_factory=dict)
    trained_at: int = 0
    version: _Version | None = None
    rounds: list[Round] = field(default_factory=list)


class Simulation:
    """Runs campaigns on one data set.

    Args:
        settings: the policy, the preset, the costs (the price of a box apart).
        device: where to train and predict.
        labels: label names.
        samples: images, with every box that is there.
        prices: seconds that drawing a box takes, each of which is accounted for.
        on_progress: told the fraction done of a campaign and a sentence; may raise to stop.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        labels: Sequence[str],
        samples: Sequence[Sample],
        prices: Sequence[float],
        on_progress: Tell,
    ) -> None:
        self._settings = settings
        self._device = device
        self._labels = tuple(labels)
        self._samples = list(samples)
        self._costs: dict[float, CostModel] = {
            price: dataclasses.replace(cost_model(settings), draw=price) for price in prices
        }
        self._tell = on_progress
        self._fingerprints: dict[int, str] = {}
        self._embeddings: npt.NDArray[np.float32] | None = None

    def loop(
        self,
        strategy: str,
        seed: int,
        *,
        stop_after: int | None = None,
        late: Mapping[str, int] | None = None,
    ) -> Campaign:
        """The loop: images are asked for by a strategy, trainings start by the live policy.

        Args:
            strategy: in `acquisition.STRATEGIES`.
            seed: of the first order, and of what is left to chance.
            stop_after: images after which it ends; all of them where None.
            late: labels that the annotator knows only once so many images are labelled.
        """
        first = self._first_order(strategy, seed)

        def due(state: _State) -> bool:
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
            return decision.action == "start"

        def ask(state: _State) -> int:
            if state.version is None:
                return next(i for i in first if i not in state.sides)
            scores = state.version.scores
            return min((i for i in scores if i not in state.sides), key=lambda i: (scores[i], i))

        return self._run(strategy, strategy, seed, ask, due, stop_after, late or {})

    def one_round(self, seed: int, *, first: int = FIRST) -> Campaign:
        """The story: so many random images by hand, one training, and its boxes for the rest."""
        order = self._first_order("random", seed)

        def due(state: _State) -> bool:
            return state.trained_at == 0 and len(state.labelled) == first

        def ask(state: _State) -> int:
            return order[len(state.labelled)]

        name = f"one round after {first}"
        return self._run(name, "random", seed, ask, due, None, {})

    def _run(
        self,
        name: str,
        strategy: str,
        seed: int,
        ask: Callable[[_State], int],
        due: Callable[[_State], bool],
        stop_after: int | None,
        late: Mapping[str, int],
    ) -> Campaign:
        state = _State()
        total = min(stop_after or len(self._samples), len(self._samples))
        human: dict[float, list[float]] = {price: [0.0] for price in self._costs}
        hand: dict[float, list[float]] = {price: [0.0] for price in self._costs}
        while len(state.labelled) < total:
            labels = self._known(late, len(state.labelled))
            index = ask(state)
            sample = _only(self._samples[index], self._labels, labels)
            for price, costs in self._costs.items():
                drawn = self._drawn(state.version, index, labels, price)
                human[price].append(human[price][-1] + human_seconds(drawn, sample, costs))
                hand[price].append(hand[price][-1] + by_hand(sample, costs))
            state.labelled.append(index)
            self._note(state, index, sample, labels)
            # Trained on all there is, it would serve nobody.
            if len(state.labelled) < len(self._samples) and due(state):
                self._train(state, labels, strategy, f"{name}:{seed}", total, late)
        return Campaign(
            name,
            seed,
            {price: seconds[1:] for price, seconds in human.items()},
            {price: seconds[1:] for price, seconds in hand.items()},
            state.rounds,
            sum(r.seconds for r in state.rounds),
        )

    def _train(
        self,
        state: _State,
        labels: tuple[str, ...],
        strategy: str,
        seed: str,
        total: int,
        late: Mapping[str, int],
    ) -> None:
        started = time.monotonic()
        done = len(state.labelled)

        def tell(fraction: float, words: str) -> None:
            self._tell(done / total, f"{done} images labelled; {words} ({fraction:.0%})")

        dataset = self._dataset(state, labels, late)
        trainer = Trainer(self._settings, self._device, tell)
        outcome = trainer.fit(dataset, state.version.live if state.version else None)
        state.trained_at = done
        rest = [i for i in range(len(self._samples)) if i not in state.sides]
        if outcome.verdict.promote:
            state.version = self._go_live(outcome, strategy, f"{seed}:{done}", rest)
        whole = [_only(self._samples[i], self._labels, labels) for i in rest]
        quality = None
        if state.version is not None:
            found = [state.version.found[s.key] for s in whole]
            quality = evaluate(found, whole, labels)
        state.rounds.append(
            Round(
                images=done,
                promoted=outcome.verdict.promote,
                reason=outcome.verdict.reason,
                map50=outcome.assessment.evaluation.map50,
                map50_of_rest=quality.map50 if quality else 0.0,
                ap50_of_rest={
                    label: quality.per_class[label].ap50 if quality else None for label in labels
                },
                seconds=round(time.monotonic() - started, 1),
            )
        )

    def _go_live(
        self, outcome: TrainingOutcome, strategy: str, name: str, rest: Sequence[int]
    ) -> _Version:
        """What auto-labelling does after a promotion."""
        detector = outcome.detector
        samples = [self._samples[i] for i in rest]
        found = predict_samples(detector, samples, max_pixels=self._settings.image_max_pixels)
        scorer = strategy_named(
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
        return _Version(live, thresholds, found, dict(zip(rest, scores, strict=True)))

    def _drawn(
        self, version: _Version | None, index: int, labels: tuple[str, ...], price: float
    ) -> Detections:
        """What the annotator is shown of an image, with indices into `labels`."""
        if version is None:
            return Detections.empty()
        found = version.found[self._samples[index].key]
        # The labels of a version begin those of every later one: indices stay.
        return shown(found, version.thresholds[price][found.labels])

    def _dataset(self, state: _State, labels: tuple[str, ...], late: Mapping[str, int]) -> Dataset:
        samples = tuple(
            # As it was annotated then: labels that came later are not on it.
            _only(self._samples[i], self._labels, self._known(late, position))
            for position, i in enumerate(state.labelled)
        )
        assign(list(state.sides.values()))
        task_of = {self._samples[i].key: i for i in state.labelled}
        return Dataset(
            labels=labels,
            samples=samples,
            task_of=task_of,
            clip_of={key: _clip(state.sides[i]) for key, i in task_of.items()},
            holdout=frozenset(k for k, i in task_of.items() if state.sides[i].side == "holdout"),
            revision=len(samples),
        )

    def _note(self, state: _State, index: int, sample: Sample, labels: tuple[str, ...]) -> None:
        names = frozenset(labels[i] for i in sample.labels.tolist())
        if index not in self._fingerprints:
            image = decode_image(sample.image, max_pixels=self._settings.image_max_pixels)
            self._fingerprints[index] = fingerprint(image)
        state.sides[index] = Item(
            index,
            sample.image.name,
            self._fingerprints[index],
            names,
            by_chance=is_left_to_chance(index, self._settings.random_share),
        )

    def _first_order(self, strategy: str, seed: int) -> list[int]:
        """Before there is a detector: by diversity alone, or at random."""
        order = list(range(len(self._samples)))
        random.Random(seed).shuffle(order)
        if strategy == "random":
            return order
        if self._embeddings is None:
            self._tell(0.0, "looking at the images")
            preset = preset_named(self._settings.preset, self._device)
            trunk = Detector.pretrained(preset, self._labels, self._settings.weights, self._device)
            seen = predict_samples(trunk, self._samples, max_pixels=self._settings.image_max_pixels)
            rows = [seen[s.key].embedding for s in self._samples]
            self._embeddings = np.stack([row for row in rows if row is not None])
        # A random half, so that seeds differ in more than chance later on.
        pool = order[: max(len(order) // 2, min(len(order), 50))]
        wanted = max(self._settings.train_min, 2)
        chosen = [pool[i] for i in farthest_first(self._embeddings[pool], wanted)]
        return chosen + [i for i in order if i not in set(chosen)]

    def _known(self, late: Mapping[str, int], labelled: int) -> tuple[str, ...]:
        """The labels that the annotator knows by then; those that come late stand last."""
        first = tuple(label for label in self._labels if label not in late)
        came = sorted((n, label) for label, n in late.items() if labelled >= n)
        return first + tuple(label for _, label in came)


def _only(sample: Sample, labels: Sequence[str], known: Sequence[str]) -> Sample:
    """A sample with the boxes of known labels alone, as indices into them."""
    if tuple(labels) == tuple(known):
        return sample
    position = {label: i for i, label in enumerate(known)}
    mapping = np.array([position.get(label, -1) for label in labels], np.int64)
    mapped = mapping[sample.labels]
    keep = mapped >= 0
    return dataclasses.replace(sample.where(keep), labels=mapped[keep])


def _clip(item: Item) -> int:
    assert item.clip is not None, "decided by then"
    return item.clip
