"""Where the seconds of a start went."""

from __future__ import annotations

import time
from collections.abc import Callable

from fvlm.train.metrics import Scalars


class StartUp:
    """A hook that says, after the first step, how long each part of the start took.

    begun: seconds since 1970 when the command began this start
    """

    def __init__(self, begun: float):
        self._at, self._parts = begun, ""
        self._begun = begun
        self._note: Callable[[str], None] | None = None

    def passed(self, part: str) -> None:
        """`part` of the start, which followed the one before, is over."""
        now = time.time()
        self._parts += f"{', ' if self._parts else ''}{now - self._at:.1f} {part}"
        self._at = now

    def tell(self, note: Callable[[str], None]) -> StartUp:
        """`note` takes the line."""
        self._note = note
        return self

    def after_step(self, step: int, scalars: Scalars) -> None:
        if self._note:
            self.passed("until the first step was done")
            self._note(f"started in {self._at - self._begun:.1f} s: {self._parts}")
            self._note = None
