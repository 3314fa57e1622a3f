"""The plan: which clips make up which step. A pure function of (dataset, seed, global batch, lanes, window).

    epoch    row groups are shuffled by (seed, epoch) and laid end to end: one stream of N rows
    lanes    the stream is cut into C equal canonical lanes; what does not fill a global batch is left to other epochs
    windows  rows are shuffled inside windows of `window_steps` steps of a lane
    step s   every lane gives its next G/C rows; the global batch is their concatenation, lane by lane
    ranks    rank r of n owns the lanes [r*C/n, (r+1)*C/n)

Never of world size, number of tasks, timing or restarts. The cursor of a run is one integer, the steps it has
finished: to resume is to start here at that step. Memory grows with the row groups (12 bytes each), never with clips.

Permutations are sorts of raw Philox output, whose bits NumPy guarantees; `Generator.permutation` may change between
NumPy versions, and with it the order of a run that is under way.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fvlm.config import Config
from fvlm.data.schema import Manifest
from fvlm.errors import UserError

PLAN_VERSION = 1
"""Part of the fingerprint: raise it when the order changes."""
_EPOCH, _WINDOW = 0, 1  # purposes of random streams, so that no two share one


def permutation(n: int, *key: int) -> np.ndarray:
    """[n] int64: the permutation that belongs to `key`, for ever."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True, eq=False)
class Plan:
    """See the module's text. Steps count from 0 over the whole run; an epoch has `steps_per_epoch` of them."""

    row_group_rows: np.ndarray
    """[R] rows of every row group of the dataset, in file order."""
    seed: int
    global_batch: int
    lanes: int
    window_steps: int
    dataset: str
    """Fingerprint of the dataset."""
    origin: int = 0
    """The step at which epoch 0 begins; above 0 for a run that was taken over from another trainer."""

    @classmethod
    def of_config(cls, manifest: Manifest, config: Config, origin: int = 0) -> Plan:
        """Raises UserError when the dataset does not fill one global batch."""
        data = config.data
        if manifest.num_clips < data.global_batch:
            raise UserError(
                f"{manifest.root}: {manifest.num_clips} clips do not fill one global batch of {data.global_batch}. "
                f"Use more clips, or --data.global-batch {max(manifest.num_clips, 1)} or less and lanes dividing it."
            )
        return cls(
            manifest.row_group_rows,
            config.train.seed,
            data.global_batch,
            data.lanes,
            data.window_steps,
            manifest.fingerprint,
            origin,
        )

    @functools.cached_property
    def num_clips(self) -> int:
        return int(self.row_group_rows.sum(dtype=np.int64))

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

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints give equal orders; a checkpoint stores it beside the cursor."""
        order = [self.seed, self.global_batch, self.lanes, self.window_steps, self.origin]
        identity = [PLAN_VERSION, self.dataset, *order]
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

    def rows(self, lo: int, hi: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The rows of one rank for the steps [lo, hi), which lie inside one window.

        -> row group [hi-lo, G/world] int64 and row within it [hi-lo, G/world] int64, in training order.
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
        order, ends = _stream(self, epoch)
        flat = positions.reshape(hi - lo, -1)
        index = np.searchsorted(ends, flat, side="right")
        groups = order[index]
        return groups, flat - (ends[index] - self.row_group_rows[groups])

    # Two plans are one when their orders are; the arrays need no look.
    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.fingerprint == other.fingerprint


@functools.lru_cache(maxsize=2)  # an epoch's end needs two
def _stream(plan: Plan, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """One epoch's stream: row groups in order [R], and the position in the stream at which each ends [R]."""
    order = permutation(len(plan.row_group_rows), plan.seed, _EPOCH, epoch)
    return order, np.cumsum(plan.row_group_rows[order], dtype=np.int64)
