"""Locks on files. The kernel lets go of one when its holder dies, however that comes about.

A disk may have none (Lustre without `-o flock`, some FUSE and network disks). Then a file in TEMPORARY_FOLDER is locked
in its place: it keeps out other commands of this machine, and nothing keeps out those of another one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fvlm.errors import UserError
from fvlm.files import make_dirs

try:
    import fcntl
except ImportError:  # Windows, from which runs are submitted and looked at
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What flock says on a disk that has no locks."""
TEMPORARY_FOLDER = Path("/tmp")
"""Of the machine: TMPDIR may be another one in every job."""
PATIENCE_S, POLL_S = 3.0, 0.02
"""How long a lock is tried for: whoever looks whether it is held has it for an instant."""


@contextlib.contextmanager
def exclusive(path: Path, busy: str) -> Iterator[str]:
    """Hold the lock file `path`, made with its folder where they are missing, for this process alone.

    Yields "", or what a person has to know where a substitute is locked.
    Raises UserError: `busy` when another one holds it, or that there are no locks at all; OSError: it cannot be opened.
    """
    file, note = _acquire(path, busy)
    with file:
        os.utime(path)  # since when it is held
        yield note


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file `path`, as far as this machine sees locks. Raises OSError.

    A shared lock for an instant: two who look do not disturb each other, and `exclusive` tries again.
    """
    try:
        return _is_held(path)
    except OSError as error:
        if fcntl is None or error.errno not in NO_LOCKS:
            raise
    return _is_held(_substitute(path))


def lock(file: IO[bytes] | int) -> None:
    """Wait for the exclusive lock of an open file. Raises OSError."""
    _flock(file, "LOCK_EX")


def try_lock(file: IO[bytes] | int) -> bool:
    """Take the exclusive lock of an open file; False: another one has it. Raises OSError."""
    try:
        _flock(file, "LOCK_EX", "LOCK_NB")
    except BlockingIOError:
        return False
    return True


def unlock(file: IO[bytes] | int) -> None:
    _flock(file, "LOCK_UN")


def _flock(file: IO[bytes] | int, *flags: str) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "this system has no file locks")
    operation = 0
    for flag in flags:
        operation |= getattr(fcntl, flag)
    fcntl.flock(file, operation)


def _acquire(path: Path, busy: str) -> tuple[IO[bytes], str]:
    """-> the open file that holds the lock, and a note for people."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        make_dirs(path.parent)
        try:
            file, note = _try(path)
        except FileNotFoundError:  # its folder has just been removed by a start that failed
            file, note = None, ""
        if file:
            return file, note
        if time.monotonic() > deadline:
            raise UserError(busy)
        time.sleep(POLL_S)


def _try(path: Path) -> tuple[IO[bytes] | None, str]:
    """-> the open file that holds the lock, None where another one has it; and a note for people."""
    is_new = not path.exists()
    file = path.open("ab")
    try:
        # Of a file that its last holder has removed meanwhile nobody else would see the lock.
        if try_lock(file) and _is_there(path, file):
            return file, ""
        file.close()
        return None, ""
    except OSError as error:
        file.close()
        if error.errno not in NO_LOCKS:
            raise
        try:
            return _try_substitute(path, error), _note(path, error)
        except UserError:
            if is_new:
                path.unlink(missing_ok=True)
            raise


def _is_there(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _is_held(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            try:
                _flock(file, "LOCK_SH", "LOCK_NB")
            except BlockingIOError:
                return True
            return False
    except FileNotFoundError:
        return False


def _substitute(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return TEMPORARY_FOLDER / f"fvlm-lock-{name}"


def _try_substitute(path: Path, why: OSError) -> IO[bytes] | None:
    """As `_try`, on a disk without locks. Raises UserError where TEMPORARY_FOLDER has none either."""
    substitute = _substitute(path)
    try:
        try:
            file = substitute.open("rb")  # another user's will do
        except FileNotFoundError:
            file = substitute.open("ab")  # type: ignore[assignment]
        try:
            if try_lock(file):
                return file
            file.close()
        except OSError:
            file.close()
            raise
    except OSError as error:
        raise UserError(
            f"{path}: its disk has no file locks ({why.strerror}), and {TEMPORARY_FOLDER} is no substitute "
            f"({error.strerror}): two commands could write there at once. Mount it with locks, or choose another disk."
        ) from error
    return None


def _note(path: Path, error: OSError) -> str:
    return (
        f"{path.parent}: its disk has no file locks ({error.strerror}), so {_substitute(path)} is locked in their "
        "place: that keeps out other commands of this machine, and not those of another. Start it on one machine only."
    )
