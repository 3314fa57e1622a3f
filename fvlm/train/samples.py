"""Which clips each step was trained on."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.train.step_lines import StepLines, drop_after, parsed_lines

SAMPLES = "samples"
MOST_NAMED = 10

ClipIds = dict[int, tuple[str, ...]]
"""Step, counted from 1 -> the clips of one rank's share of it."""


class Samples:
    """Knows the clips of this rank's steps until their metrics are read; with `log.samples` it lists them for good.

    The list is `samples/rank-00000.jsonl` of the run folder, one for each rank, a line a step:
    {"step": 1, "rank": 0, "world": 2, "clips": ["...", ...]}
    """

    def __init__(self, config: Config, step: int, rank: int, world: int):
        self.rank, self.world = rank, world
        self._step = step
        self._clips: ClipIds = {}
        folder = config.run_dir / SAMPLES
        lines = StepLines(folder / f"rank-{rank:05d}.jsonl", step)  # dropped even where none will be written any more
        self._lines = lines if config.log.samples else None
        # A group of its own on the host: the GPUs' would wait until they have done what they were handed.
        self._group = dist.new_group(backend="gloo") if self._lines and world > 1 else None
        if rank == 0:
            for path in _files(folder):
                if _rank_of(path) >= world:
                    drop_after(path, step)

    def of(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, the first of which belongs to the next step."""
        for step, batch in enumerate(batches, self._step + 1):
            self._clips[step] = batch.clip_ids
            yield batch

    def take(self, step: int) -> ClipIds:
        """This rank's clips of the steps up to `step`, since the last call. To be called by all ranks at one step.

        With `log.samples` they are in the files of all ranks when this returns, so a checkpoint may follow.
        """
        taken = {number: self._clips.pop(number) for number in sorted(self._clips) if number <= step}
        if self._lines:
            rows = taken.items()
            self._lines.append(
                {"step": number, "rank": self.rank, "world": self.world, "clips": clips} for number, clips in rows
            )
            if self._group:
                dist.barrier(self._group)
        return taken


def read_samples(run_dir: Path) -> dict[int, list[str]]:
    """Step -> clips of the global batch in its order, from the first step listed to the last. {} without a list.

    Raises ValueError that names the steps of which a rank's share is lost or there twice.
    """
    shares: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for path in _files(run_dir / SAMPLES):
        for share in parsed_lines(path, sys.maxsize):
            shares[share["step"]].append(share)
    steps = range(min(shares), max(shares) + 1) if shares else range(0)
    faults = [fault for step in steps for fault in _faults(step, shares[step])]
    if faults:
        more = f"; and {len(faults) - MOST_NAMED} more" if len(faults) > MOST_NAMED else ""
        raise ValueError(f"{run_dir / SAMPLES}: {'; '.join(faults[:MOST_NAMED])}{more}")
    return {
        step: [clip for share in sorted(shares[step], key=lambda share: share["rank"]) for clip in share["clips"]]
        for step in steps
    }


def _faults(step: int, shares: list[dict[str, Any]]) -> list[str]:
    if not shares:
        return [f"step {step} is lost"]
    worlds = sorted({share["world"] for share in shares})
    if len(worlds) > 1:
        return [f"step {step} is there with {' and with '.join(map(str, worlds))} ranks"]
    times = Counter(share["rank"] for share in shares)
    lost = [f"step {step} of rank {rank} is lost" for rank in range(worlds[0]) if not times[rank]]
    return lost + [f"step {step} of rank {rank} is there {n} times" for rank, n in sorted(times.items()) if n > 1]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rank-*.jsonl"))


def _rank_of(path: Path) -> int:
    return int(path.stem.removeprefix("rank-"))
