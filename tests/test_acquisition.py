"""What is asked next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ml_backend.acquisition.acquisition import (
    STRATEGIES,
    Diverse,
    Reference,
    farthest_first,
    is_left_to_chance,
    label_weights,
    strategy_named,
    uncertainty,
)
from ml_backend.detection.types import Detections

EVEN = np.ones(2)
RANDOM = np.random.default_rng(0)


def _unit(rows: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def _looks() -> np.ndarray:  # type: ignore[type-arg]
    return _unit(RANDOM.normal(size=16))


def _found(*scores: float, label: int = 0, embedding: object = None) -> Detections:
    """One object for each confidence, far from each other."""
    order = np.sort(np.array(scores, np.float32))[::-1]
    left = np.arange(len(order), dtype=np.float32) * 100
    boxes = np.stack([left, left * 0, left + 50, left * 0 + 50], 1).astype(np.float32)
    row = None if embedding is None else np.asarray(embedding, np.float32)
    return Detections(boxes.reshape(-1, 4), order, np.full(len(order), label, np.int64), row)


LEARNED = _unit(RANDOM.normal(size=(60, 16)))
REFERENCE = Reference(EVEN, np.linspace(0.05, 0.6, 40).astype(np.float64), LEARNED)


def test_doubt_is_uncertain_and_certainty_is_not() -> None:
    sure, unsure = _found(0.99, 0.98, 0.02), _found(0.5, 0.4, 0.6)
    assert uncertainty(unsure, EVEN) > 3 * uncertainty(sure, EVEN)
    # Objects that were probably missed: many faint candidates are worse than none.
    assert uncertainty(_found(0.1, 0.1, 0.1, 0.1), EVEN) > uncertainty(_found(0.99), EVEN) > 0
    assert uncertainty(Detections.empty(), EVEN) == 0.0


def test_crowds_do_not_win_by_number_alone() -> None:
    assert uncertainty(_found(*[0.5] * 60), EVEN) == uncertainty(_found(*[0.5] * 10), EVEN)


def test_what_overlaps_is_one_object_and_doubt_about_label_or_place_adds() -> None:
    box = np.array([[0, 0, 100, 100]], np.float32)
    near = np.array([[0, 0, 100, 65]], np.float32)

    def objects(boxes: list[np.ndarray], scores: list[float], labels: list[int]) -> float:  # type: ignore[type-arg]
        return uncertainty(
            Detections(np.concatenate(boxes), np.array(scores, np.float32), np.array(labels)), EVEN
        )

    alone = objects([box], [0.8], [0])
    rival = objects([box, box], [0.8, 0.7], [0, 1])
    faint_rival = objects([box, box], [0.8, 0.05], [0, 1])
    misplaced = objects([box, near], [0.8, 0.7], [0, 0])
    assert alone < faint_rival < rival
    assert alone < misplaced
    # Counted as two objects, two candidates would double the doubt at least.
    assert objects([box, box], [0.8, 0.8], [0, 0]) == pytest.approx(alone)


def test_hard_and_rare_labels_weigh_more() -> None:
    weights = label_weights([0.9, 0.5, None], [100, 100, 100])
    assert weights[0] < weights[1] < weights[2]
    common, rare = label_weights([0.8, 0.8], [1000, 10])
    assert rare > 1.5 * common
    assert uncertainty(_found(0.5, label=1), np.array([common, rare])) > uncertainty(
        _found(0.5, label=0), np.array([common, rare])
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_scores_lie_between_0_and_1_and_repeat(name: str) -> None:
    found = [
        _found(*RANDOM.uniform(0, 1, RANDOM.integers(0, 30)), embedding=_looks()) for _ in range(50)
    ]
    for reference in (REFERENCE, Reference.unknown(2)):
        scorer = strategy_named(name, reference, "v1", 0.1)
        first = scorer.score(list(range(50)), found)
        assert all(0 <= score <= 1 for score in first)
        assert len(set(first)) > 20 or not len(reference.doubts)
        # The same task again is not its own look-alike.
        assert scorer.score(list(range(50)), found) == pytest.approx(first, abs=0.05)


def test_near_duplicates_and_a_rare_class_on_a_generated_pool() -> None:
    """Thirty frames of one clip, as doubtful as can be; twenty other images; three rare ones."""
    clip = _unit(RANDOM.normal(size=16))
    frames = [
        _found(0.5, 0.45, 0.55, 0.5, embedding=_unit(clip + RANDOM.normal(size=16) * 0.01))
        for _ in range(30)
    ]
    others = [_found(0.6, 0.35, 0.4, embedding=_looks()) for _ in range(20)]
    rare = [_found(0.6, 0.35, 0.4, label=1, embedding=_looks()) for _ in range(3)]
    weights = label_weights([0.8, 0.8], [900, 12])
    reference = Reference(weights, np.linspace(0.05, 1.0, 40).astype(np.float64), LEARNED)
    pool = [*frames, *others, *rare]
    tasks = list(range(len(pool)))
    kinds = ["frame"] * 30 + ["other"] * 20 + ["rare"] * 3

    def first_twelve(name: str) -> list[str]:
        scores = strategy_named(name, reference, "v1", 0.0).score(tasks, pool)
        return [kinds[i] for i in sorted(tasks, key=lambda i: scores[i])[:12]]

    asked = first_twelve("diverse")
    assert 1 <= asked.count("frame") <= 3
    assert asked.count("rare") == 3
    # Uncertainty alone asks for one copy after the other.
    assert first_twelve("uncertainty").count("frame") >= 9


def test_copies_give_way_even_where_tasks_come_one_at_a_time() -> None:
    scorer = Diverse(REFERENCE)
    clip = _unit(RANDOM.normal(size=16))
    scores = [scorer.score([n], [_found(0.5, 0.5, embedding=clip)])[0] for n in range(5)]
    assert scores == sorted(scores)
    assert scores[4] > scores[0] + 0.2


def test_copies_give_way_before_anything_was_learned() -> None:
    """As COCO's detector, which serves until the first training, finds them."""
    clip = _looks()
    copies = [_found(0.5, embedding=clip) for _ in range(100)]
    others = [_found(0.35, embedding=_looks()) for _ in range(20)]
    scores = Diverse(Reference.unknown(2)).score(list(range(120)), [*copies, *others])
    first = sorted(range(120), key=lambda i: scores[i])[:21]
    assert sum(i < 100 for i in first) == 1


def test_what_resembles_the_learned_comes_after_what_does_not() -> None:
    known, new = scores = Diverse(REFERENCE).score(
        [1, 2],
        [
            _found(0.5, 0.5, embedding=LEARNED[3]),
            _found(0.5, 0.5, embedding=_unit(-LEARNED.sum(axis=0))),
        ],
    )
    assert new < known, scores


def test_an_image_without_boxes_is_judged_by_what_it_looks_like() -> None:
    scorer = Diverse(REFERENCE)
    empty, doubtful = scorer.score(
        [1, 2],
        [
            _found(embedding=LEARNED[5]),
            _found(0.5, 0.5, 0.5, embedding=_looks()),
        ],
    )
    assert empty > doubtful
    assert 0.5 < empty <= 1.0


def test_a_share_is_left_to_chance() -> None:
    left = [task for task in range(2000) if is_left_to_chance(task, 0.1)]
    assert 150 < len(left) < 250
    certain = [_found(0.99, embedding=LEARNED[0])] * 2000
    tasks = list(range(2000))
    scores = np.array(strategy_named("uncertainty", REFERENCE, "v1", 0.1).score(tasks, certain))
    assert np.array(scores)[left].min() < 0.1
    assert np.array(scores)[left].mean() == pytest.approx(0.5, abs=0.1)
    others = np.delete(scores, left)
    assert others.min() == others.max()
    again = np.array(strategy_named("uncertainty", REFERENCE, "v2", 0.1).score(tasks, certain))
    assert not np.allclose(again[left], scores[left])


def test_the_first_images_are_those_that_differ_most() -> None:
    groups = _unit(RANDOM.normal(size=(6, 16)))
    rows = _unit(np.repeat(groups, 20, axis=0) + RANDOM.normal(size=(120, 16)) * 0.02)
    chosen = farthest_first(rows, 6)
    assert {i // 20 for i in chosen} == set(range(6))
    assert sorted(farthest_first(rows[:4], 9)) == [0, 1, 2, 3]
    assert farthest_first(rows[:0], 3) == []


def test_a_reference_survives_the_disk(tmp_path: Path) -> None:
    REFERENCE.save(tmp_path)
    back = Reference.load(tmp_path, 2)
    found = [_found(0.5, 0.3, embedding=row) for row in _unit(RANDOM.normal(size=(5, 16)))]
    assert Diverse(back).score([1, 2, 3, 4, 5], found) == pytest.approx(
        Diverse(REFERENCE).score([1, 2, 3, 4, 5], found), abs=0.02
    )
    (tmp_path / "acquisition.safetensors").unlink()
    assert len(Reference.load(tmp_path, 2).doubts) == 0
