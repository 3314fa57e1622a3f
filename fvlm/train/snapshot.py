"""The state of one moment, kept while training goes on.

On a CPU it is copied at once. From a GPU it is copied by a stream of its own into pinned memory while the next forward
and backward pass run, which only read what is copied; the next optimizer step, which writes it, waits on the device.
Nobody waits on the host but the thread that writes the checkpoint. The memory is allocated once: as much as model and
moments take, on the host.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fvlm.train.state import Contents, random_generators, state_tensors
from fvlm.train.tensor_parts import gathered, is_shard

Tensors = dict[str, torch.Tensor]
_ALIGNMENT = 64


@dataclass(frozen=True)
class Snapshot:
    """Valid until the next one is taken from the same `Snapshots`."""

    _contents: Contents
    _copied: torch.cuda.Event | None

    def contents(self) -> Contents:
        """The checkpoint; waits until a GPU's copies are here."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._contents


class Snapshots:
    """Takes snapshots of one model and its optimizer, one at a time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._model, self._optimizer = model, optimizer
        self._buffers: Tensors = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        optimizer.register_step_pre_hook(self._hold_step)

    def reserve(self) -> bool:
        """Allocate the memory, unless that was done: after the first step, so that a lack of it shows then.

        -> whether it took time; pinning gigabytes takes seconds.
        """
        if self._buffers:
            return False
        self._fit_buffers(_joined(*state_tensors(self._model, self._optimizer)))
        return True

    def take(self, step: int, state: Mapping[str, Any]) -> Snapshot:
        """The contents of a checkpoint of this moment. `step` has been finished; `state` is what the run says.

        With shards the other ranks must give theirs now (`give_shards`).
        """
        parameters, moments = state_tensors(self._model, self._optimizer)
        sources = _joined(parameters, moments)
        self._fit_buffers(sources)
        for name in (n for n, t in sources.items() if is_shard(t)):
            # One at a time, for there may be no memory for more. Before the others, whose copies wait for these.
            self._buffers[name].copy_(gathered(sources[name]), non_blocking=True)
        here = {name: tensor for name, tensor in sources.items() if not is_shard(tensor)}
        names = {on_gpu: [n for n, t in here.items() if t.is_cuda == on_gpu] for on_gpu in (False, True)}
        for on_gpu, those in names.items():
            if those:
                copy = self._copy_from_gpu if on_gpu else torch._foreach_copy_
                copy([self._buffers[name] for name in those], [sources[name] for name in those])
        contents = Contents(
            step,
            {name: self._buffers[f"model/{name}"] for name in parameters},
            {name: self._buffers[f"optimizer/{name}"] for name in moments} | random_generators(),
            json.dumps(state),
        )
        return Snapshot(contents, self._copied)

    def _copy_from_gpu(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        device = sources[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # the step that is queued comes first
        with torch.cuda.stream(self._stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)  # the writer sleeps until then
            self._copied.record(self._stream)

    def _hold_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """The GPU finishes the copies before it changes what is copied."""
        if self._copied is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)
            self._copied = None

    def _fit_buffers(self, sources: Tensors) -> None:
        kinds = [(t.shape, t.dtype) for t in sources.values()]
        if list(self._buffers) == list(sources) and [(t.shape, t.dtype) for t in self._buffers.values()] == kinds:
            return
        # One block: pinning costs a call to the driver, and each such allocation is rounded up to a power of two.
        sizes = [t.numel() * t.element_size() for t in sources.values()]
        padded = [size + -size % _ALIGNMENT for size in sizes]
        pinned = any(tensor.is_cuda for tensor in sources.values())
        self._buffers = {}
        block = torch.empty(sum(padded), dtype=torch.uint8, pin_memory=pinned)
        block.zero_()  # so that the system hands the pages out now
        begin = 0
        for (name, source), size, whole in zip(sources.items(), sizes, padded, strict=True):
            self._buffers[name] = block[begin : begin + size].view(source.dtype).view(source.shape)
            begin += whole


def give_shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The other ranks' part in a snapshot; nothing without shards."""
    for tensor in _joined(*state_tensors(model, optimizer)).values():
        gathered(tensor)


def _joined(parameters: Tensors, moments: Tensors) -> Tensors:
    return {f"model/{name}": t for name, t in parameters.items()} | {f"optimizer/{n}": t for n, t in moments.items()}
