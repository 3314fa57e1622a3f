"""Damaged clips that a run goes round: who stands in for them, and the list of them.

A stand-in is a pure function of the place and of what lies on the disk, so every start of the run, whatever its number
of ranks, finds the same one. Once it is in the list it stays: whatever becomes of the disk later, the clip is not tried
again. The order of all other clips is untouched: a stand-in takes one place in one batch.
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
from fvlm.files import file_error, fsync_dir, no_space_is_a_user_error

CORRUPT = "corrupt.jsonl"


class Place(NamedTuple):
    """Where one clip lies: shard (its number in the manifest), row group in it, row in the group."""

    shard: int
    group: int
    row: int


@dataclass(frozen=True)
class CorruptClip:
    """One line of corrupt.jsonl: a damaged clip, and what is trained on in its place.

    shard, group, row: its place; `file` is the shard's name
    clip_id:           None where not even the id could be read
    error:             what was wrong
    replaced_by:       id of the clip that stands in for it
    stand_in:          and its place
    """

    shard: int
    group: int
    row: int
    file: str
    clip_id: str | None
    error: str
    replaced_by: str
    stand_in: Place

    @property
    def place(self) -> Place:
        return Place(self.shard, self.group, self.row)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CorruptClip:
        """Raises ValueError, TypeError or KeyError when `text` is something else."""
        raw = json.loads(text)
        return cls(**raw | {"stand_in": Place(*raw["stand_in"])})


def neighbours(place: Place, shard_rows: np.ndarray, rows_per_row_group: int) -> Iterator[Place]:
    """Places that may stand in for the clip at `place`, nearest first; never itself.

    The other rows of its row group, then the same row in the other row groups of its shard, then in those of the other
    shards, going round at each end. `shard_rows`: [F], rows of every shard.
    """

    def rows_of(shard: int, group: int) -> int:
        return min(rows_per_row_group, int(shard_rows[shard]) - group * rows_per_row_group)

    rows = rows_of(place.shard, place.group)
    yield from (Place(place.shard, place.group, (place.row + k) % rows) for k in range(1, rows))
    for further in range(len(shard_rows)):
        shard = (place.shard + further) % len(shard_rows)
        groups = -(-int(shard_rows[shard]) // rows_per_row_group)
        for k in range(further == 0, groups):
            group = (place.group + k) % groups
            yield Place(shard, group, place.row % rows_of(shard, group))


class CorruptList:
    """corrupt.jsonl of one run: every damaged clip once, in the order in which they were met. For one writer.

    Raises UserError when the file cannot be understood; and, here and in `add`, when more than `limit` (a share of the
    dataset's `clips`) are known.
    """

    def __init__(self, run_dir: Path, clips: int, limit: float):
        self._path, self._clips, self._limit = run_dir / CORRUPT, clips, limit
        self.known = known_corrupt(run_dir)
        self._whole = len(_whole_lines(self._path))
        self._require_few()

    def add(self, record: CorruptClip) -> bool:
        """False: it was known. UserError also when the disk is full."""
        if record.place in self.known:
            return False
        line = record.to_json().encode() + b"\n"
        with no_space_is_a_user_error(self._path), self._path.open("ab") as file:
            file.truncate(self._whole)  # a crash may have cut the last line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if not self._whole:
            fsync_dir(self._path.parent)
        self._whole += len(line)
        self.known[record.place] = record
        self._require_few()
        return True

    def _require_few(self) -> None:
        if len(self.known) > self._limit * self._clips:
            last = list(self.known.values())[-1]
            raise UserError(
                f"{self._path}: {len(self.known)} of {self._clips} clips are damaged, above --data.max-corrupt "
                f"{self._limit} (a share of the dataset). The last: {last.error} Restore what is named in that file "
                "and move it away, or raise the limit."
            )


def known_corrupt(run_dir: Path) -> dict[Place, CorruptClip]:
    """What a run folder's corrupt.jsonl lists, if there is one. Reads only. Raises UserError."""
    path = run_dir / CORRUPT
    try:
        records = (CorruptClip.from_json(line.decode()) for line in _whole_lines(path).splitlines())
        return {record.place: record for record in records}
    except OSError as error:
        raise file_error(error) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of damaged clips ({error!r}). Restore it, or move it away.") from error


def _whole_lines(path: Path) -> bytes:
    """All but a last line that a crash cut."""
    if not path.exists():
        return b""
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
