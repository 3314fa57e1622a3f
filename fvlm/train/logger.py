"""The hook that reads the metrics off the device and hands them on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Self

import torch

from fvlm.errors import UserError
from fvlm.ranks import world_size
from fvlm.train.flops import FlopMeter
from fvlm.train.log_writer import LogWriter
from fvlm.train.loop import Run, is_save_step
from fvlm.train.metrics import Read, Row, Scalars
from fvlm.train.optim import learning_rate
from fvlm.train.samples import Samples
from fvlm.train.sinks import Sink
from fvlm.train.skipped import SkippedSteps

READ_AFTER = 2
"""Steps that a GPU has been handed before the metrics of one are read. The host need not wait for them then, or only
while the GPU has those to do: the queue of work does not run empty. All ranks read at the same steps."""


class Logger:
    """Gathers every step's scalars; every `log_every` steps reads them and hands them to the sinks.

    Every rank runs one (the scalars are the same on all, and so are the averages in their checkpoints); only rank 0
    has sinks. `samples` knows this rank's clips; `feed` says how the ingest did since it was last asked, `remote`
    what has to be asked for over the network. With a `writer`, sinks and `remote` are called in its thread, after
    everything it was given before; without, at once. Use it in a `with` block inside that of the `Saver`: a checkpoint
    in flight waits for the lines of its steps. `meter` says how many operations were computed.
    """

    def __init__(
        self,
        run: Run,
        sinks: list[Sink],
        samples: Samples,
        feed: Callable[[], Row] = dict,
        remote: Callable[[], Row] = dict,
        writer: LogWriter | None = None,
        read_after: int | None = None,
        meter: FlopMeter | None = None,
    ):
        self.run, self.sinks, self.samples, self.feed, self.meter = run, sinks, samples, feed, meter
        self._remote, self._writer = remote, writer
        self.skipped = SkippedSteps(run.config, run.step, is_writer=samples.rank == 0)
        on_gpu = run.model.q_static.is_cuda
        self._read_after = (READ_AFTER if on_gpu else 0) if read_after is None else read_after

    def after_step(self, step: int, scalars: Scalars) -> None:
        if self._writer:
            self._writer.check()
        metrics, config = self.run.metrics, self.run.config
        metrics.add(step, scalars)
        saves = is_save_step(step, config)
        # Before a checkpoint too: what it counts as done must be in the files before it appears.
        if step % config.train.log_every == 0 or saves:
            if saves:  # it may have to wait for the checkpoint before it, which waits for these
                self._read(step - 1)
            metrics.gather()
        self._read(step if step == config.train.max_steps else step - self._read_after)

    def flush(self) -> None:
        """Read everything up to now, and return when it is written. All ranks do so at the same step.

        Raises UserError, with all of it written, when too many steps in a row were skipped.
        """
        self.run.metrics.gather()
        self.read_gathered()
        if self._writer:
            self._writer.flush()

    def read_gathered(self) -> None:
        """Read all that was gathered. Waits for the device. All ranks do so at the same step: they exchange clips."""
        self._read(self.run.step)

    def _read(self, last_step: int) -> None:
        """What was gathered up to `last_step`. Raises UserError, with all of it handed on, as `flush` does."""
        self._read_up_to(last_step)
        self.skipped.raise_if_too_many()

    def _read_up_to(self, last_step: int) -> None:
        due = [step for step in self.run.metrics.gathered if step <= last_step]
        if not due:
            return
        reads: list[Read] = []
        try:
            reads += (self.run.metrics.read() for _ in due)  # what was read before an error is told of it below
            self.run.clock.computed()  # it was waited for here, and not for data
            speed = self._speed(sum(len(read.rows) for read in reads))
            while reads:
                self._hand_on(reads[0], speed)
                reads.pop(0)
        except BaseException as error:
            for read in reads:
                read.failed(error)
            raise

    def _hand_on(self, read: Read, speed: Row) -> None:
        rows = read.rows
        last = int(rows[-1]["step"])
        clips = self.samples.take(last)
        for row in rows:
            row |= self._position(int(row["step"]))
        notes = self.skipped.record(rows, clips)
        left_s = (self.run.config.train.max_steps - last) * speed["train/step_time"]
        rows[-1] |= speed | {"train/eta_s": left_s, "train/skipped_total": float(self.skipped.total)}
        if self._writer is None:
            self._write(rows, read.latest, notes)
            read.written()
            return

        def settle(done: Future[None]) -> None:
            if error := done.exception():  # its own, or one before it, after which nothing is written any more
                read.failed(error)
            else:
                read.written()

        self._writer.submit(lambda: self._write(rows, read.latest, notes)).add_done_callback(settle)

    def _write(self, rows: list[Row], latest: Row, notes: list[str]) -> None:
        """In the writer's thread, if there is one."""
        if not self.sinks:
            return
        rows[-1] |= self._remote()
        latest = latest | rows[-1]
        for sink in self.sinks:
            for note in notes:
                sink.note(note)
            sink.write(rows, latest)

    def _position(self, step: int) -> Row:
        config, plan = self.run.config, self.run.plan
        return {"train/lr": learning_rate(step - 1, config.optim), "train/epoch": plan.epochs(step)}

    def _speed(self, steps: int) -> Row:
        """Since it was last asked, when the device had `steps` fewer finished."""
        # The steps that are read now, not those handed over: those of READ_AFTER are still being computed.
        step_time, wait = self.run.clock.lap(steps)
        on_gpu = self.run.model.q_static.is_cuda
        feed = self.feed() | (self.meter.lap(step_time) if self.meter else {})
        return {
            "train/step_time": step_time,
            "train/data_wait": wait,
            "train/clips_per_s": self.run.config.data.global_batch / step_time if step_time else 0.0,
            "train/vram_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
            "train/trained_s": self.run.clock.trained_s,
        } | feed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """After an error, write what can be: on one rank all of it, on several what was read, since others may be gone.

        A checkpoint whose lines cannot be written any more is given up.
        """
        if error is None:
            return
        try:
            if world_size() == 1:
                self._read_up_to(self.run.step)
        except Exception as failed:  # noqa: BLE001  the error that ends the run is the one to be told
            if failed is not error:
                error.add_note(f"Besides, the last metrics could not be written: {failed}")
        finally:
            self.run.metrics.abandon(UserError(f"training ended before the metrics were read: {error!r:.200}"))
