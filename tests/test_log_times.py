"""The times that log lines tell, and what reading them late is for: a GPU that is never waited for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch
from test_log_writer import Recorder, speechless
from tiny_run import batches, make_config, make_run

from fvlm.batch import Batch
from fvlm.train.device import StepsAhead
from fvlm.train.log_writer import LogWriter
from fvlm.train.logger import Logger
from fvlm.train.loop import train
from fvlm.train.metrics import Clock, Row
from fvlm.train.samples import Samples
from fvlm.train.saver import Saver
from fvlm.train.sinks import METRICS, JsonLines
from fvlm.train.store import LocalStore

# ---- time


def test_a_late_batch_is_waited_for_only_where_the_device_has_nothing_else_to_do(tmp_path, monkeypatch):
    def slowly() -> Iterator[Batch]:
        for batch in batches(1):
            time.sleep(0.2)
            yield batch

    for busy in (False, True):
        monkeypatch.setattr(StepsAhead, "is_busy", lambda self, busy=busy: busy)
        config = make_config(tmp_path / str(busy), max_steps=3, log_every=3)
        run, latest = make_run(config), []

        class Sink(Recorder):
            def write(self, rows: list[Row], newest: Row) -> None:
                latest.append(newest)  # noqa: B023  called at once

        samples = Samples(config, 0, 0, 1)
        train(run, samples.of(slowly()), [Logger(run, [Sink()], samples)])
        (row,) = latest
        assert row["train/step_time"] > 0.2
        assert (row["train/data_wait"] == 0) if busy else (row["train/data_wait"] > 0.1)


def test_what_hooks_take_is_no_wait_for_data(tmp_path):
    config, rows = make_config(tmp_path, max_steps=4, log_every=4), []

    class Slow:
        def after_step(self, step: int, scalars: object) -> None:
            time.sleep(0.2)

    class Sink(Recorder):
        def write(self, new: list[Row], latest: Row) -> None:
            rows.append(latest)

    run, samples = make_run(config), Samples(config, 0, 0, 1)
    train(run, samples.of(batches(1)), [Slow(), Logger(run, [Sink()], samples)])
    assert rows[0]["train/data_wait"] < 0.1 and rows[0]["train/step_time"] > 0.15


def test_a_step_takes_the_time_of_those_that_the_device_has_finished(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    for _ in range(12):
        now[0] += 1
        clock.stepped()
    assert clock.lap(10) == (1.2, 0.0) and clock.lap() == (0.0, 0.0)


# ---- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@needs_gpu
def test_the_host_waits_for_no_gpu_where_metrics_are_logged_or_a_checkpoint_is_taken(tmp_path):
    config = make_config(tmp_path, max_steps=12, log_every=2, save_every=5)
    run, samples = make_run(config, device="cuda"), Samples(config, 0, 0, 1)
    made = [next(batches(step)).to("cuda") for step in range(1, 13)]
    sink = Recorder()
    with (
        LogWriter([sink, JsonLines(config.run_dir, 0)]) as writer,
        Saver(run, LocalStore(tmp_path / "c"), writer.note) as saver,
        Logger(run, [writer], samples, dict, dict, writer) as logger,
    ):

        class Strict:
            """From the second step on: AdamW makes its state in the first, and memory is reserved."""

            def after_step(self, step: int, scalars: object) -> None:
                torch.cuda.set_sync_debug_mode("error")

        try:
            train(run, samples.of(iter(made)), [logger, saver, Strict()])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        writer.close()
    rows = speechless(config.run_dir / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    assert LocalStore(tmp_path / "c").names() == ["step-00000005", "step-00000010", "step-00000012"]
    assert any("checkpoints are" in str(line) for line in sink.given)
