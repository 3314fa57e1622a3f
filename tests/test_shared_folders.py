"""Folders that a node does not share, starts without progress, clusters without room: named, and an end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import write_dataset
from nodes import Nodes, namespaces
from test_nodes import CPUS, Training
from test_train import Training as Command

from fvlm import presets
from fvlm.config import Config
from fvlm.errors import StoreUnavailable, Unavailable, UserError
from ray_jobs import room, shared_folders, stores, supervise
from ray_jobs.cluster import connect
from ray_jobs.room import lack, wait_for_room
from ray_jobs.shared_folders import TOKEN, SharedFolders
from ray_jobs.supervise import StopRequest, keep_training


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_dataset(tmp_path / "data", clips=26)
    config = presets.get("demo", runs_dir=str(tmp_path / "runs"), run="run")
    config.run_dir.mkdir(parents=True)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=str(tmp_path / "data")),
        train=dataclasses.replace(config.train, checkpoint_dir=str(tmp_path / "kept")),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folders, "PATIENCE_S", 0.3)
    monkeypatch.setattr(shared_folders, "POLL_S", 0.05)
    monkeypatch.setattr(shared_folders, "address", lambda: "10.1.2.3")
    monkeypatch.setattr(room, "CLUSTER_CHECK_S", 0.2)
    monkeypatch.setattr(stores, "FIRST_WAIT_S", 0.05)


@contextlib.contextmanager
def instead_of(folder: Path, copy: bool) -> Iterator[None]:
    """On another node something else lies there: an old copy, or nothing."""
    away = folder.with_name("away")
    folder.rename(away)
    if copy:
        shutil.copytree(away, folder)
        (folder / TOKEN).write_text("of an earlier start")
    yield
    shutil.rmtree(folder, ignore_errors=True)
    away.rename(folder)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("name", ["runs/run", "kept/run"])
def test_a_folder_that_a_node_does_not_share_is_named_with_the_node(config, tmp_path, name, copy) -> None:
    option = {"runs/run": "--runs-dir", "kept/run": "--train.checkpoint-dir"}[name]
    with shared_folders.shared_folders(config) as shared:
        shared.require()
        with instead_of(tmp_path / name, copy):
            what = "another folder, or a copy of it" if copy else "no such folder"
            wanted = rf"^node \S+ \(10.1.2.3\): {re.escape(str(tmp_path / name))} \({option}\) is {what} there\."
            with pytest.raises(UserError, match=wanted):
                shared.require()
        shared.require()
    assert not list(tmp_path.rglob(TOKEN))


def test_a_dataset_may_be_a_copy_and_has_to_be_the_same_one(config, tmp_path) -> None:
    data = tmp_path / "data"
    with shared_folders.shared_folders(config) as shared:
        shutil.copytree(data, tmp_path / "copy")
        data.rename(tmp_path / "away")
        with pytest.raises(UserError, match=rf"{data} \(--data.path\) holds no dataset there"):
            shared.require()
        (tmp_path / "copy").rename(data)
        shared.require()
        write_dataset(data, clips=30)
        with pytest.raises(UserError, match=rf"{data} \(--data.path\) holds another dataset there"):
            shared.require()


def test_what_comes_late_over_a_network_disk_is_waited_for(config, monkeypatch) -> None:
    monkeypatch.setattr(shared_folders, "PATIENCE_S", 20.0)
    with shared_folders.shared_folders(config) as shared:
        (config.run_dir / TOKEN).rename(config.run_dir / "later")
        monkeypatch.setattr(
            shared_folders.time, "sleep", lambda seconds: (config.run_dir / "later").rename(config.run_dir / TOKEN)
        )
        shared.require()


# ---- starts


class Starts:
    """Stands for `Start`: what each of the starts of one command returns."""

    def __init__(self, *ends: object):
        self.ends = list(ends)

    def __call__(self, config: Config, manifest: object, world: int, use_gpu: bool, shared: SharedFolders):
        end = self.ends.pop(0)
        told, end = (True, None) if end == "told" else (False, end)
        return SimpleNamespace(world=world, told=told, run=lambda stop, note: end)


@pytest.fixture
def supervised(config: Config, monkeypatch: pytest.MonkeyPatch):
    """-> keep_training(...) with starts that end so, its lines, and the starts that were not needed."""
    monkeypatch.setattr(supervise, "wait_for_room", lambda *args: None)
    monkeypatch.setattr(supervise, "on_gpu", lambda config: False)

    def run(*ends: object) -> tuple[BaseException, list[str], list[object]]:
        starts, lines = Starts(*ends), []
        monkeypatch.setattr(supervise, "Start", starts)
        with pytest.raises(Exception) as raised:
            keep_training(config, None, StopRequest(), lines.append)  # type: ignore[arg-type]
        return raised.value, lines, starts.ends

    return run


def test_starts_that_end_well_without_progress_are_failures(supervised, config) -> None:
    error, lines, left = supervised(None, None, None, None, None)
    assert isinstance(error, RuntimeError) and "the ranks ended well, but" in str(error) and len(left) == 1
    assert f"{config.train.checkpoint_dir}/run has no checkpoint newer than that of step 0" in lines[0]
    assert [re.findall(r"failure (\d) without", line) for line in lines] == [["1"], ["2"], ["3"]]


def test_ranks_that_were_asked_to_save_and_to_end_have_not_failed(supervised) -> None:
    _, lines, left = supervised(*["told"] * 9, None, None, None, None)
    assert len(lines) == 3 and left == []


def test_a_store_that_is_away_is_no_failure_of_training_however_often(supervised) -> None:
    away = StoreUnavailable("s3://clips: could not be reached")
    error, lines, left = supervised(*[away] * 6, None, None, None, None)
    assert isinstance(error, RuntimeError) and left == []
    assert sum("store away for" in line for line in lines) == 6
    assert sum("the store answers again" in line for line in lines) == 6


# ---- room


def test_what_a_cluster_lacks_is_said_in_full() -> None:
    config = presets.get("demo")
    two = dataclasses.replace(config, scale=dataclasses.replace(config.scale, workers=2))
    assert lack(two, False, [{"CPU": 4.0}]) == lack(two, False, [{"CPU": 2.0}, {"CPU": 2.0}]) == ""
    need = "2 ranks need 4 CPUs in all (1 for a rank, on one node, and 1 for its decoding)"
    assert lack(two, False, [{"CPU": 1.0}]) == f"{need}; the cluster's nodes have 1 CPUs"
    assert lack(two, True, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}]).endswith(
        "and 2 GPUs, one for each; the cluster's nodes have 8 CPUs and 1 GPUs, 8 CPUs and 0 GPUs"
    )


def test_a_cluster_that_can_never_place_the_ranks_ends_the_command_unless_something_adds_nodes(monkeypatch) -> None:
    config = presets.get("demo")
    config = dataclasses.replace(config, scale=dataclasses.replace(config.scale, room_wait_s=1.0))
    lines: list[str] = []
    with connect(num_cpus=1, object_store_bytes=80 << 20):
        assert not room.has_autoscaler()
        for had_room, kind in ((False, UserError), (True, Unavailable)):
            with pytest.raises(kind, match=r"no room in the cluster for \d+ s .* 1 rank needs 2 CPUs .* have 1 CPUs"):
                wait_for_room(config, False, lambda: False, lines.append, had_room)
        wait_for_room(config, False, lambda: True, lines.append, False)  # asked to stop
        monkeypatch.setattr(room, "has_autoscaler", lambda: True)
        wait_for_room(config, False, lambda: False, lines.append, False)
    assert len(lines) == 3 and "for 1 s at most, no autoscaler adds nodes" in lines[0]


def test_an_autoscaler_is_known_by_its_nodes_or_its_report(monkeypatch) -> None:
    node = {"Labels": {"ray.io/node-id": "1"}}
    monkeypatch.setattr(room.ray, "nodes", lambda: [node])
    reports = {
        None: False,
        b'{"load_metrics_report": {}}': False,
        b'{"autoscaler_report": {"active_nodes": {"node_0a1b": 1}}}': False,
        b'{"autoscaler_report": {"active_nodes": {"ray.head.default": 1}}}': True,
    }
    for report, wanted in reports.items():
        monkeypatch.setattr(room.internal_kv, "_internal_kv_get", lambda key, r=report: r)
        assert room.has_autoscaler() is wanted, report
    monkeypatch.setattr(room.internal_kv, "_internal_kv_get", lambda key: None)
    node["Labels"]["ray.io/node-group"] = "workers"
    assert room.has_autoscaler()


# ---- the command


def test_one_cpu_ends_the_command_with_2_and_what_is_missing(config, tmp_path) -> None:
    with connect(num_cpus=1, object_store_bytes=200 << 20):
        import ray

        training = Command(tmp_path / "data", tmp_path / "runs", "small", {"scale.room-wait-s": 2})
        driver = training.start(
            RAY_ADDRESS=ray.get_runtime_context().gcs_address,
            RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"],
            RAY_AUTH_MODE="token",
        )
        output, _ = driver.communicate(timeout=200)
    assert driver.returncode == 2, output
    assert re.search(r"^error: no room in the cluster for \d+ s .* 1 rank needs 2 CPUs in all", output, re.MULTILINE)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with namespaces() as nodes:
        yield nodes


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("hidden", ["runs", "kept", "data"])
def test_a_node_with_a_disk_of_its_own_at_that_place_ends_the_command_and_is_named(nodes, tmp_path, hidden) -> None:
    write_dataset(tmp_path / "data", clips=26)
    for name in ("runs", "kept"):
        (tmp_path / name).mkdir()
    nodes.start(0, CPUS)
    nodes.start(1, CPUS, hide=tmp_path / hidden)
    training = Training(nodes, tmp_path / "data", tmp_path / "runs", "run", {"train.checkpoint-dir": tmp_path / "kept"})
    begin = time.monotonic()
    training.start()
    assert training.process.wait(400) == 2, training.output
    option = {"runs": "--runs-dir", "kept": "--train.checkpoint-dir", "data": "--data.path"}[hidden]
    assert re.search(rf"error: node \S+ \({nodes.address(1)}\): {tmp_path}/{hidden}\S* \({option}\) ", training.output)
    print(f"{time.monotonic() - begin:.0f} s")
