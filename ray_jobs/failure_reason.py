"""Why something failed, on one line: the first sentence of the exception itself, whatever Ray has wrapped it in."""

from __future__ import annotations

import re

from ray.exceptions import RayTaskError

MAX_CHARS = 300
"""Of a reason."""
MIN_CHARS = 24
"""A first sentence shorter than this says too little ("CUDA out of memory."): the second comes with it."""


def itself(error: BaseException) -> BaseException:
    """The exception that was raised, out of what Ray carries it in."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        # Ray Train's UserExceptionWithTraceback; a task's error. Both show a traceback in place of a message.
        inner = getattr(error, "_base_exc", None) or (error.cause if isinstance(error, RayTaskError) else None)
        if isinstance(inner, BaseException):
            error = inner
    return error


def reason(error: BaseException) -> str:
    """ "RuntimeError: the first sentence"."""
    raised = itself(error)
    return f"{type(raised).__name__}: {first_sentence(str(raised))}"


def first_sentence(text: str) -> str:
    """Of a message of any length; a line that ends in a colon goes on in the next one."""
    line = ""
    for each in filter(None, map(str.strip, text.splitlines())):
        line = f"{line} {each}".strip()
        if not line.endswith(":"):
            break
    for end in re.finditer(r"[.!?]\s+(?=[A-Z\"'`(])", line):
        if end.start() + 1 >= MIN_CHARS:
            line = line[: end.start() + 1]
            break
    return line[:MAX_CHARS]
