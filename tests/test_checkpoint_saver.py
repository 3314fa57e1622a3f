"""Saving in the background: on the disk is the moment that was taken; one write at a time, none lost."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import advance, bits, make, make_run, require_whole

from fvlm.errors import UserError
from fvlm.train import store as store_module
from fvlm.train.loop import Run
from fvlm.train.run_folder import Claim
from fvlm.train.saver import Saver
from fvlm.train.snapshot import Snapshots
from fvlm.train.state import STATE, Contents, load_checkpoint
from fvlm.train.store import LocalStore


class WatchedStore(LocalStore):
    """Writes begin when they are let, and are counted while they last."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.may_begin = threading.Event()
        self.may_begin.set()
        self.at_once = self.most_at_once = self.begun = 0

    def write(self, contents: Contents) -> None:
        self.begun += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.may_begin.wait(20)
        super().write(contents)
        self.at_once -= 1


class Notes(list):
    """Takes lines, from the training thread alone."""

    def __call__(self, text: str) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.append(text)


def step(run: Run, saver: Saver) -> None:
    advance(run)
    saver.after_step(run.step, {})


def test_what_is_on_the_disk_is_the_snapshot_though_everything_changed_right_after(tmp_path):
    run, store, notes = make_run(tmp_path, save_every=3), WatchedStore(tmp_path / "c"), Notes()
    with Saver(run, store, notes) as saver:
        for number in range(2):  # the second uses the first one's memory
            store.may_begin.clear()
            for _ in range(3):
                step(run, saver)
            taken, metrics = bits(run.model, run.optimizer), run.metrics.state_dict()
            for _ in range(2):
                step(run, saver)
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.zero_()
            assert bits(run.model, run.optimizer) != taken and not store.names()[number:]
            store.may_begin.set()
            saver.close()
            other, optimizer = make(9)
            state = load_checkpoint(store.root / store.names()[-1], other, optimizer)
            assert bits(other, optimizer) == taken and state["metrics"] == metrics
            run.restore(store.root / store.names()[-1])
    assert [note.split(" in ")[0] for note in notes] == ["saved step-00000003", "saved step-00000006"]


def test_on_a_slow_disk_one_write_is_in_flight_the_stall_is_counted_and_none_is_lost(tmp_path, monkeypatch):
    real = store_module.write_synced

    def slow(path: Path, pieces: object) -> None:
        time.sleep(0.05)
        real(path, pieces)

    monkeypatch.setattr(store_module, "write_synced", slow)
    run, store, notes = make_run(tmp_path, save_every=2, max_steps=12), WatchedStore(tmp_path / "c"), Notes()
    rows = []
    with Saver(run, store, notes) as saver:
        for _ in range(12):
            step(run, saver)
            rows.append(saver.lap())
    assert store.most_at_once == 1
    assert require_whole(store.root) == [2, 4, 6, 8, 10, 12] and len(notes) == 6
    rows = [row for row in rows if row]
    assert [row["checkpoint/step"] for row in rows] == [2, 4, 6, 8, 12]  # the last step waits for its own, after 10's
    assert all(row["checkpoint/write_s"] >= 0.15 for row in rows)
    # The first found nobody; each of the others waited for the one before, steps take next to nothing.
    assert rows[0]["checkpoint/stall_ms"] < 50 < 100 < min(row["checkpoint/stall_ms"] for row in rows[1:])
    assert f"training was held for {rows[-1]['checkpoint/stall_ms']:.0f} ms" in notes[-1]
    assert saver.lap() == {}


def test_training_goes_on_while_a_checkpoint_is_written_and_its_time_is_no_training_time(tmp_path):
    run, store = make_run(tmp_path, save_every=5), WatchedStore(tmp_path / "c")
    store.may_begin.clear()
    with Saver(run, store, Notes()) as saver:
        for _ in range(9):
            step(run, saver)
        assert store.begun == 1 and store.names() == []
        threading.Timer(0.3, store.may_begin.set).start()
        run.clock.resume()
        step(run, saver)  # has to wait
        run.clock.stepped()
        assert run.clock.trained_s < 0.2
        assert store.begun == 2


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", no_room)


def test_a_full_disk_is_told_by_the_next_step_and_what_was_there_is_untouched(tmp_path, monkeypatch):
    run, store = make_run(tmp_path, save_every=2), LocalStore(tmp_path / "c")
    saver = Saver(run, store, Notes())
    for _ in range(2):
        step(run, saver)
    saver.close()
    with monkeypatch.context() as patch:
        full_disk(patch)
        step(run, saver)
        step(run, saver)
        while not saver._writing.done():
            time.sleep(0.01)
    with pytest.raises(UserError, match=f"{store.root}/step-00000004: no space left on the disk"):
        step(run, saver)
    assert [path.name for path in store.root.iterdir()] == ["step-00000002"] and require_whole(store.root) == [2]
    step(run, saver)  # there is room again
    saver.close()
    assert require_whole(store.root) == [2, 6]


def test_what_the_writer_ran_into_is_raised_on_leaving_but_hides_no_other_error(tmp_path, monkeypatch):
    run, store = make_run(tmp_path, save_every=1), LocalStore(tmp_path / "c")
    full_disk(monkeypatch)
    with pytest.raises(UserError, match="no space left"), Saver(run, store, Notes()) as saver:
        step(run, saver)
    with pytest.raises(ZeroDivisionError) as raised, Saver(run, store, Notes()) as saver:
        step(run, saver)
        raise ZeroDivisionError
    assert "no space left" in raised.value.__notes__[0]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "c").write_text("a file where the folder should be")
    run = make_run(tmp_path)
    advance(run)
    with pytest.raises(UserError, match=f"{tmp_path}/c/step-00000001: the checkpoint could not be written"):
        run.save(tmp_path / "c")


def test_the_last_step_is_safe_when_it_returns(tmp_path):
    run, store = make_run(tmp_path, save_every=100, max_steps=3), LocalStore(tmp_path / "c")
    saver = Saver(run, store, Notes())
    for _ in range(3):
        step(run, saver)
    assert require_whole(store.root) == [3] and saver.lap()["checkpoint/step"] == 3


def test_a_requested_stop_saves_that_very_step_once_and_a_later_start_goes_on_from_it(tmp_path):
    run, store = make_run(tmp_path, save_every=4, keep_last=2), WatchedStore(tmp_path / "c")
    with Saver(run, store, Notes()) as saver:
        for _ in range(6):
            step(run, saver)
        saver.save_now()
        saver.save_now()
        assert require_whole(store.root) == [4, 6] and store.begun == 2
        for _ in range(2):
            step(run, saver)
        saver.save_now()  # the step was saved a moment ago
        assert require_whole(store.root) == [6, 8] and store.begun == 3
    other = make_run(tmp_path, seed=9, save_every=4, keep_last=2)
    other.restore(store.root / "step-00000008")
    with Saver(other, store, Notes()) as saver:
        saver.save_now()  # stopped before the first step: it is there
        assert store.begun == 3
        for _ in range(4):
            step(other, saver)
    assert require_whole(store.root) == [8, 12]
    assert json.loads((store.root / "step-00000012" / STATE).read_text())["step"] == 12


def test_snapshots_reuse_their_memory(tmp_path):
    run = make_run(tmp_path)
    advance(run)
    snapshots = Snapshots(run.model, run.optimizer)
    assert snapshots.reserve() and not snapshots.reserve()
    first = snapshots.take(1, dict).contents()
    places = {name: tensor.data_ptr() for name, tensor in (first.model | first.optimizer).items() if "rng" not in name}
    advance(run)
    second = snapshots.take(2, dict).contents()
    again = {name: tensor.data_ptr() for name, tensor in (second.model | second.optimizer).items() if "rng" not in name}
    assert places == again
    assert all(torch.equal(second.model[name], p) for name, p in run.model.named_parameters())
    # A moment that came later finds its place.
    fewer = Snapshots(*make(3))
    fewer.reserve()
    assert not fewer._fit_buffers({"one": torch.ones(3)}) and list(fewer._buffers) == ["one"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_snapshot_is_of_its_moment_though_steps_are_queued_behind_it(tmp_path):
    net = torch.nn.Linear(4096, 4096, device="cuda")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    snapshots = Snapshots(net, optimizer)

    def train_step() -> None:
        net(torch.ones(64, 4096, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    train_step()
    for number in range(3):
        for _ in range(50):
            train_step()  # the host runs ahead
        taken = snapshots.take(number, dict)
        wanted = [p.detach().clone() for p in net.parameters()]  # queued before the next step
        wanted += [optimizer.state[p]["exp_avg"].clone() for p in net.parameters()]
        for _ in range(5):
            train_step()
        contents = taken.contents()
        got = [contents.model[n] for n, _ in net.named_parameters()]
        got += [contents.optimizer[f"exp_avg/{n}"] for n, _ in net.named_parameters()]
        assert all(tensor.is_pinned() for tensor in got)
        assert all(torch.equal(mine, theirs.cpu()) for mine, theirs in zip(got, wanted, strict=True))


def test_a_rank_0_whose_run_was_taken_over_writes_and_deletes_nothing_any_more(tmp_path):
    run = make_run(tmp_path, save_every=1)
    run.config.run_dir.mkdir(parents=True, exist_ok=True)
    store = LocalStore(tmp_path / "c", Claim(run.config.run_dir).require)
    with Saver(run, store, Notes()) as saver:
        step(run, saver)
        saver.close()
        Claim(run.config.run_dir)
        step(run, saver)
        with pytest.raises(RuntimeError, match="another process has taken this run over"):
            saver.close()
    assert store.names() == ["step-00000001"]
    with pytest.raises(RuntimeError, match="taken this run over"):
        store.delete("step-00000001")
    assert require_whole(store.root) == [1]
