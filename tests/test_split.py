"""Split tasks: the split is stable and stratified, and keeps look-alikes on one side."""

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


def test_assign_decided_tasks_keep_their_side() -> None:
    first = _items(80)
    assign(first)
    before = {item.task: item.side for item in first}
    both = first + _items(200, start=1000)
    assign(both)
    assert {item.task: item.side for item in both[:80]} == before


def test_assign_new_tasks_gives_the_holdout_its_share_of_every_label() -> None:
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


def test_assign_tasks_asked_for_by_chance_are_held_out_before_others() -> None:
    items = _items(300)
    for item in items[::10]:
        item.by_chance = True
    assign(items)
    held = [item for item in items if item.side == "holdout"]
    assert 0.15 < len(held) / len(items) < 0.3
    assert sum(item.by_chance for item in held) >= 0.9 * 30


def test_assign_later_near_duplicates_join_the_side_of_the_first() -> None:
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


def test_assign_different_images_have_different_clips() -> None:
    items = _items(200)
    assign(items)
    assert len({item.clip for item in items}) == 200


@pytest.mark.parametrize("blank", [0, 10, 15])
@pytest.mark.parametrize("noise", [0.004, 0.02, 0.06])
def test_assign_clips_equal_those_of_comparing_each_with_all(blank: int, noise: float) -> None:
    rng = np.random.default_rng(blank)
    # Frames of a scene differ in some bits; some scenes have blank rows, as a sky has.
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


def test_assign_long_film_only_frames_close_together_share_a_clip() -> None:
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


def test_fold_groups_dominant_clip_is_divided_by_task() -> None:
    # All images look alike; each task has two.
    tasks = {f"{n}-{side}": n for n in range(12) for side in ("left", "right")}
    groups, parted = fold_groups(tasks, dict.fromkeys(tasks, 0))
    assert parted
    assert groups == tasks


def test_folds_large_clip_leaves_images_to_learn_from() -> None:
    tasks = {f"image-{n}": n for n in range(12)}
    # All but the last look alike.
    groups, parted = fold_groups(tasks, {key: n // 11 * 11 for key, n in tasks.items()})
    assert parted
    assert [len(part) for part in folds(groups, 3, seed=0)] == [4, 4, 4]
    # A clip of two thirds of the images stays whole.
    clips = {key: 0 if n < 8 else n for key, n in tasks.items()}
    groups, parted = fold_groups(tasks, clips)
    assert (groups, parted) == (clips, False)
    assert max(len(part) for part in folds(groups, 3, seed=0)) == 8


def test_folds_clips_stay_whole_and_every_image_is_used_once() -> None:
    clips = {f"image-{n}": n // 3 for n in range(31)}
    parts = folds(clips, 3, seed=1)
    assert sorted(key for part in parts for key in part) == sorted(clips)
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    for part in parts:
        for key in part:
            assert all(other in part for other in clips if clips[other] == clips[key])
