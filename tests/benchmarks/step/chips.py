"""What a chip does at best, measured, and what the machine is."""

from __future__ import annotations

import datetime
import platform
import shutil
import subprocess
import time
from typing import Any

import torch
import transformers

from fvlm.train.device import synchronise


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large product of random matrices: the best of several, after a warm-up."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        begin = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best / 1e12


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure means nothing without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "chip": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:  # noqa: PTH123  (no path of ours)
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    if not (tool := shutil.which("nvidia-smi")):
        return None
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
    )
    return done.stdout.split("\n")[0].strip() or None
