"""A rank that hangs says where, and ends: in a collective whose other side is gone, on a dead disk, in a driver.

Ray Train starts the group again when one of its processes ends, and only then. Nothing here depends on the interpreter:
a process of its own (`hang_watcher`) counts the time, and faulthandler's signal handler, which is C, writes the stacks.

Every rank keeps one file in stacks/ of the run folder. Its first line says which rank, where, and what step it had
finished when; stacks follow where it hung. It is removed when the rank ends in another way.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fvlm.config import Config
from fvlm.train import hang_watcher

STACKS = "stacks"
LONG = 3
"""So many times as long may a part of a start take (weights, compilation, the first step with its data); `long` too."""
LINGER, MOST_LINGER_S = 0.25, 10.0
"""Stacks are written so much before the process ends: its end makes others fail that may not have written theirs."""
HEAD_BYTES = 256
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", signal.SIGUSR2)
"""Sent to a rank that hangs. No library that is used here takes the last real-time signal for itself."""


class HangWatch:
    """Ends this process when no step is finished for `scale.hang_s` seconds. A context, and a hook of the loop.

    The host of a GPU counts a step as finished when it has handed it over, and is at most two steps ahead
    (`StepsAhead`); so a GPU that hangs is seen up to two steps late. It costs a step less than 0.2 ms of the
    thread (tests/test_hang.py).
    """

    def __init__(self, config: Config, step: int, rank: int, world: int):
        self._limit_s = config.scale.hang_s
        self._step = step
        self._who = f"rank {rank} of {world} on {socket.gethostname()}, process {os.getpid()}"
        self._folder, self._rank, self._world = config.run_dir / STACKS, rank, world
        self._lock = threading.Lock()  # of the watcher's pipe and of what is in the file

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
            faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)
            self._watcher = _Watcher(self._limit_s)
            self._arm(LONG)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self._limit_s:
            return
        with self._lock:
            self._watcher.close()
            faulthandler.unregister(DUMP_SIGNAL)
            dumped = self._dumped()
            self._file.close()
        if error is None or not dumped:  # a hang may end as an error, when the ranks that it waits for end
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
            if self._dumped():  # it was slow and did not hang
                self._file.truncate(HEAD_BYTES)
                self._file.seek(HEAD_BYTES)
            os.pwrite(self._file.fileno(), head[: HEAD_BYTES - 1].ljust(HEAD_BYTES - 1) + b"\n", 0)
            self._watcher.tell(seconds)

    def _dumped(self) -> bool:
        return os.fstat(self._file.fileno()).st_size > HEAD_BYTES


class _Watcher:
    """The process that counts. It ends when this one does."""

    def __init__(self, limit_s: float):
        tick_s, linger_s = min(1.0, limit_s / 20), min(LINGER * limit_s, MOST_LINGER_S)
        self._command = [sys.executable, "-I", "-S", hang_watcher.__file__]  # without site-packages it needs 10 ms
        self._command += [str(os.getpid()), f"{tick_s:g}", f"{linger_s:g}", str(int(DUMP_SIGNAL))]
        self._start()

    def _start(self) -> None:
        out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        self._process = subprocess.Popen(self._command, stdin=out, stdout=subprocess.DEVNULL)
        os.close(out)

    def tell(self, seconds: float) -> None:
        """So many seconds are left from now on."""
        record = f"{seconds:.3f}".encode().ljust(hang_watcher.RECORD_BYTES)
        try:
            with contextlib.suppress(BlockingIOError):  # it is stopped, and finds enough to read when it goes on
                os.write(self._in, record)
        except BrokenPipeError:  # somebody has killed it
            self.close()
            self._start()
            os.write(self._in, record)

    def close(self) -> None:
        os.close(self._in)
        self._process.kill()
        self._process.wait()


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
