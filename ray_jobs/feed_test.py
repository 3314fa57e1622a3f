"""`python -m ray_jobs.train PRESET --feed-test`: would disk and cores feed the GPU? Nothing is trained, nothing kept.

The real pipeline, from the shards to the ranks; in place of the training step stands a consumer that waits as long.
Batches are taken as the ingest ships them and are not collated: a tokenizer lies in a run folder or on the hub, and
neither has to be there before the first run. What is left out is the rank's own work, a millisecond a batch.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import ray

from fvlm.config import Config
from fvlm.data.memory import MB, IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import REMOTE_READS, ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.storage import Storage
from fvlm.train.metrics import Row
from ray_jobs.feed import Feed
from ray_jobs.feed_verdict import Findings, diagnose
from ray_jobs.ingest import rank_batches, share_of_one_rank
from ray_jobs.options import FeedTest

FIRST_STEP_S = 2.0
"""A training's first step takes so long at least, and the ingest gets on with its work meanwhile."""
LAP_S, LINE_EVERY_S, GLANCE_S = 1.0, 5.0, 0.5
WARM_UP = UNPACED = 1 / 6
"""Of the measured time. Before it, in the seconds in which Ray's own processes start on the same cores, once in weeks,
steps run that are shown and do not count; after it, batches are taken as fast as they come."""


@ray.remote
class Consumer:
    """Stands where a rank stands, and takes its batches from step `start` on."""

    def __init__(self, config: Config, manifest: Manifest, memory: IngestMemory, rank: int, start: int):
        reader = ClipReader.of_config(manifest, Plan.of_config(manifest, config), config)
        share = share_of_one_rank(config, memory, on_gpu=config.scale.device != "cpu")
        raw = rank_batches(reader, share, rank, config.scale.workers, start, sys.maxsize)
        self._threads, self._rank = share.threads, rank
        self._in_blocks = memory.blocks * memory.block_steps
        self._feed = Feed(raw, share, rank, corrupt=len)  # it counts what was replaced; there is no list to keep
        self._laps: list[Row] = []

    def __repr__(self) -> str:
        return f"feed test rank {self._rank}"

    def first(self) -> tuple[float, int]:
        """Take the first batch. -> seconds that it took, threads that decode"""
        begin = time.perf_counter()
        next(self._feed)
        return time.perf_counter() - begin, self._threads

    def drain(self) -> None:
        """Take as many batches as may lie ready, so that the next ones are as fast as they are made."""
        for _ in range(self._in_blocks):
            next(self._feed)

    def take(self, step_s: float, seconds: float) -> list[Row]:
        """A batch each `step_s`, for `seconds`. -> all laps

        As with a GPU, the next batch is asked for while a step runs, and its step begins when it is there and the one
        before has ended. So waiting is what a batch comes late, and it is never caught up with.
        """
        self._laps = []
        self._feed.lap()
        psutil.cpu_percent()
        lap_begin = step_end = time.perf_counter()
        stop, late = lap_begin + seconds, 0.0
        while step_end < stop:
            batch = next(self._feed)
            arrived = time.perf_counter()
            late += max(0.0, arrived - step_end)
            time.sleep(max(0.0, step_end - arrived))
            step_end = max(step_end, arrived) + step_s
            in_step = batch  # a rank keeps it, too, until its step has ended
            if (passed := time.perf_counter() - lap_begin) >= LAP_S or step_end >= stop:
                measured = {"seconds": passed, "wait": late / passed, "cores": psutil.cpu_percent() / 100}
                self._laps.append(self._feed.lap() | measured)
                lap_begin, late = lap_begin + passed, 0.0
        del in_step
        return self._laps

    def laps(self) -> list[Row]:
        """Those of the `take` that runs now."""
        return list(self._laps)


def feeds(config: Config, manifest: Manifest, memory: IngestMemory, test: FeedTest) -> bool:
    """Run the test on the connected cluster and print what it finds. -> whether the GPU would be fed."""
    plan = Plan.of_config(manifest, config)
    # Anywhere in the epoch: what the test before has read still lies in the page cache.
    start = random.randrange(plan.steps_per_epoch)
    world, batch = config.scale.workers, config.data.global_batch
    consumers = [
        Consumer.options(  # type: ignore[attr-defined]
            num_cpus=config.scale.cpus_per_worker,
            max_concurrency=2,  # `laps` answers while `take` runs
        ).remote(config, manifest, memory, rank, start)
        for rank in range(world)
    ]
    print(
        f"feed test: {batch} clips every {1000 * test.step_s:g} ms for {test.seconds:g} s from step {start} of "
        f"{plan.steps_per_epoch} on, {world} rank{'s' * (world > 1)}, {manifest.where}",
        flush=True,
    )
    firsts = ray.get([consumer.first.remote() for consumer in consumers])
    print(f"first batch after {max(seconds for seconds, _ in firsts):.1f} s", flush=True)
    time.sleep(FIRST_STEP_S)
    store = StorePeak()
    print("starting up, not counted:", flush=True)
    starting = watch(consumers, test.step_s, WARM_UP * test.seconds, store)
    print(f"measured (wait before: {max(mean(laps, 'wait') for laps in starting):.1%}):", flush=True)
    paced = watch(consumers, test.step_s, test.seconds, store)
    print("as fast as they come:", flush=True)
    ray.get([consumer.drain.remote() for consumer in consumers])
    unpaced = watch(consumers, 0.0, UNPACED * test.seconds, store)
    found = findings(config, manifest, test, firsts, paced, unpaced, store.peak)
    reasons = diagnose(found, config, manifest, memory)
    print(found.report(reasons), flush=True)
    return not reasons


def findings(
    config: Config,
    manifest: Manifest,
    test: FeedTest,
    firsts: list[tuple[float, int]],
    paced: list[list[Row]],
    unpaced: list[list[Row]],
    store_bytes: int,
) -> Findings:
    """What the laps of all ranks come to. `firsts`: of each rank, what `Consumer.first` said."""
    delivered = total(paced, "ingest/clips_per_s")
    return Findings(
        step_s=test.step_s,
        wanted=config.data.global_batch / test.step_s,
        delivered=delivered,
        wait=max(mean(laps, "wait") for laps in paced),
        most=max(delivered, total(unpaced, "ingest/clips_per_s")),  # a starved consumer takes all that there is, too
        first_s=max(seconds for seconds, _ in firsts),
        decode_ms=mean(flat(paced), "ingest/decode_ms", by_clips),
        read_ms=mean(flat(paced), "ingest/read_ms", by_clips),
        threads=sum(threads for _, threads in firsts),
        readers=config.scale.workers * (1 if Storage(manifest.root).is_local else REMOTE_READS),
        cores_busy=mean(flat(paced), "cores"),
        blocks_mean=mean(flat(paced), "ingest/blocks"),
        blocks_least=int(min(lap["ingest/blocks"] for lap in flat(paced))),
        store_bytes=store_bytes,
        stored_bytes=ClipReader.of_config(manifest, Plan.of_config(manifest, config), config).stored_bytes,
        replaced=int(sum(laps[-1]["ingest/replaced"] for laps in unpaced)),
    )


class StorePeak:
    """The most bytes that were in use in the cluster's object store whenever somebody looked."""

    def __init__(self) -> None:
        self.peak = 0

    def look(self) -> int:
        has, free = ray.cluster_resources(), ray.available_resources()
        used = int(has.get("object_store_memory", 0) - free.get("object_store_memory", 0))
        self.peak = max(self.peak, used)
        return used


def watch(consumers: list[Any], step_s: float, seconds: float, store: StorePeak) -> list[list[Row]]:
    """Let all of them take batches at the same time, saying how it goes. -> the laps of each"""
    running = [consumer.take.remote(step_s, seconds) for consumer in consumers]
    begin = said = time.monotonic()
    told = [0] * len(consumers)
    while True:
        done, left = ray.wait(running, num_returns=len(running), timeout=GLANCE_S)
        ray.get(done)  # raises what reading raised
        used = store.look()
        if not left:
            return list(ray.get(running))
        if time.monotonic() - said >= LINE_EVERY_S:
            said = time.monotonic()
            laps = ray.get([consumer.laps.remote() for consumer in consumers])
            new = [of_rank[since:] for of_rank, since in zip(laps, told, strict=True)]
            told = [len(of_rank) for of_rank in laps]
            wait = f", wait {max(mean(of_rank, 'wait') for of_rank in new):.1%}" if step_s and all(new) else ""
            print(f"{said - begin:4.0f} s: {line(new)}{wait}, object store {used / MB:.0f} MB", flush=True)


def line(ranks: list[list[Row]]) -> str:
    """How the last seconds went."""
    if not all(ranks):
        return "no batch came"
    return (
        f"{total(ranks, 'ingest/clips_per_s'):.1f} clips/s, "
        f"decode {mean(flat(ranks), 'ingest/decode_ms', by_clips):.1f} ms, "
        f"{mean(flat(ranks), 'ingest/blocks'):.1f} blocks waiting"
    )


def flat(ranks: list[list[Row]]) -> list[Row]:
    return [lap for laps in ranks for lap in laps]


def by_time(lap: Row) -> float:
    return lap["seconds"]


def by_clips(lap: Row) -> float:
    return lap["seconds"] * lap["ingest/clips_per_s"]


def mean(laps: list[Row], key: str, weight: Callable[[Row], float] = by_time) -> float:
    return sum(weight(lap) * lap[key] for lap in laps) / sum(map(weight, laps))


def total(ranks: list[list[Row]], key: str) -> float:
    """All ranks together."""
    return sum(mean(laps, key) for laps in ranks)
