"""The rows of the speed table: everything that was tried on the experiment, and what had not been, one command each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from compare import Bench, Spec, aligned, compare
from parts import readings
from variants import with_changes

from fvlm.config import Config


@dataclass(frozen=True)
class Entry:
    """changes: of the config, by dotted key. only: the one spec that the row is about, in place of those asked for."""

    about: str
    changes: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, str] | None = None


ENTRIES = {
    "base": Entry("the preset as it is"),
    "batch-20": Entry("batch 20 instead of 16", {"data.global_batch": 20}),
    "no-sdpa": Entry("the present style without SDPA: what SDPA brought", only=("present", "eager")),
    "no-compile": Entry("ours without torch.compile: what compiling brings", only=("eager", "sdpa")),
    "one-fine": Entry("one fine iteration instead of two", {"objective.fine_iterations": 1}),
    "224px": Entry("frames of 224 px instead of 256", {"data.frame_size": 224}),
    "optimized": Entry("both", {"objective.fine_iterations": 1, "data.frame_size": 224}),
    "coarse-interval": Entry("coarse losses at the preset's interval against every 100 steps"),
}

_FEED = "python -m ray_jobs.train joint_multifine --feed-test --data.path"
_PREPARE = "python -m ray_jobs.prepare --videos VIDEOS --captions CSV --latents sd-vae-ft-mse"
LOADING = {
    "more workers": f"{_FEED} DATA --data.decode-threads 4",
    "loaders and their workers": "python tests/benchmarks/ingest --workers 1,2,3",
    "smaller shards": f"{_PREPARE} --clips-per-shard 100 --out DATA100 && {_FEED} DATA100",
    "50-clip shards": f"{_PREPARE} --clips-per-shard 50 --out DATA50 && {_FEED} DATA50",
}
"""Rows about loading: a step's benchmark has nothing to say of them, these commands have."""


def run(bench: Bench, config: Config, specs: list[Spec], keys: list[str]) -> list[dict[str, Any]]:
    """The rows in `keys`, as far as the time reaches, and the commands for loading."""
    out: list[dict[str, Any]] = []
    for key in keys:
        entry = ENTRIES[key]
        print(f"{key}: {entry.about}")
        if bench.left() < 0:
            out.append({"row": key, "note": "not measured: out of time"})
            continue
        torch._dynamo.reset()  # or its limit of compilations is reached, and steps go on uncompiled
        chosen = specs if entry.only is None else [Spec(entry.only[0], specs[-1].precision, entry.only[1])]
        changed = with_changes(config, entry.changes)
        if key == "coarse-interval":
            out += [{"row": key, "about": entry.about} | row for row in readings(bench, changed, chosen)]
        else:
            for row in compare(bench, changed, chosen):
                out.append({"row": key, "about": entry.about} | dataclasses.asdict(row))
    _print(out)
    return out


def _print(rows: list[dict[str, Any]]) -> None:
    cells = [["", "", "ms/step", "clips/s", "peak GB"]]
    for row in rows:
        if row["row"] == "coarse-interval" and "variant" in row:
            every = [row["plain_ms"] / (1 - row[share]) for share in ("share", "share_at_100")]
            cells.append([row["row"], row["variant"], f"{every[0]:.1f} -> {every[1]:.1f}", "-", "-"])
        elif row.get("ms") is not None:
            peak = "-" if row["peak_gb"] is None else f"{row['peak_gb']:.2f}"
            name = f"{row['variant']} {row['precision']}"
            cells.append([row["row"], name, f"{row['ms']:.1f}", f"{row['clips_s']:.2f}", peak])
        else:
            cells.append([row["row"], row["note"], "-", "-", "-"])
    print(aligned(cells))
    print("Loading has commands of its own:")
    for key, command in LOADING.items():
        print(f"  {key}: {command}")
