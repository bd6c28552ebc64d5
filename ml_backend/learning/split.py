"""Which tasks are learned from and which only measure: once decided, never changed.

Near-duplicates, and frames of one clip, stay on one side: a hold-out that shares them with the
training set measures memory. They are found by a perceptual hash of the image (dHash, Krawetz
2013: the signs of horizontal differences of a thumbnail).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

Side = Literal["train", "holdout"]

HOLDOUT_SHARE = 0.2
SMALL = 60
"""Below so many annotated images a hold-out says too little: folds decide instead."""

ALIKE = 10
"""Bits of 256 in which the hashes of near-duplicates differ at most."""
ALIKE_IN_CLIP = 32
"""The same, for images whose names differ in nothing but a number."""


@dataclass(slots=True)
class Item:
    """A task, as the split sees it.

    Attributes:
        task: Label Studio's id.
        name: its image's address, to recognise the frames of a clip.
        fingerprint: 256-bit hash of its image, hexadecimal.
        labels: label names on it.
        clip: the task that stands for its near-duplicates, once known.
        side: once decided.
    """

    task: int
    name: str
    fingerprint: str
    labels: frozenset[str] = field(default_factory=frozenset)
    clip: int | None = None
    side: Side | None = None


def fingerprint(image: Image.Image) -> str:
    """dHash of an image: 256 bits, 64 hexadecimal digits."""
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BILINEAR), np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return bits.tobytes().hex()


def assign(items: Sequence[Item]) -> None:
    """Fills in `clip` and `side` of the items that have none yet; the others stay as they are.

    A new item joins the clip, and so the side, of what it resembles. New clips are dealt in an
    order that depends on the task alone, each to the side that lacks its rarest label most
    (iterative stratification, Sechidis et al. 2011).
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

    for clip in sorted(undecided, key=_shuffled):
        strata = Counter(s for item in members[clip] for s in _strata(item))
        total.update(strata)
        rarest = min(strata, key=lambda s: (total[s], s))
        # Counted with this clip: a label's first appearances go to training.
        lacking = HOLDOUT_SHARE * total[rarest] - held[rarest] >= 0.5 * strata[rarest]
        side = "holdout" if lacking else "train"
        if side == "holdout":
            held.update(strata)
        for item in members[clip]:
            item.side = side


def folds(keys: Mapping[str, int], count: int, seed: int) -> list[frozenset[str]]:
    """Deals keys into `count` folds of about the same size, never parting a clip.

    Args:
        keys: clip by key.
        count: number of folds, at least 2.
        seed: another seed deals otherwise.
    """
    clips: dict[int, list[str]] = defaultdict(list)
    for key, clip in keys.items():
        clips[clip].append(key)
    result: list[set[str]] = [set() for _ in range(count)]
    order = sorted(clips, key=lambda clip: (-len(clips[clip]), _shuffled(clip, seed)))
    for clip in order:
        min(result, key=len).update(clips[clip])
    return [frozenset(fold) for fold in result if fold]


def _find_clips(items: Sequence[Item]) -> None:
    hashes = np.array(
        [np.frombuffer(bytes.fromhex(item.fingerprint), np.uint8) for item in items], np.uint8
    ).reshape(len(items), -1)
    stems = [_stem(item.name) for item in items]
    index = {item.task: position for position, item in enumerate(items)}
    known = [i for i, item in enumerate(items) if item.clip is not None]
    for i, item in enumerate(items):
        if item.clip is not None:
            continue
        # Oldest first, so that the answer does not depend on what came later.
        distance = np.bitwise_count(hashes[known] ^ hashes[i]).sum(axis=1) if known else []
        for j, bits in zip(known, distance, strict=True):
            limit = ALIKE_IN_CLIP if stems[i] is not None and stems[i] == stems[j] else ALIKE
            if bits <= limit:
                item.clip = items[j].clip
                break
        else:
            item.clip = item.task
        known.append(index[item.task])


def _stem(name: str) -> str | None:
    """An image's name without the number at its end; None where it has no number."""
    path = PurePosixPath(urlsplit(name).path)
    # Label Studio puts eight random digits before the name of an upload.
    plain = re.sub(r"^[0-9a-f]{8}-", "", path.name)
    stem, found = re.subn(r"\d+(?=\.\w+$|$)", "#", plain)
    return f"{stem}" if found else None


def _strata(item: Item) -> Iterable[str]:
    return item.labels or {"(empty)"}


def _shuffled(clip: int, seed: int = 0) -> bytes:
    return hashlib.sha256(f"{seed}:{clip}".encode()).digest()
