"""Read images at reduced size, in parallel, and outside of the budget; leave no process behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ml_backend.demo.shapes import SHAPES, generate
from ml_backend.detection import loading
from ml_backend.detection.augment import Augmentation, Example
from ml_backend.detection.decoding import (
    Flaw,
    UndecodableImage,
    decode_image,
    decode_reduced,
    image_size,
)
from ml_backend.detection.detector import Detector
from ml_backend.detection.loading import read_example
from ml_backend.detection.prediction import predict_samples
from ml_backend.detection.training import Progress, train
from ml_backend.detection.types import Detections, Sample
from ml_backend.reasons import Code, reason
from ml_backend.remedies import with_remedy
from ml_backend.training.split import ALIKE, fingerprint
from tests import stand_in
from tests.conftest import ROOT, wait_for

CPU = torch.device("cpu")
LABELS = SHAPES[:3]


def _jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    """A JPEG with a smooth picture."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 200], 2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "JPEG", quality=90, exif=exif)
    return target.getvalue()


def _samples(folder: Path, count: int, *, width: int = 128, height: int = 96) -> list[Sample]:
    samples = []
    for image in generate(count, seed=0, width=width, height=height, most=2):
        path = folder / f"{image.name}.jpg"
        path.write_bytes(image.encoded())
        labels = np.array([SHAPES.index(name) % 3 for name in image.labels], np.int64)
        samples.append(Sample(image.name, path, image.boxes, labels))
    return samples


@pytest.mark.parametrize("orientation", [1, 6])
def test_decode_reduced_large_jpeg_is_decoded_at_a_fraction_of_its_size(orientation: int) -> None:
    content = _jpeg(1600, 1200, orientation)
    reduced = decode_reduced(content, longest=400)
    whole = decode_image(content)
    assert reduced.size == whole.size == image_size(content)
    assert max(reduced.image.size) == 400
    difference = np.asarray(reduced.image, float) - np.asarray(
        whole.resize(reduced.image.size, Image.Resampling.BOX), float
    )
    assert np.abs(difference).mean() < 3


@pytest.mark.parametrize("size", [(1601, 1199), (399, 300), (5000, 1), (800, 800)])
def test_decode_reduced_any_size_keeps_the_longest_side_asked_for(size: tuple[int, int]) -> None:
    for kind in ("JPEG", "PNG"):
        target = io.BytesIO()
        Image.new("RGB", size, "teal").save(target, kind)
        reduced = decode_reduced(target.getvalue(), longest=400)
        assert min(400, max(size)) <= max(reduced.image.size) < 2 * 400 or max(size) < 400
        assert reduced.size == size


def test_decode_reduced_fingerprint_is_alike_that_of_the_whole_image() -> None:
    content = generate(1, seed=5, width=1600, height=1200)[0].encoded()
    one = fingerprint(decode_image(content))
    other = fingerprint(decode_reduced(content, longest=400).image)
    assert (int(one, 16) ^ int(other, 16)).bit_count() <= ALIKE // 2


def test_image_size_of_a_truncated_jpeg_comes_from_its_header(tmp_path: Path) -> None:
    file = tmp_path / "cut.jpg"
    file.write_bytes(_jpeg(640, 480)[:2000])
    assert image_size(file) == (640, 480)
    with pytest.raises(UndecodableImage, match="damaged"):
        decode_image(file)


def test_undecodable_image_too_large_or_a_page_names_what_to_change() -> None:
    with pytest.raises(UndecodableImage) as large:
        decode_image(_jpeg(64, 48), max_pixels=100)
    assert large.value.flaw is Flaw.TOO_LARGE
    assert "ML_BACKEND_IMAGE_MAX_PIXELS" in with_remedy(large.value)
    with pytest.raises(UndecodableImage) as page:
        decode_image(b"<html>")
    assert page.value.flaw is Flaw.WEB_PAGE
    assert "token of Label Studio" in with_remedy(page.value)


def test_predict_samples_working_copy_boxes_are_in_pixels_of_the_original(tmp_path: Path) -> None:
    file = tmp_path / "copy.jpg"
    file.write_bytes(_jpeg(192, 96))
    none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    sample = Sample("1", file, *none, size=(1920, 960))
    detector = Detector.pretrained(stand_in.PRESET, LABELS, "none", CPU)
    found = predict_samples(detector, [sample], max_pixels=10**6)["1"]
    # The stand-in sees one box in a corner, of 2 % of either side.
    assert found.boxes[0] == pytest.approx([0, 0, 38.4, 19.2], rel=0.02)
    assert found.size == (1920, 960)


def test_read_example_working_copy_boxes_are_in_pixels_of_the_example(tmp_path: Path) -> None:
    file = tmp_path / "copy.jpg"
    file.write_bytes(_jpeg(192, 96))
    box = np.array([[960, 480, 1920, 960]], np.float32)
    sample = Sample("1", file, box, np.zeros(1, np.int64), size=(1920, 960))
    example = read_example(sample, longest=192, max_pixels=10**6)
    assert example.boxes.tolist() == [[96, 48, 192, 96]]


def test_predict_samples_several_batches_reports_progress_and_keeps_order(tmp_path: Path) -> None:
    samples = _samples(tmp_path, 40)
    told: list[float] = []
    detector = Detector.pretrained(stand_in.PRESET, LABELS, "none", CPU)
    found = predict_samples(detector, samples, max_pixels=10**6, on_progress=told.append)
    assert list(found) == [s.key for s in samples]
    assert told == [16 / 40, 32 / 40, 1.0]


def test_train_reading_takes_longer_than_the_budget_takes_all_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = _samples(tmp_path, 24)
    late = 0.0
    clock = time.monotonic
    original = Image.Image.convert

    def convert(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        # As if each image took twice the budget to decode.
        nonlocal late
        late += 120
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "convert", convert)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + late)
    told: list[Progress] = []
    result = train(
        replace(stand_in.PRESET, steps=5),
        LABELS,
        samples,
        weights="none",
        device=CPU,
        threads=1,
        budget_seconds=60,
        on_progress=told.append,
    )
    assert (result.steps, result.stopped) == (5, "finished")
    reading = [p for p in told if p.stage.code == Code.READING_IMAGES]
    # The sizes are read first, from the headers.
    expected = [0] * 24 + list(range(1, 25))
    assert [p.stage for p in reading] == [
        reason(Code.READING_IMAGES, done=done, total=24) for done in expected
    ]
    assert {p.fraction for p in reading} == {0.0}


def test_train_large_jpegs_are_decoded_once_and_never_at_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = _samples(tmp_path, 6, width=1600, height=1200)
    decoded: Counter[tuple[int, int]] = Counter()
    original = Image.Image.convert

    def convert(self: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        decoded[self.size] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "convert", convert)
    preset = replace(stand_in.PRESET, steps=12, batch_size=6)
    train(preset, LABELS, samples, weights="none", device=CPU, threads=1, budget_seconds=60)
    # 200 pixels are the smallest eighth that is not below twice the 96 that the network sees.
    assert decoded == {(200, 150): 6}


def test_train_images_beyond_the_memory_are_read_by_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = _samples(tmp_path, 8)
    monkeypatch.setattr(loading, "CACHE_BYTES", 3 * 128 * 96 * 3)
    told: list[Progress] = []
    preset = replace(stand_in.PRESET, steps=5)
    options: dict[str, Any] = {"weights": "none", "device": CPU, "threads": 1}
    result = train(preset, LABELS, samples, budget_seconds=60, on_progress=told.append, **options)
    assert result.steps == 5
    decoded = [p.stage.values["done"] for p in told if p.stage.code == Code.READING_IMAGES]
    assert 0 < max(decoded) < len(samples)


def test_train_same_seed_with_workers_or_without_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.quick import PRESET

    samples = _samples(tmp_path, 6)
    options: dict[str, Any] = {"weights": "none", "device": CPU, "threads": 1}
    one = train(PRESET, LABELS, samples, budget_seconds=60, **options).detector
    monkeypatch.setattr("ml_backend.detection.training.loading_workers", lambda *_: 0)
    other = train(PRESET, LABELS, samples, budget_seconds=60, **options).detector
    states = one.module.state_dict(), other.module.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


_HANGING = """
import sys, torch
from pathlib import Path
from tests import stand_in
from tests.test_loading import LABELS, _samples
from ml_backend.detection.training import train
samples = _samples(Path(sys.argv[1]), 6)
train(stand_in.HANGING, LABELS, samples, weights="none", device=torch.device("cpu"), threads=1,
      budget_seconds=600)
"""


def test_train_killed_leaves_no_loading_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _HANGING, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        workers: list[psutil.Process] = []

        def started() -> bool:
            workers[:] = psutil.Process(process.pid).children(recursive=True)
            return bool(workers)

        wait_for(started, within=120, what="a worker loads images")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(workers, 20)
    assert not alive


def _masked(rows: int) -> dict[str, Any]:
    masks = np.zeros((rows, 40, 60), bool)
    for number in range(rows):
        masks[number, number] = True
    return {"masks": masks, "track_ids": np.arange(rows, dtype=np.int64) + 10}


def test_detections_filter_and_sort_carry_masks_and_track_ids() -> None:
    boxes = np.zeros((3, 4), np.float32)
    scores, labels = np.array([0.2, 0.9, 0.5], np.float32), np.array([0, 1, 2])
    found = Detections(boxes, scores, labels, **_masked(3))
    ranked = found.ranked()
    assert ranked.track_ids is not None and ranked.masks is not None
    assert ranked.track_ids.tolist() == [11, 12, 10]
    assert [mask.any(1).argmax() for mask in ranked.masks] == [1, 2, 0]
    kept = found.where(found.scores > 0.4)
    assert kept.track_ids is not None and kept.masks is not None
    assert (kept.track_ids.tolist(), len(kept.masks)) == ([11, 12], 2)
    plain = Detections(boxes, scores, labels).ranked()
    assert (plain.masks, plain.track_ids) == (None, None)


def test_sample_filter_carries_masks_and_track_ids() -> None:
    sample = Sample("1", Path("x"), np.zeros((3, 4), np.float32), np.array([0, 1, 2]), **_masked(3))
    kept = sample.where(sample.labels == 2)
    assert kept.track_ids is not None and kept.masks is not None
    assert (kept.track_ids.tolist(), kept.masks.shape) == ([12], (1, 40, 60))


def test_augmentation_masks_and_track_ids_follow_their_boxes() -> None:
    masks = torch.zeros((2, 96, 128), dtype=torch.bool)
    boxes = torch.tensor([[10.0, 20.0, 50.0, 60.0], [70.0, 30.0, 120.0, 80.0]])
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    example = Example(
        torch.zeros((3, 96, 128), dtype=torch.uint8),
        boxes,
        torch.tensor([0, 1]),
        masks,
        torch.tensor([10, 11]),
    )
    augment = Augmentation(128, 160, strong=True)
    random = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(20):
        result = augment(example, lambda: example, random)
        assert result.masks is not None and result.track_ids is not None
        assert result.masks.shape == (len(result.boxes), 128, 160)
        assert (result.track_ids - 10).tolist() == result.labels.tolist()
        for mask, box in zip(result.masks, result.boxes, strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert torch.stack(around).tolist() == pytest.approx(box.tolist(), abs=2)
            seen += 1
    assert seen > 20
