"""Computes one training step of a small detector with several threads, on shares of the batch.

A small network gains nothing from more threads inside one operation, and loses much where other
processes run: on two cores a step of the `tiny` preset took 0.40 s with one thread, 0.64 s with
two. Two copies of one thread each, whose weights share memory, took 0.25 s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import nn

from ml_backend.detection.architectures.base import Architecture, Target
from ml_backend.detection.augment import Example


@contextmanager
def threads_inside(count: int | None) -> Iterator[None]:
    """Sets the threads that one operation uses on the CPU, and restores the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ThreadDataParallel:
    """Computes losses and gradients of a module with several threads on a CPU, one on a GPU.

    Args:
        architecture: computes the losses.
        module: receives the gradients.
        count: threads.
        bfloat16: whether the forward pass uses bfloat16 where that serves.
    """

    def __init__(
        self, architecture: Architecture, module: nn.Module, count: int, *, bfloat16: bool
    ) -> None:
        self._architecture = architecture
        self._bfloat16 = bfloat16
        self._modules = [module] + [copy.deepcopy(module) for _ in range(count - 1)]
        for copied in self._modules[1:]:
            for own, shared in zip(copied.parameters(), module.parameters(), strict=True):
                own.data = shared.data
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def backward(self, batch: Sequence[Example], device: torch.device) -> float:
        """Leaves the gradients of a batch's mean loss in the module; answers the loss."""
        parts = min(len(self._modules), len(batch))
        shares = [(batch[i::parts], self._modules[i], device, parts) for i in range(parts)]
        if self._pool is None or parts == 1:
            return self._share(*shares[0])
        losses = list(self._pool.map(lambda share: self._share(*share), shares))
        module = self._modules[0]
        for replica in self._modules[1:parts]:
            for own, total in zip(replica.parameters(), module.parameters(), strict=True):
                if own.grad is None:
                    continue
                total.grad = own.grad if total.grad is None else total.grad.add_(own.grad)
        return sum(losses)

    def _share(
        self, examples: Sequence[Example], module: nn.Module, device: torch.device, parts: int
    ) -> float:
        images = [example.image.to(device).float().div_(255) for example in examples]
        targets = [
            Target(
                e.boxes.to(device),
                e.labels.to(device),
                None if e.masks is None else e.masks.to(device),
            )
            for e in examples
        ]
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
            losses = self._architecture.losses(module, images, targets)
            loss = torch.stack([value.float() for value in losses.values()]).sum() / parts
        module.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())
