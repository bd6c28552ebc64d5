"""Reads the images of samples: at reduced size, in parallel, and within a bound of memory.

Workers are processes of PyTorch's `DataLoader`, forked so that they share the images that were
read already. They answer NumPy arrays through pipes: shared memory (`/dev/shm`) holds 64 MB in a
container by default, less than the batches on their way.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import functional as F  # noqa: N812

from ml_backend.detection.augment import Augmentation, Example
from ml_backend.detection.decoding import UndecodableImage, decode_reduced
from ml_backend.detection.detector import Prepared, prepare
from ml_backend.detection.presets import Preset
from ml_backend.detection.types import Sample
from ml_backend.machine import die_with_parent, memory, usable_cores

_log = logging.getLogger(__name__)

CACHE_BYTES = 2 * 2**30
"""Decoded images kept in memory at most."""
CACHE_SHARE = 0.25
"""The same, as a share of the memory that is available."""
_MOST_WORKERS = 8
_PREFETCH = 2
"""Batches that each worker prepares ahead."""


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=_Sized)
Read = Callable[[Sample], T]
OnRead = Callable[[int, int], None]
"""Told how many images of how many were read; may raise to stop."""


def cache_capacity() -> int:
    """Answers how many bytes of decoded images a training may keep."""
    return min(CACHE_BYTES, int(CACHE_SHARE * memory().available))


def loading_workers(device: torch.device, threads: int) -> int:
    """Answers how many processes load images while a device computes.

    Args:
        device: where the network runs.
        threads: CPU threads that the training may use. On a CPU the network takes them, and few
            workers beside it hide the time that reading takes.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return 0
    # A daemonic process may have no children.
    if multiprocessing.current_process().daemon:
        return 0
    if device.type == "cpu":
        return max(1, threads // 4)
    return min(_MOST_WORKERS, usable_cores())


def read_example(sample: Sample, *, longest: int, max_pixels: int) -> Example:
    """Reads a training image, shrunk so that its longer side has at most `longest` pixels.

    Raises:
        UndecodableImage, OSError: the image cannot be read.
    """
    reduced = decode_reduced(sample.image, longest=longest, max_pixels=max_pixels)
    pixels = torch.from_numpy(np.array(reduced.image)).permute(2, 0, 1)
    shrink = longest / max(pixels.shape[-2:])
    if shrink < 1:
        height, width = (max(1, round(side * shrink)) for side in pixels.shape[-2:])
        pixels = F.resize(pixels, [height, width], antialias=True)
    height, width = pixels.shape[-2:]
    original = sample.size if sample.size is not None else reduced.size
    boxes = torch.from_numpy(sample.boxes.astype(np.float32))
    if (width, height) != original:
        boxes = boxes * torch.tensor([width / original[0], height / original[1]] * 2)
    masks = None if sample.masks is None else torch.from_numpy(sample.masks)
    return Example(
        pixels.contiguous(),
        boxes,
        torch.from_numpy(sample.labels),
        None if masks is None else F.resize_mask(masks, [height, width]),
        None if sample.track_ids is None else torch.from_numpy(sample.track_ids),
    )


def read_prepared(sample: Sample, *, preset: Preset, max_pixels: int) -> Prepared:
    """Reads an image for prediction; detections come in pixels of the sample's boxes.

    Raises:
        UndecodableImage, OSError: the image cannot be read.
    """
    reduced = decode_reduced(sample.image, longest=preset.longest_side, max_pixels=max_pixels)
    size = sample.size if sample.size is not None else reduced.size
    return prepare(preset, reduced.image, size=size)


class CachedImages(Dataset[T], Generic[T]):
    """The images of samples, some of them kept in memory.

    Args:
        samples: whose images.
        read: reads one; it may raise `UndecodableImage` or `OSError`.
        capacity: bytes of images that `fill` keeps at most.
    """

    def __init__(self, samples: Sequence[Sample], read: Read[T], *, capacity: int) -> None:
        self.samples = list(samples)
        self._read = read
        self._capacity = capacity
        self._kept: dict[str, T] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> T:
        sample = self.samples[index]
        kept = self._kept.get(sample.key)
        return kept if kept is not None else self._read(sample)

    def fill(self, *, threads: int, on_read: OnRead) -> None:
        """Reads images into memory until the capacity is used up.

        A sample whose image cannot be read is left out, with a warning.

        Args:
            threads: that read at once.
            on_read: called after each image.
        """
        used = done = 0
        bad: set[str] = set()
        rest = iter(self.samples)
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            waiting: list[tuple[Sample, Future[T]]] = []
            while used < self._capacity:
                for sample in itertools.islice(rest, 2 * threads - len(waiting)):
                    waiting.append((sample, pool.submit(self._read, sample)))
                if not waiting:
                    break
                sample, future = waiting.pop(0)
                try:
                    image = future.result()
                except (UndecodableImage, OSError) as error:
                    _log.warning("%s is left out of the training: %s", sample.key, error)
                    bad.add(sample.key)
                else:
                    used += image.nbytes
                    if used <= self._capacity:
                        self._kept[sample.key] = image
                done += 1
                on_read(done, len(self.samples))
            for _, future in waiting:
                future.cancel()
        self.samples = [sample for sample in self.samples if sample.key not in bad]


class AugmentedImages(Dataset[Example]):
    """Training examples, each augmented by random numbers of its own.

    Args:
        images: the examples.
        augment: changes them.
        seed: of all random numbers.
    """

    def __init__(self, images: CachedImages[Example], augment: Augmentation, seed: int) -> None:
        self._images = images
        self._augment = augment
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """Makes the example of an index, for the given place in the order of the training."""
        index, number = key
        random = torch.Generator().manual_seed(hash((self._seed, number)) % 2**31)

        def another() -> Example:
            return self._readable(int(torch.randint(len(self._images), (), generator=random)))

        return self._augment(self._readable(index), another, random)

    def _readable(self, index: int) -> Example:
        """Reads an image, or the next one that can be read."""
        for offset in range(len(self._images)):
            place = (index + offset) % len(self._images)
            try:
                return self._images[place]
            except (UndecodableImage, OSError) as error:
                _log.warning("%s is passed over: %s", self._images.samples[place].key, error)
        raise UndecodableImage("no training image can be decoded any more")


class EndlessBatches(Sampler[list[tuple[int, int]]]):
    """Batches of indices, each with its place in the order: every epoch is shuffled anew.

    Args:
        images: number of images.
        size: images in a batch.
        seed: of the order.
    """

    def __init__(self, images: int, size: int, seed: int) -> None:
        self._images = images
        self._size = size
        self._seed = seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        random = np.random.default_rng(self._seed)
        batch: list[tuple[int, int]] = []
        for number in itertools.count():
            place = number % self._images
            if place == 0:
                order = random.permutation(self._images).tolist()
            batch.append((order[place], number))
            if len(batch) == self._size:
                yield batch
                batch = []


def training_batches(
    images: AugmentedImages, batches: EndlessBatches, *, workers: int
) -> Generator[list[Example]]:
    """Loads batches without end, ahead of their use; closing it ends the workers."""
    loader = _loader(images, batch_sampler=batches, collate_fn=_to_arrays, workers=workers)
    for rows in loader:
        yield [_to_example(row) for row in rows]


def prediction_batches(
    images: CachedImages[Prepared], *, size: int, workers: int
) -> Iterator[list[Prepared]]:
    """Loads images for prediction in their order, ahead of their use."""
    # One batch is not worth a process.
    needed = workers if len(images) > size else 0
    yield from _loader(images, batch_size=size, collate_fn=list, workers=needed)


def _loader(dataset: Dataset[Any], *, workers: int, **options: Any) -> DataLoader[Any]:
    if not workers:
        return DataLoader(dataset, **options)
    return DataLoader(
        dataset,
        num_workers=workers,
        multiprocessing_context="fork",
        prefetch_factor=_PREFETCH,
        worker_init_fn=_begin_worker,
        **options,
    )


def _begin_worker(number: int) -> None:
    # The parent may be killed at any moment; PyTorch's own check takes seconds to notice.
    die_with_parent(signal.SIGKILL)


def _to_arrays(examples: Sequence[Example]) -> list[tuple[np.ndarray[Any, Any] | None, ...]]:
    return [
        tuple(
            None if tensor is None else tensor.numpy()
            for tensor in (e.image, e.boxes, e.labels, e.masks, e.track_ids)
        )
        for e in examples
    ]


def _to_example(arrays: tuple[np.ndarray[Any, Any] | None, ...]) -> Example:
    tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
    image, boxes, labels, masks, track_ids = tensors
    assert image is not None and boxes is not None and labels is not None
    return Example(image, boxes, labels, masks, track_ids)
