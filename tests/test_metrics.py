"""What people watch: the rows, the running averages, the line of train.log, the clock."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from tiny_run import batches, make_config, make_run

from fvlm.train import metrics as metrics_module
from fvlm.train.logger import Logger
from fvlm.train.loop import train
from fvlm.train.metrics import Clock, Metrics, duration, log_line
from fvlm.train.samples import Samples
from fvlm.train.sinks import METRICS, TRAIN_LOG, JsonLines, TrainLog
from fvlm.train.step_lines import kept_lines

LATEST = {
    "step": 1250.0, "train/epoch": 2.5, "train/step_time": 0.25, "train/clips_per_s": 64.0, "train/data_wait": 0.031,
    "train/vram_gb": 17.25, "train/eta_s": 93_784.0,
    "caption/loss_coarse": 3.5, "caption/iter_1": 3.25, "caption/iter_2": 3.125, "caption/ratio_avg": 1.12,
    "recon/loss_coarse": 0.75, "recon/iter_1": 0.5, "recon/iter_2": 0.25, "recon/ratio_avg": 3.0,
}  # fmt: skip


@pytest.fixture
def now(monkeypatch):
    """A clock that only moves when told: `now[0] += 1` is a second."""
    seconds = [100.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: seconds[0])
    return seconds


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name.replace("__", "/"): torch.tensor(value) for name, value in values.items()}


def test_the_log_line_says_step_epoch_losses_ratios_speed_memory_and_time_left():
    line = log_line(LATEST, max_steps=5000)
    for part in (
        "step 1250/5000", "25.0%", "epoch 2.50", "cap: 3.5000 -> [3.2500 -> 3.1250] r=1.1200",
        "rec: 0.7500 -> [0.5000 -> 0.2500] r=3.0000", "0.250 s/step", "64.0 clips/s", "wait 3.1%", "VRAM 17.2 GB",
        "ETA 1d 02:03:04",
    ):  # fmt: skip
        assert part in line


def test_train_log_has_whole_lines_and_no_carriage_return(tmp_path):
    sink = TrainLog(tmp_path, max_steps=5000)
    sink.note("starting")
    sink.write([], LATEST)
    first_step = {key: value for key, value in LATEST.items() if "coarse" not in key and "ratio" not in key}
    sink.write([], first_step)  # before the first reading there is no coarse loss and no ratio
    sink.close()
    text = (tmp_path / TRAIN_LOG).read_text()
    assert "\r" not in text and text.endswith("\n") and len(text.splitlines()) == 3
    assert "nan" not in text


def test_averages_run_over_the_last_readings_only():
    metrics = Metrics(ratio_window=3)
    readings = {1: 1.0, 4: 2.0, 5: 4.0, 9: 6.0, 10: 11.0}
    rows = []
    for step in range(1, 11):
        values = scalars(train__loss=float(step))
        if step in readings:
            values |= scalars(caption__ratio=readings[step], recon__ratio=1.0)
        metrics.add(step, values)
        if step % 4 == 0:
            rows += metrics.drain()
    rows += metrics.drain()
    assert [row["step"] for row in rows] == list(range(1, 11))
    averages = {row["step"]: row["caption/ratio_avg"] for row in rows if "caption/ratio_avg" in row}
    assert averages == {1: 1.0, 4: 1.5, 5: pytest.approx(7 / 3), 9: 4.0, 10: 7.0}
    assert metrics.latest["train/loss"] == 10.0 and metrics.latest["recon/ratio_avg"] == 1.0
    assert metrics.drain() == []


def test_averages_go_on_after_a_restart_as_if_there_was_none():
    whole, before = Metrics(3), Metrics(3)
    for m in (whole, before):
        for step, ratio in enumerate((1.0, 2.0, 4.0), 1):
            m.add(step, scalars(caption__ratio=ratio))
        m.drain()
    after = Metrics(3)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for m in (whole, after):
        m.add(4, scalars(caption__ratio=8.0))
    assert whole.drain() == after.drain()
    assert whole.latest == after.latest


def test_a_ratio_that_is_no_number_does_not_poison_the_average():
    metrics = Metrics(3)
    for step, ratio in enumerate((1.0, math.inf, math.nan, 3.0), 1):
        metrics.add(step, scalars(caption__ratio=ratio))
    assert metrics.drain()[-1]["caption/ratio_avg"] == 2.0


def test_the_clock_tells_waiting_from_working_and_leaves_pauses_out(now):
    clock = Clock()
    now[0] += 50  # building the model
    clock.resume()
    for _ in range(4):
        now[0] += 1
        clock.waited()
        now[0] += 3
        clock.stepped()
    now[0] += 1000  # a checkpoint
    clock.resume()
    now[0] += 1
    clock.waited()
    now[0] += 3
    clock.stepped()
    assert clock.trained_s == 20
    assert clock.lap() == (4.0, 0.25)
    assert clock.lap() == (0.0, 0.0)
    assert clock.trained_s == 20


def test_the_clock_counts_on_from_what_a_checkpoint_says(now):
    clock = Clock(trained_s=3600.0)
    clock.resume()
    now[0] += 2
    clock.stepped()
    assert clock.trained_s == 3602.0
    assert clock.lap() == (2.0, 0.0)  # the speed is that of this start


def test_steps_that_a_lost_process_wrote_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / METRICS
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 8)))
    assert [json.loads(line)["step"] for line in kept_lines(path, 5)] == [1, 2, 3, 4, 5]
    sink = JsonLines(tmp_path, step=5)
    sink.write([{"step": 6, "loss": 0.25}], {})
    sink.close()
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] == 0.25


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4}', "{"])
def test_a_line_that_a_crash_tore_is_dropped(tmp_path, torn):
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n' + torn)
    assert [json.loads(line)["step"] for line in kept_lines(path, 10)] == [1, 2, 3]


@pytest.mark.parametrize(
    "seconds, text", [(0, "00:00:00"), (59.9, "00:00:59"), (3661, "01:01:01"), (93_784.0, "1d 02:03:04")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_waiting_for_the_device_where_metrics_are_read_is_no_wait_for_data(tmp_path):
    """A host that runs ahead of its GPU waits there, and nowhere else."""
    config = make_config(tmp_path, max_steps=4, log_every=2)
    run, pause, rows = make_run(config), 0.5, []
    read = run.metrics.read

    class Sink:
        def write(self, new, latest):
            rows.append(latest)

    def slowly():
        time.sleep(pause)
        return read()

    run.metrics.read = slowly  # type: ignore[method-assign]
    train(run, batches(1), [Logger(run, [Sink()], Samples(config, 0, 0, 1))])  # type: ignore[list-item]
    assert all(row["train/step_time"] > pause / 2 and row["train/data_wait"] < 0.3 for row in rows) and len(rows) == 2
