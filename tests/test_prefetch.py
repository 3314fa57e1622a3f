"""Batches made ahead in a thread: their order, how many there are, what counts, and what becomes of errors."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fvlm.batch import Batch
from fvlm.data.corrupt import CorruptClip, Place
from fvlm.errors import UserError
from fvlm.train import prefetch as prefetch_module
from fvlm.train.device import StepsAhead
from fvlm.train.prefetch import Prefetch
from ray_jobs.feed import Feed, begun

SETTLED_S = 0.05


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_items_come_in_order_and_the_next_one_is_made_while_one_is_used_and_no_other():
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    with Prefetch(items()) as ahead:
        for number in range(6):
            wait_for(lambda number=number: len(made) == number + 1)
            time.sleep(SETTLED_S)
            assert len(made) == number + 1
            assert next(ahead) == number
        assert list(ahead) == []


@pytest.mark.parametrize("error", [UserError("a flipped byte"), KeyboardInterrupt(), ValueError("odd")])
def test_an_error_is_raised_where_its_item_would_have_come(error):
    def items() -> Iterator[int]:
        yield from range(3)
        raise error

    with Prefetch(items()) as ahead:
        got = [next(ahead) for _ in range(3)]
        with pytest.raises(type(error)) as raised:
            next(ahead)
        assert got == [0, 1, 2] and raised.value is error
        assert next(ahead, "nothing") == "nothing"


def test_a_thread_that_waits_for_the_consumer_ends_and_one_that_waits_for_data_holds_nobody(monkeypatch):
    idle = Prefetch(iter(range(9)))
    assert next(idle) == 0
    idle.close()
    assert not idle._thread.is_alive() and next(idle, None) is None
    monkeypatch.setattr(prefetch_module, "JOIN_S", 0.1)
    never = threading.Event()

    def stuck() -> Iterator[int]:
        never.wait()
        yield 1

    waiting = Prefetch(stuck())
    begin = time.monotonic()
    waiting.close()
    assert time.monotonic() - begin < 5 and waiting._thread.is_alive() and waiting._thread.daemon
    never.set()
    waiting._thread.join(10)
    assert not waiting._thread.is_alive()


# ---- the feed's batches


class Block(dict):
    """A raw batch that can be seen to go."""


def raw_batches(count: int, alive: weakref.WeakValueDictionary[int, Block] | None = None) -> Iterator[Any]:
    """Of two clips each. In batch 1 and 3 another clip stood in for a damaged one."""
    for number in range(count):
        yield raw_batch(number, {} if alive is None else alive)


def raw_batch(number: int, alive: Any) -> Block:
    replaced = CorruptClip(0, 0, number, "shard", "clip", f"damaged {number}", "other", Place(0, 0, 0)).to_json()
    alive[number] = block = Block(
        clip_id=np.array([f"{number}/0", f"{number}/1"]),
        decode_s=np.array([0.5, 0.5]),
        read_s=np.array([0.25, 0.25]),
        events=np.array(['{"retries": 1}', ""]),
        replaced=np.array([replaced if number % 2 else "", ""]),
    )
    return block


class Collate:
    """Cuts one caption in every batch."""

    captions_cut = 0

    def __call__(self, raw: Any) -> Batch:
        self.captions_cut += 1
        zeros = torch.zeros(2, 1, dtype=torch.int64)
        frames, latents = torch.zeros(2, 1, 2, 2, 3, dtype=torch.uint8), torch.zeros(2, 1, 4, 1, 1).half()
        return Batch(frames, latents, zeros, zeros, tuple(map(str, raw["clip_id"])))


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Stand-ins for what a machine without a GPU lacks. -> clips of the batches that were pinned."""
    found: list[tuple[str, ...]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Batch, "pin_memory", lambda self: found.append(self.clip_ids) or self)
    return found


def make_feed(raw: Iterator[Any]) -> tuple[Feed, list[str]]:
    told: list[str] = []
    return Feed(raw, SimpleNamespace(), 0, lambda clips: told.extend(clip.error for clip in clips)), told  # type: ignore


def test_a_batch_counts_when_it_is_handed_on_and_one_that_is_never_asked_for_does_not(pinned):
    feed, told = make_feed(raw_batches(9))
    batches = feed.batches(Collate(), torch.device("cuda"))  # type: ignore[arg-type]
    for number in range(3):
        assert next(batches).clip_ids == (f"{number}/0", f"{number}/1")
        wait_for(lambda number=number: len(pinned) == number + 2)  # the next one is there
        assert feed._clips == 2 * (number + 1) and feed.captions_cut == number + 1
        assert told == ["damaged 1"][:number] and feed.replaced == len(told)
    batches.close()
    assert len(pinned) == 4 and feed.events == {"retries": 3} and feed._decode_s == 3 and feed._read_s == 1.5
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_too_many_damaged_clips_end_the_run_at_the_batch_that_has_them(pinned):
    def refuse(clips: list[CorruptClip]) -> None:
        raise UserError("too many")

    feed = Feed(raw_batches(9), SimpleNamespace(), 0, refuse)  # type: ignore[arg-type]
    batches = feed.batches(Collate(), torch.device("cuda"))  # type: ignore[arg-type]
    next(batches)
    with pytest.raises(UserError, match="too many"):
        next(batches)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_of_the_object_stores_blocks_none_is_held_that_was_handed_on(pinned, device):
    """On a CPU a batch is a view of its block; here it is not, so that what else holds one shows: the first, until the
    second is asked for. For a GPU none is held, not even that of the batch which was made ahead."""
    alive: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()
    feed, _ = make_feed(begun(raw_batches(9, alive)))  # type: ignore[arg-type]
    batches = feed.batches(Collate(), torch.device(device))  # type: ignore[arg-type]
    for number in range(5):
        next(batches)
        wait_for(lambda number=number: device == "cpu" or len(pinned) == number + 2)
        time.sleep(SETTLED_S)
        gc.collect()
        assert [block for block in alive if device == "cuda" or block < number] == []
    batches.close()


def test_the_cpu_has_no_thread_and_the_ingest_is_asked_no_earlier():
    asked = 0

    def counted() -> Iterator[Any]:
        nonlocal asked
        for raw in raw_batches(9):
            asked += 1
            yield raw

    feed, _ = make_feed(counted())
    batches = feed.batches(Collate(), torch.device("cpu"))  # type: ignore[arg-type]
    next(batches)
    time.sleep(SETTLED_S)
    assert asked == 1


def test_the_host_stays_two_steps_ahead_of_a_gpu(monkeypatch):
    class Event:
        made: ClassVar[list[Any]] = []

        def __init__(self, blocking: bool):
            self.waited = False
            self.made.append(self)

        def record(self) -> None: ...

        def synchronize(self) -> None:
            self.waited = True

        def query(self) -> bool:
            return self.waited

    monkeypatch.setattr(torch.cuda, "Event", Event)
    ahead = StepsAhead(torch.device("cuda"))
    assert not ahead.is_busy()
    for step in range(1, 8):
        ahead.stepped()
        assert [event.waited for event in Event.made] == [number <= step - 2 for number in range(1, step + 1)]
        assert ahead.is_busy()
    Event.made[-1].waited = True
    assert not ahead.is_busy()
    on_cpu = StepsAhead(torch.device("cpu"))
    on_cpu.stepped()
    assert not on_cpu.is_busy() and len(Event.made) == 7
