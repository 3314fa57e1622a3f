"""A hundred epochs through the ingest, with a damaged clip and a consumer that stalls: nothing may grow."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import write_dataset

from fvlm.data.memory import IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from ray_jobs.cluster import connect
from ray_jobs.ingest import Share, rank_batches

sys.path.insert(0, str(Path(__file__).parent / "benchmarks" / "ingest"))
from processes import memory_bytes, tree

EPOCHS, STEPS_PER_EPOCH = 100, 6
STEPS = EPOCHS * STEPS_PER_EPOCH
STORE_BYTES = 100 << 20


class Sample(NamedTuple):
    """memory: proportional bytes of this process and all below it; shared: those of them that are shared memory"""

    memory: float
    shared: float
    open_files: float
    stored: float


def sample() -> Sample:
    root = os.getpid()
    memory = memory_bytes(root)
    files = 0
    for pid in tree(root):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            files += sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return Sample(memory["total"], memory["shmem"], files, stored_bytes())


def store() -> object:
    from ray import get_runtime_context
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    return get_memory_info_reply(get_state_from_address(get_runtime_context().gcs_address)).store_stats


def stored_bytes() -> float:
    return float(store().object_store_bytes_used)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_memory_shared_memory_and_open_files_stay_flat_over_100_epochs_and_nothing_is_spilled(tmp_path):
    manifest = write_dataset(tmp_path, clips=24, stored_frames=2, frame_size=128)
    shard = tmp_path / "shard-00001.parquet"
    chunk = pq.ParquetFile(shard).metadata.row_group(1).column(4)
    content = bytearray(shard.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    shard.write_bytes(content)
    plan = Plan(manifest.shard_rows, manifest.spec.rows_per_row_group, 0, 4, 4, 4, manifest.fingerprint)
    reader = ClipReader(manifest, plan, 2, replace=True)
    memory = IngestMemory(block_steps=2, block_bytes=2 * 4 * reader.clip_bytes, waiting=2, compressed=0)
    samples, replaced = [], 0
    with connect(num_cpus=2, object_store_bytes=STORE_BYTES):
        for step, batch in enumerate(rank_batches(reader, Share(memory, 2), 0, 1, 0, STEPS)):
            replaced += int(np.count_nonzero(batch["replaced"] != ""))
            if step % 97 == 96:
                time.sleep(0.5)
            if step % 30 == 29:
                samples.append(sample())
        stats = store()
    assert replaced == EPOCHS * manifest.spec.rows_per_row_group
    second, third = (np.median(samples[i : i + 6], axis=0) for i in (7, 14))
    print(f"{second} -> {third}")
    assert (stats.spilled_bytes_total, stats.object_store_bytes_fallback) == (0, 0)
    assert third[0] < second[0] + 20e6, (second, third)
    assert third[1] < second[1] + 2e6, (second, third)
    assert third[2] < second[2] + 20, (second, third)
    assert max(s.stored for s in samples) < 2 * memory.store_bytes
