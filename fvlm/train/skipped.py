"""Steps that changed nothing because their loss or gradient was not finite: the list of them, and when to give up."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist

from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.ranks import world_size
from fvlm.train.metrics import Row
from fvlm.train.samples import ClipIds
from fvlm.train.step_lines import StepLines, parsed_lines

SKIPPED = "skipped.jsonl"


class SkippedSteps:
    """skipped.jsonl of one run, a line for each skipped step: step, loss, grad_norm, clips of the global batch.

    What is not finite stands there as text ("nan", "inf"), since JSON has no such numbers. Every rank counts, so that
    all give up at the same step; rank 0 writes. The file is the count's memory: a run that goes on at `step` counts on.

    total: steps skipped since the run began
    """

    def __init__(self, config: Config, step: int, is_writer: bool):
        self._path, self._most = config.run_dir / SKIPPED, config.train.max_skipped
        earlier = {row["step"] for row in parsed_lines(self._path, step)}
        self.total = len(earlier)
        self._in_a_row = next(n for n in range(len(earlier) + 1) if step - n not in earlier)
        self._lines = StepLines(self._path, step) if is_writer else None
        self._too_many = ""

    def record(self, rows: list[Row], clips: ClipIds) -> list[str]:
        """Count and list what was skipped among `rows`, the steps since the last call -> a line for people on each.

        All ranks call this with the same rows, and with their own `clips`: they exchange them when there is need.
        """
        skipped = {int(row["step"]): row for row in rows if row["train/skipped"]}
        of_ranks = _of_all_ranks({step: clips[step] for step in skipped}) if skipped else []
        said, lines = [], []
        for row in rows:
            step = int(row["step"])
            self._in_a_row = self._in_a_row + 1 if step in skipped else 0
            if step not in skipped:
                continue
            self.total += 1
            loss, norm = row["train/loss"], row["train/grad_norm"]
            said.append(
                f"step {step} skipped: loss {loss}, gradient norm {norm}; it changed nothing. "
                f"{self._in_a_row} in a row, {self.total} in all, listed with their clips in {self._path}"
            )
            lines.append(
                {"step": step, "loss": _json(loss), "grad_norm": _json(norm)}
                | {"clips": [clip for own in of_ranks for clip in own[step]]}
            )
            if self._in_a_row >= self._most and not self._too_many:
                self._too_many = (
                    f"step {step} was skipped, number {self._in_a_row} in a row: train/loss is {loss}, "
                    f"train/grad_norm {norm}"
                )
        if self._lines:
            self._lines.append(lines)
        return said

    def raise_if_too_many(self) -> None:
        """Raise UserError when so many steps in a row were skipped that more would not help."""
        if self._too_many:
            raise UserError(
                f"{self._too_many}. None of them changed the model; the checkpoints are good. {self._path} lists their "
                "clips: look for broken latents among them. If the dataset is sound, lower --optim.lr in a new run. "
                f"To go on past them, give a --train.max-skipped above {self._most}."
            )


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _of_all_ranks(mine: ClipIds) -> list[ClipIds]:
    """In the order of ranks, which is the order of the global batch."""
    if world_size() == 1:
        return [mine]
    of_ranks: list[Any] = [None] * world_size()
    dist.all_gather_object(of_ranks, mine)
    return of_ranks
