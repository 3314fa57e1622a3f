"""The one error that is the user's to mend, and the kind of it that a run may be told to go round."""

from __future__ import annotations

from typing import Literal

Damage = Literal["missing", "footer", "foreign", "rows", "image"]


class UserError(Exception):
    """Bad input. The message says what was wrong, where (file, key, value) and what to do about it.

    Every command prints it without a traceback and exits with code 2.
    """


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
