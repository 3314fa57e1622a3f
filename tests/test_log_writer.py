"""Logging behind the training: in order, from one thread, nothing lost, and no checkpoint before its lines."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import Ranks
from tiny_run import batches, bits, make_config, make_run

from fvlm.batch import Batch
from fvlm.errors import UserError
from fvlm.train import logger as logger_module
from fvlm.train.log_writer import LogWriter
from fvlm.train.logger import READ_AFTER, Logger
from fvlm.train.loop import Run, train
from fvlm.train.metrics import Row
from fvlm.train.samples import Samples
from fvlm.train.saver import Saver
from fvlm.train.sinks import METRICS, TRAIN_LOG, JsonLines, TrainLog
from fvlm.train.skipped import SKIPPED
from fvlm.train.state import STATE, Contents
from fvlm.train.store import LocalStore


class Recorder:
    """A sink that keeps what it is given, and by which thread. `open` lets it go on."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.threads: set[str] = set()
        self.open = threading.Event()
        self.open.set()
        self.failing = False

    def _take(self, what: Any) -> None:
        self.threads.add(threading.current_thread().name)
        assert self.open.wait(20)
        if self.failing:
            raise UserError("no space left")
        self.given.append(what)

    def write(self, rows: list[Row], latest: Row) -> None:
        self._take([int(row["step"]) for row in rows])

    def evaluated(self, row: Row, pictures: list[Any]) -> None:
        self._take(("evaluated", row["step"]))

    def note(self, text: str) -> None:
        self._take(text)

    def close(self) -> None:
        self._take("closed")


# ---- the thread


def test_a_disk_that_is_full_for_the_last_lines_ends_the_writing_with_its_error():
    sink = Recorder()
    ended = threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with LogWriter([sink]) as writer:
                sink.failing = True
                writer.note("finished")
                writer.close()
        except UserError as error:
            raised.append(error)
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    assert ended.wait(20), "it waits for a thread that is gone"
    assert "no space left" in str(raised[0])


def test_everything_comes_in_order_from_one_thread_and_does_not_hold_the_caller():
    sink = Recorder()
    writer = LogWriter([sink])
    sink.open.clear()
    writer.note("a")
    writer.write([{"step": 1.0}], {})

    def entry() -> None:
        writer.note("of the entry")
        sink.note("the entry")

    writer.submit(entry)
    writer.note("b")
    assert sink.given == []
    sink.open.set()
    writer.flush()
    assert sink.given == ["a", [1], "of the entry", "the entry", "b"]
    writer.evaluated({"step": 1.0}, [])
    assert sink.given[-1] == ("evaluated", 1.0)  # written when the call returns: a checkpoint may follow
    writer.close()
    writer.close()
    assert sink.given[-1] == "closed" and sink.threads == {"log-writer"}
    writer._thread.join(10)
    assert not writer._thread.is_alive()


def test_after_an_error_nothing_is_written_any_more_and_whoever_asks_is_told():
    sink = Recorder()
    writer = LogWriter([sink])
    writer.note("a")
    writer.flush()
    writer.check()
    sink.failing = True
    writer.note("lost")
    with pytest.raises(UserError, match="no space left"):
        writer.flush()
    sink.failing = False
    with pytest.raises(UserError, match="no space left"):
        writer.submit(lambda: sink.note("after a hole")).result()
    for ask in (writer.check, writer.flush, writer.close):
        with pytest.raises(UserError, match="no space left"):
            ask()
    assert sink.given == ["a"]


def test_an_error_of_the_run_waits_for_the_lines_before_it():
    sink = Recorder()
    with pytest.raises(ZeroDivisionError), LogWriter([sink]) as writer:
        sink.open.clear()
        threading.Timer(0.1, sink.open.set).start()
        writer.note("the last words")
        raise ZeroDivisionError
    assert sink.given == ["the last words"]
    sink.failing = True
    with pytest.raises(ZeroDivisionError) as raised, LogWriter([sink]) as writer:
        writer.note("more")
        raise ZeroDivisionError
    assert "no space left" in raised.value.__notes__[0]


# ---- metrics that are read late, as on a GPU


def speechless(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on time."""
    timed = {"train/step_time", "train/data_wait", "train/clips_per_s", "train/eta_s", "train/trained_s"}
    return [
        {key: value for key, value in json.loads(line).items() if key not in timed}
        for line in path.read_text().splitlines()
    ]


class Store(LocalStore):
    """Looks into metrics.jsonl when a checkpoint is about to be written."""

    def __init__(self, root: Path, metrics: Path):
        super().__init__(root)
        self._metrics = metrics
        self.written: list[int] = []

    def write(self, contents: Contents) -> None:
        steps = [row["step"] for row in speechless(self._metrics)]
        assert steps[: contents.step] == list(range(1, contents.step + 1))
        super().write(contents)
        self.written.append(contents.step)


def go_on(
    folder: Path,
    read_after: int,
    broken: tuple[int, ...] = (),
    sinks: tuple[Any, ...] = (),
    hooks: tuple[Any, ...] = (),
    fails_at: int = 0,
    **changes: Any,
) -> tuple[Run, Store]:
    """One start to the end, as rank 0 of 1."""
    config = make_config(folder, **changes)
    run, samples = make_run(config), Samples(config, 0, 0, 1)
    store = Store(folder / "checkpoints", config.run_dir / METRICS)

    def made() -> Iterator[Batch]:
        for step, batch in enumerate(batches(1, broken), 1):
            if step == fails_at:
                raise ZeroDivisionError
            yield batch

    all_sinks = [TrainLog(config.run_dir, config.train.max_steps), JsonLines(config.run_dir, 0), *sinks]
    with (
        LogWriter(all_sinks) as writer,
        Saver(run, store, writer.note) as saver,
        Logger(run, [writer], samples, dict, dict, writer, read_after) as logger,
    ):
        train(run, samples.of(made()), [logger, *hooks, saver])
        writer.close()
    return run, store


@pytest.mark.parametrize(("log_every", "save_every"), [(1, 1), (3, 4), (4, 2), (2, 100)])
def test_what_is_logged_and_saved_is_the_same_whether_metrics_are_read_at_once_or_late(tmp_path, log_every, save_every):
    runs = {}
    for late in (0, READ_AFTER, 5):
        settings = {"log_every": log_every, "save_every": save_every, "max_steps": 11, "keep_last": 20}
        run, store = go_on(tmp_path / str(late), late, broken=(5,), **settings)
        folder = run.config.run_dir
        states = [json.loads((store.root / name / STATE).read_text()) for name in store.names()]
        lines = [line.split(" | ")[:3] for line in (folder / TRAIN_LOG).read_text().splitlines() if " epoch " in line]
        runs[late] = (
            bits(run),
            speechless(folder / METRICS),
            (folder / SKIPPED).read_text(),
            [(state["step"], state["metrics"]) for state in states],
            [line[1:] for line in lines],
        )
        assert store.written == [*range(save_every, 11, save_every), 11]
    at_once = runs.pop(0)
    assert [row["step"] for row in at_once[1]] == list(range(1, 12))
    assert all(late[:4] == at_once[:4] for late in runs.values())
    # A line a log step, also where several are read together before a checkpoint.
    assert all(late[4] == at_once[4] for late in runs.values()) and len(at_once[4]) >= 11 // log_every


def test_metrics_are_read_so_many_steps_late_and_no_later(tmp_path):
    sink, seen = Recorder(), []

    class Look:
        def after_step(self, step: int, scalars: object) -> None:
            time.sleep(0.2)
            seen.append([steps[-1] for steps in sink.given if isinstance(steps, list)])

    go_on(tmp_path, 2, sinks=(sink,), hooks=(Look(),), log_every=3, max_steps=10)
    assert seen == [[], [], [], [], [3], [3], [3], [3, 6], [3, 6], [3, 6, 9, 10]]


def test_a_checkpoint_waits_for_the_lines_of_its_steps_though_the_log_is_slow(tmp_path):
    sink, early = Recorder(), []
    sink.open.clear()

    class Look:
        def after_step(self, step: int, scalars: object) -> None:
            if step == 8:  # that of step 4 could have been written long ago
                time.sleep(0.2)
                early.extend((tmp_path / "checkpoints").glob("*"))
                sink.open.set()

    _, store = go_on(tmp_path, 0, sinks=(sink,), hooks=(Look(),), log_every=2, save_every=4, max_steps=12)
    assert early == [] and store.written == [4, 8, 12]


def test_too_many_skipped_steps_end_the_run_at_most_so_many_steps_later_with_the_same_words(tmp_path):
    said = []
    for late in (0, 2):
        sink = Recorder()
        with pytest.raises(UserError) as caught:
            go_on(tmp_path / str(late), late, broken=(2, 3, 4), sinks=(sink,), log_every=2, max_skipped=3)
        said.append(str(caught.value).replace(f"{tmp_path}/{late}", ""))
        rows = speechless(tmp_path / str(late) / "run" / METRICS)
        assert [row["step"] for row in rows] == list(range(1, 5 + late))  # on leaving, what there is
    assert said[0] == said[1] and "step 4 was skipped, number 3 in a row" in said[0]


def test_after_an_error_the_checkpoint_in_flight_gets_its_lines_and_is_safe(tmp_path):
    with pytest.raises(ZeroDivisionError):
        go_on(tmp_path, 2, fails_at=5, log_every=2, save_every=4)
    assert (tmp_path / "checkpoints" / "step-00000004" / STATE).exists()
    assert [row["step"] for row in speechless(tmp_path / "run" / METRICS)] == [1, 2, 3, 4]


def test_where_other_ranks_may_be_gone_a_checkpoint_whose_lines_are_not_read_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(logger_module, "world_size", lambda: 2)
    with pytest.raises(ZeroDivisionError) as raised:
        go_on(tmp_path, 2, fails_at=5, log_every=2, save_every=4)
    assert "training ended before the metrics were read" in raised.value.__notes__[0]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("late", [0, 2])
def test_a_log_that_cannot_be_written_ends_the_run_and_no_checkpoint_appears_without_its_lines(tmp_path, late):
    sink = Recorder()

    class Fill:
        def after_step(self, step: int, scalars: object) -> None:
            sink.failing = sink.failing or step == 3
            time.sleep(0.02)

    with pytest.raises(UserError, match="no space left"):
        go_on(tmp_path, late, sinks=(sink,), hooks=(Fill(),), log_every=1, save_every=4, max_steps=50)
    assert not (tmp_path / "checkpoints").exists()
    assert len(speechless(tmp_path / "run" / METRICS)) <= 5


def test_a_checkpoint_that_was_taken_before_its_lines_failed_does_not_appear(tmp_path):
    sink = Recorder()

    class Fail:
        def after_step(self, step: int, scalars: object) -> None:
            if step == 3:
                time.sleep(0.1)  # until the lines so far are written
                sink.open.clear()
            if step == 5:
                sink.failing = True
                sink.open.set()

    with pytest.raises(UserError, match="no space left"):
        go_on(tmp_path, 0, sinks=(sink,), hooks=(Fail(),), log_every=1, save_every=4, max_steps=50)
    assert [3] in sink.given and [4] not in sink.given
    assert not (tmp_path / "checkpoints").exists()


# ---- on several ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


def of_one_rank(folder: Path, samples: bool) -> str:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = make_config(folder, samples=samples, log_every=2, max_skipped=3)
    run, of_rank = make_run(config), Samples(config, 0, rank, world)
    sinks = [JsonLines(config.run_dir, 0)] if rank == 0 else []
    with (
        LogWriter(sinks) as writer,
        Logger(run, [writer] if rank == 0 else [], of_rank, dict, dict, writer, 2) as logger,
    ):
        try:
            train(run, of_rank.of(batches(1, (2, 5, 6, 7), rank, world)), [logger])
        except UserError as error:
            return f"after {run.step}: {error}"
    return ""


@pytest.mark.parametrize("samples", [False, True])
def test_all_ranks_give_up_after_the_same_step_with_the_same_words(tmp_path, ranks, samples):
    first, second = ranks.all(2, functools.partial(of_one_rank, tmp_path, samples))
    assert first == second and first.startswith("after 10: step 7 was skipped, number 3 in a row")
    listed = [json.loads(line) for line in (tmp_path / "run" / SKIPPED).read_bytes().splitlines()]
    assert [(line["step"], len(line["clips"])) for line in listed] == [(2, 2), (5, 2), (6, 2), (7, 2)]
