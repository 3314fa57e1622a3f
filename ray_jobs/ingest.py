"""Ray Data's part: reads and decodes what the plan asks for, in a process of its own, into the object store.

One dataset a rank and chapter, made inside the rank. ONE actor decodes for a rank, with several threads: its blocks
come in order by construction, so nothing waits for an earlier block, and a few blocks are enough. (Tasks side by side
each hold a window of decoded blocks back until their turn comes: NOTES.md.) A task of that actor is a few windows of
the plan; it streams blocks of a few steps. The executor runs in another actor (`streaming_split`), not in the trainer's
interpreter.

How many blocks exist is bounded (`fvlm/data/memory.py`): Ray Data's own generator bound, `BlockLimit` in the executor,
and the consumer's prefetch.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.experimental import internal_kv

from fvlm.config import Config
from fvlm.data.memory import GENERATOR_BLOCKS, MB, IngestMemory, parse_bytes, share_out
from fvlm.data.plan import Plan
from fvlm.data.read import AWAY, BlockReader, ClipReader, RawBatch, Window
from fvlm.data.schema import Manifest
from fvlm.errors import StoreUnavailable, UserError
from fvlm.resources import total_memory

TASK_WINDOWS = 32
"""Windows that one task of the decoding actor prepares; what a killed one has to decode again."""
CHAPTER_TASKS = 64
"""Tasks planned as one dataset. Ray Data makes all of them up front (1.3 ms each); a long run is read in chapters."""
MOST_THREADS = 16
"""More in one process wait for each other: what is left in the interpreter is a twentieth of the work."""
STORE_FILLED, STORE_FOR_RAY = 0.5, 100 * MB
TAKEN_BLOCKS = 1
"""Of the consumer's blocks, those that it tells the executor of: one ready, one on its way."""
NICENESS = 5
"""Decoding takes the time that the training leaves, also on the core that it shares with the step."""


@dataclass(frozen=True)
class Share:
    """What one rank's ingest gets: memory, and threads that decode."""

    memory: IngestMemory
    threads: int


def waiting_key(rank: int) -> bytes:
    """Where the executor says how many blocks wait: an entry of the cluster's key-value store, of this job alone."""
    return f"fvlm/{ray.get_runtime_context().get_job_id()}/{rank}/waiting".encode()


def ingest_memory(config: Config, manifest: Manifest) -> IngestMemory:
    """What one rank's ingest may hold. Raises UserError with the numbers when that is too little."""
    reader = ClipReader.of_config(manifest, Plan.of_config(manifest, config), config)
    return share_out(reader, config.scale.workers, parse_bytes(config.ingest_memory), total_memory())


def store_needed(config: Config, memory: IngestMemory) -> int:
    """Bytes of object store: Ray writes to the disk from above STORE_FILLED on, and needs a little for itself."""
    return int(memory.store_bytes * config.scale.workers / STORE_FILLED) + STORE_FOR_RAY


def share_of_one_rank(config: Config, memory: IngestMemory, on_gpu: bool) -> Share:
    """Asks the cluster how many CPUs it has.

    Every rank's decoding reserves one CPU of its own. Were they common, the decoding of one rank, held up until its
    batches are taken, could keep all of them while that rank waits in a collective for another one, which would never
    get its batch. It reserves no more, since Ray Data then waits for ever where Ray Train and it share a cluster; but
    its threads are as many as its share of the cluster has CPUs.

    A rank on a GPU leaves most of its core idle, and decoding runs at a lower priority: it may use that core too.
    """
    scale = config.scale
    free = ray.cluster_resources().get("CPU", 0) - scale.workers * scale.cpus_per_worker
    largest_node = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=1)
    threads = max(1, int(min(free // scale.workers, largest_node - scale.cpus_per_worker, MOST_THREADS)))
    return Share(memory, config.data.decode_threads or threads + on_gpu)


def rank_batches(reader: ClipReader, share: Share, rank: int, world: int, start: int, stop: int) -> Iterator[RawBatch]:
    """This rank's part of the steps [start, stop), one RawBatch a step, in the plan's order.

    Arrays are views into the object store: drop a batch before asking for many more. Raises an error after the last
    batch before the one that cannot be had: UserError, it is damaged; StoreUnavailable, the store is away.
    """
    windows = reader.plan.windows(start, stop)
    size = reader.plan.global_batch // world
    while chapter := list(itertools.islice(windows, CHAPTER_TASKS * TASK_WINDOWS)):
        delivered = 0
        with contextlib.closing(_blocks(reader, share, rank, world, chapter)) as blocks:
            for batch in steps_of(blocks, size):
                yield batch
                delivered += 1
        wanted = chapter[-1][1] - chapter[0][0]
        if delivered != wanted:
            raise RuntimeError(f"Ray Data delivered {delivered} steps of rank {rank} where the plan has {wanted}")


def steps_of(blocks: Iterator[RawBatch], size: int) -> Iterator[RawBatch]:
    """Blocks -> batches of `size` clips, views of them, without padding. Raises the error that a block carries."""
    for block in blocks:
        clips = int(np.count_nonzero(block["clip_id"] != ""))
        for at in range(0, clips, size):
            yield {key: column[at : at + size] for key, column in block.items()}
        if clips < len(block["caption"]) and block["caption"][clips]:
            text = str(block["caption"][clips])
            if block["replaced"][clips] == AWAY:
                raise StoreUnavailable(text, float(block["read_s"][clips]))
            raise UserError(text)


def cpus_needed(config: Config, ranks: int = 0) -> int:
    """CPUs without which a run would wait for ever: every rank's own, and one for each rank's decoding.

    ranks: how many; 0: all that the config wants
    """
    return math.ceil((ranks or config.scale.workers) * (config.scale.cpus_per_worker + 1))


def _blocks(
    reader: ClipReader, share: Share, rank: int, world: int, windows: list[Window]
) -> Generator[RawBatch, None, None]:
    """One chapter through Ray Data."""
    _configure(DataContext.get_current(), share, rank)
    tasks = [windows[first : first + TASK_WINDOWS] for first in range(0, len(windows), TASK_WINDOWS)]
    # Ray Data calls the actor and its tasks after the class. A registered name (`name=`) could be had by one run only.
    named = type(f"ingest decode rank {rank}", (Decoder,), {})
    dataset = ray.data.range(len(tasks), override_num_blocks=len(tasks)).map_batches(
        named,
        fn_constructor_args=(reader, share, rank, world, tasks),
        batch_size=None,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=1),  # of two, the second may run first
    )
    dataset.set_name(f"ingest rank {rank}")
    (iterator,) = dataset.streaming_split(1)
    yield from iterator.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)  # type: ignore[arg-type]


def _configure(context: DataContext, share: Share, rank: int) -> None:
    """Settings that the plan's exactness and a small memory rest on. They are sealed into a dataset when it is made."""
    context.execution_options.preserve_order = True  # of the blocks, and of the consumer's threads
    context.max_errored_blocks = 0  # a dropped block would be lost clips
    context.execution_no_progress_timeout_s = -1  # a consumer that pauses is no failure
    context.raise_original_map_exception = True  # so that a UserError stays one
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Captions come on top, so each block is passed on at once. A shorter one would be kept, joined to the next and cut
    # again, all of it views of memory that is being decoded into: that is why blocks are padded.
    context.target_max_block_size = share.memory.block_bytes
    context._max_num_blocks_in_streaming_gen_buffer = GENERATOR_BLOCKS
    context.op_resource_reservation_enabled = False  # BlockLimit does that
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [BlockLimit])
    context.set_config(
        BlockLimit.KEY, (share.memory.waiting + TAKEN_BLOCKS, share.memory.block_bytes, waiting_key(rank))
    )


class Decoder:
    """The actor that decodes for one rank. A row of its input is the number of a task."""

    def __init__(self, reader: ClipReader, share: Share, rank: int, world: int, tasks: list[list[Window]]):
        os.nice(NICENESS)
        self._reader = BlockReader(reader, share.threads, share.memory.block_steps, pad=True)
        self._rank, self._world, self._tasks = rank, world, tasks
        self._unchecked = reader.cache

    def __call__(self, tasks: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        if self._unchecked:  # not in the constructor: Ray would try that again and again, and pass on its text alone
            self._unchecked.check()
            self._unchecked = None
        for task in tasks["id"].tolist():
            then = self._tasks[task + 1][0] if task + 1 < len(self._tasks) else None
            # Ray copies a block into the object store before it asks for the next, so memory can be used again.
            yield from self._reader.read(self._tasks[task], self._rank, self._world, then)


class BlockLimit(BackpressurePolicy):
    """Ray Data takes a block over only while fewer than so many wait for the consumer.

    Runs in the executor. Ray's own policies answer "nothing" at once when there is no room, and the executor asks again
    at once: with a block ready and a consumer that is busy it spins. This one waits for the consumer.
    """

    KEY = "fvlm.block_limit"
    LONGEST_S, GLANCE_S, SAY_EVERY_S = 0.1, 0.004, 0.5

    def __init__(self, data_context: DataContext, topology: Any, resource_manager: Any):
        super().__init__(data_context, topology, resource_manager)
        self._blocks, self._block_bytes, self._key = data_context.get_config(self.KEY)
        self._said = 0.0

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        if not op.num_active_tasks():
            return None
        deadline = time.monotonic() + self.LONGEST_S
        while (room := self._blocks - self._for_consumer() - self._on_their_way()) <= 0:
            if self._on_their_way() or time.monotonic() > deadline:
                break  # what is on its way needs the executor, that is this thread, to get on
            time.sleep(self.GLANCE_S)
        if time.monotonic() - self._said > self.SAY_EVERY_S:
            self._said = time.monotonic()
            internal_kv._internal_kv_put(
                self._key, str(self._for_consumer() + self._on_their_way()).encode(), overwrite=True
            )
        return max(room, 0) * self._block_bytes

    def _for_consumer(self) -> int:
        """Blocks that the consumer has, or may take without the executor's help."""
        *_, output = self._topology.values()
        taken = self._resource_manager.get_external_consumer_bytes() // self._block_bytes
        return int(output.output_queue.num_blocks + taken)

    def _on_their_way(self) -> int:
        """Blocks between the decoding and the consumer's queue."""
        operators = [state for op, state in self._topology.items() if op.input_dependencies]  # the input has no blocks
        *_, output = operators
        return int(sum(s.total_enqueued_output_blocks() for s in operators) - output.output_queue.num_blocks)
