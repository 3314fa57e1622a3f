"""How every command ends: 0 when it did its work, 2 and one line for bad input, 75 when a store is away."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from ray.exceptions import RayTaskError

from fvlm.errors import Unavailable, UserError

TRY_LATER = 75
"""EX_TEMPFAIL of sysexits.h: what was needed is away and may come back, so trying again may do. 2 never does."""


class Terminated(BaseException):
    """SIGTERM came, and `raise_on_sigterm` was called. As KeyboardInterrupt is, no Exception."""


def raise_on_sigterm() -> None:
    """From now on SIGTERM ends the command as Ctrl-C does: what holds files or processes cleans up first.

    Call it again after Ray has been started, which takes SIGTERM for itself.
    """

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # one is enough: a second would interrupt the cleaning up
        raise Terminated

    if threading.current_thread() is threading.main_thread():  # Python allows no other
        signal.signal(signal.SIGTERM, handler)


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run `command` and leave the process: exit code 0, or `error: ...` on stderr and 2 for a UserError, 75 for what is
    Unavailable.

    Ctrl-C gives one line and 130, and so does SIGTERM with 143 where `raise_on_sigterm` was called.

    An error of these raised in a Ray worker arrives wrapped in Ray's exceptions; it counts as well. Anything else is a
    bug of ours and keeps its traceback.
    """
    try:
        command()
    except Exception as error:
        reason = told_error(error)
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(reason, UserError) else TRY_LATER)
        raise
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    except Terminated:
        _leave(signal.SIGTERM)
    sys.exit(0)


def _leave(number: signal.Signals) -> NoReturn:
    print(f"stopped by {number.name}; what was complete stays", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def told_error(error: BaseException) -> UserError | Unavailable | None:
    """The first error told in one line that `error` is or was caused by, here or in a Ray worker; None without one."""
    for cause in causes(error):
        # Ray's task error is made one of these too, but its text is a traceback; the plain one lies under it.
        if isinstance(cause, UserError | Unavailable) and not isinstance(cause, RayTaskError):
            return cause
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what lies under it: Python's `__cause__` and `__context__`, and the `cause` of Ray's task errors."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = (getattr(current, "cause", None), current.__cause__, current.__context__)
        waiting += [link for link in inner if isinstance(link, BaseException)]
