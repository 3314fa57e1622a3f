"""Where files lie: a folder, or anything that pyarrow.fs opens (s3://, gs://, ...).

A local folder is only read here; `fvlm/files.py` writes to it, in ways that an object store has not.

A remote request is retried here and nowhere else (`fvlm/data/retries.py`): the S3 client's own retries are off, since
they can be neither counted nor logged. They stay on for what is one call of many requests: a listing, a large upload.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs

from fvlm.config import is_uri
from fvlm.data.retries import Patience, one_line, persist
from fvlm.errors import Damaged, StoreUnavailable, UserError
from fvlm.files import away_is_unavailable, is_away

T = TypeVar("T")

PARALLEL_REQUESTS = 8
"""Requests in flight at a time for one call of `Storage.read_ranges`."""
LARGEST_REQUEST = 8 << 20
"""Bytes: what is larger is asked for in pieces, so that a failure costs little and pieces come in parallel."""
MANY_PARTS = 32 << 20
"""Bytes: an upload of more than three parts or so. A single failing part must not begin all of it anew."""
MOST_OWN_RETRIES = 5
LISTING_LIMIT_S = 1800.0
"""A listing is one call, whatever its length: 1,000 names a request, so about 5 minutes for a million."""
S3_OPTIONS = ("region", "scheme", "endpoint_override", "tls_ca_file_path", "force_virtual_addressing")
GUARD_BYTES = 16

Range = tuple[int, int]
"""(first byte, number of bytes) of a file."""


@dataclass(frozen=True)
class Storage:
    """The folder `root` as one value: hashable, picklable, no connection inside (each process makes its own).

    root: a local path, file:///path, s3://bucket/path, gs://bucket/path, or another URI that pyarrow.fs knows. Options
          go into the query, as pyarrow documents: `s3://bucket/path?endpoint_override=host:port&scheme=http`; for S3
          AWS_ENDPOINT_URL in the environment does too. Credentials: the usual ones of each store.

    Methods may be called from any thread. Where they say "Raises", `Damaged("missing")` means that the store answered
    and has no such file; a store or network disk that does not answer is StoreUnavailable, which may pass.
    """

    root: str
    patience: Patience = field(default_factory=Patience)

    @property
    def is_local(self) -> bool:
        return not is_uri(self.root) or self.root.startswith("file://")

    @property
    def folder(self) -> Path:
        """The local folder; of a remote root there is none (ValueError)."""
        if not self.is_local:
            raise ValueError(f"{self.locate()} is not a local folder")
        return Path(unquote(urlsplit(self.root).path) if is_uri(self.root) else self.root)

    def locate(self, name: str = "") -> str:
        """Where file `name` (or the root) is, for people: no credentials, no options."""
        if self.is_local:
            return str(self.folder / name)
        parts = urlsplit(self.root)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/{name}".rstrip("/")

    def open(self, name: str) -> pa.NativeFile:
        """File `name` for random access. Reads through it are not retried.

        Raises Damaged: missing, or empty where it is local. UserError: refused. StoreUnavailable.
        """
        where = self.locate(name)
        try:
            if self.is_local:
                return _open_file(self.folder / name)
            files, base = _connect(self)
            return self._persist(lambda: files.open_input_file(f"{base}/{name}"), "opening it", where)
        except FileNotFoundError as error:
            raise _missing(where) from error

    def read_bytes(self, name: str) -> bytes:
        """All of file `name`. Raises as `open` does."""
        if self.is_local:
            try:
                return (self.folder / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError) as error:
                raise _missing(self.locate(name)) from error
            except OSError as error:
                raise _unreadable(self.locate(name), error) from error
        file = self.open(name)
        return b"".join(piece.tobytes() for piece in self.read_ranges(name, file, pieces(0, file.size())))

    def read_ranges(self, name: str, file: pa.NativeFile, ranges: Sequence[Range]) -> list[np.ndarray]:
        """The bytes of `ranges` of `file`, which `open(name)` gave, as [n] uint8 each: exactly as many as asked for.

        At most PARALLEL_REQUESTS at a time; each range is retried by itself, so one failure does not cost the others.
        """
        where = self.locate(name)

        def one(piece: Range) -> np.ndarray:
            start, size = piece
            what = f"reading {size} bytes at {start}"
            return self._persist(lambda: _read_exactly(file, start, size), what, where, size)

        try:
            if len(ranges) == 1:
                return [one(ranges[0])]
            with ThreadPoolExecutor(min(PARALLEL_REQUESTS, len(ranges) or 1)) as pool:
                futures = [pool.submit(one, piece) for piece in ranges]
                try:
                    return [future.result() for future in futures]
                finally:
                    for future in futures:
                        future.cancel()
        except FileNotFoundError as error:
            raise _missing(where) from error

    def sizes(self) -> dict[str, int]:
        """Bytes of every file directly under the root, by name, from one listing. Raises as `tree` does."""
        where = self.locate()
        try:
            if self.is_local:
                with away_is_unavailable(self.folder), os.scandir(self.folder) as entries:
                    return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
            files, base = _connect(self, patient=True)
            selector = pa.fs.FileSelector(base)
            found = persist(lambda: files.get_file_info(selector), "listing it", where, self.patience, LISTING_LIMIT_S)
        except FileNotFoundError as error:
            raise UserError(f"{where}: there is no such folder, or it is empty. Check --data.path.") from error
        except OSError as error:
            raise _unreadable(where, error) from error
        return {info.base_name: info.size for info in found if info.is_file}

    def tree(self) -> dict[str, int]:
        """Bytes of every file under a remote root, by its path below it; none where there is no such root.

        Raises UserError, also where there is no such bucket, and StoreUnavailable.
        """
        files, base = _connect(self, patient=True)
        # Not `allow_not_found`: a bucket that is missing would look like one without checkpoints.
        selector = pa.fs.FileSelector(base, recursive=True)
        try:
            found = persist(
                lambda: files.get_file_info(selector), "listing it", self.locate(), self.patience, LISTING_LIMIT_S
            )
        except FileNotFoundError:
            return {}
        return {info.path.removeprefix(f"{base}/"): info.size for info in found if info.is_file}

    def download(self, name: str, to: Path, progress: Callable[[], None] = lambda: None) -> None:
        """Copy remote file `name` to `to`. Raises as `open` does. progress: called whenever a few MB more are here"""
        with self.open(name) as file, to.open("wb") as out:
            ranges = pieces(0, file.size())
            for first in range(0, len(ranges), PARALLEL_REQUESTS):
                for piece in self.read_ranges(name, file, ranges[first : first + PARALLEL_REQUESTS]):
                    out.write(piece.data)
                progress()

    def write(self, name: str, content: Callable[[], Iterable[bytes | memoryview]], size: int) -> None:
        """Make or replace remote file `name`. Each attempt asks for `content` anew, `size` bytes in all.

        A file may be there in part after an attempt that failed: what vouches for it has to be written after it.
        Raises UserError, StoreUnavailable.
        """
        files, base = _connect(self, patient=size > MANY_PARTS)

        def upload() -> None:
            _upload(files, f"{base}/{name}", content())
            found = self._persist(lambda: files.get_file_info(f"{base}/{name}"), "asking for it", self.locate(name))
            if found.size != size:
                raise OSError(f"the store has {found.size} bytes of it")

        # No deadline besides the client's own for silence: an attempt that was given up could not be kept from ending
        # later, and from laying what it read by then over a better file.
        persist(upload, f"writing {size} bytes", self.locate(name), self.patience, threading.TIMEOUT_MAX)

    def remove(self, name: str) -> None:
        """Delete remote file `name`; it need not be there. Raises UserError, StoreUnavailable."""
        files, base = _connect(self)
        with contextlib.suppress(FileNotFoundError):  # also what the second attempt finds, where the first did it
            # No deadline, for the reason that `write` gives.
            where = self.locate(name)
            persist(
                lambda: files.delete_file(f"{base}/{name}"), "deleting it", where, self.patience, threading.TIMEOUT_MAX
            )

    def _persist(self, action: Callable[[], T], what: str, where: str, size: int = 0) -> T:
        return persist(action, what, where, self.patience, self.patience.deadline_s(size))


def pieces(start: int, size: int) -> list[Range]:
    """[start, start + size) cut into ranges of at most LARGEST_REQUEST bytes."""
    end = start + size
    return [(at, min(LARGEST_REQUEST, end - at)) for at in range(start, end, LARGEST_REQUEST)]


def _missing(where: str) -> Damaged:
    return Damaged(f"{where}: the dataset lists this file, but it is not there. Restore it.", "missing")


def _unreadable(where: str, error: OSError) -> UserError | StoreUnavailable:
    if is_away(error, Path(where)):
        return StoreUnavailable(f"{where}: cannot be read ({one_line(error)}). Check the mount and its server.")
    return UserError(
        f"{where}: cannot be read ({one_line(error)}). Check its permissions, the disk and the limit of open files."
    )


def _open_file(path: Path) -> pa.NativeFile:
    """A local file. Not memory-mapped: that would save 1 % of the CPU time, count every page that was read as ours, and
    turn a file that is cut short while it is read into the death of the process."""
    try:
        return pa.OSFile(str(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(str(path), error) from error


def _read_exactly(file: pa.NativeFile, start: int, size: int) -> np.ndarray:
    """[size] uint8. Raises OSError when fewer bytes came.

    The number that pyarrow returns does not tell: for S3 it is the number asked for even where the body was shorter
    (pyarrow 26), and the rest of the buffer is whatever the memory held before, which may well be an older page with
    a right checksum. So random bytes are laid where the last bytes belong: a body cut short leaves them standing.
    """
    buffer = np.empty(size, np.uint8)
    guard = os.urandom(min(size, GUARD_BYTES))
    buffer[size - len(guard) :] = np.frombuffer(guard, np.uint8)
    # A stream of its own: reading at a place straight into our memory has no other way, and no shared position.
    got = file.get_stream(start, size).readinto(buffer)
    if got != size or (size and buffer[size - len(guard) :].tobytes() == guard):
        raise OSError(f"short body: fewer than the {size} bytes asked for came")
    return buffer


def _upload(files: pa.fs.FileSystem, path: str, content: Iterable[bytes | memoryview]) -> None:
    """One attempt. Raises OSError."""
    stream = files.open_output_stream(path)
    try:
        for piece in content:
            stream.write(piece)
    except OSError:
        with contextlib.suppress(OSError):
            stream.close()  # the attempt has failed already; what it leaves is not vouched for
        raise
    stream.close()


@functools.lru_cache(maxsize=8)
def _connect(storage: Storage, patient: bool = False) -> tuple[pa.fs.FileSystem, str]:
    """This process's client for `storage`, and the path of its root inside it. Raises UserError: an unusable URI.

    patient: it makes requests anew by itself, for calls of many requests
    """
    parts = urlsplit(storage.root)
    try:
        if parts.scheme == "s3":
            return _connect_s3(storage, patient)
        root = storage.root
        if parts.scheme in ("gs", "gcs") and "retry_limit_seconds=" not in parts.query:
            # Google's client retries on its own for a quarter of an hour, unseen. One second is the least it takes.
            root += f"{'&' if parts.query else '?'}retry_limit_seconds=1"
        files, base = pa.fs.FileSystem.from_uri(root)
        return files, base.rstrip("/")
    except (pa.ArrowException, ImportError, ValueError) as error:  # ValueError: a key without its secret
        raise UserError(
            f"{storage.locate()}: not a place that data can be read from ({one_line(error)}). Give a local folder, "
            "s3://bucket/path or gs://bucket/path, with options as pyarrow documents them: "
            "?endpoint_override=host:port&scheme=http."
        ) from error


def _connect_s3(storage: Storage, patient: bool) -> tuple[pa.fs.FileSystem, str]:
    """As `pyarrow.fs.FileSystem.from_uri` would, but with timeouts and retries, which a URI cannot name."""
    parts = urlsplit(storage.root)
    credentials, _, bucket = parts.netloc.rpartition("@")
    access_key, _, secret_key = map(unquote, credentials.partition(":"))
    options: dict[str, Any] = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := options.keys() - set(S3_OPTIONS):
        raise UserError(f"{storage.locate()}: unknown options {sorted(unknown)}; there are {', '.join(S3_OPTIONS)}.")
    if "force_virtual_addressing" in options:
        options["force_virtual_addressing"] = options["force_virtual_addressing"].lower() in ("1", "true")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options.setdefault("endpoint_override", endpoint)
    told = "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ
    if not told and not {"region", "endpoint_override"} & options.keys():
        options["region"] = storage._persist(
            lambda: pa.fs.resolve_s3_region(bucket), "asking for the bucket's region", storage.locate()
        )
    timeout_s, attempts = storage.patience.timeout_s, storage.patience.attempts
    # The default strategy waits 25 ms, 50 ms, ... and has no budget over all requests that many pages would use up.
    own_retries = pa.fs.AwsDefaultS3RetryStrategy(max_attempts=min(attempts - 1, MOST_OWN_RETRIES))

    def client() -> pa.fs.FileSystem:
        return pa.fs.S3FileSystem(
            access_key=access_key or None,
            secret_key=secret_key or None,
            connect_timeout=timeout_s,
            request_timeout=timeout_s,  # on Linux: so many seconds below one byte a second; `persist` bounds the whole
            retry_strategy=own_retries if patient else pa.fs.AwsStandardS3RetryStrategy(max_attempts=1),
            background_writes=False,  # or an upload is copied into memory at once, and nobody sees how far it is
            **options,
        )

    # Not made here and now: pyarrow makes no client while a request of this process hangs, however long.
    files = storage._persist(client, "making a client", storage.locate())
    return files, f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")
