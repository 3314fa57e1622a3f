"""The table that names the videos and their captions, with our column names or WebVid's, and its rules.

video    a path below the folder of videos; WebVid's videoid is the name of an .mp4 file there or in page_dir.
         "./a.mp4", "b/../a.mp4" and "a.mp4" are one video, and so are a name in NFC and in NFD. An absolute path
         has to lie in the folder of videos. Whatever leads out of it, by "..", a URL or an absolute path, is refused.
caption  text that is not empty and not one of the words that stand for "no value" in tables (NOT_A_CAPTION).
"""

from __future__ import annotations

import posixpath
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from fvlm.data.tables import ROWS_AT_ONCE, CsvTable, ParquetTable, open_table
from fvlm.errors import UserError

OURS = ("video", "caption")
WEBVID = ("videoid", "name")
WEBVID_FOLDER = "page_dir"
NOT_A_CAPTION = frozenset({"nan", "-nan", "none", "null", "<na>", "na", "n/a", "#n/a", "#na"})
"""What pandas and spreadsheets write where a cell is empty, in lower case."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Row:
    """One row of the table. Either `refused` says why it cannot become a clip, or the other fields are good.

    number:  of the row in the table, from 0
    clip_id: the video's path in the folder of videos, or WebVid's videoid
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

    videos: the folder that paths start from; None: every absolute path is refused
    Raises UserError when the file cannot be read, has no rows or lacks a column.
    """

    def __init__(self, path: Path, videos: Path | None = None):
        self._root = videos
        table = open_table(path, (OURS, WEBVID))
        has = set(table.columns)
        names = next((names for names in (OURS, WEBVID) if has.issuperset(names)), None)
        if names is None:
            raise UserError(
                f"{path}: its columns are {', '.join(table.columns)}. Wanted are {' and '.join(OURS)}, "
                f"or WebVid's {' and '.join(WEBVID)} (and {WEBVID_FOLDER}, if the videos lie in such folders); "
                "in a CSV file, separated by a comma, semicolon or tab."
            )
        self.names = names
        wanted = [*names] + [WEBVID_FOLDER] * (names == WEBVID and WEBVID_FOLDER in has)
        self._videos, self._captions, *folders = (column for column in self._read(path, table, wanted))
        self._folders = folders[0] if folders else None
        if not len(self):
            raise UserError(f"{path}: the table has no rows.")
        self._earlier = self._find_earlier()

    def __len__(self) -> int:
        return len(self._videos)

    def _read(self, path: Path, table: CsvTable | ParquetTable, names: list[str]) -> list[pa.ChunkedArray]:
        """[rows] large_string each: the columns `names`."""
        for name in names:
            if table.columns.count(name) > 1:
                raise UserError(f"{path}: the column {name} is there twice; wanted is one column of text.")
        columns = table.read(names)
        kind = columns[names[1]].type
        self._no_caption = f"the column {names[1]} is empty"
        if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind):
            self._no_caption = f"the column {names[1]} holds numbers ({kind}), not text"
            columns[names[1]] = pa.chunked_array([pa.nulls(len(columns[names[1]]), pa.large_string())])
        return [_texts(path, name, columns[name]) for name in names]

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows [start, stop), each with its verdict; a reason for refusal counts for the row that it stands in."""
        return [self._judged(row) for row in self._unjudged(start, min(stop, len(self)))]

    def _judged(self, row: Row) -> Row:
        if row.refused is None and self._earlier[row.number] >= 0:
            refused = ["duplicate", f"row {self._earlier[row.number]} has the same video"]
            return Row(row.number, row.clip_id, row.caption, row.files, refused)
        return row

    def _unjudged(self, start: int, stop: int) -> Iterator[Row]:
        """Rows [start, stop), each without a look at the others."""
        videos, captions = (column.slice(start, stop - start).to_pylist() for column in (self._videos, self._captions))
        folders = self._folders.slice(start, stop - start).to_pylist() if self._folders else [None] * len(videos)
        for number, video, caption, folder in zip(range(start, stop), videos, captions, folders, strict=True):
            yield self._row(number, video or "", (caption or "").strip(), (folder or "").strip())

    def _row(self, number: int, video: str, caption: str, folder: str) -> Row:
        name = video.strip()
        if not name:
            return Row(number, "", caption, [], ["no video", f"the column {self.names[0]} is empty"])
        # a file may bear blanks around its name, so the name as it stands comes first
        spellings = list(dict.fromkeys((video, name)))
        if self.names == WEBVID:
            spellings = [f"{spelling}.mp4" for spelling in spellings]
            spellings += [f"{folder}/{spelling}" for spelling in spellings if folder]
        files, wrong = [], ""
        for spelling in spellings:
            file, why = self._below(spelling)
            files += [file] if not why else []
            wrong = wrong or why
        clip_id = name if self.names == WEBVID or not files else files[-1]
        if wrong:
            return Row(number, clip_id, caption, [], ["not in the folder", wrong])
        if not caption:
            return Row(number, clip_id, caption, files, ["no caption", self._no_caption])
        if caption.casefold() in NOT_A_CAPTION:
            detail = f"{caption!r} in the column {self.names[1]} stands for an empty cell"
            return Row(number, clip_id, caption, files, ["no caption", detail])
        return Row(number, clip_id, caption, files)

    def _below(self, path: str) -> tuple[str, str]:
        """(`path`, relative to the folder of videos and without "." and ".."; why it is not in there, or "")."""
        if URL.match(path.lstrip()):
            return path, f"{path} is a URL; videos are not downloaded. Put the file into the folder of videos"
        file = posixpath.normpath(path)
        if file.startswith("/"):
            root = posixpath.normpath(self._root.as_posix()).rstrip("/") + "/" if self._root else None
            if root is None or not file.startswith(root):
                return path, f"{path} is an absolute path, and not one in the folder of videos"
            file = file.removeprefix(root)
        if file == ".." or file.startswith("../"):
            return path, f"{path} leads out of the folder of videos"
        return file, ""

    def _find_earlier(self) -> np.ndarray:
        """[rows] int64: the first usable row with the same video, or -1 for that row itself.

        Eight bytes a row; names exist only in the rows whose hash is there twice.
        """
        hashes, usable = np.zeros(len(self), np.int64), np.zeros(len(self), bool)
        for start in range(0, len(self), ROWS_AT_ONCE):
            for row in self._unjudged(start, min(start + ROWS_AT_ONCE, len(self))):
                hashes[row.number], usable[row.number] = hash(_key(row)), row.refused is None
        numbers = np.flatnonzero(usable)
        order = numbers[np.argsort(hashes[numbers], kind="stable")]
        same_as_next = hashes[order[1:]] == hashes[order[:-1]]
        suspects = np.union1d(order[1:][same_as_next], order[:-1][same_as_next])
        earlier, first = np.full(len(self), -1), dict[str, int]()
        for number in suspects.tolist():
            (row,) = self._unjudged(number, number + 1)
            found = first.setdefault(_key(row), number)
            if found != number:
                earlier[number] = found
        return earlier


def _key(row: Row) -> str:
    """What two rows that name the same video have in common."""
    return row.clip_id if row.clip_id.isascii() else unicodedata.normalize("NFC", row.clip_id)


def _texts(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """[rows] large_string, valid UTF-8. Raises UserError for other types (whole numbers do as a videoid)."""
    kind = column.type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = any(
        test(plain)
        for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )
    if not is_text and not (name == WEBVID[0] and pa.types.is_integer(plain)):
        raise UserError(f"{path}: the column {name} is {kind}; wanted is one column of text.")
    try:
        texts = column.cast(pa.large_string())
        texts.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: {_first_not_utf8(name, column)}. Write the table anew, as UTF-8.") from error
    return texts


def _first_not_utf8(name: str, column: pa.ChunkedArray) -> str:
    for number, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError as error:
            return f"row {number}, column {name}: its text is not UTF-8 ({error.reason} at byte {error.start})"
    return f"the column {name} is {column.type}; wanted is one column of text"
