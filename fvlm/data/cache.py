"""A folder of row groups on a local disk, of bounded size, shared by every process of every run on the machine.

    ab12....rows   one row group and choice of columns: an uncompressed Arrow stream, then the SHA-256 of its key and
                   a CRC-32 of everything before it
    .tmp-....rows  one being written, at its full size from the first moment, its writer holding an flock on it
    .state         bytes in use and the place in .queue, 16 bytes; whoever changes which files there are holds an
                   flock on it
    .queue         the files at the last look through the folder, least recently used first

A file's modification time is the last time it was used. So the least recently used is the next in .queue that has
still the time it had then, and the folder is looked through again only once the queue has been used up. The limit
counts .rows and .tmp- files; the other two are beyond it (.queue: about 100 bytes a row group).

A hit is read into memory and not memory-mapped: the checksum touches every byte anyway, so mapping saves nothing
(0.9 ms for 3 MB either way); what was verified is then what is delivered, and a failing disk is no SIGBUS.

Nothing is fsynced: what a power cut leaves behind is recognised by its checksum and thrown away.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from fvlm import locks
from fvlm.data.counts import count
from fvlm.errors import UserError
from fvlm.files import TEMPORARY

log = logging.getLogger(__name__)

SUFFIX = ".rows"
STATE, QUEUE = ".state", ".queue"
CHECKSUM = struct.Struct("<I")
STATE_FORMAT = struct.Struct("<qq")
TRAILER = hashlib.sha256().digest_size + CHECKSUM.size
LOOKED_THROUGH_S = 60.0
"""A process looks through a folder when it first uses it, unless another has done so within these seconds."""

_seen: set[str] = set()
_complained: set[str] = set()


@dataclass
class _State:
    fd: int
    """Of .state, locked."""
    used: int = 0
    """Bytes of all .rows and .tmp- files. After a kill it may be too high until the next look, never too low."""
    place: int = 0
    """Where in .queue the next candidate for eviction stands."""

    def save(self) -> None:
        os.pwrite(self.fd, STATE_FORMAT.pack(self.used, self.place), 0)  # in place: needs no room on a full disk


@dataclass(frozen=True)
class RowGroupCache:
    """The cache in `folder`, which may hold `limit_bytes`. A value: picklable, no handles inside.

    Safe with any number of threads and processes, also such as have other limits (each keeps to its own when it
    adds). A reader whose file is evicted has it already. The folder has to be on a disk of this machine.

    Once running, an unusable folder or a full disk costs speed and nothing else: one warning a process, and row
    groups are read without the cache.
    """

    folder: str
    limit_bytes: int

    def check(self) -> None:
        """Make the folder and tidy it: temporary files of killed writers go. For a run's start, on every machine.

        Raises UserError when the folder cannot be written to or the limit is not above 0.
        """
        if self.limit_bytes <= 0:
            raise UserError(f"--data.cache-gb: the cache may hold {self.limit_bytes} bytes; give more than 0.")
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with self._locked() as state:
                self._look_through(state)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be used as a cache ({error.strerror or error}). Give --data.cache-dir a folder "
                "on a local disk that this user may write to, or leave it empty to read without a cache."
            ) from error
        _seen.add(self.folder)

    def get(self, key: str) -> pa.Table | None:
        """What was put under `key`, or None. Raises UserError as `check` does, when the process first uses the folder.

        A file that is not what was written is thrown away, counted and logged, and is None.
        """
        self._first_use()
        path = self._path(key)
        try:
            with path.open("rb") as file:
                content = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
                length = file.readinto(content)  # type: ignore[arg-type]
                table = _unpack(key, content[:length])
                if table is not None:
                    os.utime(file.fileno())
                    count("cache_hits")
                    return table
                self._discard(path, os.fstat(file.fileno()).st_ino)
            count("cache_damaged")
            log.warning("%s: not what was written there; thrown away, the row group is read anew", path)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._complain(error)
        count("cache_misses")
        return None

    def put(self, key: str, table: pa.Table) -> None:
        """Keep `table` under `key`, evicting the least recently used to make room.

        When all room is taken by files that others are writing just now, it is not kept; that is counted.
        Raises UserError when one row group is more than the whole cache may hold, or as `check` does.
        """
        self._first_use()
        content, trailer = _pack(key, table)
        size = content.size + len(trailer)
        if size > self.limit_bytes:
            raise UserError(
                f"{self.folder}: the cache may hold {self.limit_bytes:,} bytes, but one row group alone has {size:,}. "
                "Raise --data.cache-gb, or leave --data.cache-dir empty to read without a cache."
            )
        try:
            kept = self._keep(self._path(key), size, content, trailer)
        except OSError as error:
            self._complain(error)
            kept = False
        if not kept:
            count("cache_skipped")

    def _keep(self, path: Path, size: int, content: pa.Buffer, trailer: bytes) -> bool:
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{time.monotonic_ns()}-{path.name}")
        with self._locked() as state:
            if path.exists():  # another process was faster
                return True
            if not self._make_room(size, state):
                return False
            state.used += size
            state.save()  # before the file is there: whoever is killed in between leaves a figure too high
            try:
                file = temporary.open("xb")
            except OSError:
                state.used -= size
                state.save()
                raise
            locks.lock(file)  # "my writer lives"; the kernel lets go of it when the process dies
            os.ftruncate(file.fileno(), size)
        published = False
        try:
            with file:
                file.write(content)
                file.write(trailer)
                file.flush()
                with self._locked() as state:
                    if not path.exists():
                        temporary.rename(path)
                        published = True
        finally:
            if not published:
                # Gone already: closed, it looked abandoned, and whoever removed it has counted everything anew.
                with self._locked() as state, contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
                    state.used -= size
        return True

    def _make_room(self, size: int, state: _State) -> bool:
        """Evict until `size` more bytes fit. False: they do not, because files being written take up the rest."""
        looked = False
        with contextlib.ExitStack() as stack:
            queue: BinaryIO | None = None
            while state.used + size > self.limit_bytes:
                queue = queue or stack.enter_context(self._open_queue(state))
                line = queue.readline()
                if not line.endswith(b"\n"):
                    if looked:
                        return False
                    self._look_through(state)
                    looked, queue = True, None
                    continue
                state.place += len(line)
                used_at, name = line.decode().split()
                victim = Path(self.folder) / name
                with contextlib.suppress(FileNotFoundError):
                    info = victim.stat()
                    if info.st_mtime_ns == int(used_at):
                        victim.unlink()
                        state.used -= info.st_size
                        count("cache_evicted")
        return True

    def _open_queue(self, state: _State) -> BinaryIO:
        queue = (Path(self.folder) / QUEUE).open("rb")
        queue.seek(state.place)
        return queue

    def _look_through(self, state: _State) -> None:
        """Count every file anew, remove what killed writers left, and write down the order of eviction."""
        files: list[tuple[int, str]] = []
        state.used, state.place = 0, 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not entry.name.endswith(SUFFIX):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if entry.name.startswith(TEMPORARY):
                        state.used += _remove_if_abandoned(Path(entry.path))
                    else:
                        info = entry.stat()
                        state.used += info.st_size
                        files.append((info.st_mtime_ns, entry.name))
        files.sort()
        queue = Path(self.folder) / QUEUE
        queue.write_text("".join(f"{used_at} {name}\n" for used_at, name in files))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_State]:
        """The folder's state; saved at the end. No other thread or process changes the folder meanwhile."""
        fd = os.open(Path(self.folder) / STATE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locks.lock(fd)  # of this opening of the file, so that threads exclude each other too
            raw = os.pread(fd, STATE_FORMAT.size, 0)
            if len(raw) == STATE_FORMAT.size:
                state = _State(fd, *STATE_FORMAT.unpack(raw))
            else:
                state = _State(fd)
                self._look_through(state)
            yield state
            state.save()
        finally:
            locks.unlock(fd)  # closing is not enough where a process was forked meanwhile
            os.close(fd)

    def _discard(self, path: Path, inode: int) -> None:
        """Remove a damaged file, unless another process has put a good one in its place meanwhile."""
        with self._locked() as state, contextlib.suppress(FileNotFoundError):
            info = path.stat()
            if info.st_ino == inode:
                path.unlink()
                state.used -= info.st_size

    def _first_use(self) -> None:
        if self.folder in _seen:
            return
        try:
            age = time.time() - (Path(self.folder) / QUEUE).stat().st_mtime
        except OSError:
            age = LOOKED_THROUGH_S
        if 0 <= age < LOOKED_THROUGH_S and os.access(self.folder, os.W_OK):
            _seen.add(self.folder)
        else:
            self.check()

    def _complain(self, error: OSError) -> None:
        """Once a process and folder."""
        if self.folder in _complained:
            return
        _complained.add(self.folder)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        log.warning(
            "%s: %s (%s). Row groups that cannot be cached are read from the dataset each time. %s",
            self.folder,
            "the disk of the cache is full" if full else "the cache cannot be used",
            error.strerror or error,
            "Free some space, or lower --data.cache-gb." if full else "Check the folder given as --data.cache-dir.",
        )

    def _path(self, key: str) -> Path:
        return Path(self.folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}{SUFFIX}"


def _remove_if_abandoned(temporary: Path) -> int:
    """Bytes that a temporary file takes: 0 when its writer was killed, for then it is removed."""
    with temporary.open("rb") as file:
        if not locks.try_lock(file):
            return os.fstat(file.fileno()).st_size
        temporary.unlink()
        return 0


def _checksum(content: memoryview, name: bytes) -> bytes:
    return CHECKSUM.pack(zlib.crc32(name, zlib.crc32(content)))


def _pack(key: str, table: pa.Table) -> tuple[pa.Buffer, bytes]:
    """(Arrow stream, trailer). CRC-32 as in Parquet's own pages: it costs less than half of a SHA-256."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content, name = sink.getvalue(), hashlib.sha256(key.encode()).digest()
    return content, name + _checksum(memoryview(content), name)


def _unpack(key: str, data: np.ndarray) -> pa.Table | None:
    """The table in `data` [n] uint8, without a copy; None when a byte is not what was written, or it is another's."""
    content, trailer = data[:-TRAILER], data[-TRAILER:].tobytes()
    name = hashlib.sha256(key.encode()).digest()
    if len(data) < TRAILER or trailer != name + _checksum(content.data, name):
        return None
    return pa.ipc.open_stream(pa.py_buffer(content)).read_all()
