"""How every command ends: 0 when it did its work, 2 and one line for bad input, 75 when a store is away."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

from fvlm.errors import Told, UserError
from fvlm.files import file_error_in

TRY_LATER = 75
"""EX_TEMPFAIL of sysexits.h: what was needed is away and may come back, so trying again may do. 2 never does."""

END_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Sent by who ends a command from outside, or closes its terminal."""


class Terminated(BaseException):
    """One of END_SIGNALS came. As KeyboardInterrupt is, no Exception."""

    def __init__(self, number: int):
        self.signal = signal.Signals(number)


def itself_or_its_file(error: Exception) -> Told | None:
    return error if isinstance(error, Told) else file_error_in(error)


def run_command(
    command: Callable[[], None], told_error: Callable[[Exception], Told | None] = itself_or_its_file
) -> NoReturn:
    """Run `command` and leave the process: exit code 0, or `error: ...` on stderr and 2 for a UserError or an
    OSError about a file, 75 for what is Unavailable.

    Ctrl-C gives one line and 130; SIGTERM gives 143, a closed terminal 129. What holds files or processes cleans up
    first. Output that nobody reads any more (`| head`, a closed terminal, a full disk) is lost, and is no error.

    told_error: finds what an error is or was caused by, if that is to be told in one line
    """
    sys.stdout, sys.stderr = _lossy(sys.stdout), _lossy(sys.stderr)
    try:
        with _signals_as_exceptions():
            command()
    except Exception as error:
        reason = told_error(error)
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(reason, UserError) else TRY_LATER)
        raise
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    except Terminated as end:
        _leave(end.signal)
    sys.exit(0)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, END_SIGNALS raise Terminated. One that is ignored (`nohup`) stays ignored."""
    if threading.current_thread() is not threading.main_thread():  # Python allows no other
        yield
        return

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        for each in END_SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # one is enough: a second would interrupt the cleaning up
        raise Terminated(number)

    wanted: dict[int, Any] = dict.fromkeys(END_SIGNALS, handler) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.getsignal(number) for number in wanted}
    for number in wanted:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, wanted[number])
    try:
        yield
    finally:
        for number, take in before.items():
            signal.signal(number, take)


def _leave(number: signal.Signals) -> NoReturn:
    print(f"stopped by {number.name}; what was complete stays", file=sys.stderr, flush=True)
    sys.exit(128 + number)


class _LossyFile(io.FileIO):
    """A file descriptor that takes everything, and drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # a reader that went, a terminal that was closed: for good
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self.fileno())
                os.close(nothing)
            return len(data)


def _lossy(stream: TextIO) -> TextIO:
    """`stream`, unless it is something else than the process's own; characters that it cannot encode are escaped."""
    if stream is None or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    file = io.BufferedWriter(_LossyFile(stream.fileno(), "w", closefd=False))
    by_line = stream.isatty() or stream is sys.__stderr__
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=by_line)
