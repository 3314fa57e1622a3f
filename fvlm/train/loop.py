"""One rank's training: a loop of ten lines, and the hooks that log and save around it."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

import fvlm
from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.data.plan import Plan
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.train.metrics import Clock, Metrics, Row
from fvlm.train.optim import learning_rate
from fvlm.train.sinks import Sink
from fvlm.train.state import load_checkpoint, prune, save_checkpoint
from fvlm.train.step import Scalars, train_step


class Hook(Protocol):
    def after_step(self, step: int, scalars: Scalars) -> None:
        """`step` counts finished steps: 1 after the first."""


@dataclass
class Run:
    """What one rank trains: everything that changes with a step."""

    config: Config
    plan: Plan
    model: FoveatedVLM
    optimizer: torch.optim.Optimizer
    metrics: Metrics
    clock: Clock
    step: int = 0
    """Finished steps: the cursor."""

    def restore(self, checkpoint: Path) -> None:
        """Go on where `checkpoint` left off."""
        state = load_checkpoint(checkpoint, self.model, self.optimizer)
        self.plan = dataclasses.replace(self.plan, origin=state["origin"])
        if state["plan"] != self.plan.fingerprint:
            raise ValueError(
                f"{checkpoint}: its cursor counts in another plan; the run folder's config should have told"
            )
        self.step = state["step"]
        self.metrics.load_state_dict(state["metrics"])
        self.clock = Clock(trained_s=state["trained_s"])

    def save(self, root: Path) -> Path:
        return save_checkpoint(root, self.step, self.model, self.optimizer, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return run_state(self.config, self.plan, self.metrics, self.clock.trained_s)


def run_state(config: Config, plan: Plan, metrics: Metrics, trained_s: float) -> dict[str, Any]:
    """What state.json holds besides the step and the files."""
    return {
        "plan": plan.fingerprint,
        "origin": plan.origin,
        "dataset": plan.dataset,
        "metrics": metrics.state_dict(),
        "trained_s": trained_s,
        "config": config.to_dict(),
        "versions": {"fvlm": fvlm.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def train(run: Run, batches: Iterator[Batch], hooks: list[Hook]) -> None:
    """Train until `max_steps`."""
    run.clock.resume()
    while run.step < run.config.train.max_steps:
        batch = next(batches)
        run.clock.waited()
        scalars = train_step(run.model, run.optimizer, batch, run.step, run.config)
        run.step += 1
        run.clock.stepped()
        for hook in hooks:
            hook.after_step(run.step, scalars)


class Logger:
    """Gathers every step's scalars; every `log_every` steps reads them and hands them to the sinks.

    Every rank runs one (the scalars are the same on all, and so are the averages in their checkpoints); only rank 0
    has sinks. `feed` says how the ingest did since it was last asked.
    """

    def __init__(self, run: Run, sinks: list[Sink], feed: Callable[[], Row] = dict):
        self.run, self.sinks, self.feed = run, sinks, feed

    def after_step(self, step: int, scalars: Scalars) -> None:
        self.run.metrics.add(step, scalars)
        config = self.run.config.train
        # Before a checkpoint too: what it counts as done must be in the files.
        if step % config.log_every == 0 or is_save_step(step, self.run.config):
            self.flush()

    def flush(self) -> None:
        rows = self.run.metrics.drain()
        if not rows:
            return
        for row in rows:
            row |= self._position(int(row["step"]))
            _require_finite(row)
        speed = self._speed()
        rows[-1] |= speed
        latest = self.run.metrics.latest | self._position(self.run.step) | speed
        for sink in self.sinks:
            sink.write(rows, latest)

    def _position(self, step: int) -> Row:
        config, plan = self.run.config, self.run.plan
        return {"train/lr": learning_rate(step - 1, config.optim), "train/epoch": plan.epochs(step)}

    def _speed(self) -> Row:
        step_time, wait = self.run.clock.lap()
        on_gpu = self.run.model.q_static.is_cuda
        return {
            "train/step_time": step_time,
            "train/data_wait": wait,
            "train/clips_per_s": self.run.config.data.global_batch / step_time if step_time else 0.0,
            "train/vram_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
            "train/eta_s": (self.run.config.train.max_steps - self.run.step) * step_time,
            "train/trained_s": self.run.clock.trained_s,
        } | self.feed()


def _require_finite(row: Row) -> None:
    """Stop before a ruined model reaches a checkpoint. Raises UserError."""
    for name in ("train/loss", "train/grad_norm"):
        if not math.isfinite(row[name]):
            raise UserError(
                f"{name} is {row[name]} at step {int(row['step'])}. The checkpoints are from before it and good. "
                "Lower --optim.lr in a new run, or look for broken latents in the dataset."
            )


class Saver:
    """Every `save_every` steps and at the end: a checkpoint by rank 0, then `committed(path)` on every rank."""

    def __init__(self, run: Run, root: Path, is_writer: bool, committed: Callable[[int, Path | None], None]):
        self.run, self.root, self.is_writer, self.committed = run, root, is_writer, committed

    def after_step(self, step: int, scalars: Scalars) -> None:
        if not is_save_step(step, self.run.config):
            return
        path = None
        if self.is_writer:
            path = self.run.save(self.root)
            prune(self.root, self.run.config.train.keep_last, self.run.config.train.milestones)
        self.committed(step, path)
        self.run.clock.resume()  # a pause is not training time


def is_save_step(step: int, config: Config) -> bool:
    return step % config.train.save_every == 0 or step == config.train.max_steps
