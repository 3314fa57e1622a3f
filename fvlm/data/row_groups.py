"""Row groups of shards, wherever they lie: fetched, checked, and remembered in a cache when there is one.

A remote row group is read in two halves: first its bytes are fetched, then they are parsed from memory. So what fails
in the first half is the network's fault and is retried request by request, and what fails in the second is wrong
bytes. pyarrow's own `pre_buffer` does both at once, and cannot tell a server that went away from a damaged shard.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import mmap
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.data.cache import RowGroupCache
from fvlm.data.counts import count
from fvlm.data.retries import Patience, one_line
from fvlm.data.schema import MANIFEST, SPEC_KEY, DatasetSpec, Manifest, arrow_schema
from fvlm.data.storage import Range, Storage, pieces
from fvlm.errors import Damaged, StoreUnavailable, UserError
from fvlm.files import away_is_unavailable, is_away

log = logging.getLogger(__name__)
T = TypeVar("T")

OPEN_SHARDS = 64
"""Shards that a process keeps open with their footers parsed: 51 columns of 64 row groups are about 1 MB each."""
FOOTER_BYTES = 64 << 10
"""Asked for at a remote shard's end; a longer footer costs a second request."""
HOLE_BYTES = 128 << 10
"""Wanted ranges with so few bytes between them, or fewer, are one request: a request costs more than these bytes."""
CAPTION_SHARDS = 8
"""Remote shards whose captions are read at a time."""
READS = 3
"""Times that a remote row group or footer is fetched before its bytes count as damaged and not as garbled."""


@dataclass(frozen=True)
class RowGroups:
    """Reads row groups of the shards of one dataset.

    storage:     where the shards lie
    spec:        what every shard must say of itself
    fingerprint: the dataset's; names what is cached, so that two datasets never share a cached file
    cache:       where row groups are kept once read; None: nowhere

    Picklable: open shards and connections belong to the process, not to this value. Every method may be called from
    any thread. Reads of one local shard wait for each other (pyarrow's ParquetFile is not safe to share); remote
    reads do not.

    Bytes read ahead: none beyond the row group asked for. Of a remote one the wanted columns are fetched, and holes
    of at most HOLE_BYTES between them, so never more than that row group, at most PARALLEL_REQUESTS at a time. While
    it is read it is held up to three times: as fetched, laid out as in the file, and as a table.
    """

    storage: Storage
    spec: DatasetSpec
    fingerprint: str
    cache: RowGroupCache | None = None

    @classmethod
    def of(cls, manifest: Manifest, cache: RowGroupCache | None = None, patience: Patience | None = None) -> RowGroups:
        return cls(Storage(manifest.root, patience or Patience()), manifest.spec, manifest.fingerprint, cache)

    def read(self, shard: str, group: int, columns: Sequence[str], shard_rows: int | None = None) -> pa.Table:
        """Columns `columns` of row group number `group` of file `shard`, in the order in which the file has them.

        shard_rows: of the whole shard in the manifest; the shard must have as many. None: not known, not checked

        Every page's checksum is verified, and a cached file's too: a flipped byte is an error or read anew, never data.

        Raises Damaged, naming shard and row group: "missing", "footer", "foreign" or "rows". StoreUnavailable: the
        store or disk is away. UserError: it refuses, the cache cannot be used. ValueError: a column that the spec does
        not have.
        """
        if unknown := set(columns) - set(arrow_schema(self.spec).names):
            raise ValueError(f"a shard of this dataset has no columns {sorted(unknown)}")
        if self.cache is None:
            return self._read(shard, group, columns, shard_rows)
        key = json.dumps([self.fingerprint, shard, group, sorted(columns)])
        table = self.cache.get(key)
        if table is None:
            table = self._read(shard, group, columns, shard_rows)
            self.cache.put(key, table)
        return table

    def rows(self, shard: str, shard_rows: int | None = None) -> list[int]:
        """Rows of each row group of file `shard`, from its footer, which is checked as in `read`. Raises likewise."""

        def rows_of(opened: _OpenShard) -> list[int]:
            _check_rows(opened, shard_rows)
            return opened.rows

        return self._patiently(shard, rows_of)

    def _read(self, shard: str, group: int, columns: Sequence[str], shard_rows: int | None) -> pa.Table:
        def table_of(opened: _OpenShard) -> pa.Table:
            _check_rows(opened, shard_rows)
            if group >= opened.metadata.num_row_groups:
                raise Damaged(
                    f"{opened.where}: it has {opened.metadata.num_row_groups} row groups, and number {group} is asked "
                    "for: not the shard that the manifest lists. Restore it from a copy.",
                    "footer",
                )
            parquet = opened.parquet or self._fetch(shard, opened, group, columns)
            with opened.lock if opened.parquet else contextlib.nullcontext():
                return _parse_rows(parquet, opened.where, group, columns)

        return self._patiently(shard, table_of)

    def _patiently(self, shard: str, action: Callable[[_OpenShard], T]) -> T:
        """`action` on the opened shard; when a remote one comes garbled, again on a freshly opened one."""
        for attempt in itertools.count(1):
            try:
                return action(self._open(shard))
            except Damaged as error:
                with _OPEN_LOCK:
                    _OPEN.pop(self._key(shard), None)
                if self.storage.is_local or error.reason == "missing" or attempt >= READS:
                    raise
                count("rereads")
                log.warning("%s; fetching it again, %d of %d", error, attempt + 1, READS)
            time.sleep(self.storage.patience.wait_s(attempt))
        raise AssertionError("the loop above ends by itself")

    def _key(self, shard: str) -> _Key:
        """What an open shard is known by: a local file that was put in another's place is another shard."""
        version: tuple[int, ...] = ()
        if self.storage.is_local:
            path = self.storage.folder / shard
            with away_is_unavailable(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found = path.stat()
                version = (found.st_ino, found.st_mtime_ns, found.st_size)
        return self.storage, self.spec, shard, version

    def _open(self, shard: str) -> _OpenShard:
        key = self._key(shard)
        with _OPEN_LOCK:
            if key in _OPEN:
                _OPEN.move_to_end(key)
                return _OPEN[key]
        opened = _open_local(self.storage, shard) if self.storage.is_local else _open_remote(self.storage, shard)
        _check_spec(opened, self.spec)
        _check_row_groups(opened, self.spec)
        with _OPEN_LOCK:
            _OPEN[key] = opened
            while len(_OPEN) > OPEN_SHARDS:
                _OPEN.popitem(last=False)
        return opened

    def _fetch(self, shard: str, opened: _OpenShard, group: int, columns: Sequence[str]) -> pq.ParquetFile:
        """A remote shard of which just these columns of this row group are there."""
        ranges = [piece for start, size in _wanted_ranges(opened, group, columns) for piece in pieces(start, size)]
        fetched = self.storage.read_ranges(shard, opened.file, ranges)
        laid_out = _lay_out(opened.size, ranges, fetched)
        return _parquet(laid_out, opened.where, opened.metadata)


def stored_captions(manifest: Manifest, skipped: Callable[[Damaged], None] | None = None) -> Iterator[list[str]]:
    """The captions of a dataset in file order, a list a shard; nothing else of it is read.

    skipped: called with the damage of each row group that is left out; None: the first one is raised
    Raises as `RowGroups.read` does. Reads at most CAPTION_SHARDS shards further than was asked for.
    """
    row_groups, shards = RowGroups.of(manifest), iter(manifest.files.select(["name", "rows"]).to_pylist())

    def read(shard: dict[str, Any]) -> tuple[list[str], list[Damaged]]:
        captions: list[str] = []
        damage: list[Damaged] = []
        for group in range(len(manifest.spec.row_groups(shard["rows"]))):
            try:
                table = row_groups.read(shard["name"], group, ["caption"], shard["rows"])
                captions += table["caption"].to_pylist()
            except Damaged as error:
                if not skipped:
                    raise
                damage.append(error)
                if error.reason != "rows":  # nothing of this shard can be read
                    break
        return captions, damage

    at_once = 1 if row_groups.storage.is_local else CAPTION_SHARDS
    with ThreadPoolExecutor(at_once, "captions") as pool:
        reading = deque(pool.submit(read, shard) for shard in itertools.islice(shards, at_once))
        try:
            while reading:
                captions, damage = reading.popleft().result()
                reading.extend(pool.submit(read, shard) for shard in itertools.islice(shards, 1))
                for error in damage:
                    assert skipped
                    skipped(error)
                yield captions
        finally:
            for future in reading:
                future.cancel()


@dataclass(frozen=True)
class _OpenShard:
    """A shard whose footer is parsed. `parquet` is None where it is remote: then each read makes its own."""

    where: str
    file: pa.NativeFile
    size: int
    metadata: pq.FileMetaData
    parquet: pq.ParquetFile | None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def rows(self) -> list[int]:
        """Of each row group, as the footer says."""
        return [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]


_Key = tuple[Storage, DatasetSpec, str, tuple[int, ...]]
_OPEN: OrderedDict[_Key, _OpenShard] = OrderedDict()
_OPEN_LOCK = threading.Lock()


def _open_local(storage: Storage, shard: str) -> _OpenShard:
    where = storage.locate(shard)
    try:
        file = storage.open(shard)
    except Damaged as error:
        if error.reason == "missing" and not (storage.folder / MANIFEST).is_file():
            # Not one shard is gone but all of it: a disk that was unmounted.
            raise StoreUnavailable(f"{storage.locate()}: the dataset has gone. Check the mount.") from error
        raise
    parquet = _parquet(file, where)
    return _OpenShard(where, file, file.size(), parquet.metadata, parquet)


def _open_remote(storage: Storage, shard: str) -> _OpenShard:
    """The size, then the footer: FOOTER_BYTES from the end, and what is missing of a longer one."""
    file, where = storage.open(shard), storage.locate(shard)
    size = file.size()
    first = max(size - FOOTER_BYTES, 0)
    ranges = [(first, size - first)] if size else []
    fetched = storage.read_ranges(shard, file, ranges)
    end = fetched[0][-8:].tobytes() if size >= 12 else b""
    footer = int.from_bytes(end[:4], "little") + 8
    if not end.endswith(b"PAR1") or footer > size:
        raise _no_footer(where, f"{size} bytes that do not end as a Parquet file does")
    if footer > size - first:
        rest = pieces(size - footer, first - (size - footer))
        fetched += storage.read_ranges(shard, file, rest)
        ranges += rest
    return _OpenShard(where, file, size, _parquet(_lay_out(size, ranges, fetched), where).metadata, None)


def _lay_out(size: int, ranges: Sequence[Range], fetched: Sequence[np.ndarray]) -> pa.BufferReader:
    """A file of `size` bytes with `fetched` at `ranges`. The rest is zeros, which take no memory: untouched pages."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    for (start, length), piece in zip(ranges, fetched, strict=True):
        whole[start : start + length] = piece
    return pa.BufferReader(pa.py_buffer(memory))


def _parquet(file: pa.NativeFile, where: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, pre_buffer=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        _require_there(where, error)
        raise _no_footer(where, one_line(error)) from error


def _require_there(where: str, error: Exception) -> None:
    """Raise StoreUnavailable where `error` is a network disk's that is away, so that nothing is taken for damaged."""
    if isinstance(error, OSError) and is_away(error, Path(where)):
        raise StoreUnavailable(f"{where}: the disk does not answer ({one_line(error)}). Check the mount.") from error


def _no_footer(where: str, reason: str) -> Damaged:
    return Damaged(
        f"{where}: cannot be opened as Parquet; truncated or damaged ({reason}). "
        "Restore it from a copy, or delete it with manifest.json and prepare the dataset again.",
        "footer",
    )


def _check_spec(opened: _OpenShard, spec: DatasetSpec) -> None:
    """The shard has to say of itself what the manifest says. Raises Damaged("foreign")."""
    raw = (opened.metadata.metadata or {}).get(SPEC_KEY)
    if raw is None:
        raise Damaged(f"{opened.where}: not one of our shards (no {SPEC_KEY.decode()} in its footer).", "foreign")
    try:
        difference = spec.difference(DatasetSpec.from_json(json.loads(raw), opened.where))
        columns = opened.metadata.schema.to_arrow_schema()
    except (UserError, ValueError, TypeError, KeyError, pa.ArrowException) as error:  # another version, or no JSON
        raise Damaged(f"{opened.where}: what it says of itself cannot be used: {one_line(error)}", "foreign") from error
    if not difference and columns != arrow_schema(spec):  # of other types: the same bytes would read as other numbers
        difference = "the columns"
    if difference:
        raise Damaged(
            f"{opened.where}: the shard is not of this dataset: manifest against shard: {difference}. "
            "Shards of different datasets cannot be mixed; restore the right one.",
            "foreign",
        )


def _check_row_groups(opened: _OpenShard, spec: DatasetSpec) -> None:
    """The plan computes where a clip lies, and never asks the shard. Raises Damaged("foreign")."""
    if opened.rows != spec.row_groups(opened.metadata.num_rows):
        raise Damaged(
            f"{opened.where}: its row groups have {', '.join(map(str, sorted(set(opened.rows))))} rows, where all but "
            f"the last must have {spec.rows_per_row_group} (rows_per_row_group in {MANIFEST}) and the last no more. "
            "Restore it from a copy, or prepare the dataset again.",
            "foreign",
        )


def _check_rows(opened: _OpenShard, shard_rows: int | None) -> None:
    if shard_rows is not None and opened.metadata.num_rows != shard_rows:
        raise Damaged(
            f"{opened.where}: {opened.metadata.num_rows} rows, but the manifest says {shard_rows}. "
            "Restore it from a copy.",
            "foreign",
        )


def _wanted_ranges(opened: _OpenShard, group: int, columns: Sequence[str]) -> list[Range]:
    """Where the chunks of `columns` lie, those less than HOLE_BYTES apart joined. Raises Damaged: outside the file."""
    row_group = opened.metadata.row_group(group)
    chunks = []
    for name in columns:
        chunk = row_group.column(opened.metadata.schema.names.index(name))
        start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)), default=0)
        if not 4 <= start <= start + chunk.total_compressed_size <= opened.size:
            raise _no_footer(opened.where, f"row group {group}, column {name}: not inside the file")
        chunks.append((start, start + chunk.total_compressed_size))
    joined: list[tuple[int, int]] = []
    for start, end in sorted(chunks):
        if joined and start - joined[-1][1] <= HOLE_BYTES:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return [(start, end - start) for start, end in joined]


def _parse_rows(parquet: pq.ParquetFile, where: str, group: int, columns: Sequence[str]) -> pa.Table:
    rows = parquet.metadata.row_group(group).num_rows
    try:
        table = parquet.read_row_group(group, columns=list(columns), use_threads=False)
        if table.num_rows != rows or set(table.column_names) != set(columns):
            raise pa.ArrowInvalid(f"{table.num_rows} rows of {table.num_columns} columns, the footer says {rows}")
        return table
    except (pa.ArrowException, OSError) as error:
        _require_there(where, error)
        raise Damaged(
            f"{where}: row group {group} cannot be read; damaged ({one_line(error)}). Restore the shard from a copy.",
            "rows",
        ) from error
