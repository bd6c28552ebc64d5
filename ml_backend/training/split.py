"""Decides which tasks are learned from and which only measure; a decision is never changed.

Near-duplicates, and frames of one clip, stay on one side: a hold-out that shares them with the
training set would measure memorisation. A perceptual hash of the image finds them (dHash, Krawetz
2013: the signs of horizontal differences of a thumbnail).
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from PIL import Image

Side = Literal["train", "holdout"]

HOLDOUT_SHARE = 0.2
SMALL = 100
"""Annotated images below which a hold-out is too small to measure on; folds measure then."""

ALIKE = 10
"""Bits of 256 in which the hashes of near-duplicates differ at most."""
ALIKE_IN_CLIP = 32
"""The same for images whose names differ only in a number."""
NEIGHBOURS = 100
"""Images before and after an image, in the order of these numbers, that it is compared with in this
way: frames of a clip lie close together, and a long film has too many to compare with all."""
DOMINANT = 2 / 3
"""Share of the images above which a clip is divided between folds: while it measures, too few
images would be left to learn from."""
_ROWS = 16
_MANY = 0.02
"""Share of the images from which comparing with all at once is faster than one by one."""
_BLOCK = 8192
_NUMBER = re.compile(r"\d+(?=\.\w+$|$)")


@dataclass(slots=True)
class Item:
    """Describes a task for the split.

    Attributes:
        task: Label Studio's id.
        name: its image's address, to recognise the frames of a clip.
        fingerprint: 256-bit hash of its image, hexadecimal.
        labels: label names on it.
        by_chance: whether the task was asked for by chance, whatever its acquisition score.
        clip: the task that stands for its near-duplicates; None until it is known.
        side: the side of the split; None until it is decided.
    """

    task: int
    name: str
    fingerprint: str
    labels: frozenset[str] = field(default_factory=frozenset)
    by_chance: bool = False
    clip: int | None = None
    side: Side | None = None


def fingerprint(image: Image.Image) -> str:
    """Computes the dHash of an image: 256 bits as 64 hexadecimal digits."""
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR), np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return bits.tobytes().hex()


def assign(items: Sequence[Item]) -> None:
    """Fills in `clip` and `side` of the items that have none yet; the others stay as they are.

    A new item joins the clip, and so the side, of the item that it resembles. New clips go to the
    side that lacks their rarest label most (iterative stratification, Sechidis et al. 2011). Clips
    with an item that was asked for by chance come first, because images that were asked for as
    difficult ones do not represent the others; apart from that, the order depends on the task
    alone.
    """
    if not items:
        return
    _find_clips(items)
    members: dict[int, list[Item]] = defaultdict(list)
    for item in items:
        assert item.clip is not None
        members[item.clip].append(item)

    total: Counter[str] = Counter()
    held: Counter[str] = Counter()
    undecided: list[int] = []
    for clip, group in members.items():
        side = next((item.side for item in group if item.side), None)
        if side is None:
            undecided.append(clip)
            continue
        for item in group:
            item.side = item.side or side
            total.update(_strata(item))
            if item.side == "holdout":
                held.update(_strata(item))

    strata_of = {c: Counter(s for item in members[c] for s in _strata(item)) for c in undecided}
    for strata in strata_of.values():
        total.update(strata)
    chosen = {c: not any(item.by_chance for item in members[c]) for c in undecided}
    for clip in sorted(undecided, key=lambda c: (chosen[c], _shuffled(c))):
        strata = strata_of[clip]
        rarest = min(strata, key=lambda s: (total[s], s))
        lacking = HOLDOUT_SHARE * total[rarest] - held[rarest] >= 0.5 * strata[rarest]
        side = "holdout" if lacking else "train"
        if side == "holdout":
            held.update(strata)
        for item in members[clip]:
            item.side = side


def fold_groups(tasks: Mapping[str, int], clips: Mapping[str, int]) -> tuple[dict[str, int], bool]:
    """Finds the groups that folds must not divide: clips, or the tasks of a dominant clip.

    Args:
        tasks: task by key.
        clips: clip by key.

    Returns:
        Group by key, and whether a clip was divided: images that measure then resemble images that
        were learned.
    """
    sizes = Counter(clips.values())
    # A clip bears the number of one of its tasks, so that clips and tasks never share a number.
    parted = {clip for clip, size in sizes.items() if size > DOMINANT * len(clips)}
    return {k: tasks[k] if clip in parted else clip for k, clip in clips.items()}, bool(parted)


def folds(keys: Mapping[str, int], count: int, seed: int) -> list[frozenset[str]]:
    """Distributes keys over `count` folds of about the same size; groups stay whole.

    Args:
        keys: group by key.
        count: number of folds, at least 2.
        seed: of the order in which groups of equal size are distributed.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    for key, group in keys.items():
        groups[group].append(key)
    result: list[set[str]] = [set() for _ in range(count)]
    order = sorted(groups, key=lambda group: (-len(groups[group]), _shuffled(group, seed)))
    for group in order:
        min(result, key=len).update(groups[group])
    return [frozenset(fold) for fold in result if fold]


def _find_clips(items: Sequence[Item]) -> None:
    """Gives each new item the clip of the first one that it resembles, in order.

    An item is compared with items that share a row of its hash, and not with all.
    """
    if all(item.clip is not None for item in items):
        return
    known = _Known(len(items))
    # Oldest first, so that the answer does not depend on what came later.
    for item in items:
        if item.clip is not None:
            known.add(item)
    for item in items:
        if item.clip is None:
            like = known.first_like(item)
            item.clip = item.task if like is None else like.clip
            known.add(item)


class _Known:
    """Indexes items whose clips are known, to find the first that resembles another item."""

    def __init__(self, most: int) -> None:
        self._items: list[Item] = []
        self._hashes: list[int] = []
        self._words = np.zeros((4, most), np.uint64)
        self._rows: list[dict[int, list[int]]] = [{} for _ in range(_ROWS)]
        self._stems: dict[str, list[tuple[int, int]]] = {}

    def add(self, item: Item) -> None:
        """Adds an item at the end."""
        place = len(self._items)
        self._items.append(item)
        self._hashes.append(int(item.fingerprint, 16))
        self._words[:, place] = _words(item)
        for places, row in zip(self._rows, _rows(item), strict=True):
            places.setdefault(row, []).append(place)
        numbered = _numbered(item.name)
        if numbered is not None:
            stem, number = numbered
            insort(self._stems.setdefault(stem, []), (number, place))

    def first_like(self, item: Item) -> Item | None:
        """Finds the first item that resembles another; None where there is none."""
        mark = int(item.fingerprint, 16)
        first = len(self._items)
        # Hashes that differ in at most ALIKE bits differ in at most ALIKE rows, and so share one of
        # any ALIKE + 1 rows. Of all rows, those with the fewest items are looked up: many images
        # share a row of plain sky, for example.
        shared = [places.get(row, []) for places, row in zip(self._rows, _rows(item), strict=True)]
        likely = sorted(shared, key=len)[: ALIKE + 1]
        if sum(map(len, likely)) > len(self._items) * _MANY:
            first = self._first_of_all(item)
        else:
            for candidates in likely:
                first = self._first(mark, candidates, ALIKE, first)
        numbered = _numbered(item.name)
        if numbered is not None:
            first = self._first(mark, self._neighbours(*numbered), ALIKE_IN_CLIP, first)
        return self._items[first] if first < len(self._items) else None

    def _neighbours(self, stem: str, number: int) -> list[int]:
        frames = self._stems.get(stem, [])
        at = bisect_left(frames, (number, 0))
        return sorted(place for _, place in frames[max(0, at - NEIGHBOURS) : at + NEIGHBOURS])

    def _first(self, mark: int, candidates: Sequence[int], limit: int, before: int) -> int:
        for place in candidates:
            if place >= before:
                break
            if (mark ^ self._hashes[place]).bit_count() <= limit:
                return place
        return before

    def _first_of_all(self, item: Item) -> int:
        words = _words(item)[:, None]
        for start in range(0, len(self._items), _BLOCK):
            block = self._words[:, start : min(start + _BLOCK, len(self._items))]
            alike = np.bitwise_count(block ^ words).sum(axis=0, dtype=np.uint16) <= ALIKE
            if alike.any():
                return start + int(alike.argmax())
        return len(self._items)


def _words(item: Item) -> npt.NDArray[np.uint64]:
    return np.frombuffer(bytes.fromhex(item.fingerprint), np.uint64)


def _rows(item: Item) -> list[int]:
    size = len(item.fingerprint) // _ROWS
    return [int(item.fingerprint[i * size : (i + 1) * size], 16) for i in range(_ROWS)]


def _numbered(name: str) -> tuple[str, int] | None:
    """Splits the number off the end of an image's name; None where there is no number."""
    path = PurePosixPath(urlsplit(name).path)
    # Label Studio puts eight random digits before the name of an upload.
    plain = re.sub(r"^[0-9a-f]{8}-", "", path.name)
    number = _NUMBER.search(plain)
    return (_NUMBER.sub("#", plain), int(number[0][-18:])) if number else None


def _strata(item: Item) -> Iterable[str]:
    return item.labels or {"(empty)"}


def _shuffled(clip: int, seed: int = 0) -> bytes:
    return hashlib.sha256(f"{seed}:{clip}".encode()).digest()
