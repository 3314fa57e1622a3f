"""The plan alone: which clips make up which step, as arithmetic. `test_order.py` proves the same through Ray Data."""

from __future__ import annotations

import hashlib
import itertools
import time
import tracemalloc

import numpy as np
import pytest

from fvlm.data.plan import Plan, permutation

SHAPES = [
    # rows of the row groups, global batch, lanes, window steps
    ([4] * 6, 4, 4, 4),
    ([4, 4, 1, 4, 4, 1, 4, 4], 4, 2, 3),
    ([16, 16, 3, 16, 7, 1, 1, 16, 16, 5], 8, 4, 5),
    ([1] * 50, 16, 8, 100),
    ([64], 12, 4, 1),
    ([9, 8, 7, 6, 5, 4, 3, 2, 1], 45, 1, 16),
]


def make_plan(rows, global_batch=4, lanes=4, window_steps=4, seed=0, dataset="", origin=0) -> Plan:
    """`dataset` stands for a fingerprint: other row groups must not have the same."""
    rows = np.array(rows, np.int32)
    dataset = dataset or hashlib.sha256(rows.tobytes()).hexdigest()
    return Plan(rows, seed, global_batch, lanes, window_steps, dataset, origin)


def steps(plan: Plan, start: int, stop: int, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
    """For every step of [start, stop) the (row group, row) pairs of one rank, in order."""
    out = []
    for lo, hi in plan.windows(start, stop):
        groups, rows = plan.rows(lo, hi, rank, world)
        assert groups.shape == rows.shape == (hi - lo, plan.global_batch // world)
        out += [list(zip(g.tolist(), r.tolist(), strict=True)) for g, r in zip(groups, rows, strict=True)]
    return out


def epoch_of(plan: Plan, epoch: int) -> list[list[tuple[int, int]]]:
    return steps(plan, epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)


def all_clips(rows) -> set[tuple[int, int]]:
    return {(group, row) for group, n in enumerate(rows) for row in range(n)}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_shows_every_clip_once_but_for_a_counted_remainder_below_one_batch(shape):
    rows, global_batch, *_ = shape
    plan = make_plan(*shape)
    for epoch in range(3):
        seen = list(itertools.chain(*epoch_of(plan, epoch)))
        assert len(seen) == len(set(seen))
        assert set(seen) <= all_clips(rows)
        assert len(all_clips(rows) - set(seen)) == plan.remainder == sum(rows) % global_batch


def test_what_one_epoch_leaves_out_others_show():
    plan = make_plan([4, 4, 4, 3], 4, 4, 2)
    assert plan.remainder == 3
    left_out = [all_clips([4, 4, 4, 3]) - set(itertools.chain(*epoch_of(plan, epoch))) for epoch in range(12)]
    assert not set.intersection(*left_out)
    assert len(set.union(*left_out)) > 3


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
    plan = make_plan([4] * 11, 4, 4, 4)  # 11 steps an epoch: windows of 4, 4 and 3
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
        make_plan([4] * 11).rows(lo, hi)


def test_clips_are_mixed_within_a_window_and_a_lane_reads_few_row_groups_at_a_time():
    """Shuffled: a step is not a run of neighbours. Local: a window touches the row groups it needs, not all of them."""
    rows_per_group, window_steps, lanes = 8, 16, 4
    plan = make_plan([rows_per_group] * 400, 8, lanes, window_steps)
    for lo, hi in plan.windows(0, plan.steps_per_epoch):
        groups, rows = plan.rows(lo, hi)
        per_lane = (hi - lo) * plan.global_batch // lanes
        assert len(np.unique(groups)) <= lanes * (per_lane // rows_per_group + 2)
    groups, rows = plan.rows(0, window_steps)
    lane = (groups * rows_per_group + rows)[:, :2].ravel()
    neighbours = np.mean(np.abs(np.diff(lane)) == 1)
    assert neighbours < 0.3


def test_memory_and_time_do_not_grow_with_the_clips():
    """10^9 clips and 3 * 10^9 in 10^6 row groups: the cost of a window is that of the row groups, twelve bytes each."""
    for rows_per_group in (1_000, 3_000):  # the second does not fit 32 bits
        plan = make_plan(np.full(1_000_000, rows_per_group), 16, 16, 16)
        assert plan.num_clips == 1_000_000 * rows_per_group
        last = plan.steps_per_epoch - 1
        tracemalloc.start()
        began = time.process_time()
        for lo in (0, last // 16 * 16, plan.steps_per_epoch):
            groups, rows = plan.rows(lo, lo + 1, rank=1, world=4)
            assert groups.min() >= 0 and groups.max() < 1_000_000
            assert rows.min() >= 0 and rows.max() < rows_per_group
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6
        assert seconds < 10


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"global_batch": 8}, {"lanes": 2}, {"window_steps": 5}, {"dataset": "another"}, {"origin": 3}],
)
def test_the_fingerprint_tells_apart_whatever_changes_the_order(change):
    base = {"global_batch": 4, "lanes": 4, "window_steps": 4, "seed": 0, "dataset": "d"}
    assert make_plan([4] * 8, **base).fingerprint == make_plan([4] * 8, **base).fingerprint
    assert make_plan([4] * 8, **base).fingerprint != make_plan([4] * 8, **(base | change)).fingerprint


def philox4x64(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the counter starting at 1."""
    mask, out = (1 << 64) - 1, []
    for counter in range(1, count // 4 + 2):
        x, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(b >> 64) ^ x[1] ^ k0, b & mask, (a >> 64) ^ x[3] ^ k1, a & mask]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        out += x
    return out[:count]


@pytest.mark.parametrize("key", [(0,), (0, 0, 7), (3, 1, 2, 5, 11), (2**40, 1)])
@pytest.mark.parametrize("n", [1, 2, 97])
def test_a_permutation_is_the_sort_of_philox_numbers(key, n):
    """Against Philox written out in Python's integers: no NumPy release may change the order of a run under way."""
    bits = philox4x64(tuple(np.random.SeedSequence(key).generate_state(2, np.uint64).tolist()), n)
    assert permutation(n, *key).tolist() == sorted(range(n), key=bits.__getitem__)
