"""The files that a captions table may lie in: CSV, one Parquet file, or a folder of them. Only wanted columns are kept.

A CSV file is read a record at a time, and strictly: a table that is read although a quote is open loses rows without a
word. Its separator is the one with which the header holds the columns that are wanted.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.errors import UserError
from fvlm.files import sha256_file

SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
ROWS_AT_ONCE = 16384
"""Rows that exist as Python objects at a time."""
PARQUET_MAGIC = b"PAR1"

Columns = dict[str, pa.ChunkedArray]


@dataclass(frozen=True)
class CsvTable:
    """columns: as the header names them, without outer blanks; skip_blanks: a blank follows each separator there"""

    path: Path
    separator: str
    columns: list[str]
    skip_blanks: bool

    @classmethod
    def open(cls, path: Path, wanted: Sequence[Sequence[str]]) -> CsvTable:
        """Read the header. The separator is the first with which it has all of one of `wanted`, else the comma."""
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = next((line for line in file if line.strip()), None)
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error
        if header is None:
            raise UserError(f"{path}: cannot be read: it is empty. Wanted is a CSV file with a header line.")
        candidates = []
        for separator in SEPARATORS:
            names = next(csv.reader([header], delimiter=separator))
            skip_blanks = len(names) > 1 and all(name.startswith(" ") for name in names[1:])
            candidates.append(cls(path, separator, [name.strip().strip('"') for name in names], skip_blanks))
        for candidate in candidates:
            if any(set(candidate.columns).issuperset(names) for names in wanted):
                return candidate
        return candidates[0]

    def read(self, names: Sequence[str]) -> Columns:
        """The columns `names`, as text (a guess would make the videoid 0012 the number 12)."""
        records = self._records()
        next(records, None)
        places = [self.columns.index(name) for name in names]
        chunks: list[list[pa.Array]] = [[] for _ in names]
        while rows := list(itertools.islice(records, ROWS_AT_ONCE)):
            for column, place in zip(chunks, places, strict=True):
                column.append(pa.array([row[place] for row in rows], pa.large_string()))
        return {name: pa.chunked_array(each, pa.large_string()) for name, each in zip(names, chunks, strict=True)}

    def _records(self) -> Iterator[list[str]]:
        """Header and rows; empty lines do not count. Raises UserError, which names the line."""
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                lines = _Lines(file)
                rows = csv.reader(lines, delimiter=self.separator, skipinitialspace=self.skip_blanks, strict=True)
                while True:
                    lines.start_record()
                    try:
                        row = next(rows, None)
                    except csv.Error as error:
                        raise self._bad_quote(lines, error) from error
                    if row is None:
                        return
                    if len(row) < 2 and not "".join(row).strip():
                        continue
                    if len(row) != len(self.columns):
                        raise UserError(
                            f"{self.path}: line {lines.first}: {len(row)} columns, but the header has "
                            f"{len(self.columns)}, separated by a {SEPARATORS[self.separator]}. "
                            "Put texts that hold the separator in quotes."
                        )
                    yield row
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _bad_quote(self, lines: _Lines, error: csv.Error) -> UserError:
        """Why csv.reader gave up in the middle of a record, with the line where the faulty quote opens."""
        before = self._lines_before_quote(lines.record)
        if before is None:
            return UserError(f"{self.path}: line {lines.first}: cannot be read ({error}). Wanted is a CSV file.")
        where = f"{self.path}: line {lines.first + before}: a quote opens here and "
        if "expected after" in str(error):
            last = lines.first + len(lines.record) - 1
            return UserError(
                f"{where}the next quote, in line {last}, does not end the text: more of it follows. "
                "Close it, and write quotes within a text twice."
            )
        within = f" within {csv.field_size_limit():,} characters" if "limit" in str(error) else ""
        return UserError(f"{where}never closes{within}. Close it, or write a quote that belongs to the text twice.")

    def _lines_before_quote(self, record: list[str]) -> int | None:
        """How many lines of an unfinished record lie before that with the faulty quote; None: no quote is at fault."""
        split, blanks = re.escape(self.separator), " *+" if self.skip_blanks else ""
        text, at = "".join(record), 0
        quoted, plain = r'"[^"]*(?:""[^"]*)*"', rf'[^"{split}\r\n][^{split}\r\n]*'
        field = re.compile(rf"{blanks}(?:{quoted}|{plain}|)(?:{split}|\r\n|\r|\n|\Z)")
        while at < len(text):
            found = field.match(text, at)
            if found is None:
                return sum(end <= at for end in itertools.accumulate(map(len, record)))
            at = found.end()
        return None


@dataclass(frozen=True)
class ParquetTable:
    """One table in one or more files, in the order of their names. They have the same columns."""

    files: list[Path]
    columns: list[str]

    @classmethod
    def open(cls, path: Path) -> ParquetTable:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.glob("*.parquet") if file.is_file() and file.name[0] not in "._")
            if not files:
                raise UserError(
                    f"{path}: this is a folder, and no *.parquet file lies in it. "
                    "`--captions` names a CSV or Parquet file, or a folder of Parquet files."
                )
        columns = [_schema(file).names for file in files]
        for file, own in zip(files, columns, strict=True):
            if own != columns[0]:
                raise UserError(
                    f"{file}: its columns are {', '.join(own)}, but those of {files[0].name} are "
                    f"{', '.join(columns[0])}. Name one table: files with the same columns."
                )
        return cls(files, columns[0])

    def read(self, names: Sequence[str]) -> Columns:
        """The columns `names`, each with the type that it has; no other is read."""
        tables = []
        for file in self.files:
            try:
                # not pq.read_table: of a folder such as `split=train` it would make another column
                tables.append(pq.ParquetFile(file).read(columns=list(names)))
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(file, error) from error
        try:
            table = pa.concat_tables(tables)
        except pa.ArrowException as error:
            raise UserError(
                f"{self.files[0].parent}: its files have columns of different types ({_first_line(error)}). "
                "Write them with the same types."
            ) from error
        return {name: table[name] for name in names}


def open_table(path: Path, wanted: Sequence[Sequence[str]]) -> CsvTable | ParquetTable:
    """The table at `path`; of its rows nothing has been read yet.

    wanted: sets of column names, one of which it shall have; a CSV file's separator shows by them.
    Raises UserError, here and in `read`: absent, not a table, damaged, not UTF-8, or a quote that never closes.
    """
    if path.is_dir() or path.suffix.lower() == ".parquet":
        if not path.exists():
            raise _absent(path)
        return ParquetTable.open(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except FileNotFoundError as error:
        raise _absent(path) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if start.startswith(PARQUET_MAGIC):
        return ParquetTable.open(path)
    if (
        path.suffix.lower() in (".json", ".jsonl", ".ndjson")
        or start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    ):
        raise UserError(
            f"{path}: JSON lines are not read. Wanted is a CSV or Parquet file: "
            "`pandas.read_json(FILE, lines=True).to_parquet(...)` makes one."
        )
    return CsvTable.open(path, wanted)


def sha256_table(path: Path) -> str:
    """Hex SHA-256 of the file; of a folder, that of its Parquet files' names and digests."""
    if not path.is_dir():
        return sha256_file(path)
    lines = [f"{file.name} {sha256_file(file)}\n" for file in ParquetTable.open(path).files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _absent(path: Path) -> UserError:
    return UserError(
        f"{path}: no such file. `--captions` names a CSV or Parquet file with a row for each video, "
        "or a folder of Parquet files."
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: cannot be read ({_first_line(error)}). "
        "Wanted is a CSV file in UTF-8 with a header line, or a Parquet file."
    )


def _first_line(error: Exception) -> str:
    return (str(error).split("\n") or [""])[0]


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


class _Lines:
    """The lines of a CSV file. Keeps those of the record that is being read.

    first: number of the record's first line, from 1
    """

    def __init__(self, file: TextIO):
        self._file, self.record, self.first = file, list[str](), 1

    def start_record(self) -> None:
        self.first += len(self.record)
        self.record.clear()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.record.append(line)
        return line


def _not_utf8(path: Path) -> UserError:
    """Name the first line of a file that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                wrong = f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x}: {error.reason})"
                break
        else:
            wrong = "the file is not UTF-8"
    return UserError(
        f"{path}: {wrong}. Save the table as UTF-8; where it comes from Windows, "
        "`iconv -f WINDOWS-1252 -t UTF-8 FILE` may be what is needed."
    )
