"""Predicts the images of concurrent requests in shared batches, on one thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from PIL import Image

from ml_backend.detection.detector import Detector, Prepared
from ml_backend.detection.types import Detections

_log = logging.getLogger(__name__)

_GATHER = 0.004
"""Seconds that a GPU waits for a batch to fill; a CPU gains nothing by waiting."""


class PredictorClosed(RuntimeError):
    """The predictor takes no more images."""


@dataclass(frozen=True, slots=True)
class _Asked:
    image: Prepared
    answer: Future[Detections]


class BatchingPredictor:
    """Predicts single images in shared batches.

    Args:
        detector: run by this predictor's thread alone.
        device_lock: held while it runs, where several predictors share a device.
    """

    def __init__(self, detector: Detector, *, device_lock: threading.Lock | None = None) -> None:
        self._detector = detector
        self._most = detector.preset.predict_batch
        self._lock = device_lock if device_lock is not None else nullcontext()
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="detector", daemon=True)
        self._thread.start()

    def submit(self, image: Image.Image) -> Future[Detections]:
        """Requests the detections of an image.

        Args:
            image: RGB.

        Returns:
            A future of the detections, in the image's pixels; or of the error that this image,
            and no other of its batch, caused.

        Raises:
            PredictorClosed: the predictor was closed.
        """
        if self._closed:
            raise PredictorClosed("the predictor was closed")
        # Reduced here, so that the queue holds small images and the detector need not wait.
        asked = _Asked(self._detector.prepare(image), Future())
        self._asked.put(asked)
        return asked.answer

    def close(self) -> None:
        """Answers the requests so far, then stops."""
        self._closed = True
        self._asked.put(None)

    def wait(self) -> None:
        """Waits until the closed predictor's thread has ended and released the detector."""
        self._thread.join()

    def _run(self) -> None:
        while True:
            batch, ends = self._gather()
            if batch:
                with self._lock:
                    self._answer(batch)
            if ends:
                return

    def _gather(self) -> tuple[list[_Asked], bool]:
        """Takes the next batch: waits for an image, then takes all that wait, up to the limit."""
        first = self._asked.get()
        if first is None:
            return [], True
        batch = [first]
        until = time.monotonic() + (_GATHER if self._detector.device.type == "cuda" else 0)
        while len(batch) < self._most:
            try:
                more = self._asked.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if more is None:
                return batch, True
            batch.append(more)
        return batch, False

    def _answer(self, batch: list[_Asked]) -> None:
        try:
            found = self._detector.predict([asked.image for asked in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
                return
            if isinstance(error, torch.OutOfMemoryError):
                self._most = max(1, len(batch) // 2)
                torch.cuda.empty_cache()
                _log.warning("out of memory: batches of %d from now on", self._most)
            # One image may make a whole batch fail: halve the batch until that image stands alone.
            half = len(batch) // 2
            self._answer(batch[:half])
            self._answer(batch[half:])
            return
        for asked, detections in zip(batch, found, strict=True):
            asked.answer.set_result(detections)
