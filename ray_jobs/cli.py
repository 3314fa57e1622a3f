"""How every command ends: 0 when it did its work, 2 and one line when the input was at fault."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from ray.exceptions import RayTaskError

from fvlm.errors import UserError
from fvlm.files import file_error_in


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
    """Run `command` and leave the process: exit code 0, or 2 with `error: ...` on stderr for a UserError.

    Ctrl-C gives one line and 130, and so does SIGTERM with 143 where `raise_on_sigterm` was called.

    A UserError raised in a Ray worker arrives wrapped in Ray's exceptions; it counts as well, and so does an OSError
    about a file. Anything else is a bug of ours and keeps its traceback.
    """
    try:
        command()
    except Exception as error:
        reason = told_in_one_line(error)
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    except Terminated:
        _leave(signal.SIGTERM)
    sys.exit(0)


def _leave(number: signal.Signals) -> NoReturn:
    print(f"stopped by {number.name}; what was complete stays", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def told_in_one_line(error: BaseException) -> UserError | None:
    """`user_error`, or an OSError about a file, which is the disk's or its permissions' fault; None for a bug."""
    return user_error(error) or file_error_in(error)


def user_error(error: BaseException) -> UserError | None:
    """The UserError that `error` is or was caused by, here or in a Ray worker; None when there is none."""
    for cause in causes(error):
        # Ray's task error is made a UserError too, but its text is a traceback; the plain one lies under it.
        if isinstance(cause, UserError) and not isinstance(cause, RayTaskError):
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
