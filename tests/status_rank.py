"""A real run of a tiny model with its folder, hooks and log, without Ray: what tests of run folders watch and kill.

python tests/status_rank.py PAUSE_S -- OPTIONS (of ray_jobs.train) trains until the end or until it is killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import tiny_run
from datasets import write_dataset

from fvlm.config import Config
from fvlm.data.shards import read_manifest
from fvlm.train.logger import Logger
from fvlm.train.loop import Hook, train
from fvlm.train.resume import choose_checkpoint
from fvlm.train.run_folder import Claim, exclusive, open_run
from fvlm.train.samples import Samples
from fvlm.train.saver import Saver
from fvlm.train.sinks import JsonLines, TrainLog
from fvlm.train.store import checkpoint_store
from ray_jobs.command import remember
from ray_jobs.options import parse
from ray_jobs.training import announce, conclude

STEPS, SAVE_EVERY = 40, 10


def options(root: Path, run: str = "mine", *more: str) -> list[str]:
    """Of a run whose model and batches are `tiny_run`'s. Makes its dataset, which is as long as `tiny_run`'s plan."""
    if not (root / "data").exists():
        write_dataset(root / "data", clips=64, shards=1)
    paths = ["--run", run, "--runs-dir", str(root / "runs"), "--data.path", str(root / "data")]
    small = "--data.global-batch 2 --data.lanes 2 --data.frame-size 56 --model.query-width 20 --log.wandb off"
    often = f"--train.max-steps {STEPS} --train.save-every {SAVE_EVERY} --train.log-every 2 --objective.coarse-every 2"
    return ["demo", *paths, *small.split(), *often.split(), *more]


class Pause:
    """A hook that makes a step last."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def after_step(self, step: int, scalars: object) -> None:
        time.sleep(self._seconds)


def start(args: list[str], stop: Callable[[], bool] = lambda: False, pause_s: float = 0.0) -> Config:
    """One start of the run, as `ray_jobs.train` and its rank 0 make one."""
    config = parse(args)
    run_dir = open_run(config, read_manifest(config.data.path))
    with exclusive(run_dir):
        remember(config, args)
        store = checkpoint_store(config, Claim(run_dir).require)
        choice = choose_checkpoint(store, run_dir)
        run = tiny_run.make_run(config)
        if choice.name:
            with store.open(choice.name) as path:
                run.restore(path)
        sinks = [TrainLog(run_dir, config.train.max_steps), JsonLines(run_dir, run.step)]
        announce(run, 0, sinks, choice, 1, None)
        samples = Samples(config, run.step, 0, 1)
        with Saver(run, store, sinks[0].note) as saver:
            hooks: list[Hook] = [Logger(run, sinks, samples), saver, Pause(pause_s)]
            train(run, samples.of(tiny_run.batches(run.step + 1)), hooks, stop)
            if run.step < config.train.max_steps:
                hooks[0].flush()
                saver.save_now()
        conclude(run, SimpleNamespace(captions_cut=0), sinks, 0)
    return config


if __name__ == "__main__":
    start(sys.argv[3:], pause_s=float(sys.argv[1]))
