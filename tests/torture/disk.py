"""A small disk of its own, so that it can be full without any harm to others."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

SIZE_MB = 384
"""A few checkpoints and their successors."""
FILLER = "filler"


class SmallDisk:
    """A tmpfs at `folder` between `__enter__` and `__exit__`. Raises OSError where that is not permitted."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "fvlm-torture", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            self.folder.rmdir()
            raise OSError(done.stderr.strip() or "mount failed")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        self.folder.rmdir()

    def fill(self) -> int:
        """Until not a byte fits. Returns how many went in."""
        filled = 0
        fd = os.open(self.folder / FILLER, os.O_WRONLY | os.O_CREAT)
        try:
            for size in (1 << 20, 1 << 12):
                filled = self._fill(fd, filled, size)
        finally:
            os.close(fd)
        return filled

    @staticmethod
    def _fill(fd: int, filled: int, size: int) -> int:
        while True:
            try:
                os.posix_fallocate(fd, filled, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return filled
            filled += size

    @property
    def is_filled(self) -> bool:
        return (self.folder / FILLER).exists()

    def free(self) -> None:
        (self.folder / FILLER).unlink(missing_ok=True)
