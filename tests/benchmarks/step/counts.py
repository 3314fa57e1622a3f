"""What a step does, counted: floating-point operations, operators, kernels, graphs, and memory at its highest."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from fvlm.train.device import synchronise
from fvlm.train.flops import Flops, flop_counter, flops_of

Result = TypeVar("Result")

# Operators that compute nothing besides those that torch itself calls views.
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "_local_scalar_dense",
}  # fmt: skip
GRADIENT_NORM = {"linalg_vector_norm", "_foreach_norm"}
"""The first operator of clipping, and of no model here: what was dispatched before it is forward and backward."""


@dataclass(frozen=True)
class Counts(Flops):
    """Of one step, besides its floating-point operations:

    operators:          below autograd, that compute something: no views, no allocations
    operators_model:    those of forward and backward alone
    """

    operators: int
    operators_model: int


def count(step: Callable[[], Result]) -> tuple[Result, Counts]:
    """Run an eager step, and count what is dispatched in it: forward, recomputation, backward, optimizer."""
    operators = _Operators()
    with flop_counter() as flops, operators:
        result = step()
    return result, Counts(
        **dataclasses.asdict(flops_of(flops)),
        operators=operators.seen,
        operators_model=operators.seen if operators.before_norm is None else operators.before_norm,
    )


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.before_norm: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in GRADIENT_NORM and self.before_norm is None:
            self.before_norm = self.seen
        if func.namespace != "prim" and not getattr(func, "is_view", False) and func._opname not in NO_KERNEL:
            self.seen += 1
        return func(*args, **(kwargs or {}))


def count_kernels(step: Callable[[], object], device: torch.device) -> tuple[int | None, int | None]:
    """Kernels that the GPU ran in one step, and calls by which the host asked for them (a CUDA graph is one)."""
    if device.type != "cuda":
        return None, None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        synchronise(device)
    events = profiler.events() or []
    on_device = [
        event.name
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    launch = re.compile(r"(cuda|cu)(LaunchKernel\w*|LaunchCooperativeKernel\w*|GraphLaunch\w*|MemcpyAsync|MemsetAsync)")
    return (
        sum(not re.match("Memcpy|Memset|Optimizer|##|ProfilerStep", name) for name in on_device),
        sum(bool(launch.match(event.name)) for event in events if event.device_type == DeviceType.CPU),
    )


@dataclass(frozen=True)
class Compiled:
    """What torch.compile has done so far in this process: one may be taken from another."""

    graphs: int
    breaks: int
    reasons: tuple[str, ...]

    @classmethod
    def now(cls) -> Compiled:
        counters = torch._dynamo.utils.counters
        reasons = counters["graph_break"]
        return cls(counters["stats"]["unique_graphs"], sum(reasons.values()), tuple(map(str, reasons)))

    def since(self, earlier: Compiled) -> tuple[int, int, list[str]]:
        """Graphs, breaks, and the new reasons of breaks."""
        new = [reason.splitlines()[0] for reason in self.reasons if reason not in earlier.reasons]
        return self.graphs - earlier.graphs, self.breaks - earlier.breaks, new


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, float | None]]:
    """Fills in, at the end, `peak_gb` and `reserved_gb`: the most that was held above what was held at the start.

    On a GPU what torch's allocator gave out, and what it took from the driver, in which CUDA graphs keep their own
    memory. On a CPU the resident set; None where the system does not tell its peak.
    """
    out: dict[str, float | None] = {"peak_gb": None, "reserved_gb": None}
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        begin = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        yield out
        synchronise(device)
        out["peak_gb"] = (torch.cuda.max_memory_allocated(device) - begin[0]) / 1e9
        out["reserved_gb"] = (torch.cuda.max_memory_reserved(device) - begin[1]) / 1e9
        return
    resident = _status("VmRSS") if _reset_resident_peak() else None
    yield out
    if resident is not None:
        out["peak_gb"] = (_status("VmHWM") - resident) / 1e9


def _reset_resident_peak() -> bool:
    """Linux forgets a process's highest resident set when told so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.M)[1]) * 1024  # type: ignore[index]


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(
        re.search(r"can't allocate memory|CUDA error: out of memory", str(error))
    )
