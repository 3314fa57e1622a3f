"""The hook that saves: a snapshot in the training thread, all the rest in another.

A store that is away (`StoreUnavailable`) does not end the training. In mid-run the snapshot is kept and written again
and again while training goes on, until it is safe or the next save takes its place: then that one is. A save that comes
while a try is being made that gets no further is left out, since that try needs the snapshot's memory. The last
checkpoint, after the last step or when the run was asked to stop, is waited for, up to `scale.store_wait_s`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Self

import torch

from fvlm.data.counts import counted
from fvlm.data.outage import Outage
from fvlm.errors import StoreUnavailable
from fvlm.train.checkpoint_writer import CheckpointWriter, GivenUp, Lines, Saved
from fvlm.train.loop import Run, is_save_step
from fvlm.train.metrics import Row, Scalars
from fvlm.train.save_signal import LEAVE_OUT, TAKE, WAIT, SaveSignal, What
from fvlm.train.snapshot import Snapshot, Snapshots, give_shards
from fvlm.train.state import Contents
from fvlm.train.step import is_recorded
from fvlm.train.store import CheckpointStore, prune, remember_place

POLL_S = 0.5
QUIET_S, AWAY_QUIET_S = 20.0, 2.0
"""Training waits for a write that gets further; for one that has not for so long it does not. The second: after a try
that has failed because the store is away."""


@dataclass(frozen=True)
class Writing:
    """A checkpoint on its way."""

    snapshot: Snapshot
    stall_s: float
    """How long the host was held for it."""
    writer: CheckpointWriter

    @property
    def future(self) -> Future[Saved]:
        return self.writer.future

    def done(self) -> bool:
        """Whether it is safe, or failed, and it is known how long the GPU was held."""
        return self.future.done() and self.snapshot.held_ms() is not None


class Saver:
    """Every `save_every` steps and at the end, a checkpoint: taken at once, written while training goes on.

    For rank 0 alone; the others have a `ShardGiver`. At most one is being written: the next waits for it, which counts
    as time that training was held. What a person should know goes to `note`, always from the training thread. Put it
    after the hook that reads the metrics, and use it in a `with` block: leaving that waits for the write in flight. A
    checkpoint does not appear before the metrics of its steps are written (`Run.state_later`).
    What the writer ran into is raised by the next step, or there (UserError: a full disk).

    alive:  called again and again while training waits for a write that gets further (`HangWatch.extend`)
    signal: to the other ranks, where there are some
    """

    def __init__(
        self,
        run: Run,
        store: CheckpointStore,
        note: Callable[[str], None],
        alive: Callable[[], None] = lambda: None,
        signal: SaveSignal | None = None,
    ):
        self._run, self._store, self._note, self._alive, self._signal = run, store, note, alive, signal
        self._lines = Lines()
        self._outage = Outage(self._lines.add, run.config.scale.store_wait_s)
        self._left_out = 0
        """Checkpoints since the last one that is safe."""
        self._pieces = 0
        """That were written and hashed so far; counted by the writer's thread alone."""
        self._piece_at = 0.0
        self._is_said = False
        self._device = next(run.model.parameters()).device
        self._snapshots = Snapshots(run.model, run.optimizer, is_recorded(run.config, self._device))
        self._writing: Writing | None = None
        self._newest = run.step
        self._news: Row = {}

    def after_step(self, step: int, scalars: Scalars) -> None:
        self._lines.hand_on(self._note)
        self._collect(wait=False)
        reserved = self._snapshots.reserve()
        if reserved and (how := self._snapshots.describe()):
            self._note(how)
        is_last = step == self._run.config.train.max_steps
        if is_save_step(step, self._run.config):
            self._begin(step, must=is_last)
        elif not reserved:
            return
        if is_last:
            self.close()
        self._run.clock.resume()  # a pause is not training time

    def save_now(self) -> None:
        """A checkpoint of this very step, whatever `save_every` says; safe when this returns.

        For a run that was asked to stop. All metrics must have been read (`Logger.flush`, on every rank).
        """
        if self._newest != self._run.step:
            self._begin(self._run.step, must=True)
        self.close()

    def close(self) -> None:
        """Wait for the write in flight. Raises what it ran into; StoreUnavailable: the store was away for too long."""
        if self._writing:
            self._wait_for(self._writing.writer, lambda: self._outage.is_too_long)
            if not self._writing.future.done():
                self._writing.writer.give_up()
                raise StoreUnavailable(
                    f"{self._store.locate()}: away for {self._outage.seconds:.0f} s, longer than --scale.store-wait-s; "
                    f"the checkpoint of step {self._newest} is not written."
                )
        self._collect(wait=True)

    def lap(self) -> Row:
        """News since the last call; empty when there are none.

        checkpoint/step      of the newest checkpoint that is safe
        checkpoint/stall_ms  how long training was held for it: the host, and a GPU's computation
        checkpoint/hold_ms   of these, how long a GPU's computation was
        checkpoint/write_s   from then until it was safe
        """
        news, self._news = self._news, {}
        return news

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        writing = self._writing
        try:
            if error is not None and writing:
                self._wait_for(writing.writer, lambda: self._quiet_s() > self._patience_s(writing.writer))
                writing.writer.give_up()  # whoever meets an error must not wait for a store that is away
                if not writing.future.done():
                    raise StoreUnavailable("its store is away")
            self.close()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"Besides, the last checkpoint failed: {failed}")

    def _begin(self, step: int, must: bool) -> None:
        begin = time.perf_counter()
        is_taken = self._may_begin(must)
        self._tell(TAKE if is_taken else LEAVE_OUT)
        if not is_taken:
            self._left_out += 1
            return
        snapshot = self._snapshots.take(step, self._run.state_later())
        self._newest = step
        stall_s = time.perf_counter() - begin
        self._piece_at, self._is_said = time.monotonic(), False
        self._writing = Writing(snapshot, stall_s, CheckpointWriter(self._write_of(snapshot), self._outage))

    def _may_begin(self, must: bool) -> bool:
        """Wait for the write in flight, or give it up. False: a try is being made just now, and gets no further.

        must: wait for that, too
        """
        if self._writing is None:
            return True
        writer, hang_s = self._writing.writer, self._run.config.scale.hang_s or math.inf
        # A disk that takes nothing for so long that any rank would count as hanging is left to the watch.
        self._wait_for(
            writer,
            lambda: writer.pauses or (not must and self._patience_s(writer) < self._quiet_s() < hang_s),
            self._tell_all,
        )
        if not writer.future.done():
            if not writer.pauses:
                self._say_quiet(self._writing.snapshot.step)
                return False
            writer.give_up()
            self._wait_for(writer, lambda: False, self._tell_all)  # for a try that has begun in this moment
        self._collect(wait=True)
        return True

    def _write_of(self, snapshot: Snapshot) -> Callable[[], Saved]:
        """What the writer's thread does, again if need be."""
        begin = time.perf_counter()
        made: list[Contents] = []

        def write() -> Saved:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # or what it asks CUDA for makes a context on the first GPU
            if not made:
                made.append(replace(snapshot.contents(), progress=self._count_piece))
            (contents,), train = made, self._run.config.train
            self._store.write(contents)
            saved = Saved(contents.name, contents.step, time.perf_counter() - begin)
            if train.checkpoint_dir:
                remember_place(self._store, self._run.config.run_dir, saved.name)
            with contextlib.suppress(StoreUnavailable):  # it is safe; what is too old goes after the next one
                prune(self._store, contents.step, train.keep_last, train.milestones)
            return saved

        return write

    def _collect(self, wait: bool) -> None:
        """Take note of a write that is over."""
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        self._wait_for(writing.writer)
        try:
            saved = writing.future.result()
        except GivenUp:
            self._left_out += 1
            return
        hold_ms = writing.snapshot.held_ms(wait=True) or 0.0
        stall_ms = 1e3 * writing.stall_s + hold_ms
        news: Row = {"checkpoint/step": float(saved.step), "checkpoint/stall_ms": stall_ms}
        news |= {"checkpoint/hold_ms": hold_ms} if self._device.type == "cuda" else {}
        self._news = news | {"checkpoint/write_s": saved.write_s}
        missing = f"; {self._left_out} before it were left out, their store was away" if self._left_out else ""
        self._left_out = 0
        self._note(f"saved {saved.name} in {saved.write_s:.1f} s; training was held for {stall_ms:.0f} ms{missing}")

    def _count_piece(self) -> None:
        self._pieces += 1
        self._piece_at = time.monotonic()

    def _quiet_s(self) -> float:
        """Seconds since the write got further."""
        return time.monotonic() - self._piece_at

    def _patience_s(self, writer: CheckpointWriter) -> float:
        return AWAY_QUIET_S if writer.is_away else QUIET_S

    def _say_quiet(self, step: int) -> None:
        """Once a checkpoint; an outage has lines of its own."""
        if not self._is_said and not self._outage.is_on:
            self._note(f"WARNING: the checkpoint of step {step} has got no further for {self._quiet_s():.0f} s; "
                       "training goes on, and the next ones are left out until it does")  # fmt: skip
        self._is_said = True

    def _wait_for(
        self,
        writer: CheckpointWriter,
        is_enough: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] | None = None,
    ) -> None:
        # The watch is neither armed as for a step nor off: a store that takes 20 GB at 30 MB/s is slow and no hang, and
        # one that takes nothing any more, a dead disk, is a hang that nothing else would end. A store that is away and
        # says so, by errors or by its client's own timeouts, is none.
        alive, seen = alive or self._alive, (-1, 0, 0)
        while not writer.future.done() and not is_enough():
            now = self._pieces, writer.tries, counted()["retries"]
            if now != seen or writer.pauses:
                seen = now
                alive()
            self._lines.hand_on(self._note)
            futures.wait([writer.future], POLL_S)
        self._lines.hand_on(self._note)

    def _tell_all(self) -> None:
        self._alive()
        self._tell(WAIT)

    def _tell(self, what: What) -> None:
        if self._signal:
            self._signal.tell(what)


class ShardGiver:
    """What the other ranks have for a hook where rank 0 has its `Saver`: the shards that it lacks.

    alive, signal: as for the Saver; alive is called while rank 0 waits
    """

    def __init__(self, run: Run, alive: Callable[[], None] = lambda: None, signal: SaveSignal | None = None):
        self._run, self._alive, self._signal = run, alive, signal
        self._newest = run.step

    def after_step(self, step: int, scalars: Scalars) -> None:
        if is_save_step(step, self._run.config):
            self.save_now()

    def save_now(self) -> None:
        if self._newest == self._run.step or (self._signal and not self._signal.is_taken(self._alive)):
            return
        give_shards(self._run.model, self._run.optimizer)
        self._newest = self._run.step
