"""Wherever a run is stopped, and whoever goes on: the rest of the order is what it would have been, clip by clip.

Every combination, from real shards through the reader and decoder that the ingest's processes run; the way through Ray
is in test_order.py.
"""

from __future__ import annotations

import hashlib
import itertools

import pytest
from datasets import write_dataset

from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader, RawBatch

GLOBAL_BATCH = LANES = 8
WINDOW, STEPS = 3, 20
"""26 clips are 3 steps an epoch and 2 clips left out: windows and epochs end at different steps."""
Clips = list[tuple[str, str]]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ClipReader:
    manifest = write_dataset(tmp_path_factory.mktemp("order"), clips=26)
    size = manifest.spec.rows_per_row_group
    plan = Plan(manifest.shard_rows, size, 0, GLOBAL_BATCH, LANES, WINDOW, manifest.fingerprint)
    return ClipReader(manifest, plan, 2)


def clips_of(block: RawBatch) -> Clips:
    """Id and digest of every byte that a model would see, of each clip."""
    return [
        (str(clip_id), hashlib.sha256(frames.tobytes() + latents.tobytes()).hexdigest())
        for clip_id, frames, latents in zip(block["clip_id"], block["frames"], block["latents"], strict=True)
    ]


def steps(reader: ClipReader, start: int, stop: int, world: int = 1, threads: int = 1) -> list[Clips]:
    """The global batches of the steps [start, stop), put together from all ranks."""
    ranks = []
    for rank in range(world):
        blocks = BlockReader(reader, threads)
        ranks.append([clips_of(block) for block in blocks.steps(start, stop, rank, world)])
        blocks.close()
    return [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(reader: ClipReader) -> list[Clips]:
    return steps(reader, 0, STEPS)


def test_a_run_resumed_at_any_step_gets_the_rest_bit_by_bit(reader, undisturbed):
    for start in range(STEPS):
        assert steps(reader, start, STEPS) == undisturbed[start:], start


def test_three_resumes_in_a_row_change_nothing(reader, undisturbed):
    cuts = [0, 1, 7, 8, STEPS]
    assert [batch for a, b in itertools.pairwise(cuts) for batch in steps(reader, a, b)] == undisturbed


@pytest.mark.parametrize("before", [1, 2, 4, 8])
@pytest.mark.parametrize("after", [1, 2, 4, 8])
def test_saved_by_so_many_ranks_and_gone_on_with_by_so_many_the_global_batches_are_the_same(
    reader, undisturbed, before, after
):
    stop = 7
    assert steps(reader, 0, stop, before) + steps(reader, stop, STEPS, after) == undisturbed


def test_the_number_of_decoding_threads_may_change_in_mid_epoch(reader, undisturbed):
    assert steps(reader, 0, 4, threads=4) + steps(reader, 4, 11) + steps(reader, 11, STEPS, threads=2) == undisturbed
