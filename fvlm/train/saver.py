"""The hook that saves: a snapshot in the training thread, all the rest in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Self

import torch

from fvlm.train.loop import Run, is_save_step
from fvlm.train.metrics import Row, Scalars
from fvlm.train.snapshot import Snapshot, Snapshots, give_shards
from fvlm.train.step import is_recorded
from fvlm.train.store import CheckpointStore, prune

POLL_S = 0.5


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is safe."""

    name: str
    step: int
    write_s: float


@dataclass(frozen=True)
class Writing:
    """A checkpoint on its way."""

    snapshot: Snapshot
    stall_s: float
    """How long the host was held for it."""
    future: Future[Saved]

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

    alive: called again and again while training waits for a write that gets further (`HangWatch.extend`)
    """

    def __init__(
        self,
        run: Run,
        store: CheckpointStore,
        note: Callable[[str], None],
        alive: Callable[[], None] = lambda: None,
    ):
        self._run, self._store, self._note, self._alive = run, store, note, alive
        self._pieces = 0
        """That were written and hashed so far; counted by the writer's thread alone."""
        self._device = next(run.model.parameters()).device
        self._snapshots = Snapshots(run.model, run.optimizer, is_recorded(run.config, self._device))
        self._writing: Writing | None = None
        self._newest = run.step
        self._news: Row = {}

    def after_step(self, step: int, scalars: Scalars) -> None:
        self._collect(wait=False)
        reserved = self._snapshots.reserve()
        if reserved and (how := self._snapshots.describe()):
            self._note(how)
        if is_save_step(step, self._run.config):
            self._begin(step)
        elif not reserved:
            return
        if step == self._run.config.train.max_steps:
            self.close()
        self._run.clock.resume()  # a pause is not training time

    def save_now(self) -> None:
        """A checkpoint of this very step, whatever `save_every` says; safe when this returns.

        For a run that was asked to stop. All metrics must have been read (`Logger.flush`, on every rank).
        """
        if self._newest != self._run.step:
            self._begin(self._run.step)
        self.close()

    def close(self) -> None:
        """Wait for the write in flight. Raises what it ran into."""
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
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"Besides, the last checkpoint failed: {failed}")

    def _begin(self, step: int) -> None:
        begin = time.perf_counter()
        self._collect(wait=True)
        snapshot = self._snapshots.take(step, self._run.state_later())
        self._newest = step
        stall_s = time.perf_counter() - begin
        future: Future[Saved] = Future()

        def write() -> None:
            try:
                future.set_result(self._write(snapshot))
            except BaseException as error:  # noqa: BLE001  raised in the training thread
                future.set_exception(error)

        # A daemon: a disk that hangs must not keep a process that was told to end from ending.
        threading.Thread(target=write, daemon=True, name="checkpoint-writer").start()
        self._writing = Writing(snapshot, stall_s, future)

    def _write(self, snapshot: Snapshot) -> Saved:
        """In the writer's thread."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # or what it asks CUDA for makes a context on the first GPU
        begin = time.perf_counter()
        contents = replace(snapshot.contents(), progress=self._count_piece)
        self._store.write(contents)
        saved = Saved(contents.name, contents.step, time.perf_counter() - begin)
        train = self._run.config.train
        prune(self._store, contents.step, train.keep_last, train.milestones)
        return saved

    def _collect(self, wait: bool) -> None:
        """Take note of a write that is over."""
        if self._writing is None or not (wait or self._writing.done()):
            return
        writing, self._writing = self._writing, None
        self._wait_for(writing.future)
        saved = writing.future.result()
        hold_ms = writing.snapshot.held_ms(wait=True) or 0.0
        stall_ms = 1e3 * writing.stall_s + hold_ms
        news: Row = {"checkpoint/step": float(saved.step), "checkpoint/stall_ms": stall_ms}
        news |= {"checkpoint/hold_ms": hold_ms} if self._device.type == "cuda" else {}
        self._news = news | {"checkpoint/write_s": saved.write_s}
        self._note(f"saved {saved.name} in {saved.write_s:.1f} s; training was held for {stall_ms:.0f} ms")

    def _count_piece(self) -> None:
        self._pieces += 1

    def _wait_for(self, future: Future[Saved]) -> None:
        # The watch is neither armed as for a step nor off: a store that takes 20 GB at 30 MB/s is slow and no hang, and
        # one that takes nothing any more, a dead disk, is a hang that nothing else would end.
        seen = -1
        while not future.done():
            if seen != self._pieces:
                seen = self._pieces
                self._alive()
            futures.wait([future], POLL_S)


class ShardGiver:
    """What the other ranks have for a hook where rank 0 has its `Saver`: the shards that it lacks."""

    def __init__(self, run: Run):
        self._run = run
        self._newest = run.step

    def after_step(self, step: int, scalars: Scalars) -> None:
        if is_save_step(step, self._run.config):
            self.save_now()

    def save_now(self) -> None:
        if self._newest != self._run.step:
            give_shards(self._run.model, self._run.optimizer)
            self._newest = self._run.step
