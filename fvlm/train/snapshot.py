"""The state of one moment, kept while training goes on.

On a CPU it is copied at once. On a GPU a stream of its own copies it while the next forward and backward pass run,
which only read what is copied; the next optimizer step, which writes it, waits for the copy on the device. Nobody waits
on the host but the thread that writes the checkpoint.

Where the GPU has room, it is copied within the GPU first, which takes a millisecond or two, and from there to the host,
which takes ten times as long as many a forward and backward pass and holds nobody. Otherwise it is copied to the host,
and an optimizer step that comes before the end waits. The memory is allocated once: as much as model and moments take,
on the host and, for that, on the GPU.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fvlm.train.side_stream import AtOnce, Block, CudaStream, Hold, Mark, SideStream, has_room, timed
from fvlm.train.state import Contents, random_generators, state_tensors
from fvlm.train.tensor_parts import gathered, is_shard

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Valid until the next one is taken from the same `Snapshots`."""

    step: int
    _model: Tensors
    _optimizer: Tensors
    _state: Callable[[], Mapping[str, Any]]
    _copied: Mark
    holds: list[Hold] = field(default_factory=list)
    """Of the GPU's computation, so far: the next optimizer step adds its own."""

    def contents(self) -> Contents:
        """The checkpoint; waits until a GPU's copies are here, and until the run can say what it says of itself."""
        self._copied.synchronize()
        return Contents(self.step, self._model, self._optimizer, json.dumps(self._state()))

    def held_ms(self, wait: bool = False) -> float | None:
        """How long the GPU's computation was held, in all. None while that is not known; wait: until it is."""
        holds = [hold.ms(wait) for hold in self.holds]
        return None if None in holds else sum(ms for ms in holds if ms is not None)


class Snapshots:
    """Takes snapshots of one model and its optimizer, one at a time."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, is_recorded: bool = False):
        self._is_recorded = is_recorded
        self._model, self._optimizer = model, optimizer
        self._device = next(model.parameters()).device
        self._stream: SideStream = CudaStream(self._device) if self._device.type == "cuda" else AtOnce()
        self._buffers: Tensors = {}
        """On the host, all of it."""
        self._beside = self._others = Block({})
        """Their memory: of what is copied beside the computation, and of shards and what lies on the host anyway."""
        self._staging: Block | None = None
        """On the device, with the layout of `_beside`."""
        self._latest: Snapshot | None = None
        self._held_until: Mark | None = None
        """What the next optimizer step has to wait for."""
        optimizer.register_step_pre_hook(self._hold_step)

    def reserve(self) -> bool:
        """Allocate the memory, unless that was done: after the first step, so that a lack of it shows then.

        -> whether it took time; locking gigabytes takes seconds.
        """
        if self._buffers:
            return False
        self._fit_buffers(_joined(*state_tensors(self._model, self._optimizer)))
        return True

    def describe(self) -> str:
        """How a GPU's state is copied, for people; "" on a CPU."""
        if self._device.type != "cuda":
            return ""
        size = self._beside.bytes.numel() / 1e9
        if self._staging:
            return f"checkpoints are staged in {size:.1f} GB of GPU memory, and copied to the host while steps go on"
        return f"checkpoints are copied to the host at once, for lack of {size:.1f} GB of GPU memory; a step may wait"

    def take(self, step: int, state: Callable[[], Mapping[str, Any]]) -> Snapshot:
        """The contents of a checkpoint of this moment. `step` has been finished; `state` gives what the run says, and
        is called by `Snapshot.contents`. The one before must have been written.

        With shards the other ranks must give theirs now (`give_shards`).
        """
        parameters, moments = state_tensors(self._model, self._optimizer)
        sources = _joined(parameters, moments)
        self._fit_buffers(sources)
        # Shards on the stream that computes, before the others, whose copies wait for these.
        shards = {name: tensor for name, tensor in sources.items() if is_shard(tensor)}
        holds = [timed(self._device, lambda: self._gather(shards))] if shards else []
        if names := [name for name in self._others.tensors if name not in shards]:
            torch._foreach_copy_([self._buffers[name] for name in names], [sources[name] for name in names])
        copied = self._copy_beside([sources[name] for name in self._beside.tensors])
        self._latest = Snapshot(
            step,
            {name: self._buffers[f"model/{name}"] for name in parameters},
            {name: self._buffers[f"optimizer/{name}"] for name in moments} | random_generators(),
            state,
            copied,
            holds,
        )
        return self._latest

    def _gather(self, shards: Tensors) -> None:
        for name, shard in shards.items():
            # One at a time, for there may be no memory for more.
            self._buffers[name].copy_(gathered(shard), non_blocking=True)

    def _copy_beside(self, sources: list[torch.Tensor]) -> Mark:
        """-> when they are on the host"""
        host, staging = self._beside, self._staging
        if staging is None:
            self._held_until = self._stream.run(lambda: _copy(list(host.tensors.values()), sources))
            return self._held_until
        # The stream does one after the other, so this does not begin before the last snapshot has left the staging.
        self._held_until = self._stream.run(lambda: _copy(list(staging.tensors.values()), sources))
        return self._stream.after(lambda: _copy([host.bytes], [staging.bytes]))

    def _hold_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """The GPU finishes the copies before it changes what is copied."""
        if self._held_until and self._latest:
            self._latest.holds.append(self._stream.hold(self._held_until))
            self._held_until = None

    def _fit_buffers(self, sources: Tensors) -> None:
        kinds = [(t.shape, t.dtype) for t in sources.values()]
        if list(self._buffers) == list(sources) and [(t.shape, t.dtype) for t in self._buffers.values()] == kinds:
            return
        beside = {n: t for n, t in sources.items() if t.device == self._device and not is_shard(t)}
        others = {n: t for n, t in sources.items() if n not in beside}
        on_gpu = self._device.type == "cuda"
        self._buffers, self._staging = {}, None
        self._beside = self._others = Block({})  # the old ones go before the new ones come
        self._beside, self._others = Block(beside, pinned=on_gpu), Block(others, pinned=on_gpu)
        tensors = self._beside.tensors | self._others.tensors
        self._buffers = {name: tensors[name] for name in sources}
        if has_room(self._device, self._beside.bytes.numel(), self._is_recorded):
            with contextlib.suppress(torch.OutOfMemoryError):  # there is enough, but in pieces
                self._staging = Block(beside, self._device)


def give_shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The other ranks' part in a snapshot; nothing without shards."""
    for tensor in _joined(*state_tensors(model, optimizer)).values():
        gathered(tensor)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources, non_blocking=True)


def _joined(parameters: Tensors, moments: Tensors) -> Tensors:
    return {f"model/{name}": t for name, t in parameters.items()} | {f"optimizer/{n}": t for n, t in moments.items()}
