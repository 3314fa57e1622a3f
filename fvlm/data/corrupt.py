"""Damaged clips that a run goes round: who stands in for them, and the list of them.

A stand-in is a pure function of the place and of what lies on the disk, so every start of the run, whatever its number
of ranks, gets the same one. The order of all other clips is untouched: a stand-in takes one place in one batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fvlm.errors import UserError
from fvlm.files import fsync_dir, write_atomic

CORRUPT = "corrupt.jsonl"
MOST_NEIGHBOURS = 10_000
"""Places looked at for one stand-in. A dataset where so many in a row are damaged is lost."""


class Place(NamedTuple):
    """Where one clip lies: shard (its number in the manifest), row group in it, row in the group."""

    shard: int
    group: int
    row: int


@dataclass(frozen=True)
class CorruptClip:
    """One line of corrupt.jsonl. `clip_id` is None where not even the id could be read; `error` says what was wrong."""

    shard: int
    group: int
    row: int
    file: str
    clip_id: str | None
    error: str
    replaced_by: str

    @property
    def place(self) -> Place:
        return Place(self.shard, self.group, self.row)


def neighbours(place: Place, shard_rows: np.ndarray, rows_per_row_group: int, whole_shard: bool) -> Iterator[Place]:
    """Places that may stand in for the clip at `place`, nearest first.

    The other rows of its row group, then the same row in the other row groups of its shard, then in those of the other
    shards, going round at each end. `whole_shard`: nothing of its own shard can be read.
    """

    def rows_of(shard: int, group: int) -> int:
        return min(rows_per_row_group, int(shard_rows[shard]) - group * rows_per_row_group)

    def groups_of(shard: int) -> int:
        return -(-int(shard_rows[shard]) // rows_per_row_group)

    def found() -> Iterator[Place]:
        if not whole_shard:
            rows = rows_of(place.shard, place.group)
            yield from (Place(place.shard, place.group, (place.row + k) % rows) for k in range(1, rows))
        for further in range(whole_shard, len(shard_rows)):
            shard = (place.shard + further) % len(shard_rows)
            groups = groups_of(shard)
            for k in range(further == 0, groups):
                group = (place.group + k) % groups
                yield Place(shard, group, place.row % rows_of(shard, group))

    for _, neighbour in zip(range(MOST_NEIGHBOURS), found(), strict=False):
        yield neighbour


class CorruptList:
    """corrupt.jsonl of one run: every damaged clip once, in the order in which they were met.

    Raises UserError when the file cannot be understood, and in `add` when more than `limit` (a share of the dataset's
    `clips`) are known.
    """

    def __init__(self, run_dir: Path, clips: int, limit: float):
        self._path, self._clips, self._limit = run_dir / CORRUPT, clips, limit
        self.known = frozenset(read_corrupt(run_dir))

    def add(self, record: CorruptClip) -> bool:
        """False: it was known."""
        if record.place in self.known:
            return False
        new = not self._path.exists()
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            fsync_dir(self._path.parent)
        self.known |= {record.place}
        if len(self.known) > self._limit * self._clips:
            raise UserError(
                f"{self._path}: {len(self.known)} of {self._clips} clips are damaged, above --data.max-corrupt "
                f"{self._limit} (a share of the dataset). The last: {record.error} Restore the shards named there, or "
                "raise the limit."
            )
        return True


def read_corrupt(run_dir: Path) -> list[Place]:
    """The places in a run folder's corrupt.jsonl, if there is one. A line that a crash cut is dropped from it."""
    path = run_dir / CORRUPT
    if not path.exists():
        return []
    whole, _, cut = path.read_text().rpartition("\n")
    if cut:
        write_atomic(path, whole + "\n" * bool(whole))
    try:
        return [CorruptClip(**json.loads(line)).place for line in whole.splitlines()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a list of damaged clips ({error}). Restore it, or move it away.") from error
