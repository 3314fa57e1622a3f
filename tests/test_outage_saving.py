"""Saving while the store is away: training goes on, the newest checkpoint is kept, the last one is waited for."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import advance, make_run, require_whole

from fvlm.data import outage as outage_module
from fvlm.errors import StoreUnavailable
from fvlm.train import saver as saver_module
from fvlm.train.saver import Saver
from fvlm.train.state import Contents
from fvlm.train.store import LocalStore


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage_module, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(outage_module, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(outage_module, "POLL_S", 0.01)
    monkeypatch.setattr(saver_module, "POLL_S", 0.02)


def gone(*_: object) -> None:
    raise StoreUnavailable("s: gone")


class AwayStore(LocalStore):
    """Writes fail while it is `away`; `busy` is held while one does."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.away, self.tries = False, 0
        self.may_fail = threading.Event()
        self.may_fail.set()

    def write(self, contents: Contents) -> None:
        self.tries += 1
        if self.away:
            assert self.may_fail.wait(120)
        if self.away:
            raise StoreUnavailable(f"{self.locate(contents.name)}: could not be reached", 0.0)
        super().write(contents)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def saving(tmp_path: Path):
    run, store, notes = make_run(tmp_path, save_every=2), AwayStore(tmp_path / "c"), []
    return run, store, notes, Saver(run, store, notes.append)


def step(run, saver) -> None:
    advance(run)
    saver.after_step(run.step, {})


def test_training_goes_on_while_the_store_is_away_and_the_same_checkpoint_is_safe_once_it_is_back(saving) -> None:
    run, store, notes, saver = saving
    store.away = True
    for _ in range(3):
        step(run, saver)
    until(lambda: store.tries >= 3)
    assert store.names() == []
    store.away = False
    until(lambda: store.names() == ["step-00000002"])
    step(run, saver)  # the next save is as ever
    saver.close()
    assert require_whole(store.root) == [2, 4]
    assert notes[0].startswith("WARNING: store away for ") and "training goes on without a checkpoint" in notes[0]
    assert notes[1].startswith("the store answers again; it was away for ")
    assert [note.split(" in ")[0] for note in notes[2:]] == ["saved step-00000002", "saved step-00000004"]


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits_for_its_store(saving) -> None:
    run, store, notes, saver = saving
    store.away = True
    for _ in range(6):
        step(run, saver)
        if run.step % 2 == 0:
            until(lambda: saver._writing.writer.pauses)
    store.away = False
    saver.close()
    assert require_whole(store.root) == [6]
    assert "; 2 before it were left out, their store was away" in notes[-1]


def test_a_save_in_the_midst_of_a_try_is_left_out_and_training_is_not_held(saving) -> None:
    run, store, notes, saver = saving
    store.away = True
    for _ in range(2):
        step(run, saver)
    until(lambda: store.tries >= 2)
    store.may_fail.clear()
    until(lambda: not saver._writing.writer.pauses)
    begin = time.monotonic()
    for _ in range(2):
        step(run, saver)
    assert time.monotonic() - begin < 60 and saver._writing.snapshot.step == 2
    store.away = False
    store.may_fail.set()
    saver.close()
    assert require_whole(store.root) == [2] and "; 1 before it were left out" in notes[-1]
    saver.save_now()  # the step that was left out can still be had
    assert require_whole(store.root) == [2, 4]


def test_training_is_not_held_by_a_write_that_gets_no_further(saving, monkeypatch) -> None:
    """Before the store's own timeouts have said that it is away."""
    run, store, notes, saver = saving
    monkeypatch.setattr(saver_module, "QUIET_S", 0.3)
    store.away = True
    store.may_fail.clear()
    for _ in range(8):
        step(run, saver)
    assert store.tries == 1 and len(notes) == 1
    assert re.match(r"WARNING: the checkpoint of step 2 has got no further for \d+ s; training goes on", notes[0])
    store.away = False
    store.may_fail.set()
    saver.close()
    assert require_whole(store.root) == [2] and "; 3 before it were left out" in notes[-1]


def test_the_last_checkpoint_is_waited_for_and_the_rank_does_not_look_hung(tmp_path) -> None:
    run, store, notes, alive = make_run(tmp_path, max_steps=2, save_every=2), AwayStore(tmp_path / "c"), [], []
    saver = Saver(run, store, notes.append, lambda: alive.append(time.monotonic()))
    store.away = True
    threading.Timer(1.5, lambda: setattr(store, "away", False)).start()
    for _ in range(2):
        step(run, saver)
    assert require_whole(store.root) == [2] and len(alive) >= 2


def test_a_store_that_stays_away_ends_the_wait_for_the_last_checkpoint_as_such(tmp_path) -> None:
    run = make_run(tmp_path, save_every=2)
    object.__setattr__(run.config.scale, "store_wait_s", 0.5)
    store = AwayStore(tmp_path / "c")
    store.away = True
    saver = Saver(run, store, lambda text: None)
    advance(run)
    with pytest.raises(StoreUnavailable, match=r"longer than --scale.store-wait-s; the checkpoint of step 1 is not"):
        saver.save_now()


def test_an_error_does_not_wait_for_a_store_that_is_away_and_hides_nothing(saving) -> None:
    run, store, _, saver = saving
    store.away = True
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError) as raised, saver:
        for _ in range(2):
            step(run, saver)
        raise ZeroDivisionError
    assert time.monotonic() - begin < 60 and "its store is away" in raised.value.__notes__[0]


def test_what_is_too_old_is_left_for_the_next_time_when_the_store_goes_away_after_the_write(saving) -> None:
    run, store, notes, saver = saving
    store.delete = gone  # type: ignore[method-assign]
    object.__setattr__(run.config.train, "keep_last", 1)
    for _ in range(4):
        step(run, saver)
    saver.close()
    assert require_whole(store.root) == [2, 4] and len(notes) == 2
