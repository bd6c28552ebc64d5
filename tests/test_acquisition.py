"""Acquisition: uncertainty, strategies, the random share, and the first images of a project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ml_backend.acquisition.factory import make_strategy
from ml_backend.acquisition.farthest_first import farthest_first
from ml_backend.acquisition.image_uncertainty import image_uncertainty
from ml_backend.acquisition.label_weights import label_weights
from ml_backend.acquisition.nearest import nearest_similarities
from ml_backend.acquisition.random_share import in_random_share
from ml_backend.acquisition.reference import Reference
from ml_backend.acquisition.scored_images import ScoredImages
from ml_backend.acquisition.strategies.diverse import Diverse
from ml_backend.detection.types import Detections
from ml_backend.extensions import STRATEGIES
from ml_backend.settings import SettingsError, load_settings
from ml_backend.simulation.report import Plan

EVEN = np.ones(2)
RANDOM = np.random.default_rng(0)


def _run(program: str, *folders: Path) -> str:
    """Runs a program in a process of its own, with packages of the folders; returns its output."""
    path = os.pathsep.join(map(str, [*folders, Path(__file__).parents[1]]))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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


TRAINED = _unit(RANDOM.normal(size=(60, 16)))
REFERENCE = Reference(EVEN, np.linspace(0.05, 0.6, 40).astype(np.float64), TRAINED)


def test_image_uncertainty_medium_confidence_exceeds_high_confidence() -> None:
    sure, unsure = _found(0.99, 0.98, 0.02), _found(0.5, 0.4, 0.6)
    assert image_uncertainty(unsure, EVEN) > 3 * image_uncertainty(sure, EVEN)
    # Objects that were probably missed: many faint candidates are worse than none.
    assert (
        image_uncertainty(_found(0.1, 0.1, 0.1, 0.1), EVEN)
        > image_uncertainty(_found(0.99), EVEN)
        > 0
    )
    assert image_uncertainty(Detections.empty(), EVEN) == 0.0


def test_image_uncertainty_many_objects_counts_the_ten_most_uncertain() -> None:
    assert image_uncertainty(_found(*[0.5] * 60), EVEN) == image_uncertainty(
        _found(*[0.5] * 10), EVEN
    )


def test_image_uncertainty_overlapping_candidates_are_one_object_with_rival_label_or_box() -> None:
    box = np.array([[0, 0, 100, 100]], np.float32)
    near = np.array([[0, 0, 100, 65]], np.float32)

    def objects(boxes: list[np.ndarray], scores: list[float], labels: list[int]) -> float:  # type: ignore[type-arg]
        return image_uncertainty(
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


def test_label_weights_hard_or_rare_label_is_larger() -> None:
    weights = label_weights([0.9, 0.5, None], [100, 100, 100])
    assert weights[0] < weights[1] < weights[2]
    common, rare = label_weights([0.8, 0.8], [1000, 10])
    assert rare > 1.5 * common
    assert image_uncertainty(_found(0.5, label=1), np.array([common, rare])) > image_uncertainty(
        _found(0.5, label=0), np.array([common, rare])
    )


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_score_builtin_strategy_lies_in_0_to_1_and_repeats(name: str) -> None:
    found = [
        _found(*RANDOM.uniform(0, 1, RANDOM.integers(0, 30)), embedding=_looks()) for _ in range(50)
    ]
    for reference in (REFERENCE, Reference.unknown(2)):
        scorer = make_strategy(name, reference, "v1", 0.1)
        first = scorer.score(list(range(50)), found)
        assert all(0 <= score <= 1 for score in first)
        assert len(set(first)) > 20 or not len(reference.uncertainties)
        # Scored again, every task keeps its place.
        assert scorer.score(list(range(50)), found) == pytest.approx(first)


def test_diverse_pool_with_one_clip_asks_for_rare_labels_and_few_frames_of_the_clip() -> None:
    """Thirty frames of one clip, as doubtful as can be; twenty other images; three rare ones."""
    clip = _unit(RANDOM.normal(size=16))
    frames = [
        _found(0.5, 0.45, 0.55, 0.5, embedding=_unit(clip + RANDOM.normal(size=16) * 0.01))
        for _ in range(30)
    ]
    others = [_found(0.6, 0.35, 0.4, embedding=_looks()) for _ in range(20)]
    rare = [_found(0.6, 0.35, 0.4, label=1, embedding=_looks()) for _ in range(3)]
    weights = label_weights([0.8, 0.8], [900, 12])
    reference = Reference(weights, np.linspace(0.05, 1.0, 40).astype(np.float64), TRAINED)
    pool = [*frames, *others, *rare]
    tasks = list(range(len(pool)))
    kinds = ["frame"] * 30 + ["other"] * 20 + ["rare"] * 3

    def first_twelve(name: str) -> list[str]:
        scores = make_strategy(name, reference, "v1", 0.0).score(tasks, pool)
        return [kinds[i] for i in sorted(tasks, key=lambda i: scores[i])[:12]]

    asked = first_twelve("diverse")
    assert 1 <= asked.count("frame") <= 3
    assert asked.count("rare") == 3
    # Uncertainty alone asks for one copy after the other.
    assert first_twelve("uncertainty").count("frame") >= 9


def test_diverse_copies_scored_one_at_a_time_get_later_places() -> None:
    scorer = Diverse(REFERENCE, "v1")
    clip = _unit(RANDOM.normal(size=16))
    scores = [scorer.score([n], [_found(0.5, 0.5, embedding=clip)])[0] for n in range(5)]
    assert scores == sorted(scores)
    assert scores[4] > scores[0] + 0.2


def test_diverse_unknown_reference_puts_copies_behind_other_images() -> None:
    """The reference of the COCO detector, which serves until the first training."""
    clip = _looks()
    copies = [_found(0.5, embedding=clip) for _ in range(100)]
    others = [_found(0.35, embedding=_looks()) for _ in range(20)]
    scores = Diverse(Reference.unknown(2), "v1").score(list(range(120)), [*copies, *others])
    first = sorted(range(120), key=lambda i: scores[i])[:21]
    assert sum(i < 100 for i in first) == 1


def test_diverse_image_like_a_training_image_comes_after_a_novel_one() -> None:
    known, new = scores = Diverse(REFERENCE, "v1").score(
        [1, 2],
        [
            _found(0.5, 0.5, embedding=TRAINED[3]),
            _found(0.5, 0.5, embedding=_unit(-TRAINED.sum(axis=0))),
        ],
    )
    assert new < known, scores


def test_diverse_image_without_candidates_is_scored_by_its_embedding() -> None:
    scorer = Diverse(REFERENCE, "v1")
    empty, doubtful = scorer.score(
        [1, 2],
        [
            _found(embedding=TRAINED[5]),
            _found(0.5, 0.5, 0.5, embedding=_looks()),
        ],
    )
    assert empty > doubtful
    assert 0.5 < empty <= 1.0


def test_random_share_tenth_of_tasks_gets_random_scores_per_version() -> None:
    left = [task for task in range(2000) if in_random_share(task, 0.1)]
    assert 150 < len(left) < 250
    certain = [_found(0.99, embedding=TRAINED[0])] * 2000
    tasks = list(range(2000))
    scores = np.array(make_strategy("uncertainty", REFERENCE, "v1", 0.1).score(tasks, certain))
    assert np.array(scores)[left].min() < 0.1
    assert np.array(scores)[left].mean() == pytest.approx(0.5, abs=0.1)
    others = np.delete(scores, left)
    assert others.min() == others.max()
    again = np.array(make_strategy("uncertainty", REFERENCE, "v2", 0.1).score(tasks, certain))
    assert not np.allclose(again[left], scores[left])


def test_farthest_first_six_groups_chooses_one_of_each() -> None:
    groups = _unit(RANDOM.normal(size=(6, 16)))
    rows = _unit(np.repeat(groups, 20, axis=0) + RANDOM.normal(size=(120, 16)) * 0.02)
    chosen = farthest_first(rows, 6)
    assert {i // 20 for i in chosen} == set(range(6))
    assert sorted(farthest_first(rows[:4], 9)) == [0, 1, 2, 3]
    assert farthest_first(rows[:0], 3) == []


def test_reference_save_and_load_gives_the_same_scores(tmp_path: Path) -> None:
    REFERENCE.save(tmp_path)
    back = Reference.load(tmp_path, 2)
    found = [_found(0.5, 0.3, embedding=row) for row in _unit(RANDOM.normal(size=(5, 16)))]
    assert Diverse(back, "v1").score([1, 2, 3, 4, 5], found) == pytest.approx(
        Diverse(REFERENCE, "v1").score([1, 2, 3, 4, 5], found), abs=0.02
    )
    (tmp_path / "acquisition.safetensors").unlink()
    assert len(Reference.load(tmp_path, 2).uncertainties) == 0


def test_diverse_leader_scored_again_after_its_copies_keeps_its_place() -> None:
    scorer = Diverse(REFERENCE, "v1")
    copy = _found(0.5, 0.5, embedding=_looks())
    (first,) = scorer.score([0], [copy])
    later = [scorer.score([task], [copy])[0] for task in range(1, 20)]
    assert scorer.score([0], [copy]) == [pytest.approx(first)]
    # Copies keep their places as well.
    again = [scorer.score([task], [copy])[0] for task in range(1, 20)]
    assert again == pytest.approx(later)
    assert first < min(later)


def test_scored_images_beyond_capacity_forget_the_oldest() -> None:
    scored = ScoredImages(0.9, capacity=3)
    row = _looks()
    assert [scored.crowding(task, row) for task in range(5)] == pytest.approx([0, 1, 2, 3, 3])
    # Task 4 is compared with what came before it; task 0 is forgotten, and counts as new.
    assert scored.crowding(4, row) == pytest.approx(2)
    assert scored.crowding(0, row) == pytest.approx(3)


def test_nearest_similarities_small_set_equals_the_full_matrix() -> None:
    rows = _unit(RANDOM.normal(size=(700, 32)))
    similar = rows @ rows.T
    np.fill_diagonal(similar, -1.0)
    assert nearest_similarities(rows) == pytest.approx(np.sort(similar.max(axis=1)), abs=1e-6)


def test_nearest_similarities_sample_has_the_quantiles_of_all_rows() -> None:
    rows = _unit(RANDOM.normal(size=(3000, 8)) * RANDOM.uniform(0.2, 3, (1, 8)))
    every = nearest_similarities(rows, sample=3000)
    sampled = nearest_similarities(rows, sample=1000)
    below = np.searchsorted(every, np.quantile(sampled, [0.1, 0.5, 0.95])) / len(every)
    assert below == pytest.approx([0.1, 0.5, 0.95], abs=0.06)


PEAK_MEMORY = r"""
import re
from pathlib import Path

import numpy as np

from ml_backend.acquisition.reference import Reference
from ml_backend.acquisition.strategies.diverse import Diverse


def peak_mib() -> float:
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


rows = np.random.default_rng(0).normal(size=(20_000, 512)).astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
reference = Reference(np.ones(2), np.linspace(0.0, 1.0, 50), rows)
before = peak_mib()
Diverse(reference, "v1")
print(peak_mib() - before)
"""


def test_diverse_20000_training_images_takes_less_than_300_mib() -> None:
    """The full similarity matrix would take 1,526 MiB."""
    assert float(_run(PEAK_MEMORY)) < 300


def test_strategy_added_to_the_registry_is_known_to_settings_and_simulate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = {**STRATEGIES.paths, "largest": "tests.largest_first:LargestFirst"}
    monkeypatch.setattr(STRATEGIES, "paths", paths)
    settings = load_settings({"ML_BACKEND_STRATEGY": "largest"})
    Plan(("largest",), (0,), (7.0,), story=False, stop_after=None)
    strategy = make_strategy(settings.strategy, REFERENCE, "v1", 0.0)
    empty, found = strategy.score([1, 2], [_found(), _found(0.5)])
    assert found < empty


NAMED_BY_ENTRY_POINT = """
from ml_backend.acquisition.factory import make_strategy
from ml_backend.acquisition.reference import Reference
from ml_backend.settings import load_settings

name = load_settings({"ML_BACKEND_STRATEGY": "largest"}).strategy
print(make_strategy(name, Reference.unknown(1), "v9", 0.0).version)
"""


def test_strategy_of_an_installed_package_is_made_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "largest.py").write_text("from tests.largest_first import LargestFirst\n")
    about = tmp_path / "largest-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: largest\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[ml_backend.strategies]\nlargest = largest:LargestFirst\n"
    )
    assert _run(NAMED_BY_ENTRY_POINT, tmp_path).strip() == "v9"


def test_settings_unknown_strategy_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="must be one of diverse, uncertainty, random"):
        load_settings({"ML_BACKEND_STRATEGY": "clever"})


IMPORTED_BY_THE_WORKER = """
import sys

import ml_backend.acquisition.control_group
import ml_backend.acquisition.random_share
import ml_backend.acquisition.stable_random
import ml_backend.extensions
import ml_backend.settings
import ml_backend.store.open_artefacts

print(sorted({"torch", "fsspec", "s3fs"} & set(sys.modules)))
"""


def test_modules_that_the_worker_imports_do_not_import_torch() -> None:
    assert _run(IMPORTED_BY_THE_WORKER).strip() == "[]"
