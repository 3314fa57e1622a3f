"""Whose a run folder is: held from the first write on, by one process; and which config goes on with it."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datasets import write_dataset

from fvlm import locks
from fvlm.data.shards import read_manifest
from fvlm.errors import UserError
from fvlm.train.run_folder import CONFIG, LOCK, exclusive, open_run, read_began
from fvlm.train.run_report import is_locked
from ray_jobs import train
from ray_jobs.options import parse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_dataset(tmp_path_factory.mktemp("good") / "data").where)


def arguments(data: Path, runs: Path, *more: str) -> list[str]:
    small = "--data.frame-size 56 --data.global-batch 4 --data.lanes 4 --log.wandb off --scale.device cpu"
    return ["demo", "--data.path", str(data), "--runs-dir", str(runs), *small.split(), *more]


def change_config(run_dir: Path, change) -> None:
    """Rewrite the stored config as another release would have written it."""
    began = json.loads((run_dir / CONFIG).read_text())
    change(began["config"])
    (run_dir / CONFIG).write_text(json.dumps(began))


def finish_a_step(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step-00000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")


# ---- other releases


def test_a_key_that_an_older_release_did_not_store_has_its_presets_value(good, tmp_path):
    config = parse(arguments(good, tmp_path))
    run_dir = open_run(config, read_manifest(good))
    finish_a_step(run_dir)

    def older(stored: dict) -> None:
        del stored["objective"]["caption_start"], stored["train"]["seed"], stored["optim"]["beta2"]
        del stored["data"]["max_caption_tokens"]  # the demo's is not the one of data classes

    change_config(run_dir, older)
    said: list[str] = []
    open_run(config, read_manifest(good), said.append)
    assert said == []
    with pytest.raises(UserError, match=r"objective.caption_start: True -> False\nUse the old") as refusal:
        open_run(parse(arguments(good, tmp_path, "--objective.no-caption-start")), read_manifest(good))
    assert str(refusal.value).count("->") == 1


def test_a_whole_section_that_an_older_release_did_not_store_is_no_change_either(good, tmp_path):
    config = parse(arguments(good, tmp_path))
    run_dir = open_run(config, read_manifest(good))
    finish_a_step(run_dir)
    change_config(run_dir, lambda stored: [stored.pop(name) for name in ("objective", "optim", "log")])
    open_run(config, read_manifest(good))


def test_a_key_that_is_gone_locks_no_run_out_and_is_told(good, tmp_path):
    config = parse(arguments(good, tmp_path))
    run_dir = open_run(config, read_manifest(good))
    finish_a_step(run_dir)
    change_config(run_dir, lambda stored: stored["model"].update(gone=3))
    said: list[str] = []
    open_run(config, read_manifest(good), said.append)
    assert said == [f"{run_dir / CONFIG}: this release does not know model.gone = 3; the run goes on without"]


# ---- a run without a finished step


def test_a_run_without_a_finished_step_takes_the_corrected_config(good, tmp_path):
    first = parse(arguments(good, tmp_path, "--optim.lr", "30"))
    run_dir = first.run_dir
    train.prepare_run(first)
    of_the_first = [run_dir / "tokenizer", run_dir / "wandb_id", run_dir / "corrupt.jsonl"]
    for path in of_the_first[1:]:
        path.write_text("x")
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "tokenizer" / "of the first").touch()
    said: list[str] = []
    train.prepare_run(parse(arguments(good, tmp_path, "--optim.lr", "3e-5")), note=said.append)
    assert read_began(run_dir)["config"]["optim"]["lr"] == 3e-5
    assert said == ["demo has not finished a step, so it begins anew with this config: optim.lr: 30.0 -> 3e-05"]
    assert [path.exists() for path in of_the_first] == [True, False, False]
    assert not (run_dir / "tokenizer" / "of the first").exists() and (run_dir / "notes.txt").exists()


@pytest.mark.parametrize("trace", ["whole", "set aside", "in another place", "of the log"])
def test_a_run_with_a_step_that_was_safe_once_takes_no_other_config(good, tmp_path, trace):
    kept = ["--train.checkpoint-dir", str(tmp_path / "kept")]
    first = parse(arguments(good, tmp_path / "runs", *(kept if trace == "in another place" else [])))
    run_dir = open_run(first, read_manifest(good))
    if trace == "of the log":
        (run_dir / "train.log").write_text("2026-11-26 10:00:00 saved step-00000050 in 0.1 s\n")
    else:
        finish_a_step(run_dir)
    if trace == "set aside":
        (run_dir / "checkpoints" / "step-00000050").rename(run_dir / "checkpoints" / "damaged-step-00000050")
    if trace == "in another place":
        (tmp_path / "kept").mkdir()
        (run_dir / "checkpoints").rename(tmp_path / "kept" / "demo")
    with pytest.raises(UserError, match=r"optim.lr: 0.001 -> 0.1"):
        open_run(parse(arguments(good, tmp_path / "runs", "--optim.lr", "0.1")), read_manifest(good))


def test_another_dataset_in_the_same_place_is_named_as_such(tmp_path):
    manifest = write_dataset(tmp_path / "data")
    config = parse(arguments(tmp_path / "data", tmp_path / "runs"))
    finish_a_step(open_run(config, manifest))
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match="data has other clips than when the run began"):
        open_run(config, write_dataset(tmp_path / "data", seed=1))


# ---- one process at a time

SLOW_IMPORT = """
import sys, time
from pathlib import Path
from fvlm.errors import UserError
from ray_jobs import train
from ray_jobs.cli import run_command

go = Path(sys.argv.pop(1))
def slow(*_):
    (go.parent / "in the middle").touch()
    while not go.exists():
        time.sleep(0.05)
    if go.read_text() == "fail":
        raise UserError("the checkpoint is of another model")
    sys.exit(7)  # well: training would follow
train.import_run = slow
run_command(train.main)
"""


def starts(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_of_two_first_starts_the_second_is_refused_and_neither_takes_the_folder_of_the_other(good, tmp_path):
    args = arguments(good, tmp_path / "runs")
    run_dir = tmp_path / "runs" / "demo"
    first = starts([sys.executable, "-c", SLOW_IMPORT, str(tmp_path / "go"), *args, "--import-checkpoint", "x.pt"])
    second = None
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "in the middle").exists():
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert is_locked(run_dir)
        before = (run_dir / CONFIG).read_text()
        second = starts([sys.executable, "-m", "ray_jobs.train", *args, "--optim.lr", "7"])
        said = second.communicate(timeout=240)[1]
        assert second.returncode == 2 and "being trained by another process" in said and "Traceback" not in said
        assert (run_dir / CONFIG).read_text() == before
        (tmp_path / "go").write_text("fail")
        said = first.communicate(timeout=240)[1]
        assert first.returncode == 2 and "of another model" in said
    finally:
        for process in (first, second):
            if process:
                process.kill()
                process.communicate()
    assert not run_dir.exists()  # nothing stands in the way of the corrected command


def test_a_start_that_fails_leaves_the_folder_of_an_earlier_one_as_it_was(good, tmp_path):
    config = parse(arguments(good, tmp_path))
    train.prepare_run(config)
    before = {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")}
    with pytest.raises(UserError), exclusive(config.run_dir):
        train.prepare_run(parse(arguments(good, tmp_path, "--import-checkpoint", str(tmp_path / "no.pt"))))
    assert {path: path.stat().st_mtime_ns for path in config.run_dir.rglob("*")} == before


def test_who_only_looks_makes_no_start_fail(tmp_path):
    run_dir, stop = tmp_path / "run", threading.Event()
    with exclusive(run_dir):
        pass

    def look() -> None:
        while not stop.is_set():
            is_locked(run_dir)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with exclusive(run_dir):
                assert is_locked(run_dir)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    with (run_dir / LOCK).open("rb") as slow:  # a machine that is busy: the look lasts
        fcntl.flock(slow, fcntl.LOCK_SH)
        threading.Timer(0.5, lambda: fcntl.flock(slow, fcntl.LOCK_UN)).start()
        with exclusive(run_dir):
            pass


def test_a_lock_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """A first start that fails removes the folder just when another one has opened the lock in it."""
    real, run_dir, times = locks.try_lock, tmp_path / "run", []

    def try_lock(file) -> bool:
        times.append(1)
        if len(times) == 1:
            shutil.rmtree(run_dir)
        return real(file)

    monkeypatch.setattr(locks, "try_lock", try_lock)
    with exclusive(run_dir):
        assert (run_dir / LOCK).exists() and is_locked(run_dir)
    assert len(times) == 2


# ---- disks without locks


@pytest.mark.parametrize("missing", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_disk_without_locks_has_a_substitute_on_this_machine_or_is_refused(tmp_path, monkeypatch, missing):
    real, nowhere = fcntl.flock, []
    number = getattr(__import__("errno"), missing)

    def flock(file, operation):
        path = Path(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}").readlink()
        if path.is_relative_to(tmp_path / "network") or nowhere:
            raise OSError(number, "no locks here")
        return real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "TEMPORARY_FOLDER", tmp_path)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    run_dir = tmp_path / "network" / "run"
    assert not is_locked(run_dir)
    with exclusive(run_dir) as note:
        assert "its disk has no file locks (no locks here)" in note and "fvlm-lock-" in note
        assert is_locked(run_dir)
        with pytest.raises(UserError, match="being trained by another process"), exclusive(run_dir):
            pass
    assert not is_locked(run_dir)
    nowhere.append(True)
    refusal = pytest.raises(UserError, match=r"run/lock: its disk has no file locks .* choose another disk")
    shutil.rmtree(run_dir)
    with refusal, exclusive(run_dir):
        pass
    assert not run_dir.exists()
