"""How much memory the ingest may hold, and how that is shared out. Arithmetic only.

The bound holds by construction: so many blocks may exist, of a known size, and nothing else grows.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fvlm.data.read import RING, ClipReader
from fvlm.errors import UserError

MB = 1_000_000
UNITS = {"MB": MB, "GB": 1000 * MB, "MIB": 1 << 20, "GIB": 1 << 30}
AUTO_A_RANK = 1300 * MB
AUTO_OF_MACHINE = 0.25
"""`auto`: AUTO_A_RANK for every rank, at most this share of the machine."""
LARGEST_BLOCK = 64 * MB
"""Ray's price is paid a block: below this size, several steps share one."""
PROCESSES = 600 * MB
"""What the ingest's processes take before they hold a clip: the decoding actor, the executor, and three actors of Ray
Data that a cluster has once (statistics, autoscaling, locations). Measured: 60 to 140 MB each."""
GENERATOR_BLOCKS = 1
"""Decoded and stored, not yet taken over by Ray Data."""
CONSUMER_BLOCKS = 3
"""Being trained on, ready, and on its way: what Ray Data's iterator holds without prefetching."""
FEWEST_WAITING, MOST_WAITING = 1, 8
"""Blocks in Ray Data's hands. More than a few help nothing: a pause longer than these is no jitter."""


@dataclass(frozen=True)
class IngestMemory:
    """One rank's share.

    block_steps: steps in one block; a divisor of the window
    waiting:     blocks that Ray Data may hold
    compressed:  bytes of the row groups of two windows
    """

    block_steps: int
    block_bytes: int
    waiting: int
    compressed: int

    @property
    def blocks(self) -> int:
        """Blocks in the object store, at the most: the one being stored, too."""
        return 1 + GENERATOR_BLOCKS + self.waiting + CONSUMER_BLOCKS

    @property
    def store_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def total(self) -> int:
        return PROCESSES + self.compressed + RING * self.block_bytes + self.store_bytes

    def __str__(self) -> str:
        return (
            f"{self.total / MB:,.0f} MB a rank: {self.blocks} blocks of {self.block_bytes / MB:,.1f} MB "
            f"({self.block_steps} steps each) in the object store, {RING} being decoded, "
            f"{self.compressed / MB:,.0f} MB of row groups, {PROCESSES / MB:,.0f} MB of processes"
        )


def parse_bytes(text: str) -> int | None:
    """'2GB' -> 2,000,000,000; 'auto' -> None. Raises UserError."""
    if text == "auto":
        return None
    match = re.fullmatch(r"([\d.]+)\s*([MG]i?B)", text.strip(), re.IGNORECASE)
    try:
        assert match
        return int(float(match[1]) * UNITS[match[2].upper()])
    except (AssertionError, ValueError):
        raise UserError(f"--ingest-memory {text!r}: give a size such as 2GB, 800MB or 1.5GiB, or auto.") from None


def share_out(clips: ClipReader, world: int, limit: int | None, machine_bytes: int) -> IngestMemory:
    """What one of `world` ranks gets of `limit` bytes for the whole ingest; None: `auto`, which is never too little.

    Raises UserError with the numbers when it does not suffice.
    """
    per_rank = (limit or min(AUTO_A_RANK * world, int(AUTO_OF_MACHINE * machine_bytes))) // world
    batch = clips.clip_bytes * (clips.plan.global_batch // world)
    window = clips.plan.window_steps
    sizes = [steps for steps in range(window, 0, -1) if window % steps == 0]
    smallest = None
    for steps in sizes:
        if steps > 1 and steps * batch > LARGEST_BLOCK:
            continue
        smallest = IngestMemory(steps, steps * batch, FEWEST_WAITING, held_bytes(clips, world))
        spare = (per_rank - smallest.total) // smallest.block_bytes
        if spare >= 0:
            waiting = min(FEWEST_WAITING + spare, MOST_WAITING)
            return IngestMemory(steps, steps * batch, waiting, smallest.compressed)
    assert smallest is not None
    if limit is None:
        return smallest
    raise UserError(
        f"--ingest-memory: {per_rank * world / MB:,.0f} MB for {world} rank{'s' * (world > 1)} is too little. Least: "
        f"{smallest.total * world / MB:,.0f} MB ({smallest}). Give that much, or lower --data.global-batch, "
        "--data.num-frames or --data.window-steps."
    )


def held_bytes(clips: ClipReader, world: int) -> int:
    """Bytes, compressed, of the row groups that two windows of one rank touch, at the most."""
    plan, spec = clips.plan, clips.manifest.spec
    lane_rows = 2 * plan.window_steps * plan.global_batch // plan.lanes
    groups = math.ceil(lane_rows / spec.rows_per_row_group) + 1
    rows = groups * spec.rows_per_row_group * plan.lanes // world
    return int(min(rows, clips.manifest.num_clips) * clips.stored_bytes)
