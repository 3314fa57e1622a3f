"""The consumer, the same for every loader: takes each batch, looks at every page of it, and lets it go."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from processes import cpu_seconds
from touch import touch

LEFT_OUT = 32
"""Batches at the start that the steady figures leave out. Two of our windows: when two tasks work side by side they end
theirs together here, so the clock starts with nothing lying ready. A run of fewer than twice as many has no steady."""


def consume(epochs: Iterable[Iterable[Any]], root: int) -> dict[str, Any]:
    """Take all batches (frames, latents, captions, clip ids) of all `epochs` and say what they cost.

    `root` is the process under which all of the loader's processes live.
    """
    arrived: list[float] = []
    ids: list[str] = []
    touched: list[int] = []
    begin_cpu, begin = cpu_seconds(root), time.perf_counter()
    steady_cpu, sizes = begin_cpu, []
    for epoch in epochs:
        for frames, latents, captions, clip_ids in epoch:
            touched += touch(frames)
            touch(latents)
            ids += clip_ids
            sizes.append(len(captions))
            arrived.append(time.perf_counter() - begin)
            if len(arrived) == LEFT_OUT:
                steady_cpu = cpu_seconds(root)
            del frames, latents
    end_cpu, clips = cpu_seconds(root), np.array(sizes)
    steady = int(clips[LEFT_OUT:].sum()) if len(sizes) >= 2 * LEFT_OUT else 0
    return {
        "steady": steady / (arrived[-1] - arrived[LEFT_OUT - 1]) if steady else None,
        "epoch": int(clips.sum()) / arrived[-1],
        "cpu_steady": 1000 * (end_cpu - steady_cpu) / steady if steady else None,
        "cpu_epoch": 1000 * (end_cpu - begin_cpu) / int(clips.sum()),
        "after_first": int(clips[1:].sum()) / (arrived[-1] - arrived[0]) if len(arrived) > 1 else None,
        "first_s": arrived[0],
        "longest_wait_s": float(np.diff(arrived).max()) if len(arrived) > 1 else None,
        "ids": ids,
        "touched": touched,
    }
