"""The hook that reads the metrics off the device and hands them on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fvlm.train.flops import FlopMeter
from fvlm.train.loop import Run, is_save_step
from fvlm.train.metrics import Row, Scalars
from fvlm.train.optim import learning_rate
from fvlm.train.samples import Samples
from fvlm.train.sinks import Sink
from fvlm.train.skipped import SkippedSteps


class Logger:
    """Gathers every step's scalars; every `log_every` steps reads them and hands them to the sinks.

    Every rank runs one (the scalars are the same on all, and so are the averages in their checkpoints); only rank 0
    has sinks. `samples` knows this rank's clips; `feed` says how the ingest did since it was last asked; `meter` how
    many operations were computed.
    """

    def __init__(
        self,
        run: Run,
        sinks: list[Sink],
        samples: Samples,
        feed: Callable[[], Row] = dict,
        meter: FlopMeter | None = None,
    ):
        self.run, self.sinks, self.samples, self.feed, self.meter = run, sinks, samples, feed, meter
        self.skipped = SkippedSteps(run.config, run.step, is_writer=samples.rank == 0)

    def after_step(self, step: int, scalars: Scalars) -> None:
        self.run.metrics.add(step, scalars)
        config = self.run.config.train
        # Before a checkpoint too: what it counts as done must be in the files.
        if step % config.log_every == 0 or is_save_step(step, self.run.config):
            self.flush()

    def flush(self) -> None:
        """Read and write everything up to now. All ranks do so at the same step: they may exchange clips.

        Raises UserError, with all of it written, when too many steps in a row were skipped.
        """
        rows = self.run.metrics.drain()
        self.run.clock.computed()  # it was waited for here, and not for data
        if not rows:
            return
        clips = self.samples.take(int(rows[-1]["step"]))
        for row in rows:
            row |= self._position(int(row["step"]))
        notes = self.skipped.record(rows, clips)
        rows[-1] |= self._speed() | {"train/skipped_total": float(self.skipped.total)}
        latest = self.run.metrics.latest | rows[-1]
        for sink in self.sinks:
            for note in notes:
                sink.note(note)
            sink.write(rows, latest)
        self.skipped.require_few()

    def _position(self, step: int) -> Row:
        config, plan = self.run.config, self.run.plan
        return {"train/lr": learning_rate(step - 1, config.optim), "train/epoch": plan.epochs(step)}

    def _speed(self) -> Row:
        step_time, wait = self.run.clock.lap()
        on_gpu = self.run.model.q_static.is_cuda
        feed = self.feed() | (self.meter.lap(step_time) if self.meter else {})
        return {
            "train/step_time": step_time,
            "train/data_wait": wait,
            "train/clips_per_s": self.run.config.data.global_batch / step_time if step_time else 0.0,
            "train/vram_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
            "train/eta_s": (self.run.config.train.max_steps - self.run.step) * step_time,
            "train/trained_s": self.run.clock.trained_s,
        } | feed
