"""The hold-out split: stable, stratified, and never parting what looks alike."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ml_backend.training.split import (
    ALIKE,
    ALIKE_IN_CLIP,
    HOLDOUT_SHARE,
    NEIGHBOURS,
    Item,
    assign,
    fingerprint,
    fold_groups,
    folds,
)

STEMS = [f"camera {letter}" for letter in "abcdefghij"]


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


def test_what_was_asked_for_by_chance_measures_before_what_was_asked_for_because_it_is_hard() -> (
    None
):
    items = _items(300)
    for item in items[::10]:
        item.by_chance = True
    assign(items)
    held = [item for item in items if item.side == "holdout"]
    assert 0.15 < len(held) / len(items) < 0.3
    assert sum(item.by_chance for item in held) >= 0.9 * 30


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


@pytest.mark.parametrize("blank", [0, 10, 15])
@pytest.mark.parametrize("noise", [0.004, 0.02, 0.06])
def test_clips_are_what_comparing_each_with_all_finds(blank: int, noise: float) -> None:
    rng = np.random.default_rng(blank)
    # Scenes whose frames differ in some bits; of some, rows are as blank as a sky.
    scenes = rng.random((40, 256)) < 0.5
    scenes[:20, : 16 * blank] = False
    marks = scenes[rng.integers(0, 40, 600)] ^ (rng.random((600, 256)) < noise)
    items = [
        Item(
            task=number,
            name=f"{rng.choice(STEMS)}_{number}.jpg" if number % 7 else "unnumbered.jpg",
            fingerprint=np.packbits(mark).tobytes().hex(),
        )
        for number, mark in enumerate(marks)
    ]
    for item in items[:50]:
        item.clip = 10_000 + item.task // 2
    expected = [item.clip for item in items]
    for i, item in enumerate(items):
        for j in range(i):
            if expected[i] is not None:
                break
            bits = int(np.sum(marks[i] != marks[j]))
            stems = {name.split("_")[0] for name in (item.name, items[j].name)}
            same = len(stems) == 1 and "unnumbered.jpg" not in stems
            if bits <= (ALIKE_IN_CLIP if same else ALIKE):
                expected[i] = expected[j]
        if expected[i] is None:
            expected[i] = item.task
    assign(items)
    assert [item.clip for item in items] == expected


def test_of_a_long_film_only_frames_close_together_are_taken_for_a_clip() -> None:
    frame = np.random.default_rng(0).random(256) < 0.5
    later = frame ^ (np.arange(256) < ALIKE_IN_CLIP)
    cut = [np.random.default_rng(n).random(256) < 0.5 for n in range(1, NEIGHBOURS + 1)]

    def clips(between: list[npt.NDArray[np.bool_]]) -> list[int | None]:
        frames = [
            Item(number, f"film_{number}.jpg", np.packbits(bits).tobytes().hex())
            for number, bits in enumerate([frame, *between, later])
        ]
        assign(frames)
        return [item.clip for item in frames]

    assert clips(cut[1:])[-1] == 0
    assert clips(cut)[-1] == NEIGHBOURS + 1


def test_a_fixed_camera_is_parted_between_folds_by_task() -> None:
    # Two images of each task, all alike.
    tasks = {f"{n}-{side}": n for n in range(12) for side in ("left", "right")}
    groups, parted = fold_groups(tasks, dict.fromkeys(tasks, 0))
    assert parted
    assert groups == tasks


def test_folds_learn_from_a_share_however_large_a_clip_is() -> None:
    tasks = {f"image-{n}": n for n in range(12)}
    # All but the last look alike.
    groups, parted = fold_groups(tasks, {key: n // 11 * 11 for key, n in tasks.items()})
    assert parted
    assert [len(part) for part in folds(groups, 3, seed=0)] == [4, 4, 4]
    # Two of three may stay together.
    clips = {key: 0 if n < 8 else n for key, n in tasks.items()}
    groups, parted = fold_groups(tasks, clips)
    assert (groups, parted) == (clips, False)
    assert max(len(part) for part in folds(groups, 3, seed=0)) == 8


def test_folds_part_no_clip_and_use_every_image_once() -> None:
    clips = {f"image-{n}": n // 3 for n in range(31)}
    parts = folds(clips, 3, seed=1)
    assert sorted(key for part in parts for key in part) == sorted(clips)
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    for part in parts:
        for key in part:
            assert all(other in part for other in clips if clips[other] == clips[key])
