"""The run folder: everything one run is and knows.

config.json   the whole config, and the fingerprint of the dataset, as the run began
command.json  the options of its last start      held          it was stopped on purpose
lock, claim   who trains it, who may write       stacks/       of ranks that hung, until the next start
train.log     metrics.jsonl, a line a step       evals.jsonl    pictures/      one line, and pictures, an evaluation
architecture.json  of both models, as the run began: fvlm.model.hub
tokenizer/    skipped.jsonl   corrupt.jsonl   samples/   wandb_id   wandb/   checkpoints/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvlm.config import Config, identity
from fvlm.data.schema import Manifest
from fvlm.errors import UserError
from fvlm.files import write_atomic
from fvlm.train.state import checkpoints, step_of
from fvlm.train.store import CHECKPOINTS

CONFIG, TOKENIZER, LOCK, CLAIM = "config.json", "tokenizer", "lock", "claim"
PICTURES = "pictures"


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run for this command alone, as long as it lives: the kernel lets go when it is killed.

    Raises UserError when another one holds it.
    """
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run_dir}: this run is being trained by another process. Wait for it, stop it, or use another --run."
            ) from error
        yield


class Claim:
    """The right to write checkpoints: the newest claim on a run has it.

    A rank 0 can outlive its start: its command was killed a moment ago, or its node is cut off and does not know that
    training goes on elsewhere. It must not write any more, and nobody can wait for it.
    """

    def __init__(self, run_dir: Path):
        self._path, self._token = run_dir / CLAIM, secrets.token_hex(8)
        write_atomic(self._path, self._token)

    def require(self) -> None:
        """Raises RuntimeError when another process has claimed the run since."""
        if self._path.read_text() != self._token:
            raise RuntimeError(f"{self._path.parent}: another process has taken this run over; this one may not write")


def open_run(config: Config, manifest: Manifest) -> Path:
    """Make the run's folder, or check that the one there is of this run. Returns it.

    Raises UserError, with every difference, when the folder holds a run that began with another config or dataset.
    """
    run_dir = config.run_dir
    path = run_dir / CONFIG
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        began: dict[str, Any] = {
            "config": config.to_dict(),
            "dataset": manifest.fingerprint,
            "dataset_path": manifest.where,
        }
        write_atomic(path, json.dumps(began, indent=2) + "\n")
        return run_dir
    began = read_began(run_dir)
    before, now = identity(began["config"]), identity(config.to_dict())
    changes = [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key)]  # fmt: skip
    if began["dataset"] != manifest.fingerprint:
        changes.append(f"dataset: {began['dataset_path']} -> {manifest.where} (other clips, or in another order)")
    if changes:
        raise UserError(
            f"{run_dir}: this run began with another config; what may not change within a run has changed:\n  "
            + "\n  ".join(changes)
            + "\nUse the old values to continue it, or another --run name to start a new one."
        )
    return run_dir


def read_began(run_dir: Path) -> dict[str, Any]:
    """What config.json says of the run's beginning."""
    path = run_dir / CONFIG
    try:
        began: dict[str, Any] = json.loads(path.read_bytes())
        began["config"], began["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: missing or damaged ({error}). Restore it, or use another --run name.") from error
    return began


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint in the run's own folder, by its name; None without one."""
    found = checkpoints(run_dir / CHECKPOINTS)
    return found[-1] if found else None


def finished_steps(run_dir: Path) -> int:
    """Of that checkpoint. Where checkpoints lie elsewhere (train.checkpoint_dir): `store.newest_step`."""
    latest = latest_checkpoint(run_dir)
    return step_of(latest) if latest else 0
