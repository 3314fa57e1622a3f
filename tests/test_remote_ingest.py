"""A dataset behind a network that fails, through the whole product: plan, Ray Data, cache, start of a run, training."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import write_dataset
from faulty_store import Proxy, Store
from test_order import Clip, clips_of, plan_of, share

from fvlm.data.cache import RowGroupCache
from fvlm.data.describe import damage, describe
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.shards import check_shards, read_manifest
from fvlm.errors import Damaged, UserError
from ray_jobs import train
from ray_jobs.cluster import connect
from ray_jobs.ingest import rank_batches
from ray_jobs.options import parse
from ray_jobs.submit import entrypoint

CLIPS, SHARDS, GLOBAL_BATCH, LANES, WINDOW, USED = 60, 5, 4, 4, 4, 4
STOP = 2 * CLIPS // GLOBAL_BATCH  # two epochs
ROOT = Path(__file__).resolve().parents[1]
KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_EC2_METADATA_DISABLED": "true"}
OPTIONS = [
    *("demo", "--data.frame-size", "56", "--data.global-batch", "4", "--data.lanes", "4", "--data.window-steps", "4"),
    *("--train.max-steps", "3", "--train.log-every", "1", "--log.wandb", "off", "--scale.device", "cpu"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(num_cpus=4, object_store_bytes=256 << 20):
        yield


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("local"), clips=CLIPS, shards=SHARDS)


@pytest.fixture(scope="module")
def store(local: Manifest) -> Iterator[Store]:
    store = Store()
    store.upload(Path(local.root), "set")
    yield store
    store.stop()


def reader_of(manifest: Manifest, cache: RowGroupCache | None = None) -> ClipReader:
    return ClipReader(manifest, plan_of(manifest, GLOBAL_BATCH, LANES, WINDOW), USED, cache)


@pytest.fixture(scope="module")
def expected(local: Manifest) -> list[list[Clip]]:
    """The steps as the local dataset gives them, without Ray; their ids also as the plan says, without the reader."""
    reader = reader_of(local)
    steps = [clips_of(batch) for batch in BlockReader(reader).steps(0, STOP)]
    first = np.concatenate([[0], np.cumsum(local.shard_rows)])
    places = (reader.plan.rows(*window, 0, 1) for window in reader.plan.windows(0, STOP))
    numbers = [first[shard] + group * local.spec.rows_per_row_group + row for shard, group, row in places]
    ids = [f"clip-{number:05d}" for window in numbers for number in window.reshape(-1)]
    assert [clip.clip_id for clip in itertools.chain(*steps)] == ids
    assert all(times == 1 for times in Counter(ids[:CLIPS]).values())  # no clip lost, none twice
    return steps


def delivered(
    manifest: Manifest, world: int = 1, cache: RowGroupCache | None = None
) -> tuple[list[list[Clip]], Counter[str]]:
    """The steps through Ray Data, all ranks at the same time; and what the ingest's processes counted."""
    reader = reader_of(manifest, cache)
    ranks = [rank_batches(reader, share(reader, world), rank, world, 0, STOP) for rank in range(world)]
    steps: list[list[Clip]] = []
    events: Counter[str] = Counter()
    for batches in zip(*ranks, strict=True):
        steps.append([clip for batch in batches for clip in clips_of(batch)])
        for text in itertools.chain(*(batch["events"] for batch in batches)):
            events.update(json.loads(str(text)) if text else {})
    return steps, events


def test_a_cold_start_with_5_percent_failing_requests_delivers_the_plans_order(cluster, proxy, expected) -> None:
    flaky = proxy(seed=2, s500=0.02, s503=0.02, cut=0.01)
    steps, events = delivered(read_manifest(flaky.uri("set")))
    assert steps == expected
    assert 0.01 < sum(flaky.faults.values()) / len(flaky.requests) < 0.15
    assert events["retries"] > 0 and events["rereads"] == 0


def test_30_percent_errors_and_short_bodies_give_the_same_order_and_every_retry_is_seen_by_the_trainer(
    cluster, proxy, expected
) -> None:
    shares = {"s500": 0.08, "s503": 0.06, "cut": 0.06, "short": 0.05, "empty": 0.05}
    bad = proxy(seed=3, **shares)
    manifest = read_manifest(bad.uri("set"))
    before = sum(bad.faults.values())
    steps, events = delivered(manifest)
    assert steps == expected
    faults = sum(bad.faults.values()) - before
    assert bad.faults.keys() == shares.keys() and 0.15 < faults / len(bad.requests) < 0.45
    assert faults <= events["retries"] <= faults + 2  # a busy machine may be late by itself
    assert events["rereads"] == 0


def test_ranks_share_a_cache_and_what_is_in_it_is_not_fetched_again(cluster, proxy, expected, tmp_path) -> None:
    flaky = proxy(seed=4, s503=0.05)
    manifest = read_manifest(flaky.uri("set"))
    cache = RowGroupCache(str(tmp_path / "cache"), 1 << 30)
    steps, first = delivered(manifest, world=2, cache=cache)
    assert steps == expected and first["cache_misses"] >= CLIPS // manifest.spec.rows_per_row_group
    before = len(flaky.requests)
    steps, second = delivered(manifest, world=2, cache=cache)
    assert steps == expected
    assert len(flaky.requests) == before, "no request at all: the cache has every row group"
    assert second.keys() == {"cache_hits"} and second["cache_hits"] >= CLIPS // manifest.spec.rows_per_row_group


def test_a_cache_folder_that_cannot_be_used_ends_the_ingest_with_its_name(cluster, local, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    cache = RowGroupCache(str(tmp_path / "file" / "cache"), 1 << 30)
    with pytest.raises(UserError, match=r"file/cache: cannot be used as a cache .* --data.cache-dir"):
        delivered(local, cache=cache)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """`options(proxy, "set", ...)`: a tiny run on that folder of the store; the keys are in the environment."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)

    def given(proxy: Proxy, folder: str, *more: str) -> list[str]:
        uri = f"s3://clips/{folder}?endpoint_override={proxy.address}&scheme=http"
        return [*OPTIONS, "--data.path", uri, "--runs-dir", str(tmp_path / "runs"), *more]

    return given


def test_a_run_is_prepared_from_a_remote_dataset_as_from_a_local_one(proxy, local, options, tmp_path) -> None:
    flaky = proxy(seed=5, s503=0.1)
    manifest = train.prepare_run(parse(options(flaky, "set", "--run", "remote")))
    assert (manifest.fingerprint, manifest.where) == (local.fingerprint, "s3://clips/set") and flaky.faults
    train.prepare_run(parse([*options(flaky, "set"), "--run", "local", "--data.path", local.root]))
    remote, here = tmp_path / "runs" / "remote", tmp_path / "runs" / "local"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (remote / "tokenizer" / name).read_bytes() == (here / "tokenizer" / name).read_bytes()
    assert json.loads((remote / "config.json").read_text())["dataset_path"] == "s3://clips/set"
    assert sum("list-type" in path for _, path, _ in flaky.requests) >= 1
    # Local or remote is no difference to the run: it may go on from a copy of its dataset.
    train.prepare_run(parse([*options(flaky, "set"), "--run", "remote", "--data.path", local.root]))


def test_damage_at_the_start_ends_a_run_or_is_told_and_left_to_the_reader(
    proxy, store, local, options, tmp_path, capsys
) -> None:
    store.upload(Path(local.root), "gaps")
    store.files.delete_file("clips/gaps/shard-00001.parquet")
    store.write("gaps/shard-00003.parquet", store.read("gaps/shard-00003.parquet")[:-100])
    honest = proxy()
    with pytest.raises(Damaged, match=r"s3://clips/gaps/shard-00001.parquet: .*not there"):
        train.prepare_run(parse(options(honest, "gaps")))
    assert not (tmp_path / "runs").exists()
    train.prepare_run(parse(options(honest, "gaps", "--data.on-corrupt", "replace")))
    said = capsys.readouterr().out
    for name in ("shard-00001.parquet", "shard-00003.parquet"):
        assert f"damaged, its clips will be replaced: s3://clips/gaps/{name}: " in said
        assert f"left out of the tokenizer's training: s3://clips/gaps/{name}: " in said
    assert said.count("\n") == 4


def test_a_start_on_a_remote_dataset_lists_once_and_opens_a_few_shards(proxy, store, tmp_path) -> None:
    many = write_dataset(tmp_path, clips=20, shards=20)
    store.upload(tmp_path, "many")
    honest = proxy()
    manifest = read_manifest(honest.uri("many"))
    honest.requests.clear()
    assert check_shards(manifest) == [] and manifest.fingerprint == many.fingerprint
    listings = [path for _, path, _ in honest.requests if "list-type" in path]
    opened = sorted({path for method, path, _ in honest.requests if method == "HEAD"})
    assert len(listings) == 1 and len(opened) == 8 and "shard-00019" in opened[-1]


def test_a_remote_dataset_can_be_looked_at(proxy, local) -> None:
    remote = read_manifest(proxy().uri("set"))
    there, here = dict(describe(remote)), dict(describe(local))
    assert there.pop("dataset") == "s3://clips/set" and here.pop("dataset") == local.root
    assert there == here and list(damage(remote)) == []


def test_no_command_mangles_a_uri_or_takes_a_secret_in_it(monkeypatch) -> None:
    uri = "gs://clips/a/../b?endpoint_override=127.0.0.1:1"
    config = parse([*OPTIONS, "--data.path", uri, "--data.cache-dir", "cache"])
    assert config.data.path == uri
    words = entrypoint(config, OPTIONS)
    assert f"--data.path '{uri}'" in words and f"--data.cache-dir {Path.cwd() / 'cache'}" in words
    assert parse(shlex.split(words)[3:]) == config
    with pytest.raises(UserError, match=r"--data\.path holds a secret") as caught:
        parse([*OPTIONS, "--data.path", "s3://key:hush@clips/set"])
    assert "hush" not in str(caught.value)


@pytest.mark.long
def test_training_on_a_remote_dataset_from_the_first_step_to_the_last(proxy, options, tmp_path) -> None:
    flaky = proxy(seed=6, s500=0.1, s503=0.1)
    command = [sys.executable, "-m", "ray_jobs.train", *options(flaky, "set"), "--data.cache-dir", "cache"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    done = subprocess.run(
        command, cwd=tmp_path, env=clean | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "demo"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(np.isfinite(row["caption/loss_fine"]) for row in rows)
    retries = int(rows[-1]["ingest/retries"])
    assert retries > 0 and f", {retries} retries | " in (run / "train.log").read_text().splitlines()[-2]
    assert rows[-1]["ingest/cache_misses"] > 0 and list((tmp_path / "cache").glob("*.rows"))
