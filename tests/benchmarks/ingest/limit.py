"""The limit: JPEG files in memory, decoded on all cores into buffers that never change. Nothing is delivered."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
from formats import FRAMES, SIZE, stored_clips
from loaders import decode_batch
from processes import cpu_seconds

Batches = list[list[list[bytes]]]


def decode_all(batches: Batches, start: Barrier | None = None) -> None:
    out = np.zeros((len(batches[0]), FRAMES, SIZE, SIZE, 3), np.uint8)  # zeros, touched: no page is new when it starts
    out.fill(1)
    if start is not None:
        start.wait()
    for batch in batches:
        decode_batch(batch, out[: len(batch)])


def load(folder: Path, batch: int) -> Batches:
    jpegs = [clip.jpegs for clip in stored_clips(folder / "parquet")]
    return [jpegs[i : i + batch] for i in range(0, len(jpegs), batch)]


def measure(batches: Batches, kind: str, epochs: int) -> dict[str, Any]:
    """clips/s and CPU seconds of all cores; `kind`: "threads" or "processes"."""
    cores = os.cpu_count() or 1
    shares = [batches[core::cores] * epochs for core in range(cores)]
    clips = sum(len(batch) for share in shares for batch in share)
    if kind == "threads":
        with ThreadPoolExecutor(cores) as pool:
            begin_cpu, begin = cpu_seconds(os.getpid()), time.perf_counter()
            list(pool.map(decode_all, shares))
            seconds = time.perf_counter() - begin
    else:
        fork = multiprocessing.get_context("fork")
        start = fork.Barrier(cores + 1)
        workers = [fork.Process(target=decode_all, args=(share, start)) for share in shares]
        for worker in workers:
            worker.start()
        start.wait()
        begin_cpu, begin = cpu_seconds(os.getpid()), time.perf_counter()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - begin
    cpu = 1000 * (cpu_seconds(os.getpid()) - begin_cpu) / clips
    return {"steady": clips / seconds, "epoch": clips / seconds, "cpu_steady": cpu, "cpu_epoch": cpu}
