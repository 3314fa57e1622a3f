"""What happened when, as train.log tells it: it is only ever appended to, so what was done twice stands there twice."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

STEP = re.compile(r" step (\d+)/\d+ \(")
START = re.compile(r" (?:resumed|starting) at step (\d+)")


@dataclass(frozen=True)
class Event:
    at: float
    """time.monotonic()"""
    step: int


class Timeline:
    """Follows a train.log that has a line for every step. `poll` often: what is new counts as having happened now."""

    def __init__(self, path: Path):
        self._path, self._read = path, 0
        self.steps: list[Event] = []
        """Finished steps."""
        self.starts: list[Event] = []
        """The ranks have come up, with so many steps behind them."""

    def poll(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        now = time.monotonic()
        for line in whole.decode(errors="replace").splitlines():
            self.take(line, now)

    def take(self, line: str, at: float) -> None:
        # The last match: a line that a full disk cut short has the next one behind it.
        for pattern, events in ((START, self.starts), (STEP, self.steps)):
            if found := pattern.findall(line):
                events.append(Event(at, int(found[-1])))

    @property
    def step(self) -> int:
        """The newest finished one."""
        return self.steps[-1].step if self.steps else 0

    def repeated(self) -> int:
        """Steps that were done again, as often as they were."""
        return len(self.steps) - len({event.step for event in self.steps})

    def recovery(self, killed: float, before: float, goes_on_after: float | None) -> Event | None:
        """The first step that shows that the run has got over a kill; None when it has not, up to the time `before`.

        It is the first after the ranks have come up again. goes_on_after: seconds of going on without that which show
        that there was no need, and then it is the next step; None: they have to come up.
        """
        start = next((event.at for event in self.starts if killed < event.at <= before), None)
        after = [event for event in self.steps if (start or killed) < event.at <= before]
        if start is None and (goes_on_after is None or not after or after[-1].at < killed + goes_on_after):
            return None
        return after[0] if after else None
