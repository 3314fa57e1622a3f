"""What this process has counted since it began: nothing that is retried, evicted or thrown away goes unseen."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Literal

Event = Literal[
    "retries",  # a request to a remote store was made again
    "rereads",  # a remote row group or footer arrived whole but wrong, and was fetched again
    "cache_hits",
    "cache_misses",
    "cache_evicted",  # row groups removed to make room
    "cache_damaged",  # cached row groups that were not what was written, thrown away
    "cache_skipped",  # row groups that could not be cached: a full disk, or all room taken by files being written
]

_COUNTS: Counter[Event] = Counter()
_LOCK = threading.Lock()


def count(event: Event) -> None:
    with _LOCK:
        _COUNTS[event] += 1


def counted() -> Counter[Event]:
    """A copy of the counts of this process; an event that never happened counts 0."""
    with _LOCK:
        return _COUNTS.copy()
