"""From host memory to the device that trains, and how far the host may run ahead of it."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import torch

from fvlm.batch import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """`batches`, on `device`. To a GPU they go through pinned memory and on a stream of their own.

    The host runs ahead of the GPU, so this copy goes on while the step before it computes. What came out of the object
    store is let go as soon as it is pinned. Pinned memory is torch's, which uses it again when the copy is over: a copy
    that does not block records its stream with the block, and the block is free when that has got so far.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        batch = batch.pin_memory()  # the same name: the batch that is not pinned must not live on. Pinned: no copy
        with torch.cuda.stream(stream):
            there = batch.to(device, non_blocking=True)
        del batch
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(stream)
        for tensor in there.tensors():
            tensor.record_stream(compute)  # or its memory might go to the next copy before the step has read it
        yield there
        del there


def synchronise(device: torch.device) -> None:
    """Wait until all that was handed to a GPU is done. Elsewhere nothing is handed over."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class StepsAhead:
    """Keeps the host at most LIMIT steps ahead of a GPU. A CPU is never behind."""

    LIMIT = 2
    """Steps handed to the GPU that it may have to do yet when the next one follows. It always has one, so a late batch
    or a slow host does not show at once; each more would hold one more batch in its memory, and run past the step at
    which a stop is asked for."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._ends: collections.deque[torch.cuda.Event] = collections.deque()

    def stepped(self) -> None:
        """A step was handed over. Waits until the device is close enough."""
        if self._on_gpu:
            end = torch.cuda.Event(blocking=True)  # the thread that makes batches has the core meanwhile
            end.record()
            self._ends.append(end)
            if len(self._ends) > self.LIMIT:
                self._ends.popleft().synchronize()

    def is_busy(self) -> bool:
        """Whether the device still has to do some of what it was handed."""
        return bool(self._ends) and not self._ends[-1].query()
