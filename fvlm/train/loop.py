"""One rank's training: a loop of ten lines, and the hooks that log and save around it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.data.plan import Plan
from fvlm.model.foveated import FoveatedVLM
from fvlm.train.device import StepsAhead
from fvlm.train.metrics import Clock, Metrics, Scalars
from fvlm.train.run_state import RunState
from fvlm.train.state import STATE, contents_of, open_checkpoint
from fvlm.train.step import Step
from fvlm.train.store import LocalStore


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

    @functools.cached_property
    def take_step(self) -> Step:
        """Made when it is first asked for: that sets how the model runs, and hooks."""
        return Step(self.config, self.model, self.optimizer)

    def restore(self, checkpoint: Path) -> None:
        """Go on where `checkpoint` left off. Raises UserError, and has changed nothing, when it is not of this run."""
        stored = open_checkpoint(checkpoint, self.model, self.optimizer)
        file = str(checkpoint / STATE)
        state = RunState.from_dict(file, stored.state)
        plan = dataclasses.replace(self.plan, origin=state.origin)
        state.require_same_run(file, self.config, plan)
        self.metrics.load_state_dict(state.metrics)
        stored.apply()
        self.plan, self.step, self.clock = plan, stored.state["step"], Clock(trained_s=state.trained_s)

    def save(self, root: Path) -> Path:
        """A checkpoint in the folder `root`, safe when this returns. While training, `Saver` does it."""
        contents = contents_of(self.step, self.model, self.optimizer, self.state_dict())
        LocalStore(root).write(contents)
        return root / contents.name

    def state_dict(self) -> dict[str, Any]:
        """What state.json holds besides the step and the files. All metrics must have been read."""
        return self._state(self.metrics.state_dict()).to_dict()

    def state_later(self) -> Callable[[], dict[str, Any]]:
        """What `state_dict` says once the metrics of the steps up to now were read and written.

        What is returned waits for that, so it is to be called in another thread. All metrics must have been gathered.
        """
        metrics, state = self.metrics.state_later(), self._state({})
        return lambda: dataclasses.replace(state, metrics=metrics.result()).to_dict()

    def _state(self, metrics: dict[str, Any]) -> RunState:
        return RunState.of(self.config, self.plan, metrics, self.clock.trained_s, self.step)


def train(run: Run, batches: Iterator[Batch], hooks: list[Hook], stop: Callable[[], bool] = lambda: False) -> None:
    """Train until `max_steps`, or until `stop()`, which is asked after every step."""
    ahead = StepsAhead(next(run.model.parameters()).device)
    run.clock.resume()
    while run.step < run.config.train.max_steps:
        run.clock.computed()  # what the hooks took was no wait for data
        batch = next(batches)
        if ahead.is_busy():
            run.clock.computed()  # whatever the host waited for, the device did not
        else:
            run.clock.waited()
        scalars = run.take_step(batch, run.step)
        run.step += 1
        ahead.stepped()
        run.clock.stepped()
        for hook in hooks:
            hook.after_step(run.step, scalars)
        if stop():
            break


def is_save_step(step: int, config: Config) -> bool:
    return step % config.train.save_every == 0 or step == config.train.max_steps
