"""How every command on Ray ends: as `fvlm.entry_point` says, wherever in the cluster the error was raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

from ray.exceptions import RayTaskError

from fvlm import entry_point
from fvlm.errors import Told
from fvlm.files import file_error_in


def run_command(main: Callable[[], None]) -> NoReturn:
    """`fvlm.entry_point.run_command`; an error that arrives wrapped in Ray's exceptions counts as one."""
    entry_point.run_command(main, told_in_one_line)


def told_in_one_line(error: BaseException) -> Told | None:
    """`told_error`, or an OSError about a file, which is the disk's or its permissions' fault; None for a bug."""
    return told_error(error) or file_error_in(error)


def told_error(error: BaseException) -> Told | None:
    """The first error told in one line that `error` is or was caused by, here or in a Ray worker; None without one."""
    for cause in causes(error):
        # Ray's task error is made one of these too, but its text is a traceback; the plain one lies under it.
        if isinstance(cause, Told) and not isinstance(cause, RayTaskError):
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
