"""What a chip can compute at best, by its maker's tables."""

from __future__ import annotations

import re

import torch

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
"""Dense bf16 with float32 accumulation, TFLOP/s, from NVIDIA's data sheets and architecture white papers (the figures
without sparsity)."""


def table_peak(device: torch.device) -> float | None:
    """TFLOP/s of dense bf16 by the table; None for a chip that is not in it."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The first chip that is part of torch's name of a device, and no other model by what follows."""
    other = r"(?!\w| (D|Ti|SUPER|Laptop|Max-Q)\b)"
    return next((float(peak) for chip, peak in PEAKS.items() if re.search(rf"\b{chip}{other}", name)), None)
