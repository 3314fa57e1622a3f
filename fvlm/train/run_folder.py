"""The run folder: everything one run is and knows.

config.json  the whole config, and the fingerprint of the dataset, as the run began
tokenizer/   train.log   metrics.jsonl   wandb_id   wandb/   checkpoints/
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fvlm.config import Config, identity
from fvlm.data.schema import Manifest
from fvlm.errors import UserError
from fvlm.files import write_atomic
from fvlm.train.state import checkpoints, step_of

CONFIG, TOKENIZER, CHECKPOINTS, LOCK = "config.json", "tokenizer", "checkpoints", "lock"


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Hold the run for this process alone, as long as it lives: the kernel lets go when it is killed.

    Raises UserError when another process holds it.
    """
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{run_dir}: this run is being trained by another process. Wait for it, stop it, or use another --run."
            ) from error
        yield


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
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: missing or damaged ({error}). Restore it, or use another --run name.") from error
    return began


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; None before the first."""
    found = checkpoints(run_dir / CHECKPOINTS)
    return found[-1] if found else None


def finished_steps(run_dir: Path) -> int:
    latest = latest_checkpoint(run_dir)
    return step_of(latest) if latest else 0
