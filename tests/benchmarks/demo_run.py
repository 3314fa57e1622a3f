"""Whole runs of the demo's model, as a user starts them, for the benchmarks that compare them with something."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

from fvlm import presets
from fvlm.config import Config
from fvlm.train.sinks import METRICS

LAP, LEFT_OUT = 10, 2
"""Steps between two log lines, and the laps of a run that do not count: Ray's own processes start in them."""


def demo_config(root: Path, run: str, steps: int, clips: int = 8, ranks: int = 1, threads: int = 1) -> Config:
    """Of a run on the dataset `root`/data, with a lane for each of a step's clips."""
    config = presets.demo()
    return dataclasses.replace(
        config,
        run=run,
        runs_dir=str(root / "runs"),
        data=dataclasses.replace(config.data, path=str(root / "data"), global_batch=clips, lanes=clips),
        train=dataclasses.replace(config.train, max_steps=steps, log_every=LAP),
        scale=dataclasses.replace(config.scale, workers=ranks, cpus_per_worker=float(threads)),
    )


def train(config: Config) -> list[dict[str, float]]:
    """-> the rows of its metrics, one a step."""
    options = {
        "data.path": config.data.path, "runs-dir": config.runs_dir, "run": config.run, "log.wandb": "off",
        "data.global-batch": config.data.global_batch, "data.lanes": config.data.lanes,
        "train.max-steps": config.train.max_steps, "train.log-every": config.train.log_every,
        "scale.workers": config.scale.workers, "scale.cpus-per-worker": config.scale.cpus_per_worker,
    }  # fmt: skip
    words = itertools.chain.from_iterable((f"--{key}", str(value)) for key, value in options.items())
    command = [sys.executable, "-m", "ray_jobs.train", "demo", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)
    return [json.loads(line) for line in (config.run_dir / METRICS).read_bytes().splitlines()]


def laps(rows: list[dict[str, float]]) -> list[float]:
    """Seconds a step of each lap that counts, with waiting for data and all hooks in them."""
    return [row["train/step_time"] for row in rows if "train/step_time" in row][LEFT_OUT:]
