"""A store that is away: tried again with longer and longer waits, with lines that say for how long, and an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from fvlm.errors import StoreUnavailable

T = TypeVar("T")
Note = Callable[[str], object]

FIRST_WAIT_S, LONGEST_WAIT_S = 2.0, 60.0
"""Between two tries; doubled each time. A try itself lasts up to `Patience.longest_s`."""
SAY_EVERY_S = 300.0
POLL_S = 0.2


class Outage:
    """One time that a store is away.

    note:    takes the lines
    limit_s: how long it is waited for; 0: for ever
    """

    def __init__(self, note: Note, limit_s: float):
        self._note, self._limit_s = note, limit_s
        self._since: float | None = None
        self._said = 0.0
        self._wait_s = FIRST_WAIT_S

    @property
    def is_on(self) -> bool:
        return self._since is not None

    @property
    def seconds(self) -> float:
        """How long the store has been away; 0 while it is not."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    @property
    def is_too_long(self) -> bool:
        return 0 < self._limit_s < self.seconds

    def failed(self, error: StoreUnavailable, then: str) -> float:
        """Take note of a try that failed. -> seconds until the next. then: what is done meanwhile, for people"""
        now, first = time.monotonic(), self._since is None
        if self._since is None:
            self._since = now - error.for_s
        wait_s, self._wait_s = self._wait_s, min(2 * self._wait_s, LONGEST_WAIT_S)
        if first or now - self._said >= SAY_EVERY_S:
            self._said = now
            limit = f", for {self._limit_s:.0f} s at most" if self._limit_s else ""
            away = f"WARNING: store away for {self.seconds:.0f} s: {error}"
            self._note(f"{away} It is tried again and again{limit}; {then}")
        return wait_s

    def over(self) -> None:
        """The store has answered."""
        if self.is_on:
            self._note(f"the store answers again; it was away for {self.seconds:.0f} s")
        self._since, self._wait_s = None, FIRST_WAIT_S


def wait_out(action: Callable[[], T], then: str, outage: Outage, is_stopped: Callable[[], object] = lambda: False) -> T:
    """`action()`, made again with back-off while it raises StoreUnavailable, with lines for people.

    Raises StoreUnavailable when the store has been away for too long, or when `is_stopped()`.
    """
    while True:
        try:
            result = action()
        except StoreUnavailable as error:
            pause = outage.failed(error, then)
            if outage.is_too_long or not sleep(pause, is_stopped):
                raise
        else:
            outage.over()
            return result


def sleep(seconds: float, is_stopped: Callable[[], object] = lambda: False) -> bool:
    """Sleep; False when it ended early because of `is_stopped()`."""
    deadline = time.monotonic() + seconds
    while not is_stopped():
        left = deadline - time.monotonic()
        if left <= 0:
            return True
        time.sleep(min(left, POLL_S))
    return False
