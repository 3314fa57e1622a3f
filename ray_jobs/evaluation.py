"""The clips that a run is evaluated on, read and decoded in a process of their own: the training decodes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from fvlm.data.read import BlockReader, ClipReader, RawBatch
from fvlm.train.held_out import EvalClips

THREADS = 2
"""That decode for one rank. The ingest has filled its share of memory by then and waits."""
AHEAD = 1
"""Batches in the object store that the rank has not asked for."""


@ray.remote(num_cpus=0, num_returns="streaming")
def decode(reader: ClipReader, batches: int, rank: int, world: int) -> Iterator[RawBatch]:
    """This rank's share of the first `batches` steps of the plan. Raises UserError."""
    blocks = BlockReader(reader, THREADS)
    try:
        yield from blocks.steps(0, batches, rank, world)  # Ray copies each before it asks for the next
    finally:
        blocks.close()


def decoded(clips: EvalClips, rank: int, world: int) -> Iterator[RawBatch]:
    """The same, as it comes: views into the object store, where two batches lie at the most if each is dropped in time.

    Raises UserError.
    """
    task = decode.options(name="evaluation decode", _generator_backpressure_num_objects=AHEAD)
    refs: Any = task.remote(clips.reader, clips.batches, rank, world)
    while (ref := next(refs, None)) is not None:
        yield ray.get(ref)
        del ref
