"""The table that names the videos and their captions: CSV or Parquet, with our column names or WebVid's."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from fvlm.errors import UserError

OURS = ("video", "caption")
WEBVID = ("videoid", "name")
WEBVID_FOLDER = "page_dir"


@dataclass(frozen=True)
class Row:
    """One row of the table. Either `refused` says why it cannot become a clip, or the other fields are good.

    number:  of the row in the table, from 0
    clip_id: the video's path as the table gives it, or WebVid's videoid
    files:   where the video may lie, relative to the folder of videos; the first that exists is it
    refused: [reason, detail], or None
    """

    number: int
    clip_id: str
    caption: str
    files: list[str]
    refused: list[str] | None = None


class Captions:
    """The table, as Arrow columns, so that millions of rows fit; `Row`s exist only where they are asked for.

    Raises UserError when the file cannot be read, has no rows or lacks a column.
    """

    def __init__(self, path: Path):
        table = _read_table(path)
        has = set(table.column_names)
        names = next((names for names in (OURS, WEBVID) if has.issuperset(names)), None)
        if names is None:
            raise UserError(
                f"{path}: its columns are {', '.join(table.column_names)}. Wanted are {' and '.join(OURS)}, "
                f"or WebVid's {' and '.join(WEBVID)} (and {WEBVID_FOLDER}, if the videos lie in such folders)."
            )
        if not table.num_rows:
            raise UserError(f"{path}: the table has no rows.")
        self.names = names
        self._videos, self._captions = (_texts(table, name, path) for name in names)
        in_folders = names == WEBVID and WEBVID_FOLDER in has
        self._folders = _texts(table, WEBVID_FOLDER, path) if in_folders else None
        self._earlier = self._find_earlier()

    def __len__(self) -> int:
        return len(self._videos)

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows [start, stop), each with its verdict: "no video", "no caption" and "duplicate" are refused."""
        return [self._row(number) for number in range(start, min(stop, len(self)))]

    def _row(self, number: int) -> Row:
        row = self._unchecked(number)
        refused = None
        if not row.clip_id:
            refused = ["no video", f"the column {self.names[0]} is empty"]
        elif not row.caption:
            refused = ["no caption", f"the column {self.names[1]} is empty"]
        elif self._earlier[number] >= 0:
            refused = ["duplicate", f"row {self._earlier[number]} has the same video"]
        return Row(number, row.clip_id, row.caption, row.files, refused)

    def _unchecked(self, number: int) -> Row:
        video = (self._videos[number].as_py() or "").strip()
        caption = (self._captions[number].as_py() or "").strip()
        if self.names == OURS:
            clip_id = PurePosixPath(video).as_posix() if video else ""  # ./a.mp4 and a.mp4 are one video
            return Row(number, clip_id, caption, [clip_id])
        folder = self._folders[number].as_py() if self._folders is not None else None
        return Row(number, video, caption, [f"{video}.mp4"] + ([f"{folder}/{video}.mp4"] if folder else []))

    def _find_earlier(self) -> np.ndarray:
        """[rows] int64: the first usable row with the same video, or -1 for that row itself."""
        earlier = np.full(len(self), -1)
        first: dict[str, int] = {}
        for number in range(len(self)):
            row = self._unchecked(number)
            if row.clip_id and row.caption:
                found = first.setdefault(row.clip_id, number)
                if found != number:
                    earlier[number] = found
        return earlier


def _read_table(path: Path) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path}: no such file. `--captions` names a CSV or Parquet file with a row for each video.")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(file), [])
        # Every column as text: guessed types would make the videoid 0012 the number 12.
        return pyarrow.csv.read_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read ({str(error).splitlines()[0]}). "
            "Wanted is a CSV file in UTF-8 with a header line, or a Parquet file whose name ends in .parquet."
        ) from error


def _texts(table: pa.Table, name: str, path: Path) -> pa.Array:
    try:
        column = table[name].cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, KeyError) as error:
        kind = table.schema.field(name).type if table.schema.get_field_index(name) >= 0 else "there twice"
        raise UserError(f"{path}: the column {name} is {kind}; wanted is one column of text.") from error
    return column.combine_chunks()
