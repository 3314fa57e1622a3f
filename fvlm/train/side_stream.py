"""Copies beside the computation, host memory that a GPU can copy to by itself, and whether a GPU has room."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from fvlm.errors import UserError

ALIGNMENT = 64
PAGE = 4096
PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every device."""
STAYS_FREE = 0.1
"""Share of a GPU's memory that stays free: allocations of an odd size split what there is."""


class Mark(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Wait on the host until it is reached."""


class Hold(Protocol):
    """A wait of the computation."""

    def ms(self, wait: bool) -> float | None:
        """How long it took; None while that is not known. wait: wait on the host until it is."""


class SideStream(Protocol):
    """Does work beside the computation, each piece after the one before."""

    def run(self, work: Callable[[], None]) -> Mark:
        """Do `work` when what the computation was handed so far is done. -> its end"""

    def hold(self, mark: Mark) -> Hold:
        """The computation waits for `mark` before it goes on with what it is handed from now on."""

    def after(self, work: Callable[[], None]) -> Mark:
        """Do `work` after the work before, whatever the computation does. -> its end"""


class Passed:
    """What a CPU has done is done."""

    def synchronize(self) -> None: ...

    def ms(self, wait: bool) -> float | None:
        return 0.0


class AtOnce:
    """Of a CPU."""

    def run(self, work: Callable[[], None]) -> Mark:
        work()
        return Passed()

    after = run

    def hold(self, mark: Mark) -> Hold:
        return Passed()


class CudaHold:
    """Between two events of the stream that computes."""

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event):
        self._begin, self._end = begin, end

    def ms(self, wait: bool) -> float | None:
        if wait:
            self._end.synchronize()
        return self._begin.elapsed_time(self._end) if self._end.query() else None


class CudaStream:
    """Of a GPU."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> Mark:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self.after(work)

    def after(self, work: Callable[[], None]) -> Mark:
        with torch.cuda.stream(self._stream):
            work()
            mark = torch.cuda.Event(blocking=True)  # whoever waits sleeps
            mark.record(self._stream)
        return mark

    def hold(self, mark: Mark) -> Hold:
        assert isinstance(mark, torch.cuda.Event)
        return timed(self._device, lambda: torch.cuda.current_stream(self._device).wait_event(mark))


def timed(device: torch.device, work: Callable[[], object]) -> Hold:
    """Hand `work` to the stream that computes. -> how long it takes there"""
    if device.type != "cuda":
        work()
        return Passed()
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    work()
    end.record(stream)
    return CudaHold(begin, end)


def has_room(device: torch.device, size: int, is_recorded: bool = False) -> bool:
    """Whether `device` is a GPU that can spare `size` bytes for good, next to steps like those that it has done."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    # torch keeps what a step needed at its peak, and will need that again. A recorded step keeps all that it had.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return free + (0 if is_recorded else max(kept, 0)) - size > STAYS_FREE * total


class Block:
    """Bytes in one piece for tensors of the given kinds, one after the other.

    pinned: page-locked, so that a GPU's copies go on by themselves. Raises UserError when there is not so much.
    """

    def __init__(self, like: dict[str, torch.Tensor], device: torch.device | str = "cpu", pinned: bool = False):
        sizes = [t.numel() * t.element_size() for t in like.values()]
        padded = [size + -size % ALIGNMENT for size in sizes]
        total = sum(padded)
        whole = torch.empty(total + (PAGE if pinned else 0), dtype=torch.uint8, device=device)
        self.bytes = whole[-whole.data_ptr() % PAGE :][:total] if pinned else whole
        if self.bytes.device.type == "cpu":
            self.bytes.zero_()  # so that the system hands the pages out now
        if pinned and total:
            self._lock()
        self.tensors: dict[str, torch.Tensor] = {}
        begin = 0
        for (name, tensor), size, more in zip(like.items(), sizes, padded, strict=True):
            self.tensors[name] = self.bytes[begin : begin + size].view(tensor.dtype).view(tensor.shape)
            begin += more

    def _lock(self) -> None:
        """Plain memory that is locked afterwards: torch's own pinned memory is rounded up to a power of two, which for
        20.8 GB is 34.4 (`CachingHostAllocator`: PowerOf2Ceil).
        """
        place, size = self.bytes.data_ptr(), self.bytes.numel()
        cudart = torch.cuda.cudart()
        if code := int(cudart.cudaHostRegister(place, size, PORTABLE)):
            raise UserError(
                f"checkpoints need {size / 1e9:.1f} GB of page-locked memory on the host, as much as weights and "
                f"moments, and CUDA refuses them (error {code}). Give the machine or the container more memory."
            )
        # Before the memory goes, which `self.bytes` keeps. Not at exit: the driver does so itself, or is gone.
        weakref.finalize(self, cudart.cudaHostUnregister, place).atexit = False
