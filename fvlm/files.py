"""Files that survive a power cut: written beside, fsynced, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fvlm.errors import StoreUnavailable, UserError

SYNC_BYTES = 256 << 20
"""A large file is brought to the disk in such parts, so that a slow disk shows how far it is."""
AWAY = {
    getattr(errno, name)
    for name in (
        *("ESTALE", "ETIMEDOUT", "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET"),
        *("ECONNREFUSED", "ECONNRESET", "ECONNABORTED", "ENOLINK", "EREMOTEIO", "ESHUTDOWN", "ENONET", "ECOMM"),
    )
    if hasattr(errno, name)
}
"""What a disk on the network says while its server is away, and no disk of this machine does."""
NETWORK_DISKS = (
    "nfs",
    "cifs",
    "smb",
    "ceph",
    "lustre",
    "9p",
    "afs",
    "beegfs",
    "gpfs",
    "glusterfs",
    "fuse.",
    "virtiofs",
)
"""Beginnings of the types of file systems that lie elsewhere."""

TEMPORARY = ".tmp-"
"""Prefix of names that no reader looks at; whoever owns the folder may delete them at any time."""


def fsync_dir(path: Path) -> None:
    """Make renames inside `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """The folder and those above it, made where they are missing, so that none is lost with the power."""
    if path.is_dir():
        return
    make_dirs(path.parent)
    path.mkdir(exist_ok=True)
    fsync_dir(path.parent)


def write_synced(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """A new file, on the disk when this returns; nobody may look at it before.

    The interpreter is free for other threads while the system writes.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    unsynced = 0
    try:
        for piece in pieces:
            rest = memoryview(piece)
            unsynced += len(rest)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if unsynced >= SYNC_BYTES:
                os.fdatasync(fd)
                unsynced = 0
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`: after a crash a reader finds the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with no_space_is_a_user_error(path), temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def sha256_file(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def no_space_is_a_user_error(path: Path) -> Iterator[None]:
    """Turn 'disk full' and 'quota exceeded' into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: no space left on the disk while writing it ({error.strerror}). "
                "What was complete before is untouched. Free some space and run the same command again."
            ) from error
        raise


@contextlib.contextmanager
def unwritable_is_a_user_error(path: Path) -> Iterator[None]:
    """Turn every OSError of what writes to `path` (or below it) into a UserError that names the path and the cure."""
    try:
        with no_space_is_a_user_error(path):
            yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}: {where}). "
            "Mend that (permissions, mount, a file in the way), or choose another place."
        ) from error


def is_away(error: OSError, path: Path, writing: bool = False) -> bool:
    """Whether the disk of `path` is away, which may pass, and not full, forbidden or broken.

    EIO is both: what a network disk says for a server that does not answer, and a bad sector of a disk in this machine,
    whose other sectors can be read. A write that failed so may be tried again wherever it was.
    """
    if error.errno == errno.EIO:
        return writing or is_on_network(path)
    return error.errno in AWAY


def is_on_network(path: Path) -> bool:
    """Whether `path` lies in a file system whose disk is elsewhere. Asks the kernel's table alone, never that disk."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False  # no Linux
    longest, kind = "", ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        inside = str(path.absolute()) == point or str(path.absolute()).startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(longest):
            longest, kind = point, right.split()[0]
    return kind.startswith(NETWORK_DISKS)


@contextlib.contextmanager
def away_is_unavailable(path: Path, writing: bool = False) -> Iterator[None]:
    """Turn the OSErrors of a network disk that is away into StoreUnavailable, which names the path."""
    try:
        yield
    except OSError as error:
        if not is_away(error, path, writing):
            raise
        raise StoreUnavailable(
            f"{path}: the disk does not answer ({error.strerror or error}). Check the mount and its server."
        ) from error
