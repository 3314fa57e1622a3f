"""What a chip could do at best, and what the machine is."""

from __future__ import annotations

import datetime
import platform
import re
import shutil
import subprocess
import time
from typing import Any

import torch
import transformers

# Dense bf16 with float32 accumulation, TFLOP/s, from NVIDIA's data sheets and architecture white papers (the figures
# without sparsity).
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090 Ti": 80,
    "RTX 3090": 71,
}


def table_peak(device: torch.device) -> float | None:
    """TFLOP/s of dense bf16 by the table; None for a chip that is not in it."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The first chip that is part of torch's name of a device, and no other model by what follows."""
    other = r"(?!\w| (D|Ti|SUPER|Laptop|Max-Q)\b)"
    return next((float(peak) for chip, peak in PEAKS.items() if re.search(rf"\b{chip}{other}", name)), None)


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


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
