"""The consumer, the same for every loader: takes each batch, looks at every page of it, and lets it go."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from processes import cpu_seconds
from touch import touch


def consume(epochs: Iterable[Iterable[Any]], root: int) -> dict[str, Any]:
    """Take all batches (frames, latents, captions, clip ids) of all `epochs` and say what they cost.

    "steady" leaves the first epoch out: loaders start processes, some of them while the first batches come already.
    With one epoch there is no steady. `root` is the process under which all of the loader's processes live.
    """
    arrived: list[float] = []
    ids: list[str] = []
    touched: list[int] = []
    begin_cpu, begin = cpu_seconds(root), time.perf_counter()
    steady_cpu, sizes, first_epoch = begin_cpu, [], 0
    for number, epoch in enumerate(epochs):
        if number == 1:
            first_epoch, steady_cpu = len(arrived), cpu_seconds(root)
        for frames, latents, captions, clip_ids in epoch:
            touched += touch(frames)
            touch(latents)
            ids += clip_ids
            sizes.append(len(captions))
            arrived.append(time.perf_counter() - begin)
            del frames, latents
    end_cpu, clips = cpu_seconds(root), np.array(sizes)
    steady = int(clips[first_epoch:].sum()) if first_epoch else 0
    end_of_first = first_epoch or len(arrived)
    return {
        "steady": steady / (arrived[-1] - arrived[first_epoch - 1]) if steady else None,
        "epoch": int(clips[:end_of_first].sum()) / arrived[end_of_first - 1],
        "cpu_steady": 1000 * (end_cpu - steady_cpu) / steady if steady else None,
        "cpu_epoch": 1000 * (end_cpu - begin_cpu) / int(clips.sum()),
        "first_s": arrived[0],
        "longest_wait_s": float(np.diff(arrived).max()) if len(arrived) > 1 else None,
        "ids": ids,
        "touched": touched,
    }
