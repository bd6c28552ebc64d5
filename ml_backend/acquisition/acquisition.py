"""What to ask next: the acquisition score of a task, by which Label Studio orders, lowest first.

It is not a confidence (a region's `score` is): it lies in `[0, 1]`, and low means that a label here
teaches much. It is comparable across the tasks of one version.

The default strategy, `diverse`, follows PPAL (Yang et al., "Plug and play active learning for
object detection", CVPR 2024) in that it weighs a box's uncertainty by how hard its label has
proved, and then asks for images that differ. It departs from it where a score must be had for one
task at a time, as Label Studio opens it, and not for a whole pool:

- Uncertainty (`uncertainty`): what overlaps is one object, so that it counts once (as in
  entropy-aware suppression; Wu et al., CVPR 2022). An object's doubt is the binary entropy of its
  calibrated confidence (which covers objects that were probably missed: a candidate of 0.1 counts
  as almost half a bit), and, as far as it is there, the doubt between labels and about its place.
  The ten most doubtful are summed: a mean would prefer clutter, a sum over all would prefer crowds.
- Novelty: how far the image lies from all that was learned, by the detector's own backbone.
- Crowding: an image that resembles others that were scored before it gives way to them, so that the
  hundred most uncertain are not a hundred copies of one.
- Chance: a share of the tasks, by their number, gets a place at random.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file, save_file
from torchvision.ops import box_iou

from ml_backend.acquisition.stable_random import chance
from ml_backend.detection.types import Detections, FloatArray

TOP = 10
"""Objects of an image that count."""
ONE_OBJECT = 0.5
"""IoU from which candidates are taken for one object."""
NOVELTY = 0.25
"""Share of novelty in the priority; the rest is uncertainty."""
MEMORY = 100_000
"""Scored images that are remembered; the oldest are forgotten first."""
ALIKE_AT_LEAST = 0.8
"""Cosine similarity below which images are never taken for look-alikes."""

_FILE = "acquisition.safetensors"
_MOST = 4.0
"""An uncertainty that none exceeds, for all practical purposes."""
_Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """What a version knows of the images that it has learned, to judge others by.

    Attributes:
        weights: float64 `[C]`, how much a doubt about each label counts.
        doubts: float64 `[U]`, ascending: uncertainties of images that were not learned.
        embeddings: float32 `[N, D]`: those of the learned images, one of each clip.
    """

    weights: _Array
    doubts: _Array
    embeddings: FloatArray

    @classmethod
    def unknown(cls, labels: int) -> Reference:
        """Of a version that has learned nothing in this project."""
        return cls(np.ones(labels), np.zeros(0), np.zeros((0, 1), np.float32))

    def save(self, folder: Path) -> None:
        """Writes it beside a version's weights."""
        tensors: dict[str, npt.NDArray[np.generic]] = {
            "weights": self.weights,
            "doubts": self.doubts,
            "embeddings": self.embeddings.astype(np.float16),
        }
        save_file(tensors, folder / _FILE)

    @classmethod
    def load(cls, folder: Path, labels: int) -> Reference:
        """Reads it back; that of versions that have none is unknown."""
        if not (folder / _FILE).is_file():
            return cls.unknown(labels)
        tensors = load_file(folder / _FILE)
        embeddings = tensors["embeddings"].astype(np.float32)
        return cls(tensors["weights"], tensors["doubts"], embeddings)


def label_weights(ap50: Sequence[float | None], boxes: Sequence[int]) -> _Array:
    """How much a doubt about each label counts: the harder and the rarer, the more.

    Args:
        ap50: average precision of each label on images that were not learned.
        boxes: number of boxes of each label that were learned.

    Returns:
        float64 `[C]`, one plus what is missing to an AP50 of 1 (a label that could not be measured
        counts as hard), times the fourth root of how rare it is against the mean.
    """
    hard = np.array([1.0 if value is None else 1.0 - value for value in ap50])
    counts = np.maximum(np.array(boxes, np.float64), 1.0)
    rare = np.clip((counts.mean() / counts) ** 0.25, 0.5, 2.0) if len(counts) else counts
    weights: _Array = (1.0 + hard) * rare
    return weights


def uncertainty(candidates: Detections, weights: _Array) -> float:
    """How much a detector doubts what it finds in an image; see the module's docstring.

    Args:
        candidates: detections down to a low confidence, calibrated, before any threshold.
        weights: float64 `[C]`, of the labels.

    Returns:
        The sum over the `TOP` most doubtful objects, divided by `TOP`: bits, weighted.
    """
    doubts = []
    for first, members in _objects(candidates):
        p = float(candidates.scores[first])
        label = candidates.labels[first]
        others = members[candidates.labels[members] != label]
        rival = float(candidates.scores[others].max(initial=0.0))
        doubt = _entropy(p) + p * _entropy(rival / max(p + rival, 1e-9))
        doubt += p * _misplacement(candidates, first, members)
        doubts.append(float(weights[label]) * doubt)
    return float(np.sum(np.sort(doubts)[::-1][:TOP])) / TOP


class Strategy(Protocol):
    """Scores tasks. Safe to use from several threads."""

    def score(self, tasks: Sequence[int | None], found: Sequence[Detections]) -> list[float]:
        """Acquisition scores in `[0, 1]`, low for those to be asked first.

        Args:
            tasks: numbers of the tasks; the same task again is not its own look-alike.
            found: for each, the candidates in its image, with embedding.
        """
        ...


class Diverse:
    """Uncertain images that differ from what was learned, and from each other.

    What was scored before is remembered by the process: of look-alikes that two processes score,
    as after one was killed, each has a first one.

    Args:
        reference: what the version knows.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        learned = reference.embeddings
        self._centre = learned.mean(axis=0) if len(learned) else None
        self._learned = self._centred(learned)
        similar = self._learned @ self._learned.T
        np.fill_diagonal(similar, -1.0)
        self._nearest = np.sort(similar.max(axis=1)) if len(similar) > 1 else np.zeros(0)
        self._alike = max(
            ALIKE_AT_LEAST, float(np.quantile(self._nearest, 0.95)) if len(self._nearest) else 0.99
        )
        self._alike = min(self._alike, 0.99)
        self._lock = threading.Lock()
        self._scored: dict[int, int] = {}
        self._task_in: dict[int, int] = {}
        self._rows = np.zeros((0, 0), np.float32)
        self._next = 0

    def score(self, tasks: Sequence[int | None], found: Sequence[Detections]) -> list[float]:
        """See `Strategy`."""
        doubts = np.array([uncertainty(f, self._reference.weights) for f in found])
        place = _share_below(doubts, self._reference.doubts, 0.0, _MOST)
        scores = np.zeros(len(found))
        # The most doubtful of a group of look-alikes leads it.
        for i in np.argsort(-doubts, kind="stable").tolist():
            priority = (1 - NOVELTY) * place[i] + NOVELTY * 0.5
            embedding = found[i].embedding
            if embedding is not None:
                row = self._centred(embedding[None])[0]
                if self._centre is not None:
                    nearest = float((self._learned @ row).max())
                    novelty = 1 - _share_below(np.array([nearest]), self._nearest, -1.0, 1.0)[0]
                    priority += NOVELTY * (novelty - 0.5)
                priority /= 1 + self._lookalikes(tasks[i], row)
            scores[i] = 1 - priority
        return [float(s) for s in np.clip(scores, 0.0, 1.0)]

    def _centred(self, embeddings: FloatArray) -> FloatArray:
        moved = embeddings if self._centre is None else embeddings - self._centre
        length = np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9)
        return np.asarray(moved / length, np.float32)

    def _lookalikes(self, task: int | None, row: FloatArray) -> float:
        """How many look-alikes were scored before, each counted by how alike it is."""
        with self._lock:
            similar = self._rows @ row if len(self._rows) else np.zeros(0, np.float32)
            own = self._scored.get(task) if task is not None else None
            if own is not None:
                similar[own] = -1.0
            alike = np.clip((similar - self._alike) / (1 - self._alike), 0.0, 1.0)
            if own is None:
                self._remember(task, row)
            return float(np.sqrt(alike).sum())

    def _remember(self, task: int | None, row: FloatArray) -> None:
        if len(self._rows) == self._next and len(self._rows) < MEMORY:
            grown = np.zeros((min(MEMORY, 2 * len(self._rows) + 256), len(row)), np.float32)
            if len(self._rows):
                grown[: len(self._rows)] = self._rows
            self._rows = grown
        at = self._next % MEMORY
        self._next = at + 1
        self._rows[at] = row
        forgotten = self._task_in.pop(at, None)
        if forgotten is not None:
            del self._scored[forgotten]
        if task is not None:
            self._task_in[at] = task
            self._scored[task] = at


class Uncertainty:
    """Uncertainty alone: to compare with.

    Args:
        reference: what the version knows.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    def score(self, tasks: Sequence[int | None], found: Sequence[Detections]) -> list[float]:
        """See `Strategy`."""
        doubts = np.array([uncertainty(f, self._reference.weights) for f in found])
        return [float(s) for s in 1 - _share_below(doubts, self._reference.doubts, 0.0, _MOST)]


class Random:
    """A place at random, the same each time for a task and a version: to compare with.

    Args:
        seed: name of the version.
    """

    def __init__(self, seed: str) -> None:
        self._seed = seed

    def score(self, tasks: Sequence[int | None], found: Sequence[Detections]) -> list[float]:
        """See `Strategy`."""
        return [chance(f"{self._seed}:{task}") for task in tasks]


class WithChance:
    """Another strategy, but for a share of the tasks, whose places are left to chance.

    Args:
        strategy: that scores the others.
        share: of the tasks, in `[0, 1]`.
        seed: name of the version.
    """

    def __init__(self, strategy: Strategy, share: float, seed: str) -> None:
        self._strategy = strategy
        self._share = share
        self._random = Random(seed)

    def score(self, tasks: Sequence[int | None], found: Sequence[Detections]) -> list[float]:
        """See `Strategy`."""
        scores = self._strategy.score(tasks, found)
        random = self._random.score(tasks, found)
        return [
            by_chance if task is not None and is_left_to_chance(task, self._share) else score
            for task, score, by_chance in zip(tasks, scores, random, strict=True)
        ]


STRATEGIES: Mapping[str, Callable[[Reference, str], Strategy]] = {
    "diverse": lambda reference, version: Diverse(reference),
    "uncertainty": lambda reference, version: Uncertainty(reference),
    "random": lambda reference, version: Random(version),
}
"""Strategies by name: each is made for a version, of its reference and its name."""


def strategy_named(name: str, reference: Reference, version: str, share: float) -> Strategy:
    """A strategy for one version.

    Args:
        name: in `STRATEGIES`.
        reference: what the version knows.
        version: its name.
        share: of the tasks whose place is left to chance.
    """
    strategy = STRATEGIES[name](reference, version)
    return WithChance(strategy, share, version) if share else strategy


def is_left_to_chance(task: int, share: float) -> bool:
    """Whether a task is one of those whose place is left to chance: for ever the same ones."""
    return chance(f"chance:{task}") < share


def farthest_first(embeddings: FloatArray, count: int) -> list[int]:
    """Images that differ most, for a project without a detector.

    Farthest-first traversal (Gonzalez, 1985; as "k-center greedy", Sener and Savarese, 2018),
    beginning with the image that is most like all.

    Args:
        embeddings: float32 `[N, D]`.
        count: how many are wanted.

    Returns:
        Indices, in the order in which they should be asked.
    """
    if not len(embeddings):
        return []
    moved = embeddings - embeddings.mean(axis=0)
    rows = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-9)
    chosen = [int(np.argmin(np.linalg.norm(moved, axis=1)))]
    distance = 1 - rows @ rows[chosen[0]]
    while len(chosen) < min(count, len(rows)):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, 1 - rows @ rows[chosen[-1]])
    return chosen


def _objects(candidates: Detections) -> list[tuple[int, npt.NDArray[np.intp]]]:
    """Candidates that overlap, as one object: the most confident one, and all of them."""
    if not len(candidates):
        return []
    boxes = torch.from_numpy(candidates.boxes)
    overlaps = box_iou(boxes, boxes).numpy() >= ONE_OBJECT
    free = np.ones(len(candidates), bool)
    groups = []
    for i in range(len(candidates)):
        if free[i]:
            members = np.flatnonzero(overlaps[i] & free)
            free[members] = False
            groups.append((i, members))
    return groups


def _misplacement(candidates: Detections, first: int, members: npt.NDArray[np.intp]) -> float:
    """How much candidates of one object and label disagree about its place, in `[0, 1]`."""
    same = members[candidates.labels[members] == candidates.labels[first]]
    if len(same) < 2:
        return 0.0
    iou = box_iou(
        torch.from_numpy(candidates.boxes[[first]]), torch.from_numpy(candidates.boxes[same])
    )[0].numpy()
    share = candidates.scores[same] / candidates.scores[same].sum()
    # Members overlap by half at least: twice what is missing to a full overlap.
    return float(np.clip(2 * (share * (1 - iou)).sum(), 0.0, 1.0))


def _entropy(p: float) -> float:
    """Binary entropy, in bits."""
    if not 0.0 < p < 1.0:
        return 0.0
    return float(-p * np.log2(p) - (1 - p) * np.log2(1 - p))


def _share_below(values: _Array, known: _Array, least: float, most: float) -> _Array:
    """Share of the known values that lie below each value, between them interpolated."""
    x = np.concatenate([[least], np.clip(known, least, most), [most]])
    shares: _Array = np.interp(values, x, np.linspace(0.0, 1.0, len(x)))
    return shares
