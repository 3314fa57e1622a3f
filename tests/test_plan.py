"""The plan alone: which clips make up which step, as arithmetic. `test_order.py` proves the same through Ray Data."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fvlm.data.plan import Plan

PLAN_SCALE = Path(__file__).parent / "benchmarks" / "ingest" / "plan_scale.py"
SHAPES = [
    # rows of the shards, rows of a full row group, global batch, lanes, window steps
    ([8, 16], 4, 4, 4, 4),  # nothing is short
    ([9, 5, 12, 1], 4, 4, 2, 3),
    ([35, 23, 2, 16, 21, 7], 16, 8, 4, 5),
    ([1] * 50, 4, 16, 8, 100),  # everything is short
    ([3] * 11, 8, 4, 4, 2),
    ([64], 16, 12, 4, 1),  # one shard
    ([15], 16, 2, 1, 4),  # one row group, which is short
    ([45, 0, 9, 8, 7, 6, 5, 4, 3, 2, 1], 10, 45, 1, 16),
]


def make_plan(rows, rows_per_group=4, global_batch=4, lanes=4, window_steps=4, seed=0, dataset="", origin=0) -> Plan:
    return Plan(np.array(rows), rows_per_group, seed, global_batch, lanes, window_steps, dataset, origin)


def chi_square(counts: list[int]) -> float:
    """How far the counts are from equal, in standard deviations of chance."""
    expected, freedom = sum(counts) / len(counts), len(counts) - 1
    return (sum((count - expected) ** 2 for count in counts) / expected - freedom) / math.sqrt(2 * freedom)


Clip = tuple[int, int, int]
"""Shard, row group, row."""


def steps(plan: Plan, start: int, stop: int, rank: int = 0, world: int = 1) -> list[list[Clip]]:
    """For every step of [start, stop) the clips of one rank, in order."""
    out = []
    for lo, hi in plan.windows(start, stop):
        places = plan.rows(lo, hi, rank, world)
        assert all(array.shape == (hi - lo, plan.global_batch // world) for array in places)
        out += [list(map(tuple, step)) for step in np.stack(places, axis=-1).tolist()]
    return out


def epoch_of(plan: Plan, epoch: int) -> list[list[Clip]]:
    return steps(plan, epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)


def all_clips(rows: list[int], rows_per_group: int) -> set[Clip]:
    return {(shard, row // rows_per_group, row % rows_per_group) for shard, n in enumerate(rows) for row in range(n)}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_shows_every_clip_once_but_for_a_counted_remainder_below_one_batch(shape):
    rows, rows_per_group, global_batch, *_ = shape
    plan, clips = make_plan(*shape), all_clips(rows, rows_per_group)
    for epoch in range(3):
        seen = list(itertools.chain(*epoch_of(plan, epoch)))
        assert len(seen) == len(set(seen))
        assert set(seen) <= clips
        assert len(clips - set(seen)) == plan.remainder == sum(rows) % global_batch


@pytest.mark.parametrize("rows", [[8, 7], [15], [3] * 5], ids=["short-and-full", "one-shard", "only-short"])
def test_what_one_epoch_leaves_out_others_show_and_every_clip_is_left_out_as_often(rows):
    """Full row groups and short ones alike, though they lie apart in the stream."""
    plan = make_plan(rows, 4, 4, 4, 2)
    assert plan.remainder == 3
    clips = all_clips(rows, 4)
    epochs = 3_000
    left_out = [clips - set(itertools.chain(*epoch_of(plan, epoch))) for epoch in range(epochs)]
    assert not set.intersection(*left_out[:12])
    times = Counter(itertools.chain(*left_out))
    share = 3 / 15
    assert all(abs(times[clip] / epochs - share) < 6 * math.sqrt(share * (1 - share) / epochs) for clip in clips)


@pytest.mark.parametrize("shape", SHAPES)
def test_epochs_and_seeds_have_orders_of_their_own(shape):
    orders = [epoch_of(make_plan(*shape, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_count_makes_the_same_global_batches_and_no_two_ranks_read_the_same_clip(shape):
    plan = make_plan(*shape)
    stop = 2 * plan.steps_per_epoch
    alone = steps(plan, 0, stop)
    for world in (n for n in (2, 4, 8) if plan.lanes % n == 0):
        ranks = [steps(plan, 0, stop, rank, world) for rank in range(world)]
        assert [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)] == alone
        for a, b in itertools.combinations(ranks, 2):
            first_epoch = [set(itertools.chain(*rank[: plan.steps_per_epoch])) for rank in (a, b)]
            assert first_epoch[0].isdisjoint(first_epoch[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_resuming_after_any_step_gives_exactly_the_rest(shape):
    plan = make_plan(*shape)
    stop = 3 * plan.steps_per_epoch
    whole = steps(plan, 0, stop)
    for k in range(stop + 1):
        assert steps(plan, k, stop) == whole[k:]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_taken_over_at_some_step_has_a_plan_that_begins_there(shape):
    plan, later = make_plan(*shape), make_plan(*shape, origin=23)
    stop = 2 * plan.steps_per_epoch
    assert steps(later, 23, 23 + stop) == steps(plan, 0, stop)
    assert steps(later, 24, 23 + stop) == steps(plan, 1, stop)
    assert later.epochs(23) == 0 and later.epochs(23 + stop) == 2


def test_windows_end_where_windows_and_epochs_of_the_plan_end():
    plan = make_plan([44])  # 11 steps an epoch: windows of 4, 4 and 3
    assert list(plan.windows(0, 24)) == [(0, 4), (4, 8), (8, 11), (11, 15), (15, 19), (19, 22), (22, 24)]
    for start, stop in itertools.combinations(range(25), 2):
        # Every step has a window of its epoch; the ranges must be the runs of equal ones.
        labels = {s: (s // 11, s % 11 // 4) for s in range(start, stop)}
        runs = [[*members] for _, members in itertools.groupby(labels, key=labels.__getitem__)]
        assert list(plan.windows(start, stop)) == [(run[0], run[-1] + 1) for run in runs]
    assert list(plan.windows(7, 7)) == []


@pytest.mark.parametrize("lo, hi", [(2, 5), (9, 12), (3, 3), (4, 3)])
def test_steps_of_two_windows_are_refused(lo, hi):
    with pytest.raises(ValueError, match="window"):
        make_plan([44]).rows(lo, hi)


def test_clips_are_mixed_within_a_window_and_a_lane_reads_few_row_groups_at_a_time():
    """Shuffled: a step is not a run of neighbours. Local: a window touches the row groups it needs, not all of them."""
    rows_per_group, window_steps, lanes = 8, 16, 4
    plan = make_plan([80] * 40, rows_per_group, 8, lanes, window_steps)
    for lo, hi in plan.windows(0, plan.steps_per_epoch):
        groups = {clip[:2] for step in steps(plan, lo, hi) for clip in step}
        per_lane = (hi - lo) * plan.global_batch // lanes
        assert len(groups) <= lanes * (per_lane // rows_per_group + 2)
    places = plan.rows(0, window_steps)
    lane = (places.shard * 80 + places.group * rows_per_group + places.row)[:, :2].ravel()
    neighbours = np.mean(np.abs(np.diff(lane)) == 1)
    assert neighbours < 0.3


@pytest.mark.parametrize("rows", [[80] * 40, [3] * 1000, [77, 3, 160] * 15], ids=["full", "short", "uneven"])
def test_neighbours_on_disk_are_strangers_in_an_epoch(rows):
    """The row groups of a shard are spread over the lanes as if each were dealt alone."""
    lanes = 4
    plan = make_plan(rows, 8, lanes, lanes, 16)
    lane_of = {}
    for step in epoch_of(plan, 0):
        for lane, (shard, group, _) in enumerate(step):
            lane_of[shard, group] = lane  # the few that two lanes share count for the last
    order = [lane_of[place] for place in sorted(lane_of)]
    together = np.mean([a == b for a, b in itertools.pairwise(order)])
    assert abs(together - 1 / lanes) < 5 * math.sqrt(3 / 16 / len(order))


def test_positions_of_row_groups_are_uniform_over_seeds():
    """Every clip is at the first place of a lane about as often as every other one, full row groups and short ones."""
    rows, seeds = [13, 16, 3], 6_000
    firsts = Counter(steps(make_plan(rows, 4, 2, 2, 1, seed=seed), 0, 1)[0][0] for seed in range(seeds))
    assert firsts.keys() == all_clips(rows, 4)
    assert chi_square(list(firsts.values())) < 6


def test_memory_and_time_do_not_grow_with_the_clips():
    """10^9 clips and 3 * 10^9 in 10^6 shards: the cost of a position is that of the shards, some sixty bytes each."""
    for mean in (1_000, 3_000):  # the second does not fit 32 bits
        rows = mean + np.tile([-3, 3], 500_000)
        plan = make_plan(rows, 16, 16, 16, 16)
        assert plan.num_clips == 1_000_000 * mean
        last = plan.steps_per_epoch - 1
        tracemalloc.start()
        began = time.process_time()
        for lo in (0, last // 16 * 16, plan.steps_per_epoch):
            shard, group, row = plan.rows(lo, lo + 1, rank=1, world=4)
            assert shard.min() >= 0 and shard.max() < 1_000_000
            assert row.min() >= 0 and row.max() < 16
            assert group.min() >= 0 and (group * 16 + row < rows[shard]).all()
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6
        assert seconds < 10


def test_a_thousand_times_the_clips_in_as_many_shards_take_the_same_memory():
    peaks = []
    for mean in (10**4, 10**7):
        plan = make_plan(np.arange(10_000) + mean, 16, 16, 16, 16)
        tracemalloc.start()
        plan.rows(plan.steps_per_epoch // 2, plan.steps_per_epoch // 2 + 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0] < 2e6


def test_a_billion_clips_in_a_million_uneven_shards_are_planned_in_2_s_and_300_mb():
    """In a fresh process, which has the manifest (some 250 MB, mostly names and hashes) already."""
    command = [sys.executable, str(PLAN_SCALE), str(10**9), str(10**6)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    figures = json.loads(done.stdout)
    assert figures["clips"] == 10**9
    assert figures["make_s"] + figures["first_position_s"] < 2
    assert figures["peak_growth_mb"] < 300


def test_more_clips_than_positions_can_count_are_refused():
    assert make_plan([2**62 - 2**20]).steps_per_epoch == 2**60 - 2**18
    for rows in ([2**62], [2**61, 2**61], [2**62, 2**62, 2**62]):  # the sum of the last is negative in 64 bits
        with pytest.raises(ValueError, match="shard_rows"):
            make_plan(rows)


def test_places_near_the_most_clips_are_computed_without_overflow():
    rows = [2**60 + 5, 2**60 + 3, 2**61 - 2**20]
    plan = make_plan(rows, 16, 4, 4, 4)
    for lo in (0, plan.steps_per_epoch // 2 // 4 * 4, plan.steps_per_epoch - 1):
        clips = steps(plan, lo, lo + 1)[0]
        assert len(set(clips)) == 4
        assert all(0 <= row < 16 and 0 <= group * 16 + row < rows[shard] for shard, group, row in clips)


def test_plans_that_are_asked_in_turns_do_not_get_each_other_s_places():
    """What a process keeps from one call to the next belongs to one plan, whatever the plans have in common."""
    base = {"rows": [9, 21, 14, 5], "rows_per_group": 4, "dataset": "the same"}
    changes = [{}, {"seed": 1}, {"rows": [9, 21, 5, 14]}, {"rows_per_group": 6}, {"global_batch": 8}, {"origin": 1}]
    alone = [steps(make_plan(**base | change), 1, 20) for change in changes]
    plans = [make_plan(**base | change) for change in changes]
    in_turns = [[steps(plan, step, step + 1)[0] for plan in plans] for step in range(1, 20)]
    assert [list(orders) for orders in zip(*in_turns, strict=True)] == alone


def test_a_plan_travels_without_what_it_has_computed():
    """It goes with every task of the ingest."""
    plan = make_plan(np.arange(100_000) + 1000, 16, 16, 16, 16)
    before, first = len(pickle.dumps(plan)), steps(plan, 5, 6)
    assert len(pickle.dumps(plan)) < before + 1_000
    assert steps(pickle.loads(pickle.dumps(plan)), 5, 6) == first


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"global_batch": 8}, {"lanes": 2}, {"window_steps": 5}, {"dataset": "another"}, {"origin": 3},
        {"rows": [16, 8, 8]}, {"rows_per_group": 8},
    ],
)  # fmt: skip
def test_the_fingerprint_tells_apart_whatever_changes_the_order(change):
    base = {"rows": [8, 16, 8], "global_batch": 4, "lanes": 4, "window_steps": 4, "seed": 0, "dataset": "d"}
    assert make_plan(**base).fingerprint == make_plan(**base).fingerprint
    assert make_plan(**base).fingerprint != make_plan(**(base | change)).fingerprint
