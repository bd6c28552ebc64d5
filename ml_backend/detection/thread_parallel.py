"""One step of a small detector by several threads, each on its share of the batch.

A small network gains nothing from more threads inside one operation, and loses much where other
processes run: on two cores a step of the `tiny` preset took 0.40 s with one thread, 0.64 s with
two. Two replicas of one thread each, whose weights share memory, took 0.25 s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ml_backend.detection.augment import Example


@contextmanager
def threads_inside(count: int | None) -> Iterator[None]:
    """Sets the threads that one operation uses on the CPU, and puts them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Replicas:
    """Losses and gradients of a module, computed by several threads on a CPU, by one on a GPU.

    Args:
        module: a detector in torchvision's protocol; its gradients are what comes out.
        count: threads.
        half: whether bfloat16 is used where it serves.
    """

    def __init__(self, module: nn.Module, count: int, *, half: bool) -> None:
        self._half = half
        self._modules = [module] + [copy.deepcopy(module) for _ in range(count - 1)]
        for replica in self._modules[1:]:
            for own, shared in zip(replica.parameters(), module.parameters(), strict=True):
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
            {"boxes": e.boxes.to(device), "labels": e.labels.to(device) + 1} for e in examples
        ]
        with torch.autocast(device.type, torch.bfloat16, enabled=self._half):
            losses: dict[str, Tensor] = module(images, targets)
            loss = torch.stack([value.float() for value in losses.values()]).sum() / parts
        module.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())
