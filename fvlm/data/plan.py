"""The plan: which clips make up which step. A pure function of (dataset, seed, global batch, lanes, window).

    epoch    row groups are shuffled by (seed, epoch) and laid end to end: one stream of N rows
    lanes    the stream is cut into C equal canonical lanes; what does not fill a global batch is left to other epochs
    windows  rows are shuffled inside windows of `window_steps` steps of a lane
    step s   every lane gives its next G/C rows; the global batch is their concatenation, lane by lane
    ranks    rank r of n owns the lanes [r*C/n, (r+1)*C/n)

Never of world size, number of tasks, timing or restarts. The cursor of a run is one integer, the steps it has
finished: to resume is to start here at that step.

No list of clips or row groups exists anywhere: memory grows with the shards alone (about 60 bytes each), so a billion
clips cost what a million cost. That works because a shard's row groups are all full but for its last one. The full ones
are shuffled by a keyed permutation that gives the i-th element without the others; the short ones, at most one a shard,
by sorting. They follow the full ones, and a place drawn for each epoch says where the stream begins, so that what is
left out at its end may be any clip.

Randomness is raw Philox output, whose bits NumPy guarantees; `Generator.permutation` may change between NumPy versions,
and with it the order of a run that is under way.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fvlm.config import Config
from fvlm.data.schema import Manifest
from fvlm.errors import UserError

PLAN_VERSION = 1
"""Part of the fingerprint: raise it when the order changes."""
MOST_CLIPS = 2**62
"""Positions are int64, and two of them are added."""
_FULL, _SHORT, _START, _WINDOW = range(4)  # purposes of random streams, so that no two share one
_ROUNDS = 8
"""With four, orders of seven elements are visibly not equally likely (NOTES.md)."""


def random_bits(n: int, *key: int) -> np.ndarray:
    """[n] uint64, the numbers that belong to `key`, for ever."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def permutation(n: int, *key: int) -> np.ndarray:
    """[n] int64: the permutation of range(n) that belongs to `key`."""
    return np.argsort(random_bits(n, *key), kind="stable")


def permuted(index: np.ndarray, n: int, *key: int) -> np.ndarray:
    """Elements `index` (integers below n) of another permutation of range(n), at a cost that does not grow with n.

    A Feistel network over a rectangle of at least n places, walked on until it comes below n (Black & Rogaway 2002,
    "Ciphers with arbitrary finite domains", section 5); its rounds mix as SplitMix64 does (Steele, Lea & Flood 2014).
    """
    # An even height: two odd sides make even permutations alone, which shows where n is small.
    height = np.uint64(2 * (math.isqrt(n) // 2 + 1))
    width = np.uint64(n // int(height) + 1)
    keys = random_bits(2 * _ROUNDS, *key).reshape(_ROUNDS, 2)
    result = index.astype(np.uint64)
    outside = np.ones(result.shape, bool)
    while outside.any():
        y, x = np.divmod(result[outside], width)
        for y_key, x_key in keys:
            y = (y + _mix(x ^ y_key)) % height
            x = (x + _mix(y ^ x_key)) % width
        result[outside] = y * width + x
        outside = result >= n
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """63 bits: a sum that wrapped round would not be a permutation any more."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(1)


class Places(NamedTuple):
    """Where clips lie: shard (its number in the manifest), row group in it, row in the group; int64, one shape."""

    shard: np.ndarray
    group: np.ndarray
    row: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """See the module's text. Steps count from 0 over the whole run; an epoch has `steps_per_epoch` of them."""

    shard_rows: np.ndarray
    """[F] rows of every shard, in the manifest's order."""
    rows_per_row_group: int
    seed: int
    global_batch: int
    lanes: int
    window_steps: int
    dataset: str
    """Fingerprint of the dataset."""
    origin: int = 0
    """The step at which epoch 0 begins; above 0 for a run that was taken over from another trainer."""

    def __post_init__(self) -> None:
        clips = self.shard_rows.sum(dtype=np.float64)  # cannot wrap round
        if clips >= MOST_CLIPS:
            raise ValueError(f"shard_rows: {clips:.3g} clips; a plan is for fewer than 2^62")

    @classmethod
    def of_config(cls, manifest: Manifest, config: Config, origin: int = 0) -> Plan:
        """Raises UserError when the dataset does not fill one global batch."""
        data = config.data
        if manifest.num_clips < data.global_batch:
            raise UserError(
                f"{manifest.where}: {manifest.num_clips} clips do not fill one global batch of {data.global_batch}. "
                f"Use more clips, or --data.global-batch {max(manifest.num_clips, 1)} or less and lanes dividing it."
            )
        return cls(
            manifest.shard_rows,
            manifest.spec.rows_per_row_group,
            config.train.seed,
            data.global_batch,
            data.lanes,
            data.window_steps,
            manifest.fingerprint,
            origin,
        )

    @functools.cached_property
    def num_clips(self) -> int:
        return int(self.shard_rows.sum(dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        return self.num_clips // self.global_batch

    def epochs(self, step: int) -> float:
        """Epochs that are over after `step` finished steps."""
        return (step - self.origin) / self.steps_per_epoch

    @property
    def remainder(self) -> int:
        """Clips left out of each epoch, other ones each time."""
        return self.num_clips - self.steps_per_epoch * self.global_batch

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints give equal orders; a checkpoint stores it beside the cursor."""
        rows = hashlib.sha256(self.shard_rows.astype("<i8").tobytes()).hexdigest()
        order = [self.seed, self.global_batch, self.lanes, self.window_steps, self.origin]
        identity = [PLAN_VERSION, self.dataset, rows, self.rows_per_row_group, *order]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def windows(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut the steps [start, stop) where windows and epochs end: [lo, hi) ranges, the ingest's pieces of work."""
        lo = start
        while lo < stop:
            in_epoch = (lo - self.origin) % self.steps_per_epoch
            to_window_end = self.window_steps - in_epoch % self.window_steps
            hi = min(lo + to_window_end, lo + self.steps_per_epoch - in_epoch, stop)
            yield lo, hi
            lo = hi

    def rows(self, lo: int, hi: int, rank: int = 0, world: int = 1) -> Places:
        """The clips of one rank for the steps [lo, hi), which lie inside one window: [hi-lo, G/world], in order.

        Raises ValueError for steps of two windows.
        """
        epoch, first = divmod(lo - self.origin, self.steps_per_epoch)
        window = first // self.window_steps
        begin = window * self.window_steps
        end = min(begin + self.window_steps, self.steps_per_epoch)
        if not first < first + (hi - lo) <= end:
            raise ValueError(f"steps [{lo}, {hi}) do not lie inside one window")
        share = self.global_batch // self.lanes  # rows of one lane in one step
        per_lane = self.steps_per_epoch * share
        positions = np.empty((hi - lo, self.lanes // world, share), np.int64)
        for i, lane in enumerate(range(rank * self.lanes // world, (rank + 1) * self.lanes // world)):
            shuffled = permutation((end - begin) * share, self.seed, _WINDOW, epoch, lane, window)
            mine = shuffled.reshape(-1, share)[first - begin : hi - lo + first - begin]
            positions[:, i] = lane * per_lane + begin * share + mine
        return self._stream(epoch, positions.reshape(hi - lo, -1))

    def _stream(self, epoch: int, position: np.ndarray) -> Places:
        """What stands at these positions of an epoch's stream, [...] int64."""
        size, shards = self.rows_per_row_group, _shards(self)
        full_groups = int(shards.full_before[-1])
        begin = int(random_bits(1, self.seed, _START, epoch)[0]) % self.num_clips
        position = (position + begin) % self.num_clips
        places = Places(*(np.empty_like(position) for _ in Places._fields))

        full = position < full_groups * size
        number, row = np.divmod(position[full], size)
        group = permuted(number, full_groups, self.seed, _FULL, epoch)
        shard = np.searchsorted(shards.full_before, group, side="right") - 1
        places.shard[full], places.group[full], places.row[full] = shard, group - shards.full_before[shard], row

        order, ends = _short_groups(self, epoch)
        position = position[~full] - full_groups * size
        number = np.searchsorted(ends, position, side="right")
        shard = order[number]
        group, rest = np.divmod(self.shard_rows[shard], size)
        places.shard[~full], places.group[~full], places.row[~full] = shard, group, position - (ends[number] - rest)
        return places

    # Two plans are one when their orders are; the arrays need no look.
    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint == other.fingerprint


class _Shards(NamedTuple):
    full_before: np.ndarray
    """[F+1] full row groups in the shards before each, and in all."""
    with_short: np.ndarray
    """Numbers of the shards that end in a short row group."""


# Kept a process, not in the plan: a plan travels to every task of the ingest, these do not.
@functools.lru_cache(maxsize=1)
def _shards(plan: Plan) -> _Shards:
    full, rest = np.divmod(plan.shard_rows, plan.rows_per_row_group)
    return _Shards(np.concatenate([[0], np.cumsum(full, dtype=np.int64)]), np.flatnonzero(rest))


@functools.lru_cache(maxsize=2)  # an epoch's end needs two
def _short_groups(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Shards with a short last row group, in the epoch's order, and where each of these groups ends in their stream."""
    with_short = _shards(plan).with_short
    order = with_short[permutation(len(with_short), plan.seed, _SHORT, epoch)]
    return order, np.cumsum(plan.shard_rows[order] % plan.rows_per_row_group, dtype=np.int64)
