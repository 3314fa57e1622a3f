"""The ingest's memory budget, as arithmetic: what it never exceeds, and what it says when it does not suffice."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import make_spec, write_dataset

from fvlm.data.memory import MB, held_bytes, parse_bytes, share_out
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.schema import FILES_SCHEMA, Manifest
from fvlm.errors import UserError

GIB = 1 << 30


def reader_of(batch: int, window: int, frame_size: int = 256, frames: int = 8, lanes: int = 4) -> ClipReader:
    """Of a dataset that is nowhere: 20 kB a stored frame, 24 frames stored."""
    spec = make_spec(stored_frames=24, frame_size=frame_size, rows_per_row_group=16)
    rows = np.array([1000, 1016, 900])
    columns = [pa.array(["a", "b", "c"]), pa.array(rows), pa.array(rows * 24 * 20_000), pa.array(["0" * 64] * 3)]
    manifest = Manifest("nowhere", spec, pa.table(columns, schema=FILES_SCHEMA), "0" * 64, 0)
    return ClipReader(manifest, Plan(rows, 16, 0, batch, lanes, window, manifest.fingerprint), frames)


@pytest.mark.parametrize(
    "text, size",
    [
        ("2GB", 2_000_000_000), ("800MB", 800_000_000), ("1.5GiB", 3 * GIB // 2), ("64 mib", 64 << 20), ("auto", None),
    ],
)  # fmt: skip
def test_sizes_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "2TB", "-1GB", "1.2.3GB", "2GB please", "Auto"])
def test_a_size_that_is_none_is_an_error_with_examples(text):
    with pytest.raises(UserError, match=r"--ingest-memory .*give a size such as 2GB"):
        parse_bytes(text)


GRID = list(itertools.product([1, 2, 4], [4, 16, 64], [1, 5, 12, 16], [56, 256]))


@pytest.mark.parametrize("world, batch, window, frame_size", GRID)
def test_what_all_ranks_hold_together_never_exceeds_the_limit(world, batch, window, frame_size):
    reader = reader_of(batch, window, frame_size)
    step = 8 * (3 * frame_size**2 + 4 * (frame_size // 8) ** 2 * 2) * (batch // world)  # bytes of a rank's clips
    accepted = 0
    for limit in np.geomspace(200 * MB, 20_000 * MB, 25).astype(int).tolist():
        try:
            memory = share_out(reader, world, limit, 64 * GIB)
        except UserError:
            assert not accepted  # more is never refused where less was enough
            continue
        accepted += 1
        assert window % memory.block_steps == 0
        assert memory.block_bytes == step * memory.block_steps
        # Two blocks are decoded into; one is being stored, one stored, three are the consumer's.
        blocks = memory.waiting + 2 + 2 + 3
        assert memory.total == 600 * MB + memory.compressed + blocks * memory.block_bytes
        assert world * memory.total <= limit
    assert accepted


@pytest.mark.parametrize("world, batch, window, frame_size", GRID)
def test_too_little_is_refused_and_the_least_that_the_message_names_suffices(world, batch, window, frame_size):
    reader = reader_of(batch, window, frame_size)
    with pytest.raises(UserError, match="--ingest-memory: 60 MB for") as refusal:
        share_out(reader, world, 60 * MB, 64 * GIB)
    least = int(re.search(r"Least: ([\d,]+) MB", str(refusal.value))[1].replace(",", ""))
    share_out(reader, world, (least + 1) * MB, 64 * GIB)
    with pytest.raises(UserError):
        share_out(reader, world, (least - 2) * MB, 64 * GIB)


def test_more_memory_lets_more_blocks_wait_up_to_a_few():
    reader = reader_of(16, 16)
    waiting = [share_out(reader, 1, limit * MB, 64 * GIB).waiting for limit in (910, 960, 1_020, 9_000)]
    assert waiting == sorted(waiting) and waiting[0] < waiting[1] < waiting[-1] == 8


@pytest.mark.parametrize(
    "world, machine, most", [(1, 64 * GIB, 1300 * MB), (2, 64 * GIB, 2600 * MB), (2, 7 * GIB, 7 * GIB // 4)]
)
def test_auto_is_1300_mb_a_rank_and_at_most_a_quarter_of_the_machine(world, machine, most):
    memory = share_out(reader_of(16, 16), world, None, machine)
    assert memory == share_out(reader_of(16, 16), world, most, machine)
    assert world * memory.total <= most


def test_auto_on_a_small_machine_is_the_least_that_works():
    reader = reader_of(16, 16)
    memory = share_out(reader, 1, None, 2 * GIB)
    assert (memory.block_steps, memory.waiting) == (1, 1)
    assert memory == share_out(reader, 1, memory.total, 2 * GIB)


@pytest.mark.parametrize("world, lanes, window", [(1, 4, 6), (1, 1, 6), (2, 4, 3), (4, 4, 5)])
def test_no_two_windows_of_a_rank_touch_more_stored_bytes_than_are_reckoned_with(tmp_path, world, lanes, window):
    manifest = write_dataset(tmp_path, clips=190, stored_frames=4)
    plan = Plan(manifest.shard_rows, manifest.spec.rows_per_row_group, 0, 4, lanes, window, manifest.fingerprint)
    reader = ClipReader(manifest, plan, num_frames=2)
    sizes = {}
    for shard, name in enumerate(manifest.files["name"].to_pylist()):
        metadata = pq.ParquetFile(tmp_path / name).metadata
        for group in range(metadata.num_row_groups):
            chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            sizes[shard, group] = sum(c.total_compressed_size for c in chunks if c.path_in_schema in reader.columns)
    windows = list(plan.windows(0, plan.steps_per_epoch))
    for rank in range(world):
        touched = [
            set(zip(*(places.reshape(-1).tolist() for places in plan.rows(*ends, rank, world)[:2]), strict=True))
            for ends in windows
        ]
        largest = max(sum(sizes[place] for place in a | b) for a, b in itertools.pairwise(touched))
        assert largest <= held_bytes(reader, world)
