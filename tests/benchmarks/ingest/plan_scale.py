"""The plan at scale, without files: `python plan_scale.py CLIPS SHARDS` prints one JSON value.

Times are the longest of a few, the first in an epoch and another one in it, at random cursors. Memory is the growth of
the process's peak RSS while the manifest is already there; the manifest's own is beside it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fvlm.config import Config, DataConfig
from fvlm.data.plan import Plan
from fvlm.data.schema import FILES_SCHEMA, DatasetSpec, Manifest

CURSORS = 3


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def forget_peak() -> int:
    """Start the peak (VmHWM) anew; -> RSS now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def synthetic_manifest(clips: int, shards: int) -> Manifest:
    """Shards of half to one and a half times the mean number of clips; nearly all of them end in a short row group."""
    spec = DatasetSpec(8, 256, "jpeg", "as-is", "none", "float16", (4, 32, 32))
    mean, left_over = divmod(clips, shards)
    rows = np.full(shards, mean)
    rows[:left_over] += 1
    moved = np.random.default_rng(0).integers(0, mean // 2 + 1, shards // 2)
    rows[: len(moved)] += moved
    rows[len(moved) : 2 * len(moved)] -= moved
    columns = [
        pa.array([f"shard-{number:07d}.parquet" for number in range(shards)]),
        pa.array(rows),
        pa.array(rows * 200_000),
        pa.array([f"{number:064x}" for number in range(shards)]),
    ]
    return Manifest("synthetic", spec, pa.table(columns, schema=FILES_SCHEMA), "0" * 64, 0)


def measure(clips: int, shards: int) -> dict[str, Any]:
    before = forget_peak()
    manifest = synthetic_manifest(clips, shards)
    idle = forget_peak()
    begin = time.perf_counter()
    plan = Plan.of_config(manifest, Config(run="plan-scale", data=DataConfig(global_batch=16, lanes=16)))
    steps = plan.steps_per_epoch
    made = time.perf_counter() - begin
    random = np.random.default_rng(0)
    firsts, seconds = [], []
    for epoch in range(CURSORS):  # an epoch each, so that none finds what another has left
        for times in (firsts, seconds):
            cursor = epoch * steps + int(random.integers(steps))
            begin = time.perf_counter()
            plan.rows(*next(plan.windows(cursor, cursor + 1_000)))
            times.append(time.perf_counter() - begin)
    return {
        "clips": plan.num_clips,
        "shards": shards,
        "row_groups": int((-(-plan.shard_rows // plan.rows_per_row_group)).sum()),
        "make_s": made,
        "first_position_s": max(firsts),
        "further_position_s": max(seconds),
        "peak_growth_mb": (status_bytes("VmHWM") - idle) / 1e6,
        "manifest_mb": (idle - before) / 1e6,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
