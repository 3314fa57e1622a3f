"""Where metrics go. A sink takes the rows of the steps since the last call, and the newest value of everything.

W&B's: `fvlm.train.wandb_sink`.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

from fvlm.files import no_space_is_a_user_error, write_atomic
from fvlm.train.metrics import Row, evaluation_line, log_line
from fvlm.train.step_lines import StepLines

TRAIN_LOG, METRICS, EVALS, WANDB_ID = "train.log", "metrics.jsonl", "evals.jsonl", "wandb_id"


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str


class Sink(Protocol):
    def write(self, rows: list[Row], latest: Row) -> None: ...

    def evaluated(self, row: Row, pictures: list[Picture]) -> None:
        """One evaluation (`fvlm.train.evaluation.Evaluation` says what is in its row)."""

    def note(self, text: str) -> None:
        """Something a person should know: resumed, saved, finished."""

    def close(self) -> None: ...


class TrainLog:
    """train.log: one line every `log_every` steps, whole lines only, never a carriage return."""

    def __init__(self, run_dir: Path, max_steps: int):
        self._path = run_dir / TRAIN_LOG
        self._file = self._open()
        self._max_steps = max_steps

    def _open(self) -> TextIO:
        return self._path.open("a", buffering=1, encoding="utf-8")

    def write(self, rows: list[Row], latest: Row) -> None:
        self.note(log_line(latest, self._max_steps))

    def evaluated(self, row: Row, pictures: list[Picture]) -> None:
        self.note(evaluation_line(row, len(pictures)))

    def note(self, text: str) -> None:
        if not self._is_in_place():  # somebody has moved it away, and has it now; the run's log is a new one
            self._file.close()
            self._file = self._open()
        with no_space_is_a_user_error(self._path):
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self._file.close()


class JsonLines:
    """metrics.jsonl, one object a step, and evals.jsonl, one an evaluation.

    Opening them at step s drops what a lost process wrote after s.

    A value that is no number (a loss that was not finite) is null: JSON has neither NaN nor infinity.
    """

    def __init__(self, run_dir: Path, step: int):
        self._lines = StepLines(run_dir / METRICS, step)
        self._evaluations = StepLines(run_dir / EVALS, step)

    def write(self, rows: list[Row], latest: Row) -> None:
        self._lines.append(map(_json, rows))

    def evaluated(self, row: Row, pictures: list[Picture]) -> None:
        self._evaluations.append([_json(row)])

    def note(self, text: str) -> None:
        """Notes are for people; this file is for programs."""

    def close(self) -> None:
        self._lines.close()
        self._evaluations.close()


def _json(row: Row) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def wandb_id(run_dir: Path) -> str:
    """The run's W&B id, made on first use."""
    path = run_dir / WANDB_ID
    if not path.exists():
        write_atomic(path, os.urandom(4).hex() + "\n")
    return path.read_text().strip()
