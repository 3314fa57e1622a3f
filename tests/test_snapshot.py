"""How a GPU's state is copied: what waits for what, from where, and how long that held the training."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from runs import advance, bits, make, make_run, require_whole

from fvlm.errors import UserError
from fvlm.train import side_stream as side_stream_module
from fvlm.train import snapshot as snapshot_module
from fvlm.train.metrics import Row
from fvlm.train.saver import Saver
from fvlm.train.side_stream import ALIGNMENT, PAGE, Block, has_room
from fvlm.train.snapshot import Snapshots
from fvlm.train.state import load_checkpoint
from fvlm.train.store import LocalStore

HOLD_MS = 7.0


class LateStream:
    """A side stream that does its work as late as it may: when somebody waits for it."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.done = 0
        self.lock = threading.Lock()
        self.known = True

    def run(self, work: Callable[[], None]) -> LateMark:
        self.waiting.append(work)
        return LateMark(self, self.done + len(self.waiting))

    after = run

    def hold(self, mark: LateMark) -> LateHold:
        mark.synchronize()
        return LateHold(self)


class LateMark:
    def __init__(self, stream: LateStream, number: int):
        self._stream, self._number = stream, number

    def synchronize(self) -> None:
        with self._stream.lock:  # of the thread that trains, and the one that writes
            while self._stream.done < self._number:
                self._stream.waiting.pop(0)()
                self._stream.done += 1


class LateHold:
    def __init__(self, stream: LateStream):
        self._stream = stream

    def ms(self, wait: bool) -> float | None:
        return HOLD_MS if wait or self._stream.known else None


def late_snapshots(snapshots: Snapshots) -> LateStream:
    stream = LateStream()
    snapshots._stream = stream
    return stream


@pytest.mark.parametrize("staged", [False, True])
def test_a_snapshot_is_of_its_moment_and_the_next_step_waits_for_no_more_than_it_must(tmp_path, monkeypatch, staged):
    monkeypatch.setattr(snapshot_module, "has_room", lambda *_: staged)
    run = make_run(tmp_path)
    advance(run)
    snapshots = Snapshots(run.model, run.optimizer)
    stream = late_snapshots(snapshots)
    snapshots.reserve()
    assert (snapshots._staging is not None) == staged
    for number in range(3):
        advance(run, 2)
        taken = bits(run.model, run.optimizer)
        snapshot = snapshots.take(run.step, dict)
        assert stream.waiting  # nothing of it has held anybody
        advance(run)  # the optimizer waits, as late as it can
        # Staged: the copy to the host goes on; otherwise the step had to wait for all of it.
        assert len(stream.waiting) == (1 if staged else 0)
        advance(run, 3)
        assert len(stream.waiting) == (1 if staged else 0) and len(snapshot.holds) == 1
        contents = snapshot.contents()
        assert stream.waiting == []
        LocalStore(tmp_path / "c").write(contents)
        other, optimizer = make(9)
        load_checkpoint(tmp_path / "c" / contents.name, other, optimizer)
        found = bits(other, optimizer)
        assert {name: found[name] for name in found if name != "generator"} == {
            name: taken[name] for name in taken if name != "generator"
        }, number


def test_a_snapshot_that_follows_at_once_does_not_overwrite_what_still_leaves_the_staging(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot_module, "has_room", lambda *_: True)
    run = make_run(tmp_path)
    advance(run)
    snapshots = Snapshots(run.model, run.optimizer)
    stream = late_snapshots(snapshots)
    first = snapshots.take(1, dict)
    host = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    advance(run)
    snapshots.take(2, dict)
    advance(run)  # waits for the second's staging, which comes after the first has left
    assert stream.done == 3
    assert all(torch.equal(first._model[name], host[name]) for name in host)


def test_a_held_gpu_counts_as_held_training_once_it_is_known(tmp_path):
    run, notes, rows = make_run(tmp_path, save_every=2), [], []
    with Saver(run, LocalStore(tmp_path / "c"), notes.append) as saver:
        stream = late_snapshots(saver._snapshots)
        for _ in range(2):
            advance(run)
            saver.after_step(run.step, {})
        stream.known = False
        advance(run)
        saver._writing.future.result(20)
        saver.after_step(run.step, {})
        assert notes == [] and saver.lap() == {}  # it is safe, but the GPU has not come to the end of the wait
        stream.known = True
        saver._collect(wait=False)
        rows.append(saver.lap())
    assert require_whole(tmp_path / "c") == [2]
    assert rows[0]["checkpoint/stall_ms"] >= HOLD_MS and len(notes) == 1
    assert f"held for {rows[0]['checkpoint/stall_ms']:.0f} ms" in notes[0]


def test_a_checkpoint_of_the_last_step_holds_no_step(tmp_path):
    run, rows = make_run(tmp_path, max_steps=2), []
    with Saver(run, LocalStore(tmp_path / "c"), lambda text: None) as saver:
        late_snapshots(saver._snapshots)
        for _ in range(2):
            advance(run)
            saver.after_step(run.step, {})
        rows.append(saver.lap())
    assert rows[0]["checkpoint/step"] == 2 and "checkpoint/hold_ms" not in rows[0]


def test_the_writers_thread_uses_the_gpu_that_trains(tmp_path, monkeypatch):
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    run = make_run(tmp_path, save_every=1)
    with Saver(run, LocalStore(tmp_path / "c"), lambda text: None) as saver:
        saver._device = torch.device("cuda", 1)
        advance(run)
        saver.after_step(1, {})
        saver.close()
        assert saver.lap()["checkpoint/hold_ms"] == 0.0
    assert used == [torch.device("cuda", 1)]


# ---- memory


class Cudart:
    """What torch gives of CUDA's runtime: what was locked and let go; `code` is what it answers."""

    def __init__(self, code: int = 0):
        self.code, self.locked, self.freed = code, [], []

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:
        self.locked.append((place, size, flags))
        return self.code

    def cudaHostUnregister(self, place: int) -> int:
        self.freed.append(place)
        return 0


def test_locked_memory_begins_at_a_page_is_as_large_as_it_must_be_and_is_let_go_in_time(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    like = {"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.int64), "c": torch.ones(70_000)}
    block = Block(like, pinned=True)
    ((place, size, flags),) = cudart.locked
    assert place % PAGE == 0 and flags == 1
    wanted = sum(tensor.nbytes for tensor in like.values())
    assert wanted <= size < wanted + len(like) * ALIGNMENT
    assert [(name, t.shape, t.dtype) for name, t in block.tensors.items()] == [
        (name, t.shape, t.dtype) for name, t in like.items()
    ]
    for name, tensor in block.tensors.items():
        assert place <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= place + size
        assert tensor.data_ptr() % ALIGNMENT == 0
        tensor.copy_(like[name])
    assert all(torch.equal(block.tensors[name], like[name]) for name in like)  # none lies upon another
    assert cudart.freed == []
    del block, tensor
    gc.collect()
    assert cudart.freed == [place]


def test_memory_that_cannot_be_locked_is_an_error_with_its_size(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(code=2))
    with pytest.raises(UserError, match=r"0\.1 GB of page-locked memory.*error 2"):
        Block({"a": torch.ones(25_000_000)}, pinned=True)


@pytest.mark.parametrize(
    ("free", "reserved", "peak", "size", "fits"),
    [
        (60, 20, 20, 49, True), (60, 20, 20, 50, False),  # a tenth of 100 stays free
        (30, 60, 30, 49, True),  # what torch keeps and no step has needed counts
        (30, 60, 60, 25, False), (30, 50, 60, 25, False),
    ],
)  # fmt: skip
def test_a_gpu_has_room_where_a_tenth_stays_free_beside_a_steps_peak(monkeypatch, free, reserved, peak, size, fits):
    fake = SimpleNamespace(
        mem_get_info=lambda device: (free, 100),
        memory_reserved=lambda device: reserved,
        max_memory_allocated=lambda device: peak,
    )
    monkeypatch.setattr(side_stream_module.torch, "cuda", fake)
    assert has_room(torch.device("cuda"), size) == fits
    assert not has_room(torch.device("cpu"), size)
    # A recorded step keeps what it left free.
    assert has_room(torch.device("cuda"), size, is_recorded=True) == (free - size > 10)


# ---- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("staged", [False, True])
def test_a_gpus_snapshot_is_of_its_moment_though_steps_are_queued_behind_it(monkeypatch, staged):
    monkeypatch.setattr(snapshot_module, "has_room", lambda *_: staged)
    net = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, device="cuda") for _ in range(4)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    snapshots = Snapshots(net, optimizer)

    def train_step() -> None:
        net(torch.ones(64, 4096, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    train_step()
    assert snapshots.reserve() and ("staged" in snapshots.describe()) == staged
    for number in range(3):
        for _ in range(20):
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
        assert taken.held_ms(wait=True) is not None


@needs_gpu
def test_with_staging_a_gpu_is_held_for_a_fraction_of_what_it_is_without(monkeypatch):
    held = {}
    for staged in (False, True):
        monkeypatch.setattr(snapshot_module, "has_room", lambda device, size, staged=staged: staged)
        net = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096, device="cuda") for _ in range(8)))  # 1.6 GB in all
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        snapshots, ms = Snapshots(net, optimizer), []
        for number in range(6):
            net(torch.ones(64, 4096, device="cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number:
                snapshot = snapshots.take(number, dict)
                snapshot.contents() if number == 1 else None
                net(torch.ones(64, 4096, device="cuda")).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                snapshot.contents()
                time.sleep(0.01)
                ms.append(snapshot.held_ms(wait=True))
        held[staged] = sorted(ms)[len(ms) // 2]
    assert held[True] < held[False] / 4, held


def test_rows_of_a_run_on_a_cpu_have_no_gpu_in_them(tmp_path):
    run, rows = make_run(tmp_path, save_every=1), list[Row]()
    with Saver(run, LocalStore(tmp_path / "c"), lambda text: None) as saver:
        advance(run)
        saver.after_step(1, {})
        saver.close()
        rows.append(saver.lap())
    assert set(rows[0]) == {"checkpoint/step", "checkpoint/stall_ms", "checkpoint/write_s"}
