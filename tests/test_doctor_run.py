"""`ray_jobs.doctor` on data, folders, memory and runs that are broken on purpose: the right cures."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
from datasets import write_dataset
from doctor_cases import (
    WSL2_MOUNTS,
    WSL2_VERSION,
    copied_dataset,
    copied_root,
    dataset,
    look_at,
    mounted,
    nothing_set,
    options,
    require,
    worst,
)

from fvlm.checks.machine import Machine
from fvlm.data.shards import read_manifest
from fvlm.train.run_folder import exclusive, open_run
from fvlm.train.state import MODEL, contents_of, step_of
from fvlm.train.store import LocalStore
from ray_jobs.checkup import look_at_store
from ray_jobs.options import parse

quick = pytest.fixture(autouse=True)(nothing_set)
good = pytest.fixture(scope="module")(dataset)
data = pytest.fixture(copied_dataset)


def test_a_truncated_a_missing_and_a_foreign_shard(data, tmp_path):
    shard = data / "shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    require(
        look_at(options(data, tmp_path / "runs"))["data"], "FAIL", f"{shard}: {len(whole) - 100} bytes", "Restore it"
    )
    replaced = look_at(options(data, tmp_path / "runs", "--data.on-corrupt", "replace"))["data"]
    require(replaced, "warn", f"{shard}: {len(whole) - 100} bytes", "")
    shard.unlink()
    require(look_at(options(data, tmp_path / "runs"))["data"], "FAIL", f"{shard}: the manifest lists", "Restore it")


def test_held_out_clips_that_fit_and_that_do_not(good, data, tmp_path):
    asked = options(good, tmp_path / "runs", "--eval.every", "5", "--eval.path", str(data))
    require(
        look_at(asked)["evaluation"], "FAIL", "the training dataset itself", "Prepare clips that are not trained on"
    )
    write_dataset(tmp_path / "held-out", clips=8, seed=1)
    found = look_at([*asked, "--eval.path", str(tmp_path / "held-out")])["evaluation"]
    require(found, "ok", "8 of the 8 held-out clips", "")
    (tmp_path / "held-out" / "shard-00000.parquet").unlink()
    found = look_at([*asked, "--eval.path", str(tmp_path / "held-out")])
    require(found["evaluation"], "FAIL", "the manifest lists", "Restore it")
    assert found["data"].level == "ok"


def test_a_manifest_that_is_missing_or_damaged(data, tmp_path):
    (data / "files.parquet").write_bytes(b"nothing")
    require(look_at(options(data, tmp_path / "runs"))["data"], "FAIL", "its SHA-256 is not", "Restore both")
    (data / "manifest.json").unlink()
    require(look_at(options(data, tmp_path / "runs"))["data"], "FAIL", "not a dataset", "ray_jobs.prepare")


def test_frames_of_another_size(good, tmp_path):
    found = look_at(options(good, tmp_path / "runs", "--data.frame-size", "256"))
    require(found["data"], "FAIL", "frames of 56 px; the config wants 256", "--data.frame-size 56")
    assert found["runs disk"].level == "ok"  # what does not hang on it is looked at all the same


def test_too_little_memory_for_the_ingest(good, tmp_path):
    found = look_at(options(good, tmp_path / "runs", "--ingest-memory", "10MB"))
    require(found["data"], "FAIL", "--ingest-memory: 10 MB for 1 rank is too little", "Least:")


def test_a_disk_that_is_nearly_full_or_has_no_room_for_one_checkpoint(good, tmp_path):
    with mounted(tmp_path / "small", "size=100m") as small:  # a checkpoint of demo has 30 MB
        require(look_at(options(good, small))["runs disk"], "warn", "wanted", "--runs-dir another disk")
        with (small / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 80 << 20)
        require(look_at(options(good, small))["runs disk"], "FAIL", "free, ", f"Free some room on {small}")
        few = ["--train.save-every", "160", "--train.keep-last", "1"]
        (small / "filler").unlink()
        require(look_at(options(good, small, *few))["runs file system"], "warn", "a reboot loses it", "on a disk")


def test_a_folder_of_runs_that_is_read_only(good, tmp_path):
    with mounted(tmp_path / "fixed", "size=10m,ro") as fixed:
        require(look_at(options(good, fixed))["runs disk"], "FAIL", "Read-only file system", "--runs-dir takes another")


def test_shared_memory_that_is_too_small_for_the_ingest(good, tmp_path):
    machine = copied_root(tmp_path / "root")
    (tmp_path / "root" / "dev" / "shm").unlink()
    with mounted(tmp_path / "root" / "dev" / "shm", "size=64m"):  # Docker's default
        require(look_at(options(good, tmp_path), machine)["object store"], "warn", "/dev/shm has 67.1 MB", "--shm-size")
        found = worst(look_at_store(machine, {}, 11 * 10**9))
        require(found["object store"], "FAIL", "Ray refuses to start", "remount,size=22G")


def test_data_and_runs_on_a_drive_of_windows(good, data, tmp_path):
    drive = f"D:\\134 {tmp_path} 9p rw,noatime,dirsync,aname=drvfs;path=D:\\134;uid=1000;gid=1000,mmap,trans=fd 0 0\n"
    machine = copied_root(tmp_path / "root", proc__version=WSL2_VERSION, proc__mounts=WSL2_MOUNTS + drive)
    found = look_at(options(data, tmp_path / "runs"), machine)
    require(found["system"], "note", "5.15.167.4-microsoft-standard-WSL2", ".wslconfig")
    wanted = f"{data} lies on {tmp_path}, a drive of Windows (9p)"
    require(found["data file system"], "warn", wanted, f"cp -a {data} ~/data and --data.path ~/data")
    require(found["runs file system"], "warn", "a drive of Windows (9p)", "--runs-dir ~/")
    assert "data file system" not in look_at(options(good, tmp_path / "runs"), copied_root(tmp_path / "plain"))


def test_memory_is_that_of_the_container_where_that_is_less(good, tmp_path):
    assert Machine().memory().total == psutil.virtual_memory().total
    small = {"sys__fs__cgroup__job__memory.max": "max\n", "sys__fs__cgroup__memory.max": f"{1 << 30}\n"}
    machine = copied_root(tmp_path / "two", proc__self__cgroup="0::/job/inner\n", **small)
    assert machine.memory().limit == machine.memory().usable == 1 << 30
    found = look_at(options(good, tmp_path / "runs"), machine)
    require(found["memory of the run"], "FAIL", "there are 1.1 GB", "--ingest-memory")
    old = {"sys__fs__cgroup__memory__memory.limit_in_bytes": f"{1 << 29}\n"}
    machine = copied_root(tmp_path / "one", proc__self__cgroup="4:memory:/\n1:name=systemd:/\n", **old)
    assert machine.memory().usable == 1 << 29


def test_a_run_that_another_process_trains(good, tmp_path):
    args = options(good, tmp_path / "runs")
    run_dir = open_run(parse(args), read_manifest(good))
    assert look_at(args)["run demo"].level == "ok"
    with exclusive(run_dir):
        require(look_at(args)["run demo"], "FAIL", "trained by another process", "another --run")
    assert look_at([*args, "--optim.lr", "0.5"])["run demo"].level == "ok"  # no step is done: a start takes it
    (run_dir / "train.log").write_text("2026-11-26 10:00:00 saved step-00000050 in 0.1 s\n")
    changed = look_at([*args, "--optim.lr", "0.5"])["run demo"]
    require(changed, "FAIL", "this run began with another config", "")
    assert "optim.lr: 0.001 -> 0.5" in f"{changed.value} {changed.cure}"


def test_a_checkpoint_that_is_damaged_and_a_run_that_is_finished(good, tmp_path):
    args = options(good, tmp_path / "runs")
    run_dir = open_run(parse(args), read_manifest(good))
    model, store = torch.nn.Linear(3, 3), LocalStore(run_dir / "checkpoints")
    for step in (50, 160):
        store.write(contents_of(step, model, torch.optim.AdamW(model.parameters()), {}))
    require(look_at(args)["run demo"], "note", "finished, 160 of 160 steps", "--train.max-steps")
    assert step_of(store.names()[-1]) == 160
    (run_dir / "checkpoints" / "step-00000160" / MODEL).unlink()
    require(look_at(args)["run demo"], "warn", "the newest checkpoint is damaged", "passes it over")
