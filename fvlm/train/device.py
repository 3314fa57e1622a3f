"""From host memory to the device that trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fvlm.batch import Batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """`batches`, on `device`. To a GPU they go through pinned memory and on a stream of their own.

    The host runs ahead of the GPU, so this copy goes on while the step before it computes. What came out of the object
    store is let go as soon as it is pinned; torch keeps pinned memory and uses it again.
    """
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)
    for batch in batches:
        pinned = batch.pin_memory()
        with torch.cuda.stream(stream):
            there = pinned.to(device, non_blocking=True)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(stream)
        for tensor in there.tensors():
            tensor.record_stream(compute)  # or its memory might go to the next copy before the step has read it
        yield there


def synchronise(device: torch.device) -> None:
    """Wait until all that was handed to a GPU is done. Elsewhere nothing is handed over."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
