"""A checkpoint on its way to the store, in a thread of its own, for as long as the store is away."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from fvlm.data.outage import Outage, sleep
from fvlm.errors import StoreUnavailable

SAVES_ON = "training goes on without a checkpoint"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is safe."""

    name: str
    step: int
    write_s: float


class GivenUp(Exception):
    """Before it was safe: its store was away, and a newer one was to be written, or the training ended."""


class CheckpointWriter:
    """Does `write`, again and again while that raises StoreUnavailable, with the pauses of `outage`.

    outage: of the store, perhaps one that has begun already; it is this thread's until `future` is done
    future: -> Saved; GivenUp; or what `write` raised besides
    """

    def __init__(self, write: Callable[[], Saved], outage: Outage):
        self.future: Future[Saved] = Future()
        self._write, self._outage = write, outage
        self._away = outage.is_on
        self._pauses = False
        self._tries = 0
        self._give_up = threading.Event()
        # A daemon: a disk that hangs must not keep a process that was told to end from ending.
        threading.Thread(target=self._run, daemon=True, name="checkpoint-writer").start()

    @property
    def is_away(self) -> bool:
        """Whether the last try has failed because the store is away, of this checkpoint or of the one before."""
        return self._away

    @property
    def pauses(self) -> bool:
        """Whether it is between two tries, and would be over at once if it were given up."""
        return self._pauses

    @property
    def tries(self) -> int:
        """Tries that failed."""
        return self._tries

    def give_up(self) -> None:
        """Make no other try. `future` is done as soon as the one that is being made is over."""
        self._give_up.set()

    def _run(self) -> None:
        try:
            self.future.set_result(self._until_safe())
        except BaseException as error:  # noqa: BLE001  raised in the training thread
            self.future.set_exception(error)

    def _until_safe(self) -> Saved:
        while True:
            try:
                saved = self._write()
            except StoreUnavailable as error:
                self._tries += 1
                self._away = True
                pause = self._outage.failed(error, SAVES_ON)
                self._pauses = True
                if not sleep(pause, self._give_up.is_set):
                    raise GivenUp(str(error)) from error
                self._pauses = False
            else:
                self._away = False
                self._outage.over()
                return saved


class Lines:
    """Takes lines in one thread and hands them on in another."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()

    def add(self, line: str) -> None:
        self._queue.put(line)

    def hand_on(self, note: Callable[[str], object]) -> None:
        while not self._queue.empty():
            note(self._queue.get())
