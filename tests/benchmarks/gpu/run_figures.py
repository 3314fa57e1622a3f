"""What whole runs come to: figures of their metrics and logs, and how two runs differ. No processes."""

from __future__ import annotations

import itertools
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/, where the torture compares runs
from torture.compare import metrics_differences

from fvlm.train.sinks import METRICS
from fvlm.train.state import MODEL, OPTIMIZER, checkpoint_name
from fvlm.train.store import CHECKPOINTS

LEFT_OUT = 2
"""Laps at the beginning of a run that do not count: Ray's own processes start in them."""
Row = dict[str, Any]
SAVED = re.compile(r" saved step-(\d+) in ([\d.]+) s; training was held for ([\d.]+) ms")
STARTED = re.compile(r" started in ([\d.]+) s: (.*)")
MOCK_STEP = re.compile(r" (a mock step has passed .*)")
FEED = {
    "wanted_clips_per_s": re.compile(r"^wanted +([\d.]+) clips/s", re.M),
    "delivered_clips_per_s": re.compile(r"^delivered +([\d.]+) clips/s", re.M),
    "data_wait": re.compile(r"^data wait +([\d.]+)%", re.M),
    "first_batch_s": re.compile(r"^first batch +after ([\d.]+) s", re.M),
    "decode_ms": re.compile(r"^decode +([\d.]+) ms", re.M),
    "decode_threads": re.compile(r"^decode .*, (\d+) threads", re.M),
    "read_ms": re.compile(r"^read +([\d.]+) ms", re.M),
    "most_clips_per_s": re.compile(r"^without a step +([\d.]+) clips/s", re.M),
}


def median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def speed(rows: Sequence[Row], steps: Sequence[tuple[float, int]], batch: int, bare_ms: float | None) -> Row:
    """How fast a run was, after its first laps.

    rows: of metrics.jsonl; those at the end of a lap say how long its steps took, pauses for checkpoints left out
    steps: when how many steps were seen in it: the clock on the wall, pauses and all
    bare_ms: of a bare step
    """
    laps = [row for row in rows if "train/step_time" in row][LEFT_OUT:]
    ms = median(1000 * row["train/step_time"] for row in laps)
    seen = [(at, step) for at, step in steps if laps and step >= laps[0]["step"]]
    wall = 1000 * (seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1]) if len(seen) > 1 else None
    return {
        "steps": int(rows[-1]["step"]) if rows else 0,
        "laps": len(laps),
        "ms_step": ms,
        "clips_per_s": 1000 * batch / ms if ms else None,
        "share_of_bare": bare_ms / ms if bare_ms and ms else None,
        "ms_step_wall": wall,
        "clips_per_s_wall": 1000 * batch / wall if wall else None,
        "share_of_bare_wall": bare_ms / wall if bare_ms and wall else None,
        "data_wait": mean(laps, "train/data_wait"),
        "mfu": mean(laps, "train/mfu"),
        "ingest_clips_per_s": mean(laps, "ingest/clips_per_s"),
        "decode_ms": mean(laps, "ingest/decode_ms"),
        "peak_gb": max((row["train/vram_gb"] for row in laps), default=None),
        "last_loss": rows[-1].get("train/loss") if rows else None,
    }


def mean(laps: Sequence[Row], key: str) -> float | None:
    """None where no lap has it."""
    values = [row[key] for row in laps if row.get(key) is not None]
    return statistics.fmean(values) if values else None


def saves(rows: Sequence[Row], lines: Iterable[str]) -> list[Row]:
    """Each checkpoint: how long training was held for it, and how long until it was safe. The last is only in the log,
    where figures are rounded."""
    found = {
        int(step): {"step": int(step), "stall_ms": float(ms), "write_s": float(seconds)}
        for match in filter(None, map(SAVED.search, lines))
        for step, seconds, ms in (match.groups(),)
    }
    for row in rows:
        if "checkpoint/step" in row:
            step = int(row["checkpoint/step"])
            found[step] = {"step": step, "stall_ms": row["checkpoint/stall_ms"], "write_s": row["checkpoint/write_s"]}
    return [found[step] for step in sorted(found)]


def saving_laps(steps: Sequence[tuple[float, int]], save_every: int, log_every: int) -> Row:
    """Milliseconds a step, by the clock on the wall, of laps that begin with a checkpoint and of the others."""
    with_save, others = [], []
    for (begin, first), (end, last) in list(itertools.pairwise(steps))[LEFT_OUT - 1 :]:
        if last - first == log_every:
            (others if first % save_every else with_save).append(1000 * (end - begin) / log_every)
    saving, plain = median(with_save), median(others)
    cost = (saving - plain) * log_every if saving is not None and plain is not None else None
    return {"ms_step_with_save": saving, "ms_step_without": plain, "laps_with_save": len(with_save), "ms_a_save": cost}


def start(lines: Iterable[str]) -> Row:
    """How long the first start of a log took, and what its mock step said."""
    found: Row = {"seconds": None, "parts": None, "mock_step": None}
    for line in lines:
        if match := MOCK_STEP.search(line):
            found["mock_step"] = found["mock_step"] or match[1]
        if match := STARTED.search(line):
            return found | {"seconds": float(match[1]), "parts": match[2]}
    return found


def feed(output: str) -> Row:
    """Figures of a feed test's report; None for one that is not in it."""
    found: Row = {key: float(m[1]) if (m := pattern.search(output)) else None for key, pattern in FEED.items()}
    if found["data_wait"] is not None:
        found["data_wait"] /= 100
    return found | {"feeds": bool(re.search(r"^feeds the GPU$", output, re.M))}


def difference(one: Path, other: Path, steps: int) -> Row:
    """Two run folders, both of `steps` steps, bit for bit."""
    found: Row = {}
    for part, file in (("weights", MODEL), ("optimizer", OPTIMIZER)):
        paths = [folder / CHECKPOINTS / checkpoint_name(steps) / file for folder in (one, other)]
        found |= {f"{part}_{key}": value for key, value in tensor_difference(*paths).items()}
    lines = metrics_differences(one / METRICS, other / METRICS, steps)
    return found | {
        "metrics_equal": not lines,
        "metrics_differences": lines,
        "equal": found["weights_equal"] and found["optimizer_equal"] and not lines,
    }


def tensor_difference(one: Path, other: Path) -> Row:
    """-> equal: to the last bit; largest: difference of two numbers, None where shapes or names differ; in: its tensor;
    tensors_that_differ."""
    largest: float | None = 0.0
    where, differ = None, 0
    with safe_open(one, "pt") as ours, safe_open(other, "pt") as theirs:
        names = sorted(set(ours.keys()) | set(theirs.keys()))
        both = set(ours.keys()) & set(theirs.keys())
        for name in names:
            a, b = (file.get_tensor(name) if name in both else torch.empty(0) for file in (ours, theirs))
            if name in both and a.shape == b.shape and a.dtype == b.dtype and bits(a).equal(bits(b)):
                continue
            differ += 1
            if name not in both or a.shape != b.shape:
                largest, where = None, name
            elif largest is not None:
                gap = (a.double() - b.double()).abs().max().item()
                if gap >= largest:
                    largest, where = gap, name
    return {"equal": not differ, "largest": largest, "in": where, "tensors_that_differ": differ}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
