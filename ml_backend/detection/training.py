"""Trains a detector on samples, within a budget of time."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms.v2 import functional as F  # noqa: N812

from ml_backend.detection.augment import Augmentation, Example
from ml_backend.detection.decoding import MAX_PIXELS, UndecodableImage, decode_image
from ml_backend.detection.detector import Detector
from ml_backend.detection.evaluation import evaluate
from ml_backend.detection.presets import Preset
from ml_backend.detection.thread_parallel import Replicas, threads_inside
from ml_backend.detection.types import Sample

_log = logging.getLogger(__name__)

WARM_UP = 0.08
"""Share of the steps in which the learning rate rises."""
TRUNK_RATE = 0.5
"""Learning rate of a pretrained trunk, relative to the rest."""
SCRATCH_RATE = 2.0
"""Learning rate where nothing is pretrained, relative to the preset's."""
MEMORY = 0.99
"""Decay of the average of the weights, per step."""
FEW_STEPS = 200
"""Steps in which a pretrained detector learns the first images: from 10 photographs of blood cells
it reached a mean AP50 of 0.73 after 200 steps, and of 0.74 after 400."""
STEPS_PER_IMAGE = 10
"""Steps more for each further image, up to the preset's."""
EVALUATIONS = 10
"""Times that a training looks at its validation samples."""
PATIENCE = 4
"""Looks without a better result after which it ends, once half of it is done."""
STATISTICS_OF = 4
"""Images that a batch normalisation needs to see together, where it learns its statistics."""
CACHE_BYTES = 2 * 2**30
"""Decoded images kept in memory at most."""


class TrainingDiverged(RuntimeError):
    """The loss is no number any more."""


class NothingToLearn(ValueError):
    """No sample can be used."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is.

    Attributes:
        fraction: done, in `[0, 1]`.
        epoch: passes over the samples so far.
        loss: running mean.
        message: in words.
    """

    fraction: float
    epoch: float
    loss: float
    message: str


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What a training led to.

    Attributes:
        detector: the best, or last, weights.
        epochs: passes over the samples.
        steps: optimiser steps.
        seconds: it took.
        batch_size: in the end.
        stopped: why it ended.
        history: `(fraction, mean AP50)` on the validation samples.
    """

    detector: Detector
    epochs: float
    steps: int
    seconds: float
    batch_size: int
    stopped: Literal["finished", "budget", "early stop"]
    history: tuple[tuple[float, float], ...] = field(default_factory=tuple)


def train(
    preset: Preset,
    labels: Sequence[str],
    samples: Sequence[Sample],
    *,
    validation: Sequence[Sample] = (),
    start: Detector | None = None,
    weights: str = "auto",
    device: torch.device,
    seed: int = 0,
    budget_seconds: float,
    threads: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Trains a detector.

    AdamW under a cosine schedule with warm-up, gradients clipped, an exponential moving average
    of the weights. The schedule follows steps or time, whichever is further, so that it ends
    gently within the budget.

    Args:
        preset: what to build.
        labels: label names; the samples' labels are indices into them.
        samples: to learn from.
        validation: where given, the weights that do best on them are kept, and the training ends
            early when they no longer improve.
        start: a detector of the preset to start from, shrunk and perturbed (Ash and Adams, 2020),
            instead of
        weights: the preset's: `auto`, `none` or a file.
        device: where to train.
        seed: of everything random.
        budget_seconds: wall-clock seconds that it may take.
        threads: CPU threads, all where not given.
        max_pixels: samples whose images are larger are left out.
        on_progress: called after every step; may raise to stop.

    Raises:
        NothingToLearn: no sample's image can be decoded.
        TrainingDiverged: the loss became NaN.
        ValueError: the file of weights does not fit.
    """
    began = time.monotonic()
    torch.manual_seed(seed)
    if start is None:
        detector = Detector.pretrained(preset, labels, weights, device)
    else:
        detector = _shrink_and_perturb(start.with_labels(labels))
    threads = threads or torch.get_num_threads()
    deadline = began + budget_seconds
    images = _Images(samples, preset.max_size, max_pixels)
    run = _Run(detector, images, validation, seed, deadline, threads, on_progress)
    try:
        with threads_inside(run.threads_inside):
            return _go(run, began)
    finally:
        run.close()


def _go(run: _Run, began: float) -> TrainingResult:
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
    """One training's state; it outlives a batch that was too large."""

    def __init__(
        self,
        detector: Detector,
        images: _Images,
        validation: Sequence[Sample],
        seed: int,
        deadline: float,
        threads: int,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        preset = detector.preset
        self.detector = detector
        self.batch_size = preset.batch_size
        self._validation = validation
        self._deadline = deadline
        self._tell = on_progress
        self._images = images
        self._pretrained = detector.weights.kind != "none"
        self._loader = _Loader(self._images, preset, seed, detector.device, strong=self._pretrained)
        self._module = detector.module.train()
        self._module.transform._skip_resize = True  # type: ignore[union-attr]
        if self._pretrained:
            _freeze_statistics(self._module)
        share = 1 if self._pretrained else STATISTICS_OF
        replicas = max(1, min(threads, preset.batch_size // share))
        if detector.device.type != "cpu":
            replicas = 1
        self._threads = threads
        self.threads_inside = threads // replicas
        self._replicas = Replicas(self._module, replicas, half=_half(detector.device))
        self._average = AveragedModel(self._module, avg_fn=_average, use_buffers=True)
        self._optimizer = _optimizer(self._module, preset, self._pretrained)
        self._step = 0
        self._seen = 0
        self._loss = math.nan
        self._best: tuple[float, dict[str, Tensor]] | None = None
        self._history: list[tuple[float, float]] = []
        self._since_best = 0

    def go(self, began: float) -> TrainingResult:
        preset = self.detector.preset
        # A step's worth of images stays the same when the batch was halved.
        images = len(self._images)
        # Few images are soon learned, if there was anything to begin with.
        few = FEW_STEPS + STEPS_PER_IMAGE * images if self._pretrained else preset.steps
        steps = max(min(preset.steps, few), math.ceil(preset.epochs * images / preset.batch_size))
        started = time.monotonic()
        first = self._step
        time_left = max(0.0, self._deadline - started) * (0.9 if self._validation else 0.97)
        stopped: Literal["finished", "budget", "early stop"] = "finished"
        base = [group["lr"] for group in self._optimizer.param_groups]
        fraction = 0.0
        next_look = 1 / EVALUATIONS
        for batch in self._loader.batches(lambda: self.batch_size):
            elapsed = time.monotonic() - started
            by_time = elapsed / time_left if time_left else 1.0
            fraction = max(self._step / steps, by_time)
            if fraction >= 1 and self._step > first:
                stopped = "budget" if self._step < steps else "finished"
                break
            rate = _schedule(min(fraction, 1.0))
            for group, peak in zip(self._optimizer.param_groups, base, strict=True):
                group["lr"] = peak * rate
            try:
                self._learn(batch)
            finally:
                for group, peak in zip(self._optimizer.param_groups, base, strict=True):
                    group["lr"] = peak
            self._report(fraction)
            if self._validation and fraction >= next_look:
                next_look = fraction + 1 / EVALUATIONS
                self._look(fraction)
                if self._since_best >= PATIENCE and fraction > 0.5:
                    stopped = "early stop"
                    break
        if self._validation and stopped != "early stop":
            self._look(1.0)
        self.detector.module = self._finished()
        return TrainingResult(
            detector=self.detector,
            epochs=round(self._seen / len(self._images), 2),
            steps=self._step,
            seconds=time.monotonic() - began,
            batch_size=self.batch_size,
            stopped=stopped,
            history=tuple(self._history),
        )

    def close(self) -> None:
        """Ends its threads."""
        self._loader.close()
        self._replicas.close()

    def _learn(self, batch: list[Example]) -> None:
        loss = self._replicas.backward(batch, self.detector.device)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss became {loss} after {self._step} steps: a smaller learning rate in "
                "the preset helps"
            )
        nn.utils.clip_grad_norm_(self._module.parameters(), 5.0)
        self._optimizer.step()
        self._average.update_parameters(self._module)
        self._step += 1
        self._seen += len(batch)
        self._loss = loss if math.isnan(self._loss) else 0.9 * self._loss + 0.1 * loss

    def _report(self, fraction: float) -> None:
        if self._tell is not None:
            epoch = self._seen / len(self._images)
            self._tell(
                Progress(
                    min(1.0, fraction),
                    epoch,
                    self._loss,
                    f"training: epoch {epoch:.0f}, loss {self._loss:.2f}",
                )
            )

    def _look(self, fraction: float) -> None:
        """Measures the averaged weights on the validation samples; keeps the best."""
        module = self._averaged()
        judge = copy.copy(self.detector)
        judge.module = module
        found = []
        size = self.detector.preset.predict_batch
        with threads_inside(self._threads):
            for start in range(0, len(self._validation), size):
                part = self._validation[start : start + size]
                found += judge.predict(
                    [decode_image(s.image, max_pixels=self._images.max_pixels) for s in part]
                )
        quality = evaluate(found, self._validation, self.detector.labels).map50
        self._history.append((round(fraction, 3), quality))
        if self._best is None or quality > self._best[0]:
            self._best = quality, copy.deepcopy(module.state_dict())
            self._since_best = 0
        else:
            self._since_best += 1

    def _averaged(self) -> nn.Module:
        module: nn.Module = copy.deepcopy(self._average.module)
        module.transform._skip_resize = False  # type: ignore[union-attr]
        return module.eval()

    def _finished(self) -> nn.Module:
        module = self._averaged()
        if self._best is not None:
            module.load_state_dict(self._best[1])
        return module


class _Images:
    """Decoded samples, shrunk to what a step can use; those that fit stay in memory."""

    def __init__(self, samples: Sequence[Sample], max_size: int, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._size = 2 * max_size
        self._kept: dict[int, Example] = {}
        self._bytes = 0
        self._samples: list[Sample] = []
        for sample in samples:
            try:
                example = self._decode(sample)
            except (UndecodableImage, OSError) as error:
                _log.warning("%s is left out of the training: %s", sample.key, error)
                continue
            if self._bytes + example.image.numel() <= CACHE_BYTES:
                self._kept[len(self._samples)] = example
                self._bytes += example.image.numel()
            self._samples.append(sample)
        if not self._samples:
            raise NothingToLearn(f"none of the {len(samples)} images can be decoded")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Example:
        kept = self._kept.get(index)
        return kept if kept is not None else self._decode(self._samples[index])

    @property
    def shape(self) -> tuple[float, float]:
        """Median height and width."""
        sizes = np.array([tuple(e.image.shape[-2:]) for e in self._kept.values()] or [(3, 4)])
        return float(np.median(sizes[:, 0])), float(np.median(sizes[:, 1]))

    def _decode(self, sample: Sample) -> Example:
        image = decode_image(sample.image, max_pixels=self.max_pixels)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        boxes = torch.from_numpy(sample.boxes.astype(np.float32))
        labels = torch.from_numpy(sample.labels)
        shrink = self._size / max(pixels.shape[-2:])
        if shrink < 1:
            height, width = (max(1, round(side * shrink)) for side in pixels.shape[-2:])
            boxes = boxes * torch.tensor([width / pixels.shape[-1], height / pixels.shape[-2]] * 2)
            pixels = F.resize(pixels, [height, width], antialias=True)
        return Example(pixels.contiguous(), boxes, labels)


class _Loader:
    """Endless batches, augmented by other threads while the model learns."""

    def __init__(
        self, images: _Images, preset: Preset, seed: int, device: torch.device, *, strong: bool
    ) -> None:
        self._images = images
        self._seed = seed
        height, width = images.shape
        scale = min(preset.min_size / min(height, width), preset.max_size / max(height, width))
        # A canvas in whole strides: nothing is padded.
        self._augment = Augmentation(
            *(max(64, 32 * round(side * scale / 32)) for side in (height, width)), strong=strong
        )
        # On a CPU the model takes the cores; one thread only hides the waiting.
        self._pool = ThreadPoolExecutor(1 if device.type == "cpu" else 8)

    def batches(self, size: Callable[[], int]) -> Iterator[list[Example]]:
        order = self._order()
        waiting: list[Future[Example]] = []
        while True:
            wanted = size()
            while len(waiting) < 3 * wanted:
                waiting.append(self._pool.submit(self._make, *next(order)))
            batch, waiting = waiting[:wanted], waiting[wanted:]
            yield [future.result() for future in batch]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _order(self) -> Iterator[tuple[int, int]]:
        random = np.random.default_rng(self._seed)
        number = 0
        while True:
            for index in random.permutation(len(self._images)).tolist():
                yield index, number
                number += 1

    def _make(self, index: int, number: int) -> Example:
        random = torch.Generator().manual_seed(hash((self._seed, number)) % 2**31)

        def another() -> Example:
            return self._images[int(torch.randint(len(self._images), (), generator=random))]

        return self._augment(self._images[index], another, random)


def _average(mean: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    """Exponential moving average; young ones forget faster, or the first weights would weigh on."""
    decay = min(MEMORY, (1 + int(count)) / (10 + int(count)))
    return mean + (new - mean) * (1 - decay)


def _schedule(fraction: float) -> float:
    """Linear warm-up, then half a cosine to a hundredth."""
    if fraction < WARM_UP:
        return max(0.01, fraction / WARM_UP)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (fraction - WARM_UP) / (1 - WARM_UP)))


def _optimizer(module: nn.Module, preset: Preset, pretrained: bool) -> torch.optim.Optimizer:
    trunk: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (trunk if name.startswith(preset.trunk) else rest).append(parameter)
    rate = preset.learning_rate * (1.0 if pretrained else SCRATCH_RATE)
    groups = [
        {"params": rest, "lr": rate},
        {"params": trunk, "lr": rate * (TRUNK_RATE if pretrained else 1.0)},
    ]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.02)


def _freeze_statistics(module: nn.Module) -> None:
    """Batches are small: the pretrained statistics are better than theirs."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def _half(device: torch.device) -> bool:
    """Whether bfloat16 is native: on current GPUs, and on CPUs that multiply matrices in it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_amx_tile_supported())


def _shrink_and_perturb(detector: Detector, shrink: float = 0.5, noise: float = 0.01) -> Detector:
    """Ash and Adams (2020): keep half of what was learned, and break its symmetry."""
    with torch.no_grad():
        for name, parameter in detector.module.named_parameters():
            if not name.startswith(detector.preset.trunk) and parameter.ndim > 1:
                scale = parameter.std() if parameter.numel() > 1 else torch.tensor(1.0)
                parameter.mul_(shrink).add_(torch.randn_like(parameter) * noise * scale)
    return detector
