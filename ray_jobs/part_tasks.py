"""The parts of a dataset as tasks on the cluster, and the lines that tell how far they are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray.data

from fvlm.data import parts
from fvlm.data.outage import Outage, wait_out
from fvlm.errors import StoreUnavailable, UserError

T = TypeVar("T")
Rows = Generator[dict[str, Any], None, None]
Work = Callable[[dict[str, Any]], dict[str, Any]]

PROGRESS_SECONDS = 5.0
AWAY_S = 600.0
"""How long a task waits for a network disk that is away, before the command ends with code 75."""


def unfinished(out: Path, indices: Sequence[int]) -> list[int]:
    """Of these parts those that have no record yet. Says so when there are others."""
    todo = [index for index in indices if not parts.is_done(out, index)]
    if len(todo) < len(indices):
        print(f"continuing: {len(indices) - len(todo)} of {len(indices)} parts are done", flush=True)
    return todo


def as_tasks(work: Work, items: list[dict[str, Any]], tasks: int, name: str) -> Rows:
    """Run `work` on every item, `tasks` at a time (0: as many as there are CPUs): a row of figures as each is done.

    name: of the tasks, in the dashboard

    A task whose process ends is begun again by Ray, any number of times: `parts.write_part` counts them.
    """
    dataset = ray.data.from_items(items, override_num_blocks=len(items))  # one block, so one task, an item

    def task(batch: dict[str, Any]) -> dict[str, Any]:
        return work(batch)

    task.__name__ = name  # after which Ray Data calls them
    done = dataset.map_batches(task, batch_size=1, compute=ray.data.TaskPoolStrategy(size=tasks or None), num_cpus=1)
    yield from done.iter_rows()


def outcome_of(part: Callable[[], T]) -> tuple[T | None, dict[str, Any]]:
    """What `part` returns, made again while a disk that it reads is away; and the columns of a row that tell its error.

    As an exception an error would arrive under pages of Ray's own traces.
    """
    try:
        made = wait_out(part, "the task waits", Outage(print, AWAY_S))
    except (UserError, StoreUnavailable) as error:
        return None, {"error": [str(error)], "away": [isinstance(error, StoreUnavailable)]}
    return made, {"error": [""], "away": [False]}


def follow(rows: Rows, num_parts: int, done: int = 0) -> list[dict[str, Any]]:
    """All rows, with a line of progress every few seconds. Raises the first error that one holds
    (`outcome_of`)."""
    progress, seen = Progress(num_parts, done), []
    with contextlib.closing(rows):  # an execution that outlives the cluster's connection hangs at the end
        for row in rows:
            if row["error"]:
                raise (StoreUnavailable if row["away"] else UserError)(row["error"])
            if row.get("note"):
                print(row["note"], flush=True)
            progress.add(row["clips"])
            seen.append(row)
    return seen


class Progress:
    """Lines such as `parts 12/80  1,530 clips  41.2 clips/s  ETA 3m20s`, one every few seconds."""

    def __init__(self, num_parts: int, done: int):
        self.num_parts, self.done, self.done_before, self.clips = num_parts, done, done, 0
        self.started = self.printed = time.monotonic()

    def add(self, clips: int) -> None:
        self.done, self.clips = self.done + 1, self.clips + clips
        now = time.monotonic()
        if now - self.printed < PROGRESS_SECONDS and self.done < self.num_parts:
            return
        self.printed, elapsed = now, now - self.started
        left = round(elapsed / (self.done - self.done_before) * (self.num_parts - self.done))
        eta = f"{left // 3600}h{left // 60 % 60:02d}m{left % 60:02d}s"
        rate = self.clips / elapsed
        print(f"parts {self.done}/{self.num_parts}  {self.clips:,} clips  {rate:.1f} clips/s  ETA {eta}", flush=True)


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    for name, value in rows:
        print(f"{name:<18}{value}", flush=True)
