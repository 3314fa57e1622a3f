"""The list of what was trained on: each clip of each step once, whatever was killed, on however many ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import CLIPS, batches, clip_id, make_config, make_run

from fvlm.train.logger import Logger
from fvlm.train.loop import train
from fvlm.train.samples import SAMPLES, Samples, read_samples
from fvlm.train.skipped import SKIPPED

KILLED_AT, SAVED, STEPS, BROKEN = 7, 4, 9, 5


def trained(first: int, last: int) -> dict[int, list[str]]:
    return {step: [clip_id(step, clip) for clip in range(CLIPS)] for step in range(first, last + 1)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two ranks that trained to step 7; in step 5 the second had a broken clip."""
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(__file__).with_name("samples_rank.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder), *map(str, (rank, 2, 1, KILLED_AT, BROKEN))],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=120)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return folder


def test_two_ranks_list_every_clip_once_in_the_order_of_the_global_batch(two_ranks):
    assert read_samples(two_ranks / "run") == trained(1, KILLED_AT)


def test_a_clip_that_is_broken_on_one_rank_skips_the_step_on_all_and_lists_the_clips_of_all(two_ranks):
    assert (two_ranks / "bits-0").read_bytes() == (two_ranks / "bits-1").read_bytes()
    (line,) = (two_ranks / "run" / SKIPPED).read_text().splitlines()
    listed = json.loads(line)
    assert (listed["step"], listed["clips"]) == (BROKEN, trained(BROKEN, BROKEN)[BROKEN])


def test_steps_after_the_checkpoint_are_dropped_also_of_ranks_that_are_gone_and_not_doubled(two_ranks):
    """Killed after step 7, saved at step 4; one rank goes on, after a start that listed nothing."""
    config = make_config(two_ranks, samples=True, max_steps=STEPS, log_every=2)
    with (config.run_dir / SAMPLES / "rank-00001.jsonl").open("a") as file:
        file.write('{"step": 8, "ra')
    Samples(make_config(two_ranks), SAVED, rank=0, world=1)
    assert read_samples(config.run_dir) == trained(1, SAVED)
    run, samples = make_run(config, SAVED), Samples(config, SAVED, rank=0, world=1)
    train(run, samples.of(batches(SAVED + 1)), [Logger(run, [], samples)])
    assert read_samples(config.run_dir) == trained(1, STEPS)


def test_nothing_is_listed_unless_asked_for_and_no_clip_is_held_on_to(tmp_path):
    config = make_config(tmp_path, max_steps=5, log_every=2)
    run, samples = make_run(config), Samples(config, 0, rank=0, world=1)
    train(run, samples.of(batches(1)), [Logger(run, [], samples)])
    assert not (config.run_dir / SAMPLES).exists() and read_samples(config.run_dir) == {}
    assert samples._clips == {}  # max_steps is drained as well


def write(folder: Path, rank: int, shares: list[tuple[int, int]]) -> None:
    (folder / SAMPLES).mkdir(exist_ok=True)
    rows = [{"step": step, "rank": rank, "world": world, "clips": [f"{step}/{rank}"]} for step, world in shares]
    (folder / SAMPLES / f"rank-{rank:05d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        ([(1, 2), (2, 2)], [(1, 2)], "step 2 of rank 1 is lost"),
        ([(1, 2), (2, 2), (2, 2)], [(1, 2), (2, 2)], "step 2 of rank 0 is there 2 times"),
        ([(1, 2), (3, 2)], [(1, 2), (3, 2)], "step 2 is lost"),
        ([(1, 2), (2, 1)], [(1, 2), (2, 2)], "step 2 is there with 1 and with 2 ranks"),
        ([(1, 1), (2, 1)], [(3, 2)], "step 3 of rank 0 is lost"),
        ([(s, 2) for s in range(1, 20)], [(1, 2), (19, 2)], "and 7 more"),
    ],
)
def test_what_is_lost_or_doubled_is_named(tmp_path, first, second, fault):
    write(tmp_path, 0, first)
    write(tmp_path, 1, second)
    with pytest.raises(ValueError, match=fault):
        read_samples(tmp_path)


def test_a_list_may_change_its_number_of_ranks_and_begin_late(tmp_path):
    write(tmp_path, 0, [(4, 1), (5, 2), (6, 2)])
    write(tmp_path, 1, [(5, 2), (6, 2)])
    assert read_samples(tmp_path) == {4: ["4/0"], 5: ["5/0", "5/1"], 6: ["6/0", "6/1"]}
