"""GPU memory that is full without an error: Windows' driver, under WSL2 too, then lends system memory, which a GPU
reaches many times slower. How much is left free for that reason, and how such a spill is recognised: by its slowness.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fvlm.train.metrics import Row
from fvlm.train.sinks import Picture
from fvlm.wsl2 import NO_FALLBACK, is_wsl2

GB = 1e9
SPARE = 0.9
"""Share of the free memory that an estimate may fill: allocators round up, and kernels want workspace."""
WSL2_HEADROOM = 1_500_000_000
"""Bytes that stay free under WSL2 besides: the desktop and what runs on it take more when they please, and what does
not fit then is moved to system memory without an error."""
NEARLY_FULL = 0.9
"""Share of a GPU's memory from which a spill is likely: Windows keeps some for itself."""
LEAST_SHARE = 0.05
"""Of the chip's peak: less is far below what a step of so many clips that they fill the memory should reach. A limit
that was chosen, not measured; small steps, which launches hold up, are below it, and leave memory free."""
TIMES_SLOWER = 4
"""A line whose steps take so many times as long as those of the first lines is not the noise of a machine."""
FIRST_LINES = 5


def usable(free: int, wsl2: bool | None = None) -> int:
    """Bytes of the free memory that an estimate may fill. wsl2: None asks this machine."""
    wsl2 = is_wsl2() if wsl2 is None else wsl2
    return max(0, int(free * SPARE) - (WSL2_HEADROOM if wsl2 else 0))


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU.

    reserved: what this process took from the driver
    used:     what all processes hold, as the driver says
    """

    reserved: int
    used: int
    total: int

    @classmethod
    def now(cls, device: torch.device) -> GpuMemory:
        free, total = torch.cuda.mem_get_info(device)
        return cls(torch.cuda.memory_reserved(device), total - free, total)

    @property
    def taken(self) -> int:
        return max(self.reserved, self.used)

    @property
    def is_nearly_full(self) -> bool:
        return self.taken >= NEARLY_FULL * self.total

    def __str__(self) -> str:
        return f"{self.taken / GB:.1f} GB of the GPU's {self.total / GB:.1f} GB are taken"


def slow_mock_step(
    seconds: float, flops: float, peak_tflops: float | None, memory: GpuMemory, wsl2: bool
) -> str | None:
    """What to say of a mock step that took `seconds`; None where it was as fast as it should be.

    flops:       that it needs
    peak_tflops: of the chip; None where it is not known. Then only more memory than there is tells
    """
    if memory.reserved > memory.total:
        return f"a mock step took {seconds:.2f} s, and {memory}. {cause(wsl2)}"
    if peak_tflops is None or not memory.is_nearly_full:
        return None
    expected = flops / (LEAST_SHARE * peak_tflops * 1e12)
    if seconds <= expected:
        return None
    return (
        f"a mock step took {seconds:.2f} s, where {LEAST_SHARE:.0%} of the chip's peak would be {expected:.2f} s, and "
        f"{memory}. {cause(wsl2)}"
    )


def cause(wsl2: bool) -> str:
    """What is likely, and what to do."""
    less = "Or take less memory: --train.memory small, more ranks, or another run with a smaller --data.global-batch."
    if wsl2:
        return (
            "GPU memory has probably spilled into system memory, which is many times slower. Close what else uses the "
            f"GPU in Windows, and forbid it: {NO_FALLBACK}. {less}"
        )
    return (
        "No memory spills into system memory here as under Windows: see with `nvidia-smi` what else runs on the GPU, "
        f"and at which clock. {less}"
    )


class SlowdownWatch:
    """A sink that says once when steps became many times slower than the first ones while GPU memory is nearly full.

    note:   takes the line
    memory: the GPU's, now
    """

    def __init__(self, note: Callable[[str], None], memory: Callable[[], GpuMemory], wsl2: bool):
        self._note, self._memory, self._wsl2 = note, memory, wsl2
        self._first: list[float] = []
        self._said = False

    def write(self, rows: list[Row], latest: Row) -> None:
        seconds = latest["train/step_time"] * (1 - latest["train/data_wait"])
        if len(self._first) < FIRST_LINES:
            self._first.append(seconds)
            return
        usual = statistics.median(self._first)
        if self._said or seconds <= TIMES_SLOWER * usual:
            return
        memory = self._memory()
        if memory.is_nearly_full:
            self._said = True
            self._note(
                f"steps take {seconds:.2f} s without waiting for data, where the first ones took {usual:.2f} s, and "
                f"{memory}. {cause(self._wsl2)}"
            )

    def evaluated(self, row: Row, pictures: list[Picture]) -> None:
        """Nothing to see in it."""

    def note(self, text: str) -> None:
        """Notes are for people."""

    def close(self) -> None:
        """Nothing to release."""
