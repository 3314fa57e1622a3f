"""The order of the samples, through the real Ray Data pipeline: Parquet, tasks, object store, decoded batches.

The cluster is real and so are the processes; the frames are compared with the JPEGs of the shards, decoded here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from datasets import make_clip, make_spec, write_dataset
from PIL import Image
from ray import cloudpickle

from fvlm.config import Config, ScaleConfig
from fvlm.data.memory import IngestMemory, share_out
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader, RawBatch
from fvlm.data.schema import Manifest
from fvlm.data.shards import ShardWriter, write_manifest
from fvlm.errors import UserError
from ray_jobs.cluster import connect
from ray_jobs.ingest import Share, cpus_needed, rank_batches, share_of_one_rank

CLIPS, GLOBAL_BATCH, LANES, WINDOW = 26, 4, 4, 4
STEPS_PER_EPOCH, REMAINDER = 6, 2
STOP = 3 * STEPS_PER_EPOCH
STORED, USED = 8, [0, 2, 4, 7]
INGEST = "ingest decode rank 0"
"""Part of the title that Ray gives our decoding actor."""


class Clip(NamedTuple):
    """What arrived: the id and a digest of every byte that a model would see."""

    clip_id: str
    caption: str
    digest: str


def digest(frames: np.ndarray, latents: np.ndarray) -> str:
    return hashlib.sha256(frames.tobytes() + latents.tobytes()).hexdigest()


def clips_of(batch: RawBatch) -> list[Clip]:
    assert batch["frames"].dtype == np.uint8
    return [
        Clip(str(clip_id), str(caption), digest(frames, latents))
        for clip_id, caption, frames, latents in zip(
            batch["clip_id"], batch["caption"], batch["frames"], batch["latents"], strict=True
        )
    ]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(num_cpus=4, object_store_bytes=256 << 20):
        yield


def plan_of(manifest: Manifest, global_batch: int, lanes: int, window_steps: int) -> Plan:
    size = manifest.spec.rows_per_row_group
    return Plan(manifest.shard_rows, size, 0, global_batch, lanes, window_steps, manifest.fingerprint)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ClipReader:
    manifest = write_dataset(tmp_path_factory.mktemp("order"), clips=CLIPS, stored_frames=STORED)
    rows = manifest.shard_rows % manifest.spec.rows_per_row_group
    assert rows.any() and len(set(manifest.shard_rows.tolist())) > 1  # short row groups, uneven shards
    return ClipReader(manifest, plan_of(manifest, GLOBAL_BATCH, LANES, WINDOW), len(USED))


@pytest.fixture(scope="module")
def stored(reader: ClipReader) -> dict[str, Clip]:
    """Every clip of the dataset, decoded without any code of the product."""
    clips = {}
    for name in reader.manifest.files["name"].to_pylist():
        for row in pq.read_table(f"{reader.manifest.root}/{name}").to_pylist():
            frames = np.stack([np.asarray(Image.open(io.BytesIO(row[f"frame_{t:02d}"]))) for t in USED])
            latents = np.stack([np.frombuffer(row[f"latent_{t:02d}"], np.float16) for t in USED])
            clips[row["clip_id"]] = Clip(row["clip_id"], row["caption"], digest(frames, latents))
    return clips


def rank_clips(reader: ClipReader, start: int, stop: int, rank: int = 0, world: int = 1) -> list[list[Clip]]:
    """One list of clips for every step of one rank."""
    return [clips_of(batch) for batch in rank_batches(reader, share(reader, world), rank, world, start, stop)]


def share(reader: ClipReader, world: int, block_steps: int = 2) -> Share:
    """Blocks of two steps, so that windows and starts that are not even leave blocks of one."""
    batch = reader.clip_bytes * (reader.plan.global_batch // world)
    return Share(IngestMemory(block_steps, block_steps * batch, waiting=2, compressed=0), 2)


def global_batches(reader: ClipReader, start: int, stop: int, world: int) -> list[list[Clip]]:
    ranks = [rank_clips(reader, start, stop, rank, world) for rank in range(world)]
    return [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(cluster: None, reader: ClipReader) -> list[list[Clip]]:
    """Three epochs on one rank."""
    return global_batches(reader, 0, STOP, world=1)


def test_each_epoch_shows_every_clip_once_but_for_the_counted_remainder(undisturbed, reader, stored):
    assert (reader.plan.steps_per_epoch, reader.plan.remainder) == (STEPS_PER_EPOCH, REMAINDER)
    assert [len(batch) for batch in undisturbed] == [GLOBAL_BATCH] * STOP
    epochs = [undisturbed[first : first + STEPS_PER_EPOCH] for first in range(0, STOP, STEPS_PER_EPOCH)]
    for epoch in epochs:
        seen = [clip.clip_id for clip in itertools.chain(*epoch)]
        assert len(seen) == len(set(seen)) == CLIPS - REMAINDER
        assert set(seen) <= stored.keys()
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_every_frame_latent_and_caption_is_the_one_that_the_shard_holds(undisturbed, stored):
    for clip in itertools.chain(*undisturbed):
        assert clip == stored[clip.clip_id]
    assert len({clip.digest for clip in stored.values()}) == CLIPS


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batches_are_the_same_for_any_number_of_ranks(undisturbed, reader, world):
    assert global_batches(reader, 0, STOP, world) == undisturbed


def test_ranks_that_read_at_the_same_time_get_the_same_global_batches(undisturbed, reader):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers do not find the tests' folder
    rank = ray.remote(num_cpus=0)(rank_clips)
    shares = ray.get([rank.remote(reader, 0, STOP, r, 2) for r in range(2)])
    assert [list(itertools.chain(*both)) for both in zip(*shares, strict=True)] == undisturbed


@pytest.mark.parametrize(
    "step, world", [(1, 1), (3, 4), (4, 2), (6, 1), (17, 2)],
    ids=["first-step", "mid-window", "window-end", "epoch-end", "last-step"],
)  # fmt: skip
def test_a_run_stopped_after_any_step_and_resumed_with_any_rank_count_gets_exactly_the_rest(
    undisturbed, reader, step, world
):
    stopped = rank_batches(reader, share(reader, 1), 0, 1, 0, STOP)
    assert [clips_of(batch) for batch in itertools.islice(stopped, step)] == undisturbed[:step]
    stopped.close()
    assert global_batches(reader, step, STOP, world) == undisturbed[step:]


def test_chapters_are_joined_without_a_seam(undisturbed, reader, monkeypatch):
    """A long run is read as one dataset after another; here a dataset holds two tasks of one window."""
    monkeypatch.setattr("ray_jobs.ingest.CHAPTER_TASKS", 2)
    monkeypatch.setattr("ray_jobs.ingest.TASK_WINDOWS", 1)
    assert global_batches(reader, 3, STOP, world=1) == undisturbed[3:]


def ingest_processes() -> list[psutil.Process]:
    """Processes of this test's own cluster that are busy with a task of the ingest."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if INGEST in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it ended while we looked
            continue
    return found


def test_killed_ingest_processes_are_replaced_and_leave_the_order_exact(cluster, reader):
    steps = 20 * STEPS_PER_EPOCH
    expected = [batch["clip_id"] for batch in BlockReader(reader).steps(0, steps)]
    killed, received = [], []
    for batch in rank_batches(reader, share(reader, 1), 0, 1, 0, steps):
        received.append([str(clip_id) for clip_id in batch["clip_id"]])
        if len(received) > 5 * (len(killed) + 1) and len(killed) < 4:
            for process in ingest_processes()[:1]:
                process.kill()
                process.wait(30)
                killed.append(process.pid)
    assert len(killed) == 4
    assert received == expected


@pytest.mark.timeout(120)
def test_ranks_that_wait_for_each_other_never_starve(cluster, tmp_path):
    """Two ranks in lock step, as collectives keep them, and windows too large for the object store to hold many.

    A rank's tasks stop when nobody takes their batches. If they then held all CPUs, the other rank would get none.
    """
    spec = make_spec(stored_frames=2, frame_size=256, rows_per_row_group=16)
    clip = make_clip(0, spec)
    with ShardWriter(tmp_path / "shard-00000.parquet", spec) as writer:
        for index in range(8 * 48):
            writer.add(dataclasses.replace(clip, clip_id=f"clip-{index}"))
    manifest = write_manifest(tmp_path, spec, [writer.file], 0)
    reader = ClipReader(manifest, plan_of(manifest, 8, 2, 48), 2)
    config = Config(run="starve", scale=ScaleConfig(workers=2, cpus_per_worker=0.5))
    memory = share_out(reader, 2, None, 8 << 30)
    shared_out = share_of_one_rank(config, memory, on_gpu=False)
    assert shared_out.threads == 1 and cpus_needed(config) == 3  # of 4 CPUs
    ranks = [rank_batches(reader, shared_out, rank, 2, 0, 8 * 48) for rank in range(2)]
    for _ in range(96):
        first, second = (set(next(rank)["clip_id"]) for rank in ranks)
        assert len(first | second) == 8
    for rank in ranks:
        rank.close()


def test_a_damaged_row_group_ends_the_stream_with_its_name_and_not_with_other_clips(cluster, tmp_path):
    manifest = write_dataset(tmp_path, clips=16, shards=2)
    shard = tmp_path / "shard-00001.parquet"
    column = pq.ParquetFile(shard).metadata.row_group(1).column(3)  # a frame of the last row group
    data = bytearray(shard.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    shard.write_bytes(data)
    reader = ClipReader(manifest, plan_of(manifest, 4, 4, 4), len(USED))
    with pytest.raises(UserError, match=r"shard-00001\.parquet: row group 1 cannot be read; damaged"):
        rank_clips(reader, 0, 4)
