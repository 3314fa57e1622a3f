"""The errors that are told in one line: what the user has to mend, and what may come back by itself."""

from __future__ import annotations

from typing import Literal

Damage = Literal["missing", "footer", "foreign", "rows", "image"]


class UserError(Exception):
    """Bad input. The message says what was wrong, where (file, key, value) and what to do about it.

    Every command prints it without a traceback and exits with code 2.
    """


class Unavailable(Exception):
    """What a command needs is away just now and may come back by itself. The input is not at fault.

    Every command prints it without a traceback and exits with code 75 (EX_TEMPFAIL), which supervisors try again.
    """


class StoreUnavailable(Unavailable):
    """A store or a disk on the network does not answer, or fails. Refused access is a UserError and not this.

    for_s: seconds for which it had been tried in vain
    """

    def __init__(self, message: str, for_s: float = 0.0):
        super().__init__(message, for_s)  # both, or the error could not be pickled
        self.for_s = for_s

    def __str__(self) -> str:
        return str(self.args[0])


Told = UserError | Unavailable
"""Errors that are told in one line. Any other is a bug of ours and keeps its traceback."""


class Damaged(UserError):
    """The bytes of a shard are not what was written. Whether they could be reached at all is never this error.

    reason: "missing"  the store answered and has no such file
            "footer"   cut short, or no Parquet file: nothing of the shard can be read
            "foreign"  a whole shard, but of another dataset
            "rows"     a row group cannot be read: a page checksum is wrong, or its pages make no sense
            "image"    a frame does not decode
    """

    def __init__(self, message: str, reason: Damage):
        super().__init__(message, reason)  # both, or the error could not be pickled
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])
