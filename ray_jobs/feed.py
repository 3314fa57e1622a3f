"""One rank's batches on their way into the step: what is counted about them, and what becomes of damaged clips."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from ray.experimental import internal_kv

from fvlm.batch import Batch
from fvlm.data.corrupt import CorruptClip
from fvlm.data.memory import MB
from fvlm.data.read import RawBatch
from fvlm.train.metrics import Row
from fvlm.train.prefetch import Prefetch
from ray_jobs.ingest import Share, waiting_key

if TYPE_CHECKING:
    from fvlm.data.collate import Collator  # its module imports transformers, for which the ingest does not wait

Made = tuple[Batch, "Delivery", int]
"""A batch, what is counted of it, and the captions that were cut up to it."""


@dataclass(frozen=True)
class Delivery:
    """What is counted of one batch, when it is handed on."""

    clips: int
    decode_s: float
    read_s: float
    events: Counter[str]
    replaced: list[CorruptClip]

    @classmethod
    def of(cls, raw: RawBatch) -> Delivery:
        events: Counter[str] = Counter()
        for text in filter(None, map(str, raw["events"])):
            events.update(json.loads(text))
        replaced = [CorruptClip.from_json(text) for text in map(str, raw["replaced"]) if text]
        return cls(len(raw["clip_id"]), float(np.sum(raw["decode_s"])), float(np.sum(raw["read_s"])), events, replaced)


class Feed(Iterator[RawBatch]):
    """Hands `raw` on, as it is or collated (`batches`); `lap` says how the ingest did since the last one.

    corrupt: called with the damaged clips that others stand in for, before a batch that has some is handed on
    captions_cut: captions that were too long, in the batches that `batches` has handed on
    """

    def __init__(
        self,
        raw: Iterator[RawBatch],
        share: Share,
        rank: int,
        corrupt: Callable[[list[CorruptClip]], object],
    ):
        self._raw, self._share, self._rank, self._corrupt = raw, share, rank, corrupt
        self.captions_cut = 0
        self.replaced = 0
        self.events: Counter[str] = Counter()
        self._begin()

    def _begin(self) -> None:
        self._since, self._clips, self._decode_s, self._read_s = time.perf_counter(), 0, 0.0, 0.0

    def __next__(self) -> RawBatch:
        raw = next(self._raw)
        self._count(Delivery.of(raw))
        return raw

    def batches(self, collate: Collator, device: torch.device) -> Generator[Batch, None, None]:
        """Collated; for a GPU they are also pinned, and a thread makes the next while one is trained on.

        A batch counts when it is handed on: one that was made ahead and is never asked for does not. A CPU that trains
        has nothing to gain from the thread, and would hold one more block of the object store: there a batch is a view
        into one. What is pinned is a copy, so on a GPU the thread holds the block that the training would have held.
        """
        if device.type != "cuda":
            yield from self._counted(self._collated(collate, None))
            return
        with Prefetch(self._collated(collate, device)) as made:
            yield from self._counted(made)

    def _collated(self, collate: Collator, pin_for: torch.device | None) -> Iterator[Made]:
        if pin_for:
            torch.cuda.set_device(pin_for)  # of this thread, or pinning would make a context on the first GPU
        while (raw := next(self._raw, None)) is not None:
            batch, delivery = collate(raw), Delivery.of(raw)
            del raw
            if pin_for:
                batch = batch.pin_memory()
            made = batch, delivery, collate.captions_cut
            del batch
            yield made
            del made

    def _counted(self, made: Iterator[Made]) -> Iterator[Batch]:
        for batch, delivery, captions_cut in made:
            self._count(delivery)
            self.captions_cut = captions_cut
            yield batch
            del batch

    def _count(self, delivery: Delivery) -> None:
        self._clips += delivery.clips
        self._decode_s += delivery.decode_s
        self._read_s += delivery.read_s
        self.events.update(delivery.events)
        self.replaced += len(delivery.replaced)
        if delivery.replaced:
            self._corrupt(delivery.replaced)

    def lap(self) -> Row:
        """`waiting` and `counts`."""
        return self.waiting() | self.counts()  # waiting first: it takes milliseconds, which are not to be lost

    def counts(self) -> Row:
        """Of this rank, since the last call:

        ingest/clips_per_s      clips taken
        ingest/decode_ms        CPU milliseconds of decoding a clip
        ingest/read_ms          milliseconds of reading a clip: from the disk, the cache or the network
        ingest/replaced         clips that others stood in for, since the start of this process
        ingest/EVENT            times that it happened in the ingest's process, since the start of this one; for each
                                `fvlm.data.counts.Event` that did: retries, cache_hits, ...
        """
        passed, clips = time.perf_counter() - self._since, max(self._clips, 1)
        row = {
            "ingest/clips_per_s": self._clips / passed,
            "ingest/decode_ms": 1000 * self._decode_s / clips,
            "ingest/read_ms": 1000 * self._read_s / clips,
            "ingest/replaced": float(self.replaced),
        } | {f"ingest/{event}": float(times) for event, times in self.events.items()}
        self._begin()
        return row

    def waiting(self) -> Row:
        """Of this rank; asks the cluster, so it takes milliseconds. From any thread:

        ingest/blocks           decoded blocks that wait in the object store now
        ingest/store_mb         their size
        """
        blocks = blocks_waiting(self._rank)
        return {"ingest/blocks": float(blocks), "ingest/store_mb": blocks * self._share.memory.block_bytes / MB}


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

    def all_of_them(first: Future[RawBatch | None]) -> Iterator[RawBatch]:
        batch = first.result()
        del first  # it would keep the first block for as long as the run lasts, and so would `batch`
        if batch is not None:
            yield batch
            del batch
            yield from batches

    threading.Thread(target=fetch, name="first-batch", daemon=True).start()
    return all_of_them(first)
