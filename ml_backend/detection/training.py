"""Trains a detector on samples, within a budget of time."""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ml_backend.detection.augment import Augmentation, Example
from ml_backend.detection.decoding import MAX_PIXELS, UndecodableImage, image_size
from ml_backend.detection.detector import Detector
from ml_backend.detection.device import has_fast_bfloat16
from ml_backend.detection.loading import (
    AugmentedImages,
    CachedImages,
    EndlessBatches,
    cache_capacity,
    loading_workers,
    read_example,
    training_batches,
)
from ml_backend.detection.presets import Preset
from ml_backend.detection.schedule import Schedule, adam, moving_average, steps_for
from ml_backend.detection.thread_parallel import ThreadDataParallel, threads_inside
from ml_backend.detection.types import Sample
from ml_backend.reasons import Code, Reason, reason

_log = logging.getLogger(__name__)

STATISTICS_OF = 4
"""Images that a batch normalisation needs to see together, where it learns its statistics."""
_GRADIENT_NORM = 5.0


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


class NothingToLearn(ValueError):
    """No sample can be used."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a training.

    Attributes:
        fraction: done, in `[0, 1]`; 0 while images are read.
        epoch: passes over the samples so far.
        loss: running mean; NaN before the first step.
        stage: what is being done.
    """

    fraction: float
    epoch: float
    loss: float
    stage: Reason


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The result of a training.

    Attributes:
        detector: with the average of the last weights.
        epochs: passes over the samples.
        steps: optimiser steps,
        planned: of so many.
        seconds: wall-clock time, with reading the images.
        batch_size: in the end; out of memory, it was halved.
        stopped: why it ended.
    """

    detector: Detector
    epochs: float
    steps: int
    planned: int
    seconds: float
    batch_size: int
    stopped: Literal["finished", "budget"]


def train(
    preset: Preset,
    labels: Sequence[str],
    samples: Sequence[Sample],
    *,
    start: Detector | None = None,
    weights: str = "auto",
    device: torch.device,
    seed: int = 0,
    budget_seconds: float,
    step_share: float = 1.0,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_progress: OnProgress | None = None,
) -> TrainingResult:
    """Trains a detector.

    AdamW under a cosine schedule with warm-up, gradients clipped, an exponential moving average
    of the weights. The schedule follows steps or time, whichever is further, so that the learning
    rate reaches its end within the budget.

    Args:
        preset: the preset to build.
        labels: label names; the samples' labels are indices into them.
        samples: to learn from.
        start: a detector of the preset to start from, shrunk and perturbed, instead of
        weights: the preset's: `auto`, `none` or a file.
        device: where to train.
        seed: of all random numbers.
        budget_seconds: wall-clock seconds that the steps may take. The budget
            begins with the first step, when its batch is loaded: reading images is not counted.
        step_share: share of the usual number of steps to take, in `(0, 1]`.
        threads: CPU threads, all where not given.
        max_pixels: samples whose images are larger are left out.
        on_progress: called after every image that is read, and every step; may raise to stop.

    Raises:
        NothingToLearn: no sample's image can be decoded.
        TrainingDiverged: the loss became NaN.
        WeightsError: the file of weights does not fit.
    """
    began = time.monotonic()
    torch.manual_seed(seed)
    if start is None:
        detector = Detector.pretrained(preset, labels, weights, device)
    else:
        detector = start.with_labels(labels)
        detector.shrink_and_perturb()
    threads = threads or torch.get_num_threads()
    tell = on_progress if on_progress is not None else _tell_nobody
    data = _read(preset, samples, device, threads, max_pixels, tell)
    run = _Run(detector, data, seed, budget_seconds, step_share, threads, tell)
    try:
        with threads_inside(run.threads_inside):
            return _with_smaller_batches(run, began)
    finally:
        run.close()


def _tell_nobody(progress: Progress) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Data:
    images: CachedImages[Example]
    shape: tuple[float, float]


def _read(
    preset: Preset,
    samples: Sequence[Sample],
    device: torch.device,
    threads: int,
    max_pixels: int,
    tell: OnProgress,
) -> _Data:
    """Reads the images that fit into memory; the others are read when their turn comes."""
    readable: list[Sample] = []
    sizes: list[tuple[int, int]] = []
    for sample in samples:
        try:
            size = image_size(sample.image, max_pixels=max_pixels)
        except (UndecodableImage, OSError) as error:
            _log.warning("%s is left out of the training: %s", sample.key, error)
        else:
            readable.append(sample)
            sizes.append(size)
        tell(Progress(0.0, 0.0, math.nan, reason(Code.READING_IMAGES, done=0, total=len(samples))))
    images = CachedImages(
        readable,
        functools.partial(read_example, longest=preset.longest_side, max_pixels=max_pixels),
        capacity=cache_capacity(),
    )

    def on_read(done: int, total: int) -> None:
        tell(Progress(0.0, 0.0, math.nan, reason(Code.READING_IMAGES, done=done, total=total)))

    readers = max(threads, loading_workers(device, threads))
    images.fill(threads=readers, on_read=on_read)
    if not len(images):
        raise NothingToLearn(f"none of the {len(samples)} images can be decoded")
    width, height = np.median(np.array(sizes), axis=0).tolist()
    return _Data(images, (height, width))


def _with_smaller_batches(run: _Run, began: float) -> TrainingResult:
    """Runs a training; each time that memory runs out, it goes on with half the batch."""
    while True:
        try:
            return run.go(began)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if run.batch_size == 1:
                raise
            run.batch_size //= 2
            _log.warning("out of memory (%s): going on with batches of %d", error, run.batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _Run:
    """The state of one training, which survives a batch that was too large."""

    def __init__(
        self,
        detector: Detector,
        data: _Data,
        seed: int,
        budget: float,
        step_share: float,
        threads: int,
        tell: OnProgress,
    ) -> None:
        preset = detector.preset
        self.detector = detector
        self.batch_size = preset.batch_size
        self._data = data
        self._seed = seed
        self._tell = tell
        self._threads = threads
        self._pretrained = detector.weights.kind != "none"
        canvas = preset.architecture.canvas(*data.shape, preset.input_size)
        augment = Augmentation(*canvas, strong=self._pretrained)
        self._images = AugmentedImages(data.images, augment, seed)
        self._module = detector.module.train()
        if self._pretrained:
            preset.architecture.freeze_statistics(self._module)
        share = 1 if self._pretrained else STATISTICS_OF
        copies = max(1, min(threads, preset.batch_size // share))
        if detector.device.type != "cpu":
            copies = 1
        self.threads_inside = threads // copies
        self._parallel = ThreadDataParallel(
            preset.architecture,
            self._module,
            copies,
            bfloat16=has_fast_bfloat16(detector.device),
        )
        self._average = AveragedModel(self._module, avg_fn=moving_average, use_buffers=True)
        self._optimizer = adam(self._module, preset, pretrained=self._pretrained)
        self._schedule = Schedule(self._optimizer)
        self._step_share = step_share
        # Making the last weights ready comes after the last step.
        self._stepping = budget * 0.97
        self._first_step_at: float | None = None
        self._step = 0
        self._seen = 0
        self._loss = math.nan

    def go(self, began: float) -> TrainingResult:
        """Trains to the end; after a batch that was too large, from the step where it was."""
        images = self._data.images
        planned = steps_for(self.detector.preset, len(images), pretrained=self._pretrained)
        steps = max(1, round(planned * self._step_share))
        first = self._step
        stopped: Literal["finished", "budget"] = "finished"
        batches = training_batches(
            self._images,
            EndlessBatches(len(images), self.batch_size, self._seed),
            workers=loading_workers(self.detector.device, self._threads),
        )
        for batch in batches:
            fraction = max(self._step / steps, self._share_of_time())
            if fraction >= 1 and self._step > first:
                stopped = "budget" if self._step < steps else "finished"
                break
            self._schedule.set(fraction)
            self._learn(batch)
            stage = reason(Code.TRAINING, epoch=self._epoch, loss=self._loss)
            self._report(fraction, stage)
        batches.close()
        self.detector.module = copy.deepcopy(self._average.module).eval()
        return TrainingResult(
            detector=self.detector,
            epochs=round(self._epoch, 2),
            steps=self._step,
            planned=planned,
            seconds=time.monotonic() - began,
            batch_size=self.batch_size,
            stopped=stopped,
        )

    def close(self) -> None:
        """Ends the threads of the training."""
        self._parallel.close()

    @property
    def _epoch(self) -> float:
        return self._seen / len(self._data.images)

    def _share_of_time(self) -> float:
        """Answers the share of the budget that is spent; the clock starts with the first call."""
        now = time.monotonic()
        if self._first_step_at is None:
            self._first_step_at = now
        return (now - self._first_step_at) / self._stepping if self._stepping > 0 else 1.0

    def _learn(self, batch: list[Example]) -> None:
        loss = self._parallel.backward(batch, self.detector.device)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss became {loss} after {self._step} steps: a smaller learning rate in "
                "the preset helps"
            )
        nn.utils.clip_grad_norm_(self._module.parameters(), _GRADIENT_NORM)
        self._optimizer.step()
        self._average.update_parameters(self._module)
        self._step += 1
        self._seen += len(batch)
        self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss

    def _report(self, fraction: float, stage: Reason) -> None:
        self._tell(Progress(min(1.0, fraction), self._epoch, self._loss, stage))
