"""A thread that writes what there is to log, in order, while training goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Self

from fvlm.train.metrics import Row
from fvlm.train.sinks import Picture, Sink

MAX_QUEUED = 1000
"""Entries that may wait to be written; with more, whoever logs waits: a disk so slow must not fill the memory."""

Work = Callable[[], object]


class LogWriter:
    """A sink that hands everything on to `sinks` from a thread of its own, in the order in which it came.

    So a sink is only ever called from one thread, and a slow disk or service does not hold the training. The first
    error that a sink raises (UserError: a full disk) ends the writing: what comes later is dropped, so that no file
    lacks a line before another one; `check`, `flush` and `close` raise that error.
    """

    def __init__(self, sinks: list[Sink]):
        self._sinks = sinks
        self._queue: queue.Queue[tuple[Work, Future[None]] | None] = queue.Queue(MAX_QUEUED)
        self._error: BaseException | None = None
        self._closed = False
        # A daemon: a disk that hangs must not keep a process that was told to end from ending.
        self._thread = threading.Thread(target=self._serve, name="log-writer", daemon=True)
        self._thread.start()

    # ---- the sink

    def write(self, rows: list[Row], latest: Row) -> None:
        self._each(lambda sink: sink.write(rows, latest))

    def evaluated(self, row: Row, pictures: list[Picture]) -> None:
        """Return when it is written: a checkpoint that follows implies the evaluation of its step."""
        self._each(lambda sink: sink.evaluated(row, pictures))
        self.flush()

    def note(self, text: str) -> None:
        self._each(lambda sink: sink.note(text))

    def close(self) -> None:
        """Write everything, close the sinks and end the thread. Raises what a sink raised. May be called again."""
        if self._closed:
            return
        self._closed = True

        def close_sinks() -> None:
            for sink in reversed(self._sinks):  # the log last: others still have something to tell
                sink.close()

        done = self.submit(close_sinks)
        self._queue.put(None)
        done.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """After an error, return when everything before it is written; whoever logs the error comes later."""
        if error is None or self._closed:  # closed: the thread is gone, and nobody would answer
            return
        try:
            self.flush()
        except Exception as failed:  # noqa: BLE001  the error that ends the run is the one to be told
            if failed is not error:
                error.add_note(f"Besides, not everything could be logged: {failed}")

    # ---- the queue

    def submit(self, work: Work) -> Future[None]:
        """Let the thread do `work` after all that was submitted before. -> done, or the error that kept it from it."""
        done: Future[None] = Future()
        if threading.current_thread() is self._thread:
            work()  # what an entry has to tell belongs to that entry, which fails with it
            done.set_result(None)
        else:
            self._queue.put((work, done))
        return done

    def flush(self) -> None:
        """Wait until everything that was submitted is written. Raises what a sink raised."""
        self.submit(lambda: None).result()

    def check(self) -> None:
        """Raise what a sink raised."""
        if self._error:
            raise self._error

    # ---- the thread

    def _each(self, call: Callable[[Sink], None]) -> None:
        def call_all() -> None:
            for sink in self._sinks:
                call(sink)

        self.submit(call_all)

    def _serve(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._do(*entry)
            del entry  # or it would keep what it holds while the thread waits for the next

    def _do(self, work: Work, done: Future[None]) -> None:
        try:
            self.check()
            work()
        except BaseException as error:  # noqa: BLE001  raised in the training thread
            self._error = self._error or error
            done.set_exception(error)
        else:
            done.set_result(None)
