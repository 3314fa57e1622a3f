"""Linux under Windows, whose driver lends system memory to a GPU that is full."""

from __future__ import annotations

import platform

NO_FALLBACK = (
    'NVIDIA Control Panel of Windows, Manage 3D settings, "CUDA - Sysmem Fallback Policy": "Prefer No Sysmem Fallback"'
)
"""Where Windows is told that a GPU whose memory is full shall fail, and not go on in system memory."""


def is_wsl2(kernel: str | None = None) -> bool:
    """Whether a kernel of this release is WSL2's; without one, this machine's."""
    return "microsoft" in (platform.release() if kernel is None else kernel).lower()
