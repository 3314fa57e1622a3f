"""A look at every page of a batch, so that no loader is praised for memory it has not filled."""

from __future__ import annotations

from typing import Any

import numpy as np

PAGE = 4096


def touch(frames: Any) -> list[int]:
    """One number a clip: the sum of one byte of every page of its frames [B, ...]; takes arrays and CPU tensors."""
    clips = np.asarray(frames).view(np.uint8).reshape(len(frames), -1)
    return clips[:, ::PAGE].sum(axis=1, dtype=np.int64).tolist()
