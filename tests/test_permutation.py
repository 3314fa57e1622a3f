"""The plan's permutations: that they are some, that all are equally likely, that no NumPy release can change them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from test_plan import chi_square

from fvlm.data.plan import permutation, permuted


@pytest.mark.parametrize("key", [(0,), (7, 0, 3), (2**40, 1)])
def test_permuted_reaches_every_element_once(key):
    for n in [*range(300), 1023, 1024, 1025, 4095, 4096, 4097, 65_536, 99_991]:
        order = permuted(np.arange(n), n, *key)
        assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(n)), n


def test_elements_asked_for_one_by_one_in_any_order_and_shape_are_those_of_the_whole():
    for n in (1, 2, 3, 100, 257):
        whole = permuted(np.arange(n), n, 5, 1)
        assert [int(permuted(np.array(i), n, 5, 1)) for i in range(n)] == whole.tolist()
        backwards = np.tile(np.arange(n)[::-1], (2, 3, 1))
        assert np.array_equal(permuted(backwards, n, 5, 1), whole[backwards])
    assert permuted(np.arange(0), 0, 5, 1).size == 0


@pytest.mark.parametrize("n", [10**12 + 39, 2**58 - 1, 2**62 - 1])
def test_a_huge_permutation_maps_into_its_range_without_doubles(n):
    index = np.concatenate([np.arange(5_000), n - 1 - np.arange(5_000)])
    images = permuted(index, n, 3)
    assert images.min() >= 0 and images.max() < n and len(np.unique(images)) == len(index)
    tenths = np.bincount(images // (n // 10 + 1), minlength=10)
    assert chi_square(tenths.tolist()) < 6


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_over_keys_all_orders_of_a_few_elements_are_equally_likely(n):
    orders = dict.fromkeys(itertools.permutations(range(n)), 0)
    for key in range(6_000):
        orders[tuple(permuted(np.arange(n), n, key).tolist())] += 1
    assert chi_square(list(orders.values())) < 6


@pytest.mark.parametrize("n", [6, 9, 16, 17])
def test_over_keys_two_elements_come_to_any_two_places_equally_often(n):
    pairs = np.zeros((n, n), int)
    for key in range(6_000):
        a, b = permuted(np.array([0, 1]), n, key)
        pairs[a, b] += 1
    assert not pairs.diagonal().any()
    assert chi_square(pairs[~np.eye(n, dtype=bool)].tolist()) < 6


@pytest.mark.parametrize("n", [8, 16])
def test_over_keys_half_of_the_permutations_are_even(n):
    odd = 0
    for key in range(2_000):
        order = permuted(np.arange(n), n, key)
        odd += sum(a > b for a, b in itertools.combinations(order.tolist(), 2)) % 2
    assert abs(odd / 2_000 - 0.5) < 6 * math.sqrt(0.25 / 2_000)


def test_neighbours_are_far_apart_and_keys_have_orders_of_their_own():
    n = 10**7
    for key in range(4):
        images = permuted(np.arange(2_000), n, key)
        distance = np.abs(np.diff(images)) / n
        assert abs(distance.mean() - 1 / 3) < 0.05  # two places drawn by chance
        assert not np.array_equal(images, permuted(np.arange(2_000), n, key + 1))


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


def test_permuted_is_a_feistel_network_of_philox_numbers():
    """Against the same network in Python's integers, one element at a time."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return (x ^ x >> 31) >> 1

    for n in (1, 5, 1_000, 10**15):
        height = next(h for h in itertools.count(math.isqrt(n) + 1) if h % 2 == 0)
        width = n // height + 1
        seed = tuple(np.random.SeedSequence((4, 2)).generate_state(2, np.uint64).tolist())
        keys = philox4x64(seed, 16)
        for index in {0, n // 3, n - 1}:
            place = index
            while True:
                y, x = divmod(place, width)
                for y_key, x_key in zip(keys[::2], keys[1::2], strict=True):
                    y = (y + mix(x ^ y_key)) % height
                    x = (x + mix(y ^ x_key)) % width
                place = y * width + x
                if place < n:
                    break
            assert int(permuted(np.array(index), n, 4, 2)) == place
