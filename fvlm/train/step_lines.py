"""Files of one JSON object a line, each with its step: metrics.jsonl, skipped.jsonl, samples/rank-*.jsonl.

What such a file says of a step is on the disk before a checkpoint of that step; what it says of later ones is dropped
when the run goes on from there. So each step is in it once, whatever was killed when.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from fvlm.files import fsync_dir, no_space_is_a_user_error, write_atomic


class StepLines:
    """Appends to such a file, which is made with its first line. Opening it at step s drops what came after s.

    The file is replaced then, so that a lost process which still writes does so into one that nobody reads.
    """

    def __init__(self, path: Path, step: int):
        self._path = path
        self._file: TextIO | None = None
        drop_after(path, step)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """On the disk when this returns. Raises UserError when that is full, ValueError for what JSON cannot hold."""
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        if not text:
            return
        with no_space_is_a_user_error(self._path):
            if self._file is None:
                self._path.parent.mkdir(exist_ok=True)
                self._file = self._path.open("a")
                fsync_dir(self._path.parent)
            self._file.write(text)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            self._file.close()


def drop_after(path: Path, step: int) -> None:
    if path.exists():
        write_atomic(path, "".join(kept_lines(path, step)))


def kept_lines(path: Path, step: int) -> list[str]:
    """The whole lines of a file up to `step`. A line that was cut by a crash is not whole, and the last."""
    return [line for line, row in _whole_lines(path) if row["step"] <= step]


def parsed_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """The same, parsed; none of a file that is not there."""
    return [row for _, row in _whole_lines(path) if row["step"] <= step] if path.exists() else []


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open() as lines:  # str.splitlines would end a line at U+2028 as well
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if line.endswith("\n"):
                yield line, row
