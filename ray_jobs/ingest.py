"""Ray Data's part: reads and decodes what the plan asks for, in its own processes, into the object store.

One dataset a rank and chapter, made inside the rank. A task is one window of the plan: it reads the window's row
groups once and streams one block a step, so a block is a batch. The executor runs in an actor of its own
(`streaming_split`), not in the trainer's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext

from fvlm.config import Config, DataConfig
from fvlm.data.read import ClipReader, RawBatch

CHAPTER_WINDOWS = 512
"""Windows planned as one dataset. Ray Data makes all tasks up front (1.3 ms each); a long run is read in chapters."""


def rank_batches(
    reader: ClipReader, config: DataConfig, rank: int, world: int, start: int, stop: int
) -> Iterator[RawBatch]:
    """This rank's share of the steps [start, stop), one RawBatch a step, in the plan's order.

    Arrays are views into the object store: drop a batch before asking for many more. Raises what reading raised
    (UserError for damaged data).
    """
    windows = reader.plan.windows(start, stop)
    while chapter := list(itertools.islice(windows, CHAPTER_WINDOWS)):
        delivered = 0
        for batch in _stream(reader, config, rank, world, chapter):
            yield batch
            delivered += 1
        wanted = chapter[-1][1] - chapter[0][0]
        if delivered != wanted:
            raise RuntimeError(f"Ray Data delivered {delivered} steps of rank {rank} where the plan has {wanted}")


def cpus_needed(config: Config) -> int:
    """CPUs without which a run would wait for ever: every rank's own, and one for each of its ingest tasks."""
    return math.ceil(config.scale.workers * (config.scale.cpus_per_worker + max(1, config.data.decode_tasks)))


def with_tasks_shared_out(config: Config) -> DataConfig:
    """The data section with the number of one rank's ingest tasks in it.

    Every rank gets CPUs of its own. Were they common, the tasks of one rank, held up until its batches are taken, could
    keep all of them while that rank waits in a collective for another one, which would never get its batch.
    """
    scale = config.scale
    free = ray.cluster_resources().get("CPU", 0) - scale.workers * scale.cpus_per_worker
    return dataclasses.replace(config.data, decode_tasks=config.data.decode_tasks or max(1, int(free // scale.workers)))


def _stream(
    reader: ClipReader, config: DataConfig, rank: int, world: int, windows: list[tuple[int, int]]
) -> Iterator[RawBatch]:
    """One chapter through Ray Data."""
    _configure(DataContext.get_current(), reader, world)
    dataset = ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(
        functools.partial(_read_window, reader, rank, world, windows),
        batch_size=None,
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=config.decode_tasks or None),
    )
    (iterator,) = dataset.streaming_split(1)
    yield from iterator.iter_batches(
        batch_size=reader.plan.global_batch // world,
        batch_format="numpy",
        prefetch_batches=config.prefetch_batches,
    )


def _configure(context: DataContext, reader: ClipReader, world: int) -> None:
    """Settings that the plan's exactness and a small memory rest on. They are sealed into a dataset when it is made."""
    context.execution_options.preserve_order = True  # of the blocks, and of the consumer's threads
    context.max_errored_blocks = 0  # a dropped block would be lost clips
    context.execution_no_progress_timeout_s = -1  # a consumer that pauses is no failure
    context.raise_original_map_exception = True  # so that a UserError stays one
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = batch_bytes(reader, world)


def batch_bytes(reader: ClipReader, world: int) -> int:
    """Bytes of one rank's decoded batch: the size of a block."""
    spec = reader.manifest.spec
    clip = reader.num_frames * (3 * spec.frame_size**2 + spec.latent_bytes)
    return clip * (reader.plan.global_batch // world)


def _read_window(
    reader: ClipReader, rank: int, world: int, windows: list[tuple[int, int]], ids: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """A task: `ids["id"]` says which window."""
    for index in ids["id"]:
        # Ray copies a block into the object store before it asks for the next, so memory can be used again.
        yield from reader.read(*windows[int(index)], rank, world, reuse=True)
