"""One rank's batches on their way into the step: what is counted about them, and what becomes of damaged clips."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import numpy as np
from ray.experimental import internal_kv

from fvlm.batch import Batch
from fvlm.data.collate import Collator
from fvlm.data.corrupt import CorruptClip
from fvlm.data.memory import MB
from fvlm.data.read import RawBatch
from fvlm.train.metrics import Row
from ray_jobs.ingest import Share, waiting_key


class Feed(Iterator[Batch]):
    """Collates `raw`; `lap()` says how the ingest did since the last one.

    corrupt: called with the clips that others stand in for, as soon as a batch has some; returns how many are known
    """

    def __init__(
        self,
        raw: Iterator[RawBatch],
        collate: Collator,
        share: Share,
        rank: int,
        corrupt: Callable[[list[CorruptClip]], int],
    ):
        self._raw, self._collate, self._share, self._rank, self._corrupt = raw, collate, share, rank, corrupt
        self.known_corrupt = 0
        self.replaced = 0
        self._begin()

    def _begin(self) -> None:
        self._since, self._clips, self._decode_s, self._read_s = time.perf_counter(), 0, 0.0, 0.0

    def __next__(self) -> Batch:
        raw = next(self._raw)
        self._clips += len(raw["clip_id"])
        self._decode_s += float(np.sum(raw["decode_s"]))
        self._read_s += float(np.sum(raw["read_s"]))
        replaced = [CorruptClip(**json.loads(text)) for text in map(str, raw["replaced"]) if text]
        if replaced:
            self.replaced += len(replaced)
            self.known_corrupt = self._corrupt(replaced)
        return self._collate(raw)

    def lap(self) -> Row:
        """Of this rank, since the last call:

        ingest/clips_per_s      clips taken
        ingest/decode_ms        CPU milliseconds of decoding a clip
        ingest/read_ms          milliseconds of reading a clip: from the disk, the cache or the network
        ingest/blocks           decoded blocks that wait in the object store now
        ingest/store_mb         their size
        ingest/replaced         clips that others stood in for, since the start of this process
        ingest/corrupt          clips of the dataset that are known to be damaged
        """
        passed, clips = time.perf_counter() - self._since, max(self._clips, 1)
        blocks = blocks_waiting(self._share, self._rank)
        row = {
            "ingest/clips_per_s": self._clips / passed,
            "ingest/decode_ms": 1000 * self._decode_s / clips,
            "ingest/read_ms": 1000 * self._read_s / clips,
            "ingest/blocks": float(blocks),
            "ingest/store_mb": blocks * self._share.memory.block_bytes / MB,
            "ingest/replaced": float(self.replaced),
            "ingest/corrupt": float(self.known_corrupt),
        }
        self._begin()
        return row


def blocks_waiting(share: Share, rank: int) -> int:
    """Blocks in Ray Data's hands, as the executor last said (at most half a second ago)."""
    value = internal_kv._internal_kv_get(waiting_key(share, rank))
    return int(value) if value else 0
