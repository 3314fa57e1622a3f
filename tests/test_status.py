"""`ray_jobs.status` on real run folders: while they go on, after kill -9, after the end, damaged, empty, far away."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_store import Store
from status_rank import SAVE_EVERY, STEPS, options, start

from fvlm.data.corrupt import CorruptClip, CorruptList, Place
from fvlm.train.run_folder import exclusive
from fvlm.train.run_report import LastStart, report
from fvlm.train.state import MODEL, OPTIMIZER, STATE
from fvlm.train.step_lines import parsed_lines
from ray_jobs import status
from ray_jobs.cli import run_command
from ray_jobs.command import hold

TESTS = Path(__file__).parent


@pytest.fixture
def say(monkeypatch, capsys):
    """`say(...)` -> what `python -m ray_jobs.status ...` prints, and its exit code as `say.code`."""

    def call(*args: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["status", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            run_command(status.main)
        call.code = end.value.code
        said = capsys.readouterr()
        return said.out + said.err

    return call


@pytest.fixture
def told(say):
    """`told(runs_dir, run)` -> the object that --json prints of a run."""
    return lambda runs, run: json.loads(say(run, "--runs-dir", runs, "--json"))


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """A folder with a finished run, `mine`, never changed."""
    root = tmp_path_factory.mktemp("ended")
    start(options(root))
    return root


@pytest.fixture
def root(ended, tmp_path) -> Path:
    """A copy to spoil: its own command names the copy."""
    shutil.copytree(ended, tmp_path / "root")
    command = tmp_path / "root" / "runs" / "mine" / "command.json"
    before = command.stat().st_mtime
    command.write_text(command.read_text().replace(str(ended), str(tmp_path / "root")))
    os.utime(command, (before, before))
    return tmp_path / "root"


def rows(run_dir: Path) -> list[dict]:
    return parsed_lines(run_dir / "metrics.jsonl", sys.maxsize)


def newest(run_dir: Path, name: str) -> float:
    return [row[name] for row in rows(run_dir) if name in row][-1]


def until(true, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_is_shown_as_it_starts_runs_is_killed_goes_on_and_ends(tmp_path, told):
    args, runs = options(tmp_path), tmp_path / "runs"
    run_dir, metrics = runs / "mine", runs / "mine" / "metrics.jsonl"
    command = [sys.executable, "status_rank.py", "0.2", "--", *args]
    process = subprocess.Popen(command, cwd=TESTS)
    try:
        until(lambda: (run_dir / "command.json").exists(), process)
        assert told(runs, "mine")["state"] == "starting"
        until(lambda: metrics.exists() and len(rows(run_dir)) > SAVE_EVERY, process)
        before, running, after = rows(run_dir)[-1]["step"], told(runs, "mine"), rows(run_dir)[-1]["step"]
        assert (running["state"], running["starts"], running["max_steps"]) == ("running", 1, STEPS)
        assert before <= running["step"] <= after and running["percent"] == 100 * running["step"] / STEPS
        assert running["age_s"] < 10 and running["on"] == "1 x cpu"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = told(runs, "mine")
    assert (killed["state"], killed["step"]) == ("failed", rows(run_dir)[-1]["step"])
    assert killed["checkpoint"]["step"] == killed["step"] // SAVE_EVERY * SAVE_EVERY
    assert killed["checkpoint"]["problem"] == ""
    assert any("no process of this machine holds its lock" in remark for remark in killed["remarks"])
    assert killed["left_s"] == pytest.approx((STEPS - killed["step"]) * newest(run_dir, "train/step_time"))

    start(args)
    finished = told(runs, "mine")
    assert (finished["state"], finished["step"], finished["restarts"]) == ("finished", STEPS, 1)
    assert (finished["checkpoint"]["step"], finished["left_s"]) == (STEPS, 0)
    assert "finished 40 steps" in finished["note"]


def test_every_figure_is_that_of_the_files(ended, told, say):
    run_dir = ended / "runs" / "mine"
    found = told(ended / "runs", "mine")
    assert found["loss"] == newest(run_dir, "train/loss") == rows(run_dir)[-1]["train/loss"]
    assert found["caption_ratio"] == newest(run_dir, "caption/ratio_avg")
    assert found["recon_ratio"] == newest(run_dir, "recon/ratio_avg")
    assert found["clips_per_s"] == newest(run_dir, "train/clips_per_s")
    # 64 clips, 2 a step: written out, not taken from the code that is tested
    assert (found["steps_per_epoch"], found["epoch"]) == (32, 40 / 32)
    age_s = time.time() - (run_dir / "checkpoints" / "step-00000040" / STATE).stat().st_mtime
    assert found["checkpoint"]["age_s"] == pytest.approx(age_s, abs=5)
    page = say("mine", "--runs-dir", ended / "runs")
    assert "40 of 40 (100.0%)" in page and "epoch 1.25: 1 whole passes and 8 of 32 steps" in page
    assert f"caption {newest(run_dir, 'caption/ratio_avg'):.4f}" in page
    assert "1 (0 restarts)" in page and str(run_dir / "train.log") in page and "127.0.0.1" in page


def test_all_runs_are_a_table_with_a_line_each_and_json_has_an_object_each(root, say):
    runs = root / "runs"
    (runs / "notes").mkdir()
    start(options(root, "other", "--train.max-steps", "10"), stop=lambda: (runs / "other" / "checkpoints").exists())
    lines = say("--runs-dir", runs).splitlines()
    assert [line.split()[:2] for line in lines[:4]] == [
        ["RUN", "STATE"], ["mine", "finished"], ["notes", "empty"], ["other", "finished"],
    ]  # fmt: skip
    objects = [json.loads(line) for line in say("--runs-dir", runs, "--json").splitlines()]
    assert [found["run"] for found in objects] == ["mine", "notes", "other"]


def test_a_stopped_run_and_a_held_one_are_told_apart(tmp_path, told, say):
    steps = iter(range(12))
    start(options(tmp_path), stop=lambda: next(steps) == 6)
    assert (told(tmp_path / "runs", "mine")["state"], told(tmp_path / "runs", "mine")["step"]) == ("stopped", 7)
    hold(tmp_path / "runs" / "mine")
    held = told(tmp_path / "runs", "mine")
    assert (held["state"], held["checkpoint"]["step"]) == ("held", 7)
    assert "of training, once it goes on" in say("mine", "--runs-dir", tmp_path / "runs")
    with exclusive(tmp_path / "runs" / "mine"):  # a hold stops nothing
        assert told(tmp_path / "runs", "mine")["state"] in ("starting", "running")


def test_a_start_that_was_stopped_before_a_step_was_done_did_not_fail(tmp_path, told):
    start(options(tmp_path), stop=lambda: True)
    run_dir = tmp_path / "runs" / "mine"
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    (run_dir / "train.log").write_text("2026-11-26 10:00:00 failed: no room\n")
    assert told(tmp_path / "runs", "mine")["state"] == "failed"
    line = "2026-11-26 10:01:00 stopped by signal 15 at step 0, before the ranks of this start had begun\n"
    (run_dir / "train.log").write_text(line)
    assert (told(tmp_path / "runs", "mine")["state"], told(tmp_path / "runs", "mine")["failed"]) == ("stopped", "")
    (run_dir / "command.json").unlink()
    assert (told(tmp_path / "runs", "mine")["state"], told(tmp_path / "runs", "mine")["max_steps"]) == ("stopped", 40)


def test_steps_that_a_next_start_will_repeat_are_said(root, say):
    shutil.rmtree(root / "runs" / "mine" / "checkpoints" / "step-00000040")
    text = say("mine", "--runs-dir", root / "runs")
    assert "40 of 40 (100.0%); a next start goes on from 30" in text


def test_a_held_lock_without_any_sign_of_life_is_a_stall(root, told):
    run_dir = root / "runs" / "mine"
    with exclusive(run_dir):
        assert told(root / "runs", "mine")["state"] == "starting"  # the log ends with "finished"
        log = (run_dir / "train.log").read_text().splitlines()
        (run_dir / "train.log").write_text("\n".join(log[:-1]) + "\n")
        assert told(root / "runs", "mine")["state"] == "running"
        hour_ago = time.time() - 3600
        for path in run_dir.iterdir():
            os.utime(path, (hour_ago, hour_ago))
        assert told(root / "runs", "mine")["state"] == "stalled"
        last = LastStart(status.last_start(run_dir)[0].config, None, held=False)  # scale.hang_s is 600
        assert report(run_dir, last, hour_ago + 500).state == "running"
        assert report(run_dir, last, hour_ago + 700).state == "stalled"


def test_looking_writes_nothing_and_never_holds_a_lock_that_a_start_would_meet(root, say):
    def picture() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(root.rglob("*"))}

    before = picture()
    say("mine", "--runs-dir", root / "runs")
    say("--runs-dir", root / "runs", "--json")
    assert picture() == before
    with exclusive(root / "runs" / "mine"):  # nobody is left holding it
        pass


# ---- what is damaged is shown as what it is


@pytest.mark.parametrize(
    "spoil, wanted",
    [
        (lambda run: (run / "config.json").write_text('{"config": '), ["damaged", "config.json: missing or damaged"]),
        (lambda run: (run / "config.json").write_bytes(bytes(range(256))), ["damaged", "config.json: missing"]),
        (lambda run: (run / "config.json").write_text("[]"), ["damaged", "config.json: missing or damaged"]),
        (lambda run: (run / "config.json").write_text('{"config": {"train": {"max_steps": "x"}}, "dataset": ""}')
         and (run / "command.json").unlink(), ["damaged", "step        40\n"]),
        (lambda run: (run / "config.json").unlink(), ["damaged", "config.json: missing or damaged"]),
        (lambda run: (run / "command.json").write_text("[]"), ["finished", "command.json: damaged"]),
        (lambda run: (run / "command.json").write_text('{"arguments": ["demo", "--no-such-option"]}'),
         ["finished", "command.json: its options are not valid now", "40 of 40 (100.0%)"]),
        (lambda run: (run / "command.json").unlink(), ["finished", "it has no command.json", "40 of 40 (100.0%)"]),
        (lambda run: (run / "metrics.jsonl").write_bytes(os.urandom(5000) + b"\n[1]\n{\"step\": \"x\"}\n"),
         ["finished", "of its last lines are no metrics", "40 of 40"]),
        (lambda run: (run / "metrics.jsonl").unlink(), ["finished", "40 of 40"]),
        (lambda run: (run / "train.log").write_bytes(os.urandom(3000)), ["finished", "starts      none"]),
        (lambda run: (run / "corrupt.jsonl").write_text("not json\n"),
         ["finished", "not a list of damaged clips", "1 damaged"]),
        (lambda run: (run / "checkpoints/step-00000040" / MODEL).write_bytes(b"short"),
         ["finished", "DAMAGED", f"step-00000040/{MODEL}: 5 bytes,"]),
        (lambda run: (run / "checkpoints/step-00000040" / OPTIMIZER).unlink(), ["finished", "DAMAGED", "is not there"]),
        (lambda run: (run / "checkpoints/step-00000040" / STATE).write_text("{"),
         ["finished", "DAMAGED", "no whole JSON"]),
        (lambda run: shutil.rmtree(run / "checkpoints"), ["failed", "checkpoint  none"]),
        (lambda run: (run / "checkpoints").rename(run / "elsewhere") and (run / "checkpoints").write_text("a file"),
         ["stopped", "checkpoint  none"]),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_shown_as_what_it_is(root, say, spoil, wanted):
    spoil(root / "runs" / "mine")
    if wanted[0] == "failed":  # its log says that it finished; only without that line is it no clean end
        log = root / "runs" / "mine" / "train.log"
        log.write_text("\n".join(log.read_text().splitlines()[:-1]) + "\n")
    text = say("mine", "--runs-dir", root / "runs")
    assert say.code == 0 and "Traceback" not in text
    assert text.startswith(f"mine: {wanted[0]} ("), text
    missing = [part for part in wanted[1:] if part not in text]
    assert not missing, text
    assert "mine" in say("--runs-dir", root / "runs") and say.code == 0


def test_a_failed_start_is_told_with_its_reason_until_another_one_begins(root, told, say):
    """That the command itself leaves this line: test_train.py fills a disk, test_failures.py takes the memory."""
    run_dir = root / "runs" / "mine"
    shutil.rmtree(run_dir / "checkpoints")
    log = run_dir / "train.log"
    log.write_text(log.read_text() + "2026-11-23 10:00:00 failed: no space left on the disk\n")
    found = told(root / "runs", "mine")
    assert (found["state"], found["failed"]) == ("failed", "no space left on the disk")
    assert "mine: failed (no space left on the disk)" in say("mine", "--runs-dir", root / "runs")
    log.write_text(log.read_text() + "2026-11-23 10:01:00 starting at step 0\n")
    assert told(root / "runs", "mine")["failed"] == ""


def test_a_bit_flipped_in_the_state_of_a_checkpoint_is_seen(root, told):
    path = root / "runs" / "mine" / "checkpoints" / "step-00000040" / STATE
    content = bytearray(path.read_bytes())
    content[content.index(b'"step": 40') + 9] ^= 1  # 41
    path.write_bytes(content)
    assert "SHA-256" in told(root / "runs", "mine")["checkpoint"]["problem"]


def test_a_line_cut_by_a_crash_is_no_damage_and_not_counted(root, told):
    path = root / "runs" / "mine" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 41, "train/lo')
    found = told(root / "runs", "mine")
    assert (found["step"], found["remarks"]) == (40, [])


def test_empty_and_foreign_folders_and_names_that_are_none(tmp_path, say):
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    (tmp_path / "runs" / "photos").mkdir()
    (tmp_path / "runs" / "photos" / "a.png").write_bytes(b"png")
    assert say("empty", "--runs-dir", tmp_path / "runs").splitlines()[0] == "empty: empty (no run has begun here)"
    assert [line.split() for line in say("--runs-dir", tmp_path / "runs").splitlines()[1:]] == [
        ["empty", "empty"],
        ["photos", "empty"],
    ]
    assert "holds no run 'mine'. Runs there: empty, photos." in say("mine", "--runs-dir", tmp_path / "runs")
    assert say.code == 2
    assert "no such folder" in say("--runs-dir", tmp_path / "nowhere") and say.code == 2


def test_a_copy_of_a_run_says_so_and_shows_its_own_checkpoints(root, told):
    runs = root / "runs"
    shutil.copytree(runs / "mine", runs / "backup")
    shutil.rmtree(runs / "backup" / "checkpoints" / "step-00000040")
    found = told(runs, "backup")
    assert found["checkpoint"]["step"] == 30
    assert f"a copy: its last start trained {runs / 'mine'}" in found["remarks"]


def test_the_number_of_steps_is_that_of_the_last_start(root, told):
    command = root / "runs" / "mine" / "command.json"
    command.write_text(command.read_text().replace('"40"', '"80"'))
    found = told(root / "runs", "mine")
    assert (found["max_steps"], found["percent"], found["state"]) == (80, 50.0, "stopped")
    assert found["left_s"] == pytest.approx(40 * newest(root / "runs" / "mine", "train/step_time"))


def test_skipped_steps_and_damaged_clips_are_counted(root, told):
    run_dir = root / "runs" / "mine"
    (run_dir / "skipped.jsonl").write_text('{"step": 3, "clips": []}\n{"step": 9, "clips": []}\n')
    bad = CorruptList(run_dir, 64, 0.5)
    for row in range(3):
        bad.add(CorruptClip(0, 0, row, "shard", f"clip-{row}", "does not decode", "clip-9", Place(0, 2, 1)))
    found = told(root / "runs", "mine")
    assert (found["skipped"], found["corrupt"]) == (2, 3)


def test_of_a_file_of_gigabytes_the_end_alone_is_read(root, told):
    path = root / "runs" / "mine" / "metrics.jsonl"
    wanted, end = told(root / "runs", "mine"), path.read_bytes()
    with path.open("wb") as file:
        file.truncate(6 << 30)  # a hole
        file.seek(0, 2)
        file.write(b"\n" + end)
    os.utime(path)

    def read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    before = read()
    found = told(root / "runs", "mine")
    assert read() - before < 20e6
    assert all(found[key] == wanted[key] for key in ("step", "loss", "caption_ratio", "recon_ratio", "state"))


def test_a_ratio_that_was_read_long_ago_is_found_further_back(root, told):
    path = root / "runs" / "mine" / "metrics.jsonl"
    wanted = newest(path.parent, "caption/ratio_avg")
    plain = "".join(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in range(41, 9000))
    path.write_text(path.read_text() + plain)
    assert len(plain) > 1 << 17  # more than the first look takes
    found = told(root / "runs", "mine")
    assert (found["step"], found["caption_ratio"]) == (8999, wanted)


# ---- checkpoints elsewhere


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.stop()


def test_checkpoints_in_an_object_store_are_shown_and_its_absence_is_a_remark(
    store, proxy, tmp_path, told, say, monkeypatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    front = proxy()
    place = re.sub("//.*@", "//", front.uri(f"{tmp_path.name}/kept"))  # a config may hold no secret
    start(options(tmp_path, "mine", "--train.checkpoint-dir", place))
    found = told(tmp_path / "runs", "mine")
    assert (found["state"], found["checkpoint"]["step"], found["checkpoint"]["problem"]) == ("finished", STEPS, "")
    assert found["checkpoint"]["where"].endswith("kept/mine/step-00000040") and found["checkpoint"]["age_s"] < 100
    key = f"{tmp_path.name}/kept/mine/step-00000040/{MODEL}"
    store.write(key, store.read(key)[:-1])
    assert "were written" in told(tmp_path / "runs", "mine")["checkpoint"]["problem"]

    front.go_away()
    begin = time.monotonic()
    away = told(tmp_path / "runs", "mine")
    assert time.monotonic() - begin < 30
    assert (away["step"], away["checkpoint"], away["state"]) == (STEPS, None, "finished")
    assert "checkpoint  not known" in say("mine", "--runs-dir", tmp_path / "runs")
    assert "could not be reached" in away["remarks"][0]
    text = say("--runs-dir", tmp_path / "runs")
    assert "planted-secret" not in text and "Traceback" not in text and say.code == 0
