"""The run folder: everything one run is and knows.

config.json   the whole config, and the fingerprint of the dataset, as the run began
command.json  the options of its last start      held          it was stopped on purpose
lock, claim   who trains it, who may write       stacks/       of ranks that hung, until the next start
train.log     metrics.jsonl, a line a step       evals.jsonl    pictures/      one line, and pictures, an evaluation
architecture.json  of both models, as the run began: fvlm.model.hub
tokenizer/    skipped.jsonl   corrupt.jsonl   samples/   wandb_id   wandb/   checkpoints/   saved (where they are, when
                                                                                    that is elsewhere)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fvlm import locks
from fvlm.config import ARCHITECTURE, Config, flatten
from fvlm.data.corrupt import CORRUPT
from fvlm.data.schema import Manifest
from fvlm.errors import UserError
from fvlm.files import away_is_unavailable, make_dirs, unwritable_is_a_user_error, write_atomic
from fvlm.train.run_log import read_log
from fvlm.train.same_run import changes_of_identity, unknown_keys
from fvlm.train.sinks import TRAIN_LOG, WANDB_ID
from fvlm.train.state import checkpoints, step_of
from fvlm.train.store import CHECKPOINTS, SAVED, checkpoint_store

CONFIG, TOKENIZER, LOCK, CLAIM = "config.json", "tokenizer", "lock", "claim"
PICTURES = "pictures"
OF_THE_CONFIG = (ARCHITECTURE, TOKENIZER, CORRUPT, WANDB_ID, PICTURES)
"""What a run folder holds that is right for one config alone. Lines of steps go when the run begins at step 0."""


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[str]:
    """Hold the run for this command alone, as long as it lives: the kernel lets go when it is killed. Makes the folder,
    and when the block fails removes it again if nothing lies in it.

    Yields "", or a line that a person should read (`locks.exclusive`).
    Raises UserError: another one holds it, or the folder cannot be made or written.
    """
    busy = f"{run_dir}: this run is being trained by another process. Wait for it, stop it, or use another --run."
    lock = run_dir / LOCK
    with unwritable_is_a_user_error(run_dir):
        new_folder, new_lock = not run_dir.exists(), not lock.exists()
    held = False
    with contextlib.ExitStack() as stack:
        try:
            with unwritable_is_a_user_error(run_dir):
                note = stack.enter_context(locks.exclusive(lock, busy))
            held = True
            yield note
        except BaseException:
            with contextlib.suppress(OSError):
                if new_lock and held:
                    lock.unlink()
                if new_folder:
                    run_dir.rmdir()  # unless something lies in it
            raise


@contextlib.contextmanager
def undone_on_failure(run_dir: Path) -> Iterator[None]:
    """When the block fails, what it has put into the run folder goes again: a new run's config would stand in the way
    of the corrected command. For the process that holds the run."""
    before = set(run_dir.iterdir())
    try:
        yield
    except BaseException:
        for path in set(run_dir.iterdir()) - before:
            _remove(path)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Claim:
    """The right to write checkpoints: the newest claim on a run has it.

    A rank 0 can outlive its start: its command was killed a moment ago, or its node is cut off and does not know that
    training goes on elsewhere. It must not write any more, and nobody can wait for it.
    """

    def __init__(self, run_dir: Path):
        self._path, self._token = run_dir / CLAIM, secrets.token_hex(8)
        write_atomic(self._path, self._token)

    def require(self) -> None:
        """Raises RuntimeError when another process has claimed the run since; StoreUnavailable."""
        with away_is_unavailable(self._path):
            token = self._path.read_text()
        if token != self._token:
            raise RuntimeError(f"{self._path.parent}: another process has taken this run over; this one may not write")


def open_run(config: Config, manifest: Manifest, note: Callable[[str], None] = print) -> Path:
    """Make the run's folder, or check that the one there is of this run. Returns it.

    A run that has not finished a step begins anew with this config where it differs from the one it was made with.
    `note` takes a line about that, and one about keys that this release does not know.

    Raises UserError, with every difference, when the folder holds a run that began with another config or dataset.
    """
    run_dir = config.run_dir
    if not (run_dir / CONFIG).exists():
        make_dirs(run_dir)
        _write_began(config, manifest)
        return run_dir
    began = read_began(run_dir)
    if changes := changes_since(began, config, manifest):
        if has_progress(config, began):
            raise UserError(
                f"{run_dir}: this run began with another config; what may not change within a run has changed:\n  "
                + "\n  ".join(changes)
                + "\nUse the old values to continue it, or another --run name to start a new one."
            )
        for name in OF_THE_CONFIG:
            _remove(run_dir / name)
        _write_began(config, manifest)
        note(f"{config.run_name} has not finished a step, so it begins anew with this config: {'; '.join(changes)}")
    elif unknown := unknown_keys(began["config"]):
        listed = ", ".join(f"{key} = {value!r}" for key, value in unknown.items())
        note(f"{run_dir / CONFIG}: this release does not know {listed}; the run goes on without")
    return run_dir


def _write_began(config: Config, manifest: Manifest) -> None:
    began: dict[str, Any] = {
        "config": config.to_dict(),
        "dataset": manifest.fingerprint,
        "dataset_path": manifest.where,
    }
    write_atomic(config.run_dir / CONFIG, json.dumps(began, indent=2) + "\n")


def changes_since(began: dict[str, Any], config: Config, manifest: Manifest) -> list[str]:
    """What may not change within a run and has, a text each. began: `read_began`'s"""
    changes = changes_of_identity(began["config"], config)
    if began["dataset"] == manifest.fingerprint:
        return changes
    if began.get("dataset_path") == manifest.where:
        what = (
            f"dataset: {manifest.where} has other clips than when the run began (prepared anew, or continued with "
            "--retry-missing)"
        )
    else:
        what = f"dataset: {began.get('dataset_path')} -> {manifest.where} (other clips, or in another order)"
    return [*changes, what]


def has_progress(config: Config, began: dict[str, Any]) -> bool:
    """Whether a step of the run is safe, or was once: by its checkpoints, whole or damaged, here or where `config` and
    the config that it began with keep them, and by what its log says. Raises UserError: they cannot be looked at."""
    first = flatten(began["config"]).get("train.checkpoint_dir")
    with unwritable_is_a_user_error(config.run_dir):
        for place in {"", config.train.checkpoint_dir, first if isinstance(first, str) else ""}:
            train = dataclasses.replace(config.train, checkpoint_dir=place)
            store = checkpoint_store(dataclasses.replace(config, train=train))
            if store.names() or store.damaged():
                return True
        return (config.run_dir / SAVED).exists() or read_log(config.run_dir / TRAIN_LOG).saved is not None


def read_began(run_dir: Path) -> dict[str, Any]:
    """What config.json says of the run's beginning: "config", "dataset", "dataset_path". Raises UserError."""
    path = run_dir / CONFIG
    try:
        began: dict[str, Any] = json.loads(path.read_bytes())
        began["dataset"]
        if not isinstance(began["config"], dict):
            raise TypeError(f"its config is {began['config']!r:.60}")
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
