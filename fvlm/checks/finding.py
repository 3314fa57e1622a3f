"""One thing that was looked at: what it is, what was measured, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["ok", "note", "warn", "FAIL"]
"""note: worth knowing. warn: slower or less safe than need be. FAIL: a run would not begin, or would end."""


@dataclass(frozen=True)
class Finding:
    level: Level
    what: str
    value: str
    """What was measured. Never a secret."""
    cure: str = ""

    def __str__(self) -> str:
        """`level  what: value`, and the cure on the next line."""
        cure = f"\n      -> {self.cure}" if self.cure else ""
        return f"{self.level:4}  {self.what}: {self.value}{cure}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def of_error(what: str, error: Exception, level: Level = "FAIL") -> Finding:
    """Of an error of ours, which says what is wrong and then, in a sentence of its own, what to do."""
    problem, _, cure = str(error).partition(". ")
    return Finding(level, what, problem, cure.replace("\n", "\n         "))


def gb(count: float) -> str:
    """1234567890 -> '1.2 GB', 123456789 -> '123.5 MB'"""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
