"""`make torture` has to see what it is there for: each loss, each doubling, each changed bit. No cluster here."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torture.attack import Attack, Kill
from torture.compare import Comparison, compare
from torture.disk import SmallDisk
from torture.report import Outcome
from torture.schedule import KINDS, plan_kills
from torture.terminal import Running, Terminal
from torture.timeline import Event, Timeline

from fvlm.train.samples import SAMPLES
from fvlm.train.sinks import METRICS
from fvlm.train.state import MODEL, OPTIMIZER, checkpoint_name
from fvlm.train.step_lines import StepLines

STEPS = 4


def write_run(folder: Path, speed: float) -> Path:
    """A finished run of two ranks, four clips a step, as far as it is compared. speed: of the machine."""
    checkpoint = folder / "checkpoints" / checkpoint_name(STEPS)
    checkpoint.mkdir(parents=True)
    weights = np.random.default_rng(0).standard_normal((3, 2), np.float32)
    save_file({"a.weight": weights, "a.bias": weights[0]}, checkpoint / MODEL)
    save_file({"exp_avg/a.weight": weights / 2, "rng/torch": np.arange(5, dtype=np.uint8)}, checkpoint / OPTIMIZER)
    for rank in range(2):
        lines = StepLines(folder / SAMPLES / f"rank-{rank:05d}.jsonl", 0)
        lines.append(
            {"step": step, "rank": rank, "world": 2, "clips": [f"clip-{step}-{rank}-{n}" for n in range(2)]}
            for step in range(1, STEPS + 1)
        )
        lines.close()
    metrics = StepLines(folder / METRICS, 0)
    metrics.append(
        {"step": step, "train/loss": 1 / step, "train/lr": 0.0, "train/step_time": speed, "ingest/blocks": 9 * speed}
        for step in range(1, STEPS + 1)
    )
    metrics.close()
    return folder


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    return write_run(tmp_path / "undisturbed", speed=0.1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "killed", speed=0.3)


def edit_lines(path: Path, edit: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))


def edit_row(path: Path, line: int, edit: Callable[[dict], dict]) -> None:
    def edited(lines: list[str]) -> list[str]:
        return [*lines[:line], json.dumps(edit(json.loads(lines[line]))) + "\n", *lines[line + 1 :]]

    edit_lines(path, edited)


def flip_lowest_bit(path: Path, name: str) -> None:
    tensors = load_file(path)
    bits = tensors[name].copy().reshape(-1).view(np.uint8)
    bits[0] ^= 1
    save_file({**tensors, name: bits.view(tensors[name].dtype).reshape(tensors[name].shape)}, path)


# ---- comparing


def test_runs_that_differ_in_speed_alone_are_equal(undisturbed, run):
    assert compare(undisturbed, run, STEPS) == Comparison(0, 0, True, True, True, True, [])


def test_a_lost_sample_is_counted(undisturbed, run):
    first = run / SAMPLES / "rank-00000.jsonl"
    edit_row(first, 1, lambda row: row | {"clips": row["clips"][:1]})
    found = compare(undisturbed, run, STEPS)
    assert (found.samples_lost, found.samples_doubled, found.samples_equal) == (1, 0, False)
    assert "(2, 'clip-2-0-1')" in "\n".join(found.differences)


def test_a_lost_share_of_a_step_is_counted_and_named_by_the_product(undisturbed, run):
    edit_lines(run / SAMPLES / "rank-00001.jsonl", lambda lines: lines[:2] + lines[3:])
    found = compare(undisturbed, run, STEPS)
    assert (found.samples_lost, found.samples_doubled, found.samples_equal) == (2, 0, False)
    assert "step 3 of rank 1 is lost" in "\n".join(found.differences)


def test_samples_of_a_step_that_was_done_twice_are_counted(undisturbed, run):
    edit_lines(run / SAMPLES / "rank-00000.jsonl", lambda lines: [*lines, lines[0]])
    found = compare(undisturbed, run, STEPS)
    assert (found.samples_lost, found.samples_doubled, found.samples_equal) == (0, 2, False)


def test_another_clip_is_one_lost_and_one_too_many(undisturbed, run):
    edit_row(run / SAMPLES / "rank-00000.jsonl", 3, lambda row: row | {"clips": ["clip-1-0-0", row["clips"][1]]})
    found = compare(undisturbed, run, STEPS)
    assert (found.samples_lost, found.samples_doubled, found.samples_equal) == (1, 1, False)


def test_another_order_within_a_step_is_not_equal(undisturbed, run):
    edit_row(run / SAMPLES / "rank-00000.jsonl", 0, lambda row: row | {"clips": row["clips"][::-1]})
    found = compare(undisturbed, run, STEPS)
    assert (found.samples_lost, found.samples_doubled, found.samples_equal) == (0, 0, False)


def test_a_sample_log_that_is_cut_short_in_both_runs_is_not_equal(undisturbed, run):
    for folder in (undisturbed, run):
        for rank in range(2):
            edit_lines(folder / SAMPLES / f"rank-{rank:05d}.jsonl", lambda lines: lines[:-1])
    assert not compare(undisturbed, run, STEPS).samples_equal


@pytest.mark.parametrize(
    ("file", "name"), [(MODEL, "a.weight"), (OPTIMIZER, "exp_avg/a.weight"), (OPTIMIZER, "rng/torch")]
)
def test_one_bit_of_one_tensor_is_seen(undisturbed, run, file, name):
    flip_lowest_bit(run / "checkpoints" / checkpoint_name(STEPS) / file, name)
    found = compare(undisturbed, run, STEPS)
    assert (found.weights_equal, found.optimizer_equal) == (file != MODEL, file != OPTIMIZER)
    assert found.differences == [f"{file}: tensors that differ: {name}"]


def test_a_tensor_or_a_checkpoint_that_is_not_there_is_seen(undisturbed, run):
    model = run / "checkpoints" / checkpoint_name(STEPS) / MODEL
    save_file({"a.weight": load_file(model)["a.weight"]}, model)
    found = compare(undisturbed, run, STEPS)
    assert not found.weights_equal
    assert found.differences == [f"{MODEL}: tensors that differ: a.bias"]
    model.unlink()
    assert compare(undisturbed, run, STEPS).differences == [f"{model} is not there"]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda lines: lines[:1] + lines[2:], "steps that are missing: 2"),
        (lambda lines: lines[:-1], "steps that are missing: 4"),
        (lambda lines: [*lines[:3], lines[1], *lines[3:]], "steps that are there more than once: 2"),
        (lambda lines: [*lines, lines[0].replace('"step": 1', '"step": 5')], "steps that were never to be: 5"),
        (lambda lines: [*lines[:1], lines[1][:9] + lines[2], *lines[3:]], "lines that are not whole: 2"),
    ],
    ids=["missing", "last missing", "twice", "too many", "not whole"],
)
def test_each_step_is_in_the_metrics_once(undisturbed, run, edit, told):
    edit_lines(run / METRICS, edit)
    found = compare(undisturbed, run, STEPS)
    assert not found.metrics_equal
    assert told in "\n".join(found.differences)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row | {"train/loss": float(np.nextafter(row["train/loss"], 2))},
        lambda row: row | {"train/lr": -0.0},
        lambda row: row | {"train/loss": float("nan")},
        lambda row: {key: value for key, value in row.items() if key != "train/lr"},
        lambda row: row | {"caption/ratio": 1.0},
    ],
    ids=["last bit", "sign of zero", "nan", "key gone", "key more"],
)
def test_a_value_of_the_metrics_that_differs_is_seen(undisturbed, run, change):
    edit_row(run / METRICS, 2, change)
    found = compare(undisturbed, run, STEPS)
    assert not found.metrics_equal
    assert "step 3 " in "\n".join(found.differences)
    assert found.samples_equal and found.weights_equal and found.optimizer_equal


# ---- moments


def test_kills_are_a_function_of_the_seed_and_every_kind_comes_before_one_comes_again():
    kinds = list(KINDS)
    planned = plan_kills(0, 25, kinds)
    assert planned == plan_kills(0, 25, kinds)
    assert planned[:5] == plan_kills(0, 5, kinds)
    assert planned != plan_kills(1, 25, kinds)
    assert sorted(kill.kind for kill in planned[:10]) == sorted(kill.kind for kill in planned[10:20]) == sorted(kinds)
    many = plan_kills(2, 1000, kinds)
    assert 150 < sum(kill.in_start for kill in many) < 250
    assert all(0 <= kill.share < 1 for kill in many)


# ---- what happened when


LOG = [
    (0.0, "2026-01-01 00:00:00 starting at step 0"),
    (1.0, "2026-01-01 00:00:01 step 1/9 (11.1%) epoch 0.17 | cap: 6.2"),
    (2.0, "2026-01-01 00:00:02 step 2/9 (22.2%) epoch 0.33 | cap: 6.2"),
    (2.5, "2026-01-01 00:00:02 rank 0 failed (Killed); starting again from step 1, failure 1"),
    (8.0, "2026-01-01 00:00:08 resumed at step 1 from step-00000001"),
    (9.0, "2026-01-01 00:00:09 step 2/9 (22.2%) epoch 0.33 | cap: 6.2"),
    (10.0, "2026-01-01 00:00:10 st2026-01-01 00:00:10 step 3/9 (33.3%) epoch 0.5 | cap: 6.2"),
    (16.0, "2026-01-01 00:00:16 step 4/9 (44.4%) epoch 0.66 | cap: 6.2"),
]


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    timeline = Timeline(tmp_path / "train.log")
    for at, line in LOG:
        timeline.take(line, at)
    return timeline


def test_steps_that_were_done_again_are_counted(timeline):
    assert [event.step for event in timeline.steps] == [1, 2, 2, 3, 4]
    assert timeline.repeated() == 1
    assert timeline.step == 4


def test_the_step_after_a_kill_is_the_first_one_after_the_ranks_have_come_up_again(timeline):
    assert timeline.recovery(1.5, before=7.9, goes_on_after=None) is None
    assert timeline.recovery(1.5, before=20, goes_on_after=None) == Event(9.0, 2)
    assert timeline.recovery(1.5, before=20, goes_on_after=5) == Event(9.0, 2)


def test_where_the_ranks_go_on_it_is_the_next_one_once_they_have_for_a_while(timeline):
    assert timeline.recovery(9.5, before=15.9, goes_on_after=5) is None
    assert timeline.recovery(9.5, before=20, goes_on_after=5) == Event(10.0, 3)
    assert timeline.recovery(9.5, before=20, goes_on_after=None) is None
    assert timeline.recovery(16.5, before=99, goes_on_after=0) is None


def test_a_log_is_followed_by_whole_lines(tmp_path):
    path = tmp_path / "train.log"
    timeline = Timeline(path)
    timeline.poll()
    for piece, finished in ((LOG[1][1][:30], []), (LOG[1][1][30:] + "\n", [1]), (LOG[2][1] + "\nx", [1, 2])):
        with path.open("a") as file:
            file.write(piece)
        timeline.poll()
        assert [event.step for event in timeline.steps] == finished


def test_a_job_that_is_to_end_may_finish_steps_which_do_not_count(tmp_path, timeline):
    terminal = Terminal(tmp_path, cpus=1, store_mb=1)
    attack = Attack(terminal, timeline, None, lambda text: None)
    attack.kills.append(Kill(1, "stop", 0.5, 0, True))
    attack._settle()
    assert attack.kills[0].recovered is None
    terminal.commands.append((4.0, "submit"))
    attack._settle()
    assert attack.kills[0].recovered == Event(9.0, 2)
    assert attack.kills[0].how == "by submit"


# ---- what the person at the terminal does


def ended(folder: Path, name: str, code: int) -> Running:
    process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])
    process.wait()
    log = folder / "log"
    log.touch()
    return Running(name, process, log)


@pytest.mark.parametrize(
    ("name", "code", "is_up", "following"),
    [
        ("start.sh", 0, True, "submit"),
        ("start.sh", 2, False, "stop.sh"),
        ("stop.sh", 0, False, "start.sh"),
        ("submit", 137, True, "submit"),
        ("submit", 2, False, "start.sh"),
    ],
)
def test_each_command_is_followed_by_the_documented_one(tmp_path, monkeypatch, name, code, is_up, following):
    terminal = Terminal(tmp_path, cpus=1, store_mb=1)
    given: list[str] = []
    monkeypatch.setattr(terminal, "is_up", lambda: is_up)
    monkeypatch.setattr(terminal, "give", given.append)
    terminal._current = ended(tmp_path, name, code)
    terminal.hands_off = True
    terminal.tick()
    assert given == []
    terminal.hands_off = False
    terminal.tick()
    assert given == [following]


def test_a_submit_command_that_ends_well_ends_the_run(tmp_path):
    terminal = Terminal(tmp_path, cpus=1, store_mb=1)
    terminal._current = ended(tmp_path, "submit", 0)
    terminal.tick()
    assert terminal.finished


# ---- the figures


EQUAL = Comparison(0, 0, True, True, True, True, [])


def outcome(comparison: Comparison | None = EQUAL, planned: int = 3, left_behind: tuple[str, ...] = ()) -> Outcome:
    kills = [
        Kill(1, "worker", 10.0, 5, False, Event(17.0, 4)),
        Kill(2, "head", 20.0, 9, False),
        Kill(3, "driver", 25.0, 9, True, Event(55.0, 9), ("start.sh", "submit")),
    ]
    commands = ["start.sh", "submit"]
    return Outcome(0, 100, planned, kills, {}, 7, commands, comparison, "", list(left_behind), 60.0)


def test_the_line_counts_kills_and_how_they_were_got_over():
    figures = json.loads(outcome().line())
    assert figures["kills"] == {"worker": 1, "head": 1, "driver": 1}
    assert (figures["kills_made"], figures["kills_in_a_start"]) == (3, 1)
    assert figures["killed_again_before_the_next_step"] == 1
    assert (figures["restarts_by_itself"], figures["restarts_by_command"]) == (1, 1)
    assert (figures["median_s_to_next_step"], figures["longest_s_to_next_step"]) == (18.5, 30.0)
    assert figures["steps_repeated"] == 7
    assert figures["weights_equal"] and figures["optimizer_equal"] and figures["metrics_equal"]
    assert (figures["samples_lost"], figures["samples_doubled"]) == (0, 0)
    assert outcome().problems() == []


def test_what_is_unequal_short_of_kills_or_left_behind_does_not_pass():
    unequal = Comparison(1, 0, False, True, True, True, ["samples lost: (1, 'a')"])
    assert outcome(unequal).problems() == ["samples lost: (1, 'a')"]
    assert "finished after 3 of 4 kills" in outcome(planned=4).problems()[0]
    assert outcome(left_behind=("123 raylet",)).problems() == ["left behind by stop.sh: 123 raylet"]
    assert len(outcome(comparison=None).problems()) == 1


# ---- the disk


def test_a_small_disk_fills_up_and_leaves_nothing(tmp_path):
    with contextlib.ExitStack() as at_the_end:
        try:
            disk = at_the_end.enter_context(SmallDisk(tmp_path / "disk"))
        except OSError as error:
            pytest.skip(f"no disk can be mounted here: {error}")
        file = disk.folder / "file"
        (disk.folder / "earlier").write_bytes(b"1" * 5000)
        assert disk.fill() > 100 << 20
        assert disk.is_filled
        with pytest.raises(OSError, match="No space left"):
            file.write_bytes(b"1")
        disk.free()
        file.write_bytes(b"1" * 5000)
        assert not disk.is_filled
    assert list(tmp_path.iterdir()) == []
