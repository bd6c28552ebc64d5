"""Simulate campaigns on generated images: the costs, when trainings start, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ml_backend.cli.app import app
from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.detection.training import train
from ml_backend.detection.types import Sample
from ml_backend.settings import load_settings
from ml_backend.simulation.campaign import Simulation
from ml_backend.simulation.results import Campaign
from tests.conftest import ROOT

CPU = torch.device("cpu")
LABELS = SHAPES[:3]
SMALL = replace(
    TINY,
    name="tests.test_simulation:SMALL",
    min_size=96,
    max_size=128,
    steps=60,
    epochs=1,
)
PRICES = (7.0, 27.6)


def _samples(folder: Path, count: int, seed: int) -> list[Sample]:
    samples = []
    for image in generate(count, seed=seed, width=128, height=96, most=3):
        path = folder / image.name
        path.write_bytes(image.encoded())
        labels = np.array([LABELS.index(name) for name in image.labels], np.int64)
        samples.append(Sample(image.name, path, image.boxes, labels))
    return samples


def _as_coco(folder: Path, samples: Sequence[Sample]) -> None:
    images = [
        {"id": i, "file_name": s.image.name, "width": 128, "height": 96}
        for i, s in enumerate(samples)
    ]
    boxes = [
        {"image_id": i, "category_id": int(c), "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for i, s in enumerate(samples)
        for c, (x1, y1, x2, y2) in zip(s.labels.tolist(), s.boxes.tolist(), strict=True)
    ]
    content = {
        "images": images,
        "annotations": [{"id": n, **box} for n, box in enumerate(boxes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(LABELS)],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of weights that were trained on other shapes."""
    folder = tmp_path_factory.mktemp("weights")
    samples = _samples(folder, 40, seed=7)
    result = train(
        replace(SMALL, steps=300),
        LABELS,
        samples,
        weights="none",
        device=CPU,
        threads=os.cpu_count(),
        budget_seconds=300,
    )
    result.detector.save(folder)
    return folder / "model.safetensors"


def _environ(**settings: str) -> dict[str, str]:
    return {
        "PYTHONPATH": str(ROOT),
        "ML_BACKEND_PRESET": SMALL.name,
        "ML_BACKEND_DEVICE": "cpu",
        "ML_BACKEND_TRAIN_GROWTH": "2",
        "ML_BACKEND_LIVE_MIN": "0",
        **settings,
    }


def _simulate(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ml_backend.cli", "simulate", *arguments],
        env={**os.environ, **_environ(**settings)},
        capture_output=True,
        text=True,
        timeout=1500,
    )


def test_simulate_labelled_images_reports_rounds_costs_and_savings(
    tmp_path: Path, weights: Path
) -> None:
    samples = _samples(tmp_path, 50, seed=1)
    _as_coco(tmp_path, samples)
    boxes = sum(len(s.labels) for s in samples)
    picture = tmp_path / "curves.png"
    arguments = [str(tmp_path), "--strategies", "diverse", "--picture", str(picture), "--json"]
    done = _simulate(*arguments, ML_BACKEND_WEIGHTS=str(weights))
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert (report["images"], report["boxes"]) == (50, boxes)
    loop, story = report["campaigns"]
    assert (loop["name"], story["name"]) == ("diverse", "one round after 25")
    # Trainings start after the first 10 images, and after twice as many new ones.
    assert [r["images"] for r in loop["rounds"]] == [10, 30]
    assert [r["images"] for r in story["rounds"]] == [25]
    for campaign in (loop, story):
        for price in PRICES:
            human, hand = campaign["human"][str(price)], campaign["by_hand"][str(price)]
            assert len(human) == len(hand) == 50
            assert hand[-1] == pytest.approx(50 * 3.3 + boxes * price)
            assert human == sorted(human)
    assert loop["rounds"][-1]["promoted"]
    assert loop["rounds"][-1]["map50_of_rest"] > 0.3
    assert loop["saving"]["27.6"] > 1.15
    # The more seconds a box costs to draw, the more a predicted box saves.
    assert loop["saving"]["27.6"] > loop["saving"]["7.0"] >= 1.0
    # Before its only training, every box of this campaign is drawn by hand.
    assert story["human"]["7.0"][24] == pytest.approx(story["by_hand"]["7.0"][24])
    assert Image.open(picture).size[0] > 600


def test_simulate_unknown_strategy_or_empty_folder_ends_with_its_name(tmp_path: Path) -> None:
    wrong = _simulate(str(tmp_path), "--strategies", "clever", ML_BACKEND_WEIGHTS="none")
    assert wrong.returncode == 2
    said = "there is no strategy 'clever': it must be one of diverse, uncertainty, random"
    assert said in wrong.stderr
    missing = _simulate(str(tmp_path), ML_BACKEND_WEIGHTS="none")
    assert missing.returncode == 1
    assert str(tmp_path) in missing.stderr
    assert "Traceback" not in missing.stderr


def test_simulate_wrong_option_ends_before_any_training(tmp_path: Path) -> None:
    _as_coco(tmp_path, _samples(tmp_path, 12, seed=3))
    for option, value, words in (
        ("--picture", str(tmp_path / "curves.xyz"), "must end in one of"),
        ("--picture", str(tmp_path / "nowhere" / "curves.png"), "cannot be written"),
        ("--seeds", "a", "seeds: 'a' must be numbers"),
        ("--seeds", "0,0", "seeds: each once"),
        ("--prices", "1,2,3,4,5", "prices: 1 to 4"),
    ):
        wrong = _simulate(str(tmp_path), option, value, ML_BACKEND_WEIGHTS="none")
        assert (wrong.returncode, words in wrong.stderr) == (2, True), wrong.stderr
    few = _simulate(str(tmp_path), ML_BACKEND_WEIGHTS="none", ML_BACKEND_TRAIN_MIN="12")
    assert (few.returncode, "12 images" in few.stderr) == (1, True), few.stderr
    device = _simulate(str(tmp_path), ML_BACKEND_WEIGHTS="none", ML_BACKEND_DEVICE="cuda:9")
    assert device.returncode == 1, device.stderr
    assert "Traceback" not in device.stderr


def test_simulate_damaged_image_and_interruption_reports_finished_campaigns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = _samples(tmp_path, 31, seed=3)
    _as_coco(tmp_path, samples)
    assert isinstance(samples[4].image, Path)
    content = samples[4].image.read_bytes()
    samples[4].image.write_bytes(content[: len(content) // 2])
    loop = Simulation.loop

    def interrupted(self: Simulation, strategy: str, *args: Any, **kwargs: Any) -> Campaign:
        if strategy == "diverse":
            # Somebody presses Ctrl-C.
            raise KeyboardInterrupt
        return loop(self, strategy, *args, **kwargs)

    monkeypatch.setattr(Simulation, "loop", interrupted)
    for name, value in _environ(ML_BACKEND_WEIGHTS="none", ML_BACKEND_TRAIN_MIN="25").items():
        monkeypatch.setenv(name, value)
    picture = tmp_path / "curves.png"
    arguments = ["--strategies", "random,diverse", "--picture", str(picture), "--json"]
    done = CliRunner().invoke(app, ["simulate", str(tmp_path), *arguments])
    assert done.exit_code == 130, done.output
    report = json.loads(done.stdout)
    assert [(c["name"], len(c["rounds"])) for c in report["campaigns"]] == [("random", 1)]
    assert report["images"] == 30
    assert report["left_out"] == {"the image cannot be decoded": 1}
    assert report["plan"]["seeds"] == [0]
    assert picture.exists()


def _never_trained(samples: Sequence[Sample], labels: Sequence[str] = LABELS) -> Simulation:
    settings = load_settings(
        {"ML_BACKEND_TRAIN_MIN": "1000", "ML_BACKEND_PRESET": "tiny", "ML_BACKEND_WEIGHTS": "none"}
    )
    return Simulation(settings, CPU, labels, samples, PRICES, lambda fraction, words: None)


def test_loop_never_trained_costs_drawing_by_hand_in_the_order_of_its_seed(tmp_path: Path) -> None:
    simulation = _never_trained(_samples(tmp_path, 30, seed=2))
    first, other, again = (simulation.loop("random", seed) for seed in (0, 1, 0))
    assert first.human == first.by_hand == again.human
    assert first.saving(7.0) == 1.0
    assert first.human[7.0][:10] != other.human[7.0][:10]
    assert first.human[7.0][-1] == pytest.approx(other.human[7.0][-1])
    assert len(simulation.loop("diverse", 0, stop_after=12).human[7.0]) == 12


def test_loop_before_any_training_fits_a_live_head_after_each_image(tmp_path: Path) -> None:
    settings = load_settings({"ML_BACKEND_TRAIN_MIN": "1000", "ML_BACKEND_TRAIN_THREADS": "1"})
    samples = _samples(tmp_path, 12, seed=2)
    simulation = Simulation(settings, CPU, LABELS, samples, PRICES, lambda *_: None)
    campaign = simulation.loop("random", 0, stop_after=7)
    assert [r.images for r in campaign.rounds] == [3, 4, 5, 6, 7]
    assert campaign.rounds[-1].map50_of_rest > 0.3


def test_loop_late_label_costs_nothing_before_it_comes(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 30, seed=2)
    whole = _never_trained(samples).loop("random", 0)
    late = _never_trained(samples).loop("random", 0, late={"Circle": 15})
    gained = np.diff([0.0, *late.human[7.0]]) - np.diff([0.0, *whole.human[7.0]])
    circles = [int((s.labels == LABELS.index("Circle")).sum()) for s in samples]
    assert gained[15:] == pytest.approx(np.zeros(15))
    missing = -gained[:15].sum() / 7.0
    assert 0 < missing < sum(circles)
    assert missing == pytest.approx(round(missing))


def test_predict_image_in_a_batch_has_the_embedding_of_the_image_alone(tmp_path: Path) -> None:
    # Not all random weights tell the two images apart.
    torch.manual_seed(2)
    detector = Detector.pretrained(TINY, LABELS, "none", CPU)
    wide, tall = Image.new("RGB", (300, 120), "red"), Image.effect_noise((90, 200), 60)
    images = [wide, tall.convert("RGB")]
    together = detector.predict(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = detector.predict([image])
        assert alone.embedding is not None
        assert found.embedding is not None
        assert float(alone.embedding @ found.embedding) > 0.97
    first, second = (f.embedding for f in together)
    assert first is not None
    assert second is not None
    assert float(first @ second) < 0.95
