"""Disks: what they are, how fast they read and write now, how much room they have."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fvlm.checks.finding import Finding, gb
from fvlm.checks.machine import IN_MEMORY, NETWORK, WINDOWS_DRIVES, Machine

MOST_BYTES, MOST_S = 256 << 20, 2.0
"""A test ends at the first of these."""
ONE_FILE = 64 << 20
"""Bytes read of one file."""
PIECE, SYNC_EVERY = 4 << 20, 32 << 20
KEPT = ("runs", "checkpoints")
"""What has to be there after a reboot."""
FEWEST_BYTES = 8 << 20
"""Less tells nothing about a disk's speed."""


@dataclass(frozen=True)
class Speed:
    bytes: int
    seconds: float

    @property
    def bytes_s(self) -> float:
        return self.bytes / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return f"{self.bytes_s / 1e6:,.0f} MB/s"


def read_speed(files: Sequence[Path], seed: int | None = None) -> Speed:
    """How fast pieces of these files come from the disk itself, one request at a time.

    With O_DIRECT; where a file system has none, what it holds of a file in memory is dropped first. Raises OSError.
    """
    chosen = list(files)
    random.Random(seed).shuffle(chosen)
    buffer = mmap.mmap(-1, PIECE)  # aligned to a page, as O_DIRECT asks
    done, seconds = 0, 0.0
    for path in chosen:
        if done >= MOST_BYTES or seconds >= MOST_S:
            break
        fd = _open_uncached(path)
        try:
            begin, read = time.perf_counter(), 0
            while read < ONE_FILE and done + read < MOST_BYTES and seconds + time.perf_counter() - begin < MOST_S:
                got = os.readv(fd, [buffer])
                read += got
                if got < PIECE:
                    break
            done, seconds = done + read, seconds + time.perf_counter() - begin
        finally:
            os.close(fd)
    return Speed(done, seconds)


def _open_uncached(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return fd


def write_speed(folder: Path) -> Speed:
    """How fast random bytes get onto the disk of `folder`, fsynced. The file has no name and goes with the process.

    Never more than a twentieth of the room that is left. Raises OSError: read-only, full, forbidden.
    """
    most = min(MOST_BYTES, free_bytes(folder) // 20)
    piece = os.urandom(min(PIECE, max(most, 4096)))
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        begin, done = time.perf_counter(), 0
        while True:
            done += file.write(piece)
            if done % SYNC_EVERY == 0:
                os.fdatasync(file.fileno())
            if done >= most or time.perf_counter() - begin > MOST_S:
                break
        os.fsync(file.fileno())
        return Speed(done, time.perf_counter() - begin)


def free_bytes(folder: Path) -> int:
    """For this user."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there, as far as this user may know."""
    for above in (path, *path.parents):
        with contextlib.suppress(OSError):
            if above.exists():
                return above
    return Path("/")


def look_at_reading(
    machine: Machine, folder: Path, files: Sequence[Path], size: int, wanted_bytes_s: float, step: str
) -> list[Finding]:
    """The disk of the dataset.

    files: some of its shards; size: bytes of all; wanted_bytes_s: what training reads, and `step` with what steps
    """
    found = look_at_kind(machine, "data", folder, "--data.path")
    try:
        speed = read_speed(files)
    except OSError as error:
        return [
            *found,
            Finding("FAIL", "data disk", f"{error}", "Mend the disk or the permissions, or restore the file."),
        ]
    if speed.bytes < FEWEST_BYTES:
        return [*found, Finding("ok", "data disk", f"the dataset has {gb(size)}, too little to tell a speed")]
    text = f"{speed} past the page cache, {wanted_bytes_s / 1e6:,.0f} MB/s wanted at {step}"
    if speed.bytes_s >= wanted_bytes_s:
        return [*found, Finding("ok", "data disk", text)]
    if size < machine.memory().usable / 2:
        return [*found, Finding("note", "data disk", f"{text}; {gb(size)} fit into the memory after the first epoch")]
    cure = "Move the dataset to a faster disk; `--feed-test` shows what the GPU would wait."
    return [*found, Finding("warn", "data disk", text, cure)]


def look_at_kind(machine: Machine, what: str, folder: Path, key: str) -> list[Finding]:
    """What kind of file system it is, where that matters."""
    mount = machine.mount_of(folder)
    if mount is None or mount.kind not in (*WINDOWS_DRIVES, *NETWORK):
        return []
    if mount.kind in NETWORK:
        return [
            Finding("note", f"{what} file system", f"{folder} lies on {mount.point}, a network disk ({mount.kind})")
        ]
    name = "a drive of Windows" if machine.is_wsl2 else "a file system of another machine"
    return [
        Finding(
            "warn",
            f"{what} file system",
            f"{folder} lies on {mount.point}, {name} ({mount.kind}): every file and every write is slow there, and a "
            "lock or an fsync may not hold",
            f"Move it to the Linux disk (ext4): cp -a {folder} ~/{folder.name} and {key} ~/{folder.name}",
        )
    ]


def look_at_writing(machine: Machine, what: str, folder: Path, key: str, wanted: int, next_one: int) -> list[Finding]:
    """A disk that a run writes to.

    wanted: bytes that it will hold more by the end; next_one: without which it cannot go on
    """
    found = look_at_kind(machine, what, folder, key)
    there = existing(folder)
    mount = machine.mount_of(there)
    kind = f"{mount.kind} at {mount.point}" if mount else str(there)
    try:
        speed, free = write_speed(there), free_bytes(there)
    except OSError as error:
        level_cure = f"{key} takes another folder; `mount | grep {mount.point if mount else there}` shows its options."
        return [*found, Finding("FAIL", f"{what} disk", f"{there} cannot be written to: {error.strerror}", level_cure)]
    text = f"{kind}, writes {speed} with fsync, {gb(free)} free"
    if wanted:
        text += f", {gb(wanted)} wanted"
    cure = f"Free some room on {mount.point if mount else there}, or give {key} another disk"
    if next_one and speed.bytes_s:
        text += f"; a checkpoint of {gb(next_one)} takes {next_one / speed.bytes_s:,.0f} s"
    if free < next_one:
        return [*found, Finding("FAIL", f"{what} disk", text, f"{cure}.")]
    if free < wanted:
        return [*found, Finding("warn", f"{what} disk", text, f"{cure}, or lower --train.keep-last.")]
    if mount and mount.kind in IN_MEMORY and what in KEPT:
        found.append(
            Finding("warn", f"{what} file system", f"{folder} is in memory ({mount.kind}): a reboot loses it",
                    f"{key} takes a folder on a disk.")
        )  # fmt: skip
    return [*found, Finding("ok", f"{what} disk", text)]
