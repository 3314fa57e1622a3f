"""A rank that hangs says where, and ends: in a collective whose other side is gone, on a dead disk, in a driver.

Ray Train starts the group again when one of its processes ends, and only then. Nothing here depends on the interpreter:
faulthandler's watchdog is a C thread, which works while other C code keeps the interpreter's lock for ever.

Every rank keeps one file in stacks/ of the run folder. Its first line says which rank, where, and what step it had
finished when; stacks follow where it hung. It is removed when the rank ends in another way.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fvlm.config import Config

STACKS = "stacks"
LONG = 3
"""So many times as long may a part of a start take (weights, compilation, the first step with its data); `long` too."""
LINGER, MOST_LINGER_S = 0.25, 10.0
"""Stacks are written so much before the process ends: its end makes others fail that may not have written theirs."""
HEAD_BYTES = 256


class HangWatch:
    """Ends this process when no step is finished for `scale.hang_s` seconds. A context, and a hook of the loop.

    The host of a GPU counts a step as finished when it has handed it over, and is at most two steps ahead
    (`StepsAhead`); so a GPU that hangs is seen up to two steps late. Measured cost of a step: 0.05 ms (NOTES.md).
    """

    def __init__(self, config: Config, step: int, rank: int, world: int):
        self._limit_s = config.scale.hang_s
        self._step = step
        self._who = f"rank {rank} of {world} on {socket.gethostname()}, process {os.getpid()}"
        self._folder, self._rank, self._world = config.run_dir / STACKS, rank, world
        self._due = math.inf
        self._dumped = False
        self._lock = threading.Lock()  # of _due, _dumped and what is in the file
        self._ended = threading.Event()

    def __enter__(self) -> HangWatch:
        if self._limit_s:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob("rank-*.txt"):
                rank = int(path.name.split("-")[1])
                # Of a process that was killed, and did not hang. Ranks that are no more have nobody else for this.
                if (rank == self._rank or (self._rank == 0 and rank >= self._world)) and not _stacks(path):
                    path.unlink(missing_ok=True)
            # A name of its own: the stacks of an earlier start may still wait to be collected.
            self._path = self._folder / f"rank-{self._rank:05d}-{time.time_ns()}-{os.getpid()}.txt"
            self._file = self._path.open("wb", buffering=0)
            self._file.seek(HEAD_BYTES)
            self._arm(LONG)
            threading.Thread(target=self._look, name="hang-watch", daemon=True).start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self._limit_s:
            return
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        with self._lock:
            self._due = math.inf
            self._file.close()
        if error is None or not self._dumped:  # a hang may end as an error, when the ranks that it waits for end
            self._path.unlink(missing_ok=True)

    def after_step(self, step: int, scalars: object) -> None:
        self._step = step
        self._arm()

    @contextlib.contextmanager
    def long(self) -> Iterator[None]:
        """For what takes longer than a step: an evaluation, say."""
        self.extend()
        yield
        self._arm()

    def extend(self) -> None:
        """Start the long limit anew: a part of the start is over, or something that may take long has got further."""
        self._arm(LONG)

    def _arm(self, times: float = 1) -> None:
        """From now on, `times` * `hang_s` seconds are left."""
        if not self._limit_s:
            return
        seconds = self._limit_s * times
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        head = f"{self._who}: no step for {seconds:g} s since step {self._step}, {now}".encode()
        with self._lock:
            if self._dumped:  # it was slow and did not hang
                self._file.truncate(HEAD_BYTES)
                self._file.seek(HEAD_BYTES)
                self._dumped = False
            os.pwrite(self._file.fileno(), head[: HEAD_BYTES - 1].ljust(HEAD_BYTES - 1) + b"\n", 0)
            self._due = time.monotonic() + seconds
        linger = min(LINGER * self._limit_s, MOST_LINGER_S)
        faulthandler.dump_traceback_later(seconds + linger, exit=True, file=self._file)

    def _look(self) -> None:
        """Write the stacks a little ahead of the end, if the interpreter lets this thread run."""
        while not self._ended.wait(min(1.0, self._limit_s / 20)):
            with self._lock:
                if time.monotonic() > self._due and not self._dumped:
                    self._dumped = True
                    faulthandler.dump_traceback(self._file, all_threads=True)


def collect_stacks(run_dir: Path) -> list[str]:
    """What ranks that hung in an earlier start have left, by rank: each a text of many lines. Removes it."""
    found = []
    for path in sorted((run_dir / STACKS).glob("rank-*.txt")):
        if stacks := _stacks(path):
            head = path.read_bytes()[:HEAD_BYTES].decode(errors="replace").rstrip()
            found.append(f"hung: {head}\n{stacks}")
            path.unlink(missing_ok=True)
    return found


def _stacks(path: Path) -> str:
    """What follows the first line; "" where the rank did not hang, or while it lives."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()[HEAD_BYTES:].decode(errors="replace").strip()
    return ""
