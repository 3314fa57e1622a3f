"""A rank that hangs: real processes that do, in a collective, in a sleep, with the interpreter's lock held."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hang_rank import HANG_S

from fvlm.config import Config, ScaleConfig, validate
from fvlm.errors import UserError
from fvlm.train.hang import HEAD_BYTES, LONG, STACKS, HangWatch, collect_stacks

PATIENCE_S = 240
RANKS = {"collective": 2, "interpreter": 1, "slow": 1, "first": 1, "long": 1, "error": 1,
         "asleep": 1, "watcher killed": 1, "start": 2, "slow store": 1, "dead store": 1, "slow saves": 2}  # fmt: skip


@dataclass
class Ended:
    codes: list[int]
    seconds: float
    """From the last step on, of the rank that ended last."""
    output: str
    files: list[str]
    stacks: list[str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """All of them at the same time: they mostly sleep."""
    folders = {how: tmp_path_factory.mktemp(how) for how in RANKS}
    script = str(Path(__file__).with_name("hang_rank.py"))
    started = {
        how: [
            subprocess.Popen(
                [sys.executable, script, how, str(folders[how]), str(rank), str(world)],
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]
        for how, world in RANKS.items()
    }  # fmt: skip
    result, open_ones = {}, dict(started)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while open_ones and time.monotonic() < deadline:
            for how, processes in list(open_ones.items()):
                if all(process.poll() is not None for process in processes):
                    result[how] = _ended(folders[how], processes)
                    del open_ones[how]
            time.sleep(0.02)
        assert not open_ones, f"these did not end within {PATIENCE_S} s: {sorted(open_ones)}"
        yield result
    finally:
        for process in (process for processes in started.values() for process in processes):
            process.kill()
            process.wait()


def _ended(folder: Path, processes: list[subprocess.Popen[str]]) -> Ended:
    now, stacks = time.time(), folder / "run" / STACKS
    began = [path.stat().st_mtime for path in folder.glob("began-*")]
    files = sorted(path.name for path in stacks.iterdir())
    output = "".join(process.communicate()[0] for process in processes)
    codes = [process.returncode for process in processes]
    return Ended(codes, now - max(began, default=now), output, files, collect_stacks(folder / "run"))


def test_two_ranks_of_which_one_never_comes_to_a_collective_both_say_where_they_stand_and_end(ended):
    both = ended["collective"]
    assert all(code != 0 for code in both.codes) and "ended" not in both.output
    assert HANG_S < both.seconds < 2 * HANG_S
    waiting, missing = both.stacks  # in the order of ranks
    assert "in all_reduce" in waiting and "in wait_for_the_others" in waiting
    assert "in sit_in_a_driver" in missing and "all_reduce" not in missing
    for rank, text in enumerate(both.stacks):
        head = text.splitlines()[0]
        assert f"rank {rank} of 2 on " in head and "process " in head and "since step 18, 20" in head
        assert f"no step for {HANG_S:g} s" in head


def test_a_process_that_holds_the_interpreter_for_ever_says_so_and_ends(ended):
    held = ended["interpreter"]
    assert held.codes == [-signal.SIGKILL] and HANG_S < held.seconds < 2 * HANG_S
    (text,) = held.stacks
    assert "in hold_the_interpreter" in text and "since step 18" in text


def test_a_watcher_that_was_killed_is_replaced(ended):
    assert ended["watcher killed"].codes == [-signal.SIGKILL]
    (text,) = ended["watcher killed"].stacks
    assert "in sit_in_a_driver" in text and "since step 19" in text


def test_a_machine_that_slept_longer_than_a_hang_may_take_has_not_hung(ended):
    asleep = ended["asleep"]
    assert asleep.codes == [0] and asleep.files == asleep.stacks == [], asleep
    assert asleep.seconds > 2 * LONG * HANG_S


@pytest.mark.parametrize("how", ["slow", "first", "long"])
def test_a_slow_step_the_first_one_and_what_may_take_long_are_no_hang_and_leave_nothing(ended, how):
    assert ended[how].codes == [0] and "ended" in ended[how].output, ended[how].output
    assert ended[how].files == ended[how].stacks == []


def test_a_rank_that_never_comes_to_the_start_is_seen_by_the_one_that_waits_for_it(ended):
    start = ended["start"]
    assert start.codes == [-signal.SIGKILL, 7]
    assert LONG * HANG_S < start.seconds < 2 * LONG * HANG_S + 2 * HANG_S  # until the other one ended, too
    (text,) = start.stacks
    assert "in make_run" in text and "broadcast" in text and f"no step for {LONG * HANG_S:g} s since step 0" in text


def test_a_final_checkpoint_may_take_longer_than_a_hang_while_it_gets_further(ended):
    slow = ended["slow store"]
    assert slow.codes == [0] and "ended" in slow.output, slow.output
    assert slow.files == slow.stacks == []
    assert slow.seconds > LONG * HANG_S


def test_slow_checkpoints_are_a_hang_on_no_rank_while_they_get_further_in_mid_run_and_at_the_end(ended):
    slow = ended["slow saves"]
    assert slow.codes == [0, 0] and slow.output.count("ended") == 2, slow.output
    assert slow.files == slow.stacks == []
    assert slow.seconds > 2 * LONG * HANG_S
    assert slow.output.count("saved step-") == 3


def test_a_store_that_takes_nothing_any_more_is_a_hang(ended):
    dead = ended["dead store"]
    assert dead.codes == [-signal.SIGKILL] and LONG * HANG_S < dead.seconds < 2 * LONG * HANG_S
    (text,) = dead.stacks
    assert "in _wait_for" in text and "since step 1" in text


def test_an_end_by_another_error_leaves_nothing(ended):
    assert ended["error"].codes == [3]
    assert ended["error"].files == []


def make_config(folder: Path, hang_s: float) -> Config:
    return Config(runs_dir=str(folder), run="run", scale=ScaleConfig(hang_s=hang_s))


def test_stacks_are_collected_once_and_what_living_or_killed_ranks_have_open_is_not_taken_for_them(tmp_path):
    config = make_config(tmp_path, 1000)
    stacks = config.run_dir / STACKS
    stacks.mkdir(parents=True)
    for rank, text in ((0, b""), (3, b""), (1, b"Thread 0x1:\n  File x.py, line 3 in f\n"), (2, b"Thread 0x2:\n")):
        (stacks / f"rank-{rank:05d}-1-7.txt").write_bytes(f"rank {rank}".encode().ljust(HEAD_BYTES) + text)
    with HangWatch(config, 0, 1, 3) as living:  # the new rank 1 must neither take nor spoil what the old one left
        assert collect_stacks(config.run_dir) == [
            "hung: rank 1\nThread 0x1:\n  File x.py, line 3 in f",
            "hung: rank 2\nThread 0x2:",
        ]
        assert collect_stacks(config.run_dir) == []
        assert living._path.exists()
        with HangWatch(config, 0, 0, 3):  # killed ranks left empty ones, of which rank 3 is no more
            assert sorted(path.name[:10] for path in stacks.iterdir()) == ["rank-00000", "rank-00001"]
    assert list(stacks.iterdir()) == []
    assert collect_stacks(tmp_path / "never") == []


def test_without_a_limit_there_is_no_watch(tmp_path):
    config = make_config(tmp_path, 0)
    with HangWatch(config, 0, 0, 1) as watch:
        watch.after_step(1, {})
        with watch.long():
            pass
    assert not (config.run_dir / STACKS).exists()


def test_a_negative_limit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--scale.hang-s is -1; it must not be negative"):
        validate(make_config(tmp_path, -1))


def test_watching_costs_a_step_less_than_a_fifth_of_a_millisecond_of_its_thread(tmp_path):
    seconds = []
    with HangWatch(make_config(tmp_path, 1000), 0, 0, 1) as watch:
        for step in range(300):
            began = time.thread_time()  # a busy machine does not change it
            watch.after_step(step, {})
            seconds.append(time.thread_time() - began)
    assert statistics.median(seconds) < 0.2e-3
