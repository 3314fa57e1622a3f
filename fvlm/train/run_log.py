"""Reading what a run has written, while it writes or after it died: the lines of train.log, the end of metrics.jsonl.

Whatever is in these files, cut lines and foreign bytes included, is read as far as it goes.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAILS = (1 << 16, 1 << 20, 1 << 23)
"""Bytes of metrics.jsonl that are read: the next size only where something wanted was not found. It has no bound."""
FAILED = "failed: "
"""How the line of a command that failed begins; the reason follows."""
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.+)")
_STEP = re.compile(r"step \d+/\d+ \(")
_START = re.compile(r"starting at step \d+|resumed at step \d+ from ")
_SAVED = re.compile(r"saved (step-\d+) in ")
_EVALUATED = re.compile(r"evaluated at step \d+: ")
_ENDED = re.compile(r"(stopped after|finished) \d+ steps in |(stopped by) ")
_PLACE = re.compile(r" parameters on (\d+ x \w+),")


@dataclass
class RunLog:
    """What train.log says."""

    starts: int = 0
    """Times that ranks began: 1 and the restarts."""
    started_at: float | None = None
    """Seconds since 1970: the last of them."""
    on: str = ""
    """Ranks and device of the last start: "2 x cuda"."""
    stepped: bool = False
    """Whether the last start has logged a step."""
    ended: str = ""
    """How the last start ended, as far as it said so: "stopped after", "stopped by" or "finished"."""
    failed: str = ""
    """Why the last start failed, as far as it could still say so."""
    note: str = ""
    """The last line that is not about a step, an evaluation or a checkpoint, with its time."""
    saved: tuple[str, float] | None = None
    """The last checkpoint that was said to be safe: its name, and when."""


def read_log(path: Path) -> RunLog:
    """All of train.log, line by line; an empty one where there is none. Raises OSError when it cannot be read."""
    log = RunLog()
    if not path.exists():
        return log
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if match := _LINE.fullmatch(line.rstrip("\n")):
                _take(log, match[1], match[2])
    return log


def _take(log: RunLog, when: str, text: str) -> None:
    if _STEP.match(text):
        log.stepped, log.ended = True, ""
        return
    if saved := _SAVED.match(text):
        log.saved = saved[1], _seconds(when)
        return
    if _EVALUATED.match(text):
        return
    log.note = f"{when} {text}"
    if _START.match(text):
        log.starts, log.started_at = log.starts + 1, _seconds(when)
        log.stepped, log.ended, log.failed = False, "", ""
    elif place := _PLACE.search(text):
        log.on = place[1]
    elif ended := _ENDED.match(text):
        log.ended, log.failed = ended[1] or ended[2], ""
    elif text.startswith(FAILED):
        log.ended, log.failed = "", text.removeprefix(FAILED)


def _seconds(when: str) -> float:
    """0.0 for a time that cannot be, such as month 13 in a damaged line."""
    try:
        return time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        return 0.0


@dataclass(frozen=True)
class Readings:
    """The newest metrics of a run."""

    step: int
    """Of the last row; 0 where there is none."""
    latest: dict[str, float | None]
    """The newest value of everything; None where it was not finite."""
    steps_per_epoch: int
    """0 where two rows do not tell."""
    unreadable: int
    """Lines that are no metrics, among those that were looked at."""

    def value(self, name: str) -> float | None:
        return self.latest.get(name)


def read_metrics(path: Path, wanted: tuple[str, ...]) -> Readings:
    """The end of metrics.jsonl, as far back as it takes to find a value of each name in `wanted`, but never all of a
    long file. Raises OSError when it cannot be read."""
    rows: list[dict[str, Any]] = []
    unreadable = 0
    for size in TAILS if path.exists() else ():
        rows, unreadable, all_of_it = _tail(path, size)
        if all_of_it or all(any(name in row for row in rows) for name in wanted):
            break
    latest: dict[str, float | None] = {}
    for row in rows:
        latest |= {name: value for name, value in row.items() if isinstance(value, int | float | None)}
    return Readings(rows[-1]["step"] if rows else 0, latest, _steps_per_epoch(rows), unreadable)


def _tail(path: Path, size: int) -> tuple[list[dict[str, Any]], int, bool]:
    """-> rows of the last `size` bytes, lines among them that are none, and whether that was the whole file."""
    with path.open("rb") as file:
        length = file.seek(0, 2)
        begin = file.seek(max(0, length - size))
        lines = file.read(size).split(b"\n")
    # The first was cut by us; the last is empty, or being written, or was cut by a crash.
    whole = lines[1 if begin else 0 : -1]
    rows = [row for line in whole if (row := _row(line))]
    return rows, len(whole) - len(rows), not begin


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _steps_per_epoch(rows: list[dict[str, Any]]) -> int:
    """By how much the epoch grows from row to row."""
    first, last = (rows[0], rows[-1]) if rows else ({}, {})
    steps = last.get("step", 0) - first.get("step", 0)
    begin, end = first.get("train/epoch"), last.get("train/epoch")
    if steps <= 0 or not isinstance(begin, int | float) or not isinstance(end, int | float) or end <= begin:
        return 0
    return round(steps / (end - begin))
