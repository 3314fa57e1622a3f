"""One rank's batches on their way into the step: what is counted about them, and what becomes of damaged clips."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
from ray.experimental import internal_kv

from fvlm.data.corrupt import CorruptClip
from fvlm.data.memory import MB
from fvlm.data.read import RawBatch
from fvlm.train.metrics import Row
from ray_jobs.ingest import Share, waiting_key


class Feed(Iterator[RawBatch]):
    """Hands `raw` on; `lap()` says how the ingest did since the last one.

    corrupt: called with the damaged clips that others stand in for, before a batch that has some is handed on
    """

    def __init__(
        self,
        raw: Iterator[RawBatch],
        share: Share,
        rank: int,
        corrupt: Callable[[list[CorruptClip]], object],
    ):
        self._raw, self._share, self._rank, self._corrupt = raw, share, rank, corrupt
        self.replaced = 0
        self.events: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        self._since, self._clips, self._decode_s, self._read_s = time.perf_counter(), 0, 0.0, 0.0

    def __next__(self) -> RawBatch:
        raw = next(self._raw)
        self._clips += len(raw["clip_id"])
        self._decode_s += float(np.sum(raw["decode_s"]))
        self._read_s += float(np.sum(raw["read_s"]))
        for text in filter(None, map(str, raw["events"])):
            self.events.update(json.loads(text))
        replaced = [CorruptClip.from_json(text) for text in map(str, raw["replaced"]) if text]
        if replaced:
            self.replaced += len(replaced)
            self._corrupt(replaced)
        return raw

    def lap(self) -> Row:
        """Of this rank, since the last call:

        ingest/clips_per_s      clips taken
        ingest/decode_ms        CPU milliseconds of decoding a clip
        ingest/read_ms          milliseconds of reading a clip: from the disk, the cache or the network
        ingest/blocks           decoded blocks that wait in the object store now
        ingest/store_mb         their size
        ingest/replaced         clips that others stood in for, since the start of this process
        ingest/EVENT            times that it happened in the ingest's process, since the start of this one; for each
                                `fvlm.data.counts.Event` that did: retries, cache_hits, ...
        """
        blocks = blocks_waiting(self._rank)  # first: it takes milliseconds, which are not to be lost
        passed, clips = time.perf_counter() - self._since, max(self._clips, 1)
        row = {
            "ingest/clips_per_s": self._clips / passed,
            "ingest/decode_ms": 1000 * self._decode_s / clips,
            "ingest/read_ms": 1000 * self._read_s / clips,
            "ingest/blocks": float(blocks),
            "ingest/store_mb": blocks * self._share.memory.block_bytes / MB,
            "ingest/replaced": float(self.replaced),
        } | {f"ingest/{event}": float(times) for event, times in self.events.items()}
        self._begin()
        return row


def blocks_waiting(rank: int) -> int:
    """Blocks in Ray Data's hands, as the executor last said (at most half a second ago)."""
    value = internal_kv._internal_kv_get(waiting_key(rank))
    return int(value) if value else 0


def begun(batches: Iterator[RawBatch]) -> Iterator[RawBatch]:
    """`batches`, the first of which is being fetched from now on, in a thread."""
    first: Future[RawBatch | None] = Future()

    def fetch() -> None:
        try:
            first.set_result(next(batches, None))
        except BaseException as error:  # noqa: BLE001  raised where the batch is asked for
            first.set_exception(error)

    def all_of_them() -> Iterator[RawBatch]:
        if (batch := first.result()) is not None:
            yield batch
            yield from batches

    threading.Thread(target=fetch, name="first-batch", daemon=True).start()
    return all_of_them()
