"""The ingest beside a consumer: what it holds while nobody takes batches, and `--feed-test`, which measures it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from datasets import make_clip, make_spec, write_dataset
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from fvlm.config import Config, DataConfig, ScaleConfig
from fvlm.data.memory import MB, IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.shards import ShardWriter, write_manifest
from fvlm.errors import UserError
from ray_jobs import train
from ray_jobs.cli import run_command
from ray_jobs.cluster import connect
from ray_jobs.feed import Feed
from ray_jobs.feed_verdict import Findings, diagnose
from ray_jobs.ingest import Share, ingest_memory, rank_batches
from ray_jobs.options import FeedTest, command_line

ROOT = Path(__file__).resolve().parents[1]
BATCH = 8
SMALL = [
    "--data.frame-size", "56", "--data.global-batch", "4", "--data.lanes", "4", "--data.window-steps", "4",
    "--scale.cpus-per-worker", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(num_cpus=4, object_store_bytes=300 * MB):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("small"), clips=26)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ClipReader:
    """Steps of 3 MB: what a block holds besides pixels does not count."""
    folder = tmp_path_factory.mktemp("large")
    spec = make_spec(stored_frames=2, frame_size=256, rows_per_row_group=16)
    clip = make_clip(0, spec)
    with ShardWriter(folder / "shard-00000.parquet", spec) as writer:
        for index in range(640):
            writer.add(dataclasses.replace(clip, clip_id=f"clip-{index}"))
    manifest = write_manifest(folder, spec, [writer.file], 0)
    return ClipReader(manifest, Plan(manifest.shard_rows, 16, 0, BATCH, 4, 16, manifest.fingerprint), 2)


# What the ingest holds


def store_bytes() -> tuple[int, int]:
    """In use and spilled, as the object store itself says."""
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return stats.object_store_bytes_used, stats.spilled_bytes_total + stats.object_store_bytes_fallback


def most_blocks(memory: IngestMemory, seconds: float) -> float:
    """The most blocks that were in the object store in the next `seconds`."""
    deadline, most = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        most = max(most, store_bytes()[0])
        time.sleep(0.02)
    return most / memory.block_bytes


@pytest.mark.parametrize("waiting", [1, 6])
def test_however_long_nobody_takes_a_batch_no_more_blocks_exist_than_were_reckoned_with(cluster, reader, waiting):
    memory = IngestMemory(2, 2 * BATCH * reader.clip_bytes, waiting, compressed=0)
    batches = rank_batches(reader, Share(memory, 2), 0, 1, 0, 400)
    held = []
    taken = 0
    for stall_at in (1, 2, 9, 33, 70):
        for _ in range(stall_at - taken):
            batch = next(batches)
        taken = stall_at
        held.append(most_blocks(memory, 1.2))
    assert len(batch["clip_id"]) == BATCH
    batches.close()
    del batch
    assert max(held) <= memory.blocks + 0.1  # captions, ids and times come on top of the pixels
    assert max(held) > waiting + 1  # it did read ahead
    assert store_bytes()[1] == 0


def process_named(part: str) -> psutil.Process:
    for process in psutil.Process().children(recursive=True):
        if part in " ".join(process.cmdline()):
            return process
    raise AssertionError(f"no process {part}")


def test_the_executor_rests_while_nobody_takes_a_batch_and_the_feed_counts(cluster, reader):
    memory = IngestMemory(2, 2 * BATCH * reader.clip_bytes, waiting=3, compressed=0)
    share = Share(memory, 2)
    batches = rank_batches(reader, share, 0, 1, 0, 400)
    feed = Feed(batches, share, 0, len)
    for batch in itertools.islice(feed, 5):
        assert len(batch["clip_id"]) == BATCH
    time.sleep(1.5)  # until all that may wait does
    executor = process_named("SplitCoordinator")
    before = sum(executor.cpu_times()[:2])
    time.sleep(3)
    assert sum(executor.cpu_times()[:2]) - before < 0.2 * 3
    lap = feed.lap()
    batches.close()
    assert memory.waiting <= lap["ingest/blocks"] <= memory.blocks
    assert lap["ingest/store_mb"] == pytest.approx(lap["ingest/blocks"] * memory.block_bytes / MB)
    assert 0.1 < lap["ingest/decode_ms"] < 100 and 0 < lap["ingest/read_ms"] < 1000
    assert 5 * BATCH / 60 < lap["ingest/clips_per_s"] < 5 * BATCH / 4.5
    assert lap["ingest/replaced"] == 0


# The command line


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that the command ends with, code 2, before it starts or joins a cluster."""

    def no_ray(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(train, "connect", no_ray)
    monkeypatch.setattr(sys, "argv", ["train", *args])
    with pytest.raises(SystemExit) as end:
        run_command(train.main)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--step-ms", "120"], "--step-ms 120 belongs to --feed-test"),
        (["--feed-seconds", "5"], "--feed-seconds 5 belongs to --feed-test"),
        (["--feed-test", "--step-ms", "0"], "--step-ms is 0; it must be above 0"),
        (["--feed-test", "--feed-seconds", "-1"], "--feed-seconds is -1; it must be above 0"),
        (["--feed-test", "--step-ms", "nan"], "--step-ms is nan; it must be above 0"),
        (["--feed-test", "--data.path", ""], "--data.path is missing"),
        (["--feed-test", "--ingest-memory", "lots"], "--ingest-memory 'lots': give a size"),
        (["--feed-test", "--ingest-memory", "100MB"], "--ingest-memory: 100 MB for 1 rank is too little. Least: "),
        (["--ingest-memory", "100MB"], "--ingest-memory: 100 MB for 1 rank is too little. Least: "),
    ],
)
def test_bad_input_is_refused_before_a_cluster_starts_and_leaves_no_run(
    monkeypatch, capsys, tmp_path, small, options, message
):
    args = ["demo", "--data.path", small.root, "--runs-dir", str(tmp_path / "runs"), *SMALL, *options]
    said = refused(monkeypatch, capsys, *args)
    assert f"error: {message}" in said
    assert not (tmp_path / "runs" / "demo").exists()


def test_the_step_is_120_ms_and_the_test_a_minute_long_unless_told():
    assert command_line(["demo", "--feed-test"])[1] == FeedTest(0.12, 60)
    assert command_line(["demo", "--feed-test", "--step-ms", "40", "--feed-seconds", "5"])[1] == FeedTest(0.04, 5)
    assert command_line(["demo"])[1] is None


def feed_test(manifest: Manifest, runs: Path, *options: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "ray_jobs.train", "demo", "--feed-test", "--data.path", manifest.root]
    done = subprocess.run(
        [*command, "--runs-dir", str(runs), *SMALL, *options],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_slow_step_is_fed_by_a_cluster_of_its_own(monkeypatch, small, tmp_path):
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    code, output = feed_test(small, tmp_path / "runs", "--step-ms", "250", "--feed-seconds", "6")
    assert code == 0, output
    assert output.startswith("ingest: at most ")
    for part in ("4 clips every 250 ms for 6 s", "wanted          16.0 clips/s", "5 s: 1", "\nfeeds the GPU\n"):
        assert part in output, output
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(200)
def test_two_ranks_with_an_impossible_step_are_not_fed_by_the_cluster_that_is_named(cluster, small, tmp_path):
    address = ray.get_runtime_context().gcs_address
    options = ["--step-ms", "0.5", "--feed-seconds", "2", "--scale.workers", "2"]
    code, output = feed_test(small, tmp_path / "runs", *options, RAY_ADDRESS=address)
    assert code == 1, output
    assert "2 ranks" in output and "wanted          8000.0 clips/s" in output
    assert "\ndoes NOT feed the GPU\n- " in output
    assert not (tmp_path / "runs").exists()


# The verdict


FED = Findings(
    step_s=0.1, wanted=160, delivered=160, wait=0.001, most=400, first_s=3, decode_ms=3, read_ms=0.5, threads=4,
    readers=1, cores_busy=0.5, blocks_mean=7, blocks_least=5, store_bytes=400 * MB, stored_bytes=150_000,
)  # fmt: skip
MEMORY = IngestMemory(block_steps=2, block_bytes=50 * MB, waiting=3, compressed=50 * MB)
SLOW_DISK = {"wait": 0.5, "delivered": 80, "most": 80, "read_ms": 12}
FEW_CORES = {"wait": 0.2, "delivered": 128, "most": 128, "decode_ms": 28, "cores_busy": 0.95}


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"wait": 0.0099}, []),
        ({"wait": 0.0099, "most": 100}, []),  # what was measured counts
        (SLOW_DISK, ["disk: ", "gives 12.0 MB/s", "26.4 MB/s are needed", "faster disk", "--num-frames 8"]),
        (FEW_CORES, ["cores: 4 threads", "give 128 clips/s", ": 143)", "6 threads", "4:4:4", "218 px", "num-frames 5"]),
        (FEW_CORES | {"cores_busy": 0.4}, ["only 40% busy, so try --data.decode-threads 6"]),
        (FEW_CORES | {"decode_ms": 9}, ["decoding gets only 29% of its threads' time: end what else"]),
        ({"wait": 0.05, "blocks_least": 2}, ["memory: ", "400 clips/s; 160 are wanted", "--ingest-memory 2300MB"]),
        ({"wait": 0.05}, ["batches came late: now and then the disk"]),
        ({"wait": 0.05, "cores_busy": 1.0}, ["other programs: ", "100% busy"]),
        ({"wait": 0.5, "most": 80, "delivered": 80}, ["neither decoding (6% of its threads) nor reading (4%)"]),
    ],
)
def test_the_verdict_names_what_limits_and_what_would_do(change, wanted):
    said = reasons(change)
    assert bool(said) == bool(wanted)
    for part in wanted:
        assert part in " ".join(said), said


def reasons(change: dict, root: str = "/data/clips", cache: str = "", **spec: object) -> list[str]:
    manifest = Manifest(root, make_spec(stored_frames=24, frame_size=256, **spec), None, "", 0)
    config = Config(run="r", data=DataConfig(cache_dir=cache), scale=ScaleConfig(workers=1))
    return diagnose(dataclasses.replace(FED, **change), config, manifest, MEMORY)


def test_a_slow_remote_store_asks_for_a_cache():
    said = " ".join(reasons(SLOW_DISK, "s3://bucket/clips"))
    assert "reading s3://bucket/clips gives 12.0 MB/s" in said and "--data.cache-dir" in said
    assert "--data.cache-dir" not in " ".join(reasons(SLOW_DISK, "s3://bucket/clips", cache="/cache"))


def test_the_codec_is_named_where_another_one_is_faster():
    assert "codec: PNG" in " ".join(reasons(FEW_CORES, frame_codec="png"))
    assert "codec" not in " ".join(reasons(FEW_CORES, jpeg_subsampling="420"))


def test_the_report_shows_every_figure():
    report = dataclasses.replace(FED, replaced=2).report([])
    for part in (
        "wanted          160.0 clips/s", "data wait       0.10% of the time", "0.50 ms a clip, 24.0 MB/s",
        "7.0 on the mean, 5 at least", "400 MB at the most", "400 clips/s: could feed a step of 40 ms", "2 clips,",
    ):  # fmt: skip
        assert part in report, report
    assert report.endswith("\nfeeds the GPU")


def test_a_budget_is_the_same_wherever_it_is_asked_for(small):
    """The command prints it, sizes the object store by it, and hands it to the ranks."""
    config, _ = command_line(["demo", "--data.path", small.root, "--ingest-memory", "1GB", *SMALL])
    memory = ingest_memory(config, small)
    assert memory.total <= 1000 * MB
    with pytest.raises(UserError, match="for 2 ranks is too little"):
        two = dataclasses.replace(config, ingest_memory="900MB", scale=ScaleConfig(workers=2))
        ingest_memory(two, small)
