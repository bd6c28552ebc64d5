"""Share batches: each caller gets the answer for its images, whatever fails for others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ml_backend.demo.shapes import generate
from ml_backend.detection.architectures.fcos import fcos_shufflenet
from ml_backend.detection.architectures.torchvision import TorchvisionDetector
from ml_backend.detection.detector import Detector
from ml_backend.detection.presets.tiny import PRESET as TINY
from ml_backend.detection.types import Detections
from ml_backend.serving.batching import BatchingPredictor, PredictorClosed

CPU = torch.device("cpu")
PRESET = replace(TINY, min_size=96, max_size=160)


class _Picky(nn.Module):
    """Fail on a white image, and on more than `most` images at a time."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner = fcos_shufflenet(outputs)
        self.most = 100
        self.batches: list[int] = []

    def forward(self, images: list[torch.Tensor], targets: Any = None) -> Any:
        self.batches.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("no more memory")
        if any(bool((image == 1).all()) for image in images):
            raise RuntimeError("white makes me ill")
        return self.inner(images, targets)


@pytest.fixture
def detector() -> Iterator[Detector]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = Detector.pretrained(
        replace(PRESET, architecture=TorchvisionDetector(_Picky)), ("a", "b"), "none", CPU
    )
    with torch.no_grad():
        for name, parameter in made.module.named_parameters():
            if "cls_logits.weight" in name:
                parameter.normal_(0, 0.5)
    yield made
    torch.set_num_threads(before)


def _pictures(count: int) -> list[Image.Image]:
    return [image.image for image in generate(count, seed=1, width=160, height=120)]


def _ask(
    detector: Detector, images: list[Image.Image]
) -> tuple[BatchingPredictor, list[Future[Detections]]]:
    """Ask for all images at once: the device is busy until every image waits."""
    held = threading.Lock()
    held.acquire()
    predictor = BatchingPredictor(detector, device_lock=held)
    answers = [predictor.submit(image) for image in images]
    held.release()
    return predictor, answers


def test_submit_several_images_each_future_has_its_own_detections(detector: Detector) -> None:
    images = _pictures(11)
    alone = [detector.predict([image])[0] for image in images]
    predictor, answers = _ask(detector, images)
    for answer, wanted in zip(answers, alone, strict=True):
        found = answer.result(60)
        assert len(found) == len(wanted) > 0
        assert np.allclose(np.sort(found.scores), np.sort(wanted.scores), atol=1e-3)
    predictor.close()
    module = detector.module
    assert isinstance(module, _Picky)
    assert max(module.batches[len(images) :]) == PRESET.predict_batch


def test_submit_image_that_fails_fails_alone(detector: Detector) -> None:
    images = _pictures(6)
    images[3] = Image.new("RGB", (160, 120), "white")
    predictor, answers = _ask(detector, images)
    for number, answer in enumerate(answers):
        if number == 3:
            with pytest.raises(RuntimeError, match="white makes me ill"):
                answer.result(60)
        else:
            assert len(answer.result(60)) > 0
    predictor.close()


def test_submit_out_of_memory_halves_the_batches(detector: Detector) -> None:
    module = detector.module
    assert isinstance(module, _Picky)
    module.most = 2
    predictor, answers = _ask(detector, _pictures(8))
    assert all(len(answer.result(60)) > 0 for answer in answers)
    module.batches.clear()
    assert len(predictor.submit(_pictures(1)[0]).result(60)) > 0
    assert max(module.batches) <= 2
    predictor.close()


def test_close_requests_from_before_are_answered_and_later_ones_refused(detector: Detector) -> None:
    predictor, answers = _ask(detector, _pictures(10))
    predictor.close()
    assert all(answer.result(60) is not None for answer in answers)
    with pytest.raises(PredictorClosed):
        predictor.submit(_pictures(1)[0])


def test_submit_from_many_threads_each_gets_its_answer(detector: Detector) -> None:
    images = _pictures(4)
    wanted = [len(detector.predict([image])[0]) for image in images]
    predictor = BatchingPredictor(detector)
    with ThreadPoolExecutor(12) as pool:
        found = list(
            pool.map(lambda n: len(predictor.submit(images[n % 4]).result(120)), range(48))
        )
    assert found == [wanted[n % 4] for n in range(48)]
    predictor.close()
