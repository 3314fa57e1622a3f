"""The run's log on the terminal of the command that trains it, without Ray's prefixes."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import BinaryIO

POLL_S = 0.5


class LogFollower:
    """Print the whole lines that are appended to a file while the `with` block lasts.

    A file that was moved away is read to its end, and the new one of its name from its beginning (as `tail -F` does).
    """

    def __init__(self, path: Path):
        self._path, self._stop = path, threading.Event()
        self._file: BinaryIO | None = None
        self._rest = b""
        """The beginning of a line that is not whole."""
        self._open()
        if self._file:
            self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> LogFollower:
        self._thread = threading.Thread(target=self._run, name="log-follower", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._file:
            self._file.close()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            self._print_new()
        self._print_new()

    def _print_new(self) -> None:
        with contextlib.suppress(OSError):  # of a disk that is away for a moment
            self._print_lines()
            if self._was_replaced():
                self._print_lines()  # what came before it was moved
                self._open()
                self._print_lines()

    def _print_lines(self) -> None:
        if self._file is None:
            return
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # cut to nothing, as `copytruncate` does
            self._file.seek(0)
        lines, newline, rest = (self._rest + self._file.read()).rpartition(b"\n")
        self._rest = rest
        print((lines + newline).decode(errors="replace"), end="", flush=True)

    def _was_replaced(self) -> bool:
        with contextlib.suppress(FileNotFoundError):
            there = self._path.stat()
            return self._file is None or not os.path.samestat(there, os.fstat(self._file.fileno()))
        return False

    def _open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            new = self._path.open("rb")
            if self._file:
                self._file.close()
            self._file, self._rest = new, b""
