"""How every command ends: 0 when it did its work, 2 and one line when the input was at fault."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from ray.exceptions import RayTaskError

from fvlm.errors import UserError


def run_command(command: Callable[[], None]) -> NoReturn:
    """Run `command` and leave the process: exit code 0, or 2 with `error: ...` on stderr for a UserError.

    A UserError raised in a Ray worker arrives wrapped in Ray's exceptions; it counts as well. Anything else is a bug
    of ours and keeps its traceback.
    """
    try:
        command()
    except Exception as error:
        reason = user_error(error)
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr, flush=True)
            sys.exit(2)
        raise
    sys.exit(0)


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
