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


CURES = {
    errno.EACCES: "{whose}Let this user write there (chown, chmod), or choose another place.",
    errno.EPERM: "{whose}Let this user write there (chown, chmod, chattr), or choose another place.",
    errno.ENOSPC: "Free some space, and run the same command again.",
    errno.EDQUOT: "Free some space or have the quota raised, and run the same command again.",
    errno.EROFS: "Its disk is mounted read-only: mount it for writing, or choose another place.",
    errno.ENOTDIR: "A file lies where a folder should be: move it away, or choose another place.",
    errno.EEXIST: "A file lies where a folder should be: move it away, or choose another place.",
    errno.EISDIR: "A folder lies where a file should be: move it away, or choose another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Its links lead in a circle: mend them, or choose another place.",
    errno.ESTALE: "The network disk no longer knows it: mount it anew, and run the same command again.",
    errno.EIO: "The disk failed (`dmesg` may say why): mend it, and run the same command again.",
    errno.EMFILE: "Too many files are open: `ulimit -n` has to be higher.",
    errno.ENOENT: "Bring it back, or choose another place.",
}
"""What to do about an OSError that concerns a path, by its number."""
CURE = "Mend that (permissions, mount, a file in the way), or choose another place."


def file_error(error: OSError, path: Path | None = None) -> UserError | StoreUnavailable:
    """An OSError about a file, on one line: path, reason and cure. Of a network disk that is away: StoreUnavailable.

    path: what was worked on; None: the file that the error names
    """
    # The second is that of a rename, where the first is a temporary file of ours.
    names = [name for name in (error.filename2, error.filename) if isinstance(name, str)]
    where = names[0] if names else str(path)
    if error.errno != errno.ESTALE and is_away(error, Path(where)):  # that one somebody has to mount anew
        return away_error(error, path or Path(where))
    reason = error.strerror or str(error)
    if path is not None and where != str(path):
        reason += f": {where}"
    cure = CURES.get(error.errno or 0, CURE).format(whose=_whose(where))
    cannot = f"{where}: cannot be used" if path is None else f"{path}: cannot be written"
    return UserError(f"{cannot} ({reason}). {cure}")


def file_error_in(error: BaseException) -> UserError | StoreUnavailable | None:
    """For an OSError about a file that `error` is or was raised from, in a Ray worker too; None for anything else."""
    cause: BaseException | None = error
    while cause is not None:
        # A connection has no file. Ray's task errors pass for what they carry, but their file lies under them.
        if isinstance(cause, OSError) and isinstance(cause.filename, str) and not isinstance(cause, ConnectionError):
            return file_error(cause)
        inner = getattr(cause, "cause", None)
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    return None


def _whose(path: str) -> str:
    """ "It belongs to user NAME. ", of the nearest thing that is there; "" for our own."""
    if not hasattr(os, "getuid"):  # Windows
        return ""
    for place in (Path(path), *Path(path).parents):
        try:
            owner = place.stat().st_uid
        except OSError:
            continue
        if owner == os.getuid():
            return ""
        try:
            return f"{place} belongs to user {place.owner()}. "
        except (KeyError, NotImplementedError):  # a number without a name, as in containers
            return f"{place} belongs to user {owner}. "
    return ""


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
        raise file_error(error, path) from error


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
        raise away_error(error, path) from error


def away_error(error: OSError, path: Path) -> StoreUnavailable:
    return StoreUnavailable(
        f"{path}: the disk does not answer ({error.strerror or error}). Check the mount and its server."
    )
