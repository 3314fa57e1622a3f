"""The measurement of whole runs on a GPU: its figures by hand, what it does with failures, and all of it on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks" / "gpu"))
import run_figures
import trainings
import whole_run
from trainings import Failed, Training, Watched, call

from fvlm.train.state import MODEL, OPTIMIZER, checkpoint_name
from ray_jobs.feed_verdict import Findings

GPU = Path(__file__).resolve().parent / "benchmarks" / "gpu"
LOG = """\
2026-01-01 10:00:00 a mock step has passed (train.compile layers, train.memory speed): 9.1 GB at its peak of 85.0 GB
2026-01-01 10:00:05 started in 20.5 s: 8.0 until the ranks ran and were joined, 12.5 until the first step was done
2026-01-01 10:00:20 saved step-00000040 in 1.5 s; training was held for 12 ms
2026-01-01 10:00:30 saved step-00000050 in 2.0 s; training was held for 9 ms
""".splitlines()


def rows() -> list[dict]:
    """Five laps of ten steps: the first two slow, then 100, 200 and 300 ms a step."""
    found = []
    for step in range(1, 51):
        row = {"step": step, "train/loss": 9.0 - step / 10}
        if step % 10 == 0:
            seconds = (5.0, 4.0, 0.1, 0.2, 0.3)[step // 10 - 1]
            row |= {"train/step_time": seconds, "train/data_wait": seconds / 10, "train/vram_gb": 7.0 + step / 100}
        found.append(row)
    found[49] |= {"checkpoint/step": 40.0, "checkpoint/stall_ms": 11.75, "checkpoint/write_s": 1.5}
    return found


def test_the_speed_of_a_run_is_that_of_the_laps_that_count_and_of_the_clock_on_the_wall():
    steps = [(100.0, 10), (140.0, 20), (142.0, 30), (144.0, 40), (148.0, 50)]
    found = run_figures.speed(rows(), steps, batch=16, bare_ms=150.0)
    assert (found["steps"], found["laps"], found["ms_step"]) == (50, 3, pytest.approx(200))
    assert found["clips_per_s"] == pytest.approx(80) and found["share_of_bare"] == pytest.approx(0.75)
    assert found["ms_step_wall"] == pytest.approx(1000 * 6 / 20)
    assert found["share_of_bare_wall"] == pytest.approx(0.5) and found["clips_per_s_wall"] == pytest.approx(16 / 0.3)
    assert found["data_wait"] == pytest.approx(0.02) and found["peak_gb"] == pytest.approx(7.5)
    assert found["last_loss"] == pytest.approx(4.0) and found["mfu"] is None
    cut = run_figures.speed(rows()[:15], steps[:1], batch=16, bare_ms=None)
    assert (cut["steps"], cut["ms_step"], cut["share_of_bare"], cut["ms_step_wall"]) == (15, None, None, None)


def test_checkpoints_have_their_figures_from_the_metrics_and_the_last_one_from_the_log():
    assert run_figures.saves(rows(), LOG) == [
        {"step": 40, "stall_ms": 11.75, "write_s": 1.5},
        {"step": 50, "stall_ms": 9.0, "write_s": 2.0},
    ]


def test_laps_that_begin_with_a_checkpoint_are_set_against_the_others():
    ends = {10: 0.0, 20: 9.0, 30: 10.0, 40: 11.5, 50: 12.5, 60: 14.1}  # the second lap, of 9 s, is left out
    found = run_figures.saving_laps([(at, step) for step, at in ends.items()], save_every=30, log_every=10)
    assert found["ms_step_with_save"] == pytest.approx(150) and found["laps_with_save"] == 1
    assert found["ms_step_without"] == pytest.approx(100) and found["ms_a_save"] == pytest.approx(500)


def test_the_start_is_read_from_the_log():
    found = run_figures.start(LOG)
    assert found["seconds"] == 20.5 and found["parts"].startswith("8.0 until the ranks")
    assert found["mock_step"].endswith("9.1 GB at its peak of 85.0 GB")
    assert run_figures.start([]) == {"seconds": None, "parts": None, "mock_step": None}


def test_every_figure_of_a_feed_test_is_found_in_its_report():
    findings = Findings(
        step_s=0.1, wanted=160.0, delivered=159.5, wait=0.0125, most=1510.0, first_s=3.2, decode_ms=2.5, read_ms=0.5,
        threads=15, readers=1, cores_busy=0.4, blocks_mean=5.0, blocks_least=2, store_bytes=10**8, stored_bytes=2e5,
    )  # fmt: skip
    assert run_figures.feed(findings.report([])) == {
        "wanted_clips_per_s": 160.0, "delivered_clips_per_s": 159.5, "data_wait": pytest.approx(0.0125),
        "first_batch_s": 3.2, "decode_ms": 2.5, "decode_threads": 15.0, "read_ms": 0.5, "most_clips_per_s": 1510.0,
        "feeds": True,
    }  # fmt: skip
    assert run_figures.feed(findings.report(["cores"]))["feeds"] is False
    assert set(run_figures.feed("Traceback").values()) == {None, False}


# ---- two runs


def run_folder(folder: Path, weights: torch.Tensor, loss: float = 1.0) -> Path:
    checkpoint = folder / "checkpoints" / checkpoint_name(1)
    checkpoint.mkdir(parents=True)
    save_file({"w": weights, "b": torch.zeros(2)}, checkpoint / MODEL)
    save_file({"m": torch.ones(2)}, checkpoint / OPTIMIZER)
    row = {"step": 1, "train/loss": loss, "train/step_time": torch.rand(()).item()}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_two_runs_are_equal_to_the_last_bit_or_the_largest_difference_is_named(tmp_path):
    weights = torch.tensor([0.0, 1.0, 2.0])
    one = run_folder(tmp_path / "one", weights)
    same = run_figures.difference(one, run_folder(tmp_path / "same", weights), 1)
    assert same["equal"] and same["weights_largest"] == 0.0 and same["metrics_differences"] == []

    other = run_figures.difference(one, run_folder(tmp_path / "other", weights + torch.tensor([0, 0.25, -0.5]), 1.5), 1)
    assert not other["equal"] and not other["weights_equal"] and other["optimizer_equal"]
    assert (other["weights_largest"], other["weights_in"], other["weights_tensors_that_differ"]) == (0.5, "w", 1)
    assert not other["metrics_equal"] and "train/loss: 1.0 -> 1.5" in other["metrics_differences"][0]

    zero = run_figures.difference(one, run_folder(tmp_path / "zero", torch.tensor([-0.0, 1.0, 2.0])), 1)
    assert not zero["equal"] and zero["weights_largest"] == 0.0
    shape = run_figures.difference(one, run_folder(tmp_path / "shape", torch.zeros(4)), 1)
    assert not shape["equal"] and shape["weights_largest"] is None and shape["weights_in"] == "w"


# ---- processes


def test_a_command_that_fails_or_takes_too_long_is_told_with_its_last_lines(tmp_path):
    with pytest.raises(Failed, match="exit code 3\nlast words"):
        call(["-c", "print('last words', flush=True); exit(3)"], tmp_path / "out", tmp_path, time.monotonic() + 60)
    assert call(["-c", "print(1); exit(1)"], tmp_path / "out", tmp_path, time.monotonic() + 60, (0, 1)) == "1\n"


def test_what_is_cut_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "ENDS_WITHIN_S", 0.5)
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(99)"
    )
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); {child}"
    watched = Watched(["-c", code], tmp_path / "out", tmp_path)
    family: list[psutil.Process] = []

    def tick() -> None:
        if (tmp_path / "out").read_text().count("up") == 2 and not family:
            family.extend(watched.family())

    with contextlib.closing(watched), pytest.raises(Failed, match="its time is over"):
        watched.wait(time.monotonic() + 5, tick)
    assert len(family) == 1
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_the_log_of_a_run_is_read_a_whole_line_at_a_time(tmp_path):
    training = Training(tmp_path, "run", [])
    training.look()
    assert (training.steps, training.lines, training.rows()) == ([], [], [])
    training.run_dir.mkdir(parents=True)
    log, metrics = training.run_dir / "train.log", training.run_dir / "metrics.jsonl"
    log.write_text(LOG[0] + "\n" + LOG[2][:30])
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"st')
    training.look()
    log.write_text("\n".join(LOG[0:1] + LOG[2:3]) + "\n")
    training.look()
    assert [line for _, line in training.lines] == [LOG[0], LOG[2]]
    assert [step for _, step in training.steps] == [2] and training.rows()[-1] == {"step": 2}
    assert [line for _, line in training.seen(trainings.SAVED)] == [LOG[2]]
    assert training.seen(trainings.SAVED, after=time.monotonic()) == []


# ---- parts


def whole(tmp_path: Path, *options: str) -> whole_run.WholeRun:
    return whole_run.WholeRun(whole_run.parse(["--dry-run", "--json", str(tmp_path / "all.json"), *options]), tmp_path)


def test_a_part_that_fails_is_noted_with_what_it_had_found_and_the_others_go_on(tmp_path):
    bench = whole(tmp_path)

    def fails(deadline: float) -> None:
        bench.figures("bare").update(found=1)
        raise Failed("exit code 9\nlast words")

    bench.do("bare", fails)
    bench.do("run", lambda deadline: bench.figures("run").update(ms_step=deadline - time.monotonic()))
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["failed"] == {"bare": "Failed: exit code 9\nlast words"}
    assert found["parts"]["bare"]["found"] == 1 and found["parts"]["run"]["ms_step"] > 100
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["date"] and found["machine"]["cores"]
    bench.begin -= bench.args.budget
    bench.do("feed", lambda deadline: bench.figures("feed").update(never=1))
    assert "the time is over" in bench.found["failed"]["feed"] and "never" not in bench.found["parts"]["feed"]


def test_what_is_not_measured_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(whole_run, "DETERMINISTIC", "--train.an-option-that-nobody-has")
    for part in ("data", "run"):
        monkeypatch.setattr(whole_run.WholeRun, part, lambda self, deadline: None)
    args = whole_run.parse(["--dry-run", "--json", str(tmp_path / "all.json"), "--parts", "run,deterministic"])
    assert whole_run.measure(args, tmp_path) == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert list(found["parts"]) == ["data", "run"]
    assert found["left_out"] == {
        "bare": "not among --parts", "kill": "not among --parts", "feed": "not among --parts",
        "deterministic": "the command has no option --train.an-option-that-nobody-has",
    }  # fmt: skip


def test_options_after_two_dashes_go_to_every_training_and_an_unknown_part_is_an_error(tmp_path, capsys):
    bench = whole(tmp_path, "--", "--train.memory", "small")
    assert bench.config.train.memory == "small" and bench.common[-2:] == ["--train.memory", "small"]
    with pytest.raises(SystemExit):
        whole_run.parse(["--parts", "bare,fed"])
    assert "no part fed" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_all_parts_run_at_a_tiny_size_on_the_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, str(GPU / "whole_run.py"), "--dry-run", "--json", str(tmp_path / "all.json")],
        capture_output=True, text=True, timeout=1700, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "all.json").read_text())
    sizes, parts = found["sizes"], found["parts"]
    assert found["failed"] == {} and set(parts) | set(found["left_out"]) == {"data", *whole_run.SHARES}
    assert parts["data"]["clips"] == sizes["clips"] and 50_000 < parts["data"]["bytes_a_clip"] < 400_000
    bare, run, kill, feed = (parts[name] for name in ("bare", "run", "kill", "feed"))
    assert len(bare["ms_laps"]) == bare["laps_left_out"] + sizes["laps"] and bare["batches"] == sizes["batches"]
    assert run["steps"] == sizes["steps"] and run["laps"] == sizes["steps"] // sizes["log_every"] - 2
    assert run["share_of_bare"] == pytest.approx(bare["ms_step"] / run["ms_step"])
    assert 0.1 < run["share_of_bare"] < 10 and 0 <= run["data_wait"] < 1 and run["start"]["seconds"] > 1
    assert [save["step"] for save in run["checkpoints"]] == list(range(4, sizes["steps"] + 1, 4))
    assert all(0 < save["stall_ms"] < 60_000 and 0 < save["write_s"] < 60 for save in run["checkpoints"])
    assert run["saving"]["laps_with_save"] > 0 and run["ms_step_wall"] > 0
    assert sizes["twin_steps"] // 2 <= kill["killed_at_step"] < sizes["twin_steps"] and kill["checkpoints_before"] > 0
    assert kill["equal"] and kill["weights_largest"] == 0 and 1 < kill["seconds_to_next_step"] < 300
    if "deterministic" in parts:
        assert parts["deterministic"]["equal"] and parts["deterministic"]["price"] > -0.9
    assert feed["most_clips_per_s"] >= feed["delivered_clips_per_s"] > 0 and feed["step_ms"] == run["ms_step"]
    assert not Path(found["command"][found["command"].index("--data.path") + 1]).parents[1].exists()
