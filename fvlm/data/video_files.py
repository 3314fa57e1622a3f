"""Which file on the disk the captions table means."""

from __future__ import annotations

import errno
import itertools
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path


class NotFound(Exception):
    """There is no such file. `reason` is one of few, to be counted; `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def find_video(videos: Path, files: list[str]) -> str:
    """The first of `files`, relative to the folder `videos`, that exists, spelled as the disk spells it.

    A name that is not ASCII may be composed (é is one character, NFC) in the table and decomposed on the disk (e and an
    accent, NFD, as macOS stores names), or the other way round; an exact match wins.
    Raises NotFound: "missing", or "unreadable" where a folder may not be entered.
    """
    why = "no such file in the folder of videos"
    reason = "missing"
    for file in files:
        for spelling in _spellings(file):
            try:
                if stat.S_ISREG((videos / spelling).stat().st_mode):
                    return spelling
            except ValueError:  # a NUL in the name
                continue
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    why = "no such file in the folder of videos, the name is longer than the disk allows"
                elif error.errno in (errno.EACCES, errno.EPERM):
                    reason, why = "unreadable", f"{error.strerror}, a folder on its path may not be entered"
    raise NotFound(reason, f"{why}: {' or '.join(files)}")


def _spellings(file: str) -> Iterator[str]:
    """`file` itself first, then with each part of the path composed or decomposed."""
    yield file
    if file.isascii():
        return
    parts = [
        dict.fromkeys((part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))))
        for part in file.split("/")
    ]
    spellings = ("/".join(spelling) for spelling in itertools.product(*parts))
    yield from itertools.islice(spellings, 1, None)
