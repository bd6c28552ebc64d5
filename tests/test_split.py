"""The hold-out split: stable, stratified, and never parting what looks alike."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
from PIL import Image

from ml_backend.learning.split import HOLDOUT_SHARE, Item, assign, fingerprint, folds


def _picture(seed: int, *, noise: float = 0.0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((160, 120), Image.Resampling.BICUBIC), float)
    pixels = pixels + np.random.default_rng(seed + 1).normal(0, noise, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _items(count: int, *, start: int = 0) -> list[Item]:
    chooser = random.Random(start)
    return [
        Item(
            task=number,
            name=f"/data/upload/1/{number:08x}-picture {number}.png",
            fingerprint=fingerprint(_picture(number)),
            labels=frozenset(
                label for label, share in (("car", 0.9), ("rare", 0.1)) if chooser.random() < share
            ),
        )
        for number in range(start, start + count)
    ]


def test_a_task_never_moves_sides() -> None:
    first = _items(80)
    assign(first)
    before = {item.task: item.side for item in first}
    both = first + _items(200, start=1000)
    assign(both)
    assert {item.task: item.side for item in both[:80]} == before


def test_the_holdout_has_its_share_of_every_label() -> None:
    items = _items(300)
    assign(items)
    total: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for item in items:
        total.update(item.labels)
        if item.side == "holdout":
            held.update(item.labels)
    for label in ("car", "rare"):
        assert abs(held[label] / total[label] - HOLDOUT_SHARE) < 0.08, label


def test_near_duplicates_stay_on_one_side_even_when_they_come_later() -> None:
    items = _items(60)
    assign(items)
    copies = [
        Item(
            task=500 + item.task,
            name=f"other {item.task}.jpg",
            fingerprint=fingerprint(_picture(item.task, noise=4.0)),
        )
        for item in items
    ]
    everything = items + copies
    assign(everything)
    for item, copy in zip(items, copies, strict=True):
        assert copy.clip == item.clip
        assert copy.side == item.side


def test_different_pictures_are_not_taken_for_duplicates() -> None:
    items = _items(200)
    assign(items)
    assert len({item.clip for item in items}) == 200


def test_folds_part_no_clip_and_use_every_image_once() -> None:
    clips = {f"image-{n}": n // 3 for n in range(31)}
    parts = folds(clips, 3, seed=1)
    assert sorted(key for part in parts for key in part) == sorted(clips)
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    for part in parts:
        for key in part:
            assert all(other in part for other in clips if clips[other] == clips[key])
