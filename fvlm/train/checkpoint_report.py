"""The newest checkpoint of a run, looked at in passing: where and how old it is, and whether its sizes are right."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fvlm.config import Config
from fvlm.data.retries import Patience
from fvlm.errors import StoreUnavailable, UserError
from fvlm.train.state import STATE, DamagedCheckpoint, read_state, step_of
from fvlm.train.store import CHECKPOINTS, LocalStore, RemoteStore, checkpoint_store

GLANCE = Patience(attempts=2, first_wait_s=0.2, timeout_s=5.0)
"""How long a store of checkpoints is waited for."""


@dataclass(frozen=True)
class CheckpointReport:
    name: str
    step: int
    where: str
    age_s: float | None
    problem: str
    """Why it is not whole; "" where sizes and state.json's checksum are right. Not every byte is looked at."""


def look_at_newest(
    run_dir: Path, config: Config | None, saved: tuple[str, float] | None, now: float, remarks: list[str]
) -> tuple[CheckpointReport | None, bool]:
    """-> the newest, None where there is none; and whether it could be looked at: if not, a remark says why.

    saved: name and time of the last that the log calls safe; an object store tells no time
    """
    store = LocalStore(run_dir / CHECKPOINTS)
    try:
        if config and config.train.checkpoint_dir:
            place = checkpoint_store(config)
            if isinstance(place, RemoteStore):
                return _remote(RemoteStore(dataclasses.replace(place.storage, patience=GLANCE)), saved, now), True
            assert isinstance(place, LocalStore)
            store = place
        remarks += [f"{store.locate(name)}: a damaged checkpoint that was set aside" for name in store.damaged()]
        return _local(store, now), True
    except (OSError, UserError, StoreUnavailable) as error:
        remarks.append(f"checkpoints: {error}")
        return None, False


def _local(store: LocalStore, now: float) -> CheckpointReport | None:
    """Raises OSError when it may not be looked at."""
    names = store.names()
    if not names:
        return None
    path = store.root / names[-1]
    problem = _problem(path, {file.name: file.stat().st_size for file in path.iterdir()})
    return CheckpointReport(
        path.name, step_of(path), str(path), max(0.0, now - (path / STATE).stat().st_mtime), problem
    )


def _remote(store: RemoteStore, saved: tuple[str, float] | None, now: float) -> CheckpointReport | None:
    """Raises StoreUnavailable when the store cannot be reached, UserError when it refuses."""
    names = store.names()
    if not names:
        return None
    name = names[-1]
    tree = store.storage.tree()
    sizes = {path.rpartition("/")[2]: size for path, size in tree.items() if path.startswith(f"{name}/")}
    with tempfile.TemporaryDirectory(prefix="fvlm-status-") as folder:
        path = Path(folder) / name
        path.mkdir()
        (path / STATE).write_bytes(store.storage.read_bytes(f"{name}/{STATE}"))
        problem = _problem(path, sizes).replace(str(path), store.locate(name))
    age_s = now - saved[1] if saved and saved[0] == name else None
    return CheckpointReport(name, step_of(name), store.locate(name), age_s, problem)


def _problem(path: Path, sizes: dict[str, int]) -> str:
    """Why the checkpoint whose state.json lies in `path` is not whole, with these files; "" where all looks well."""
    try:
        files = read_state(path)["files"]
    except DamagedCheckpoint as error:
        return str(error).partition(" Delete ")[0]
    except UserError as error:
        return str(error)
    for name, wanted in files.items():
        if sizes.get(name) != wanted["bytes"]:
            there = f"{sizes[name]} bytes" if name in sizes else "is not there"
            return f"{path / name}: {there}, {wanted['bytes']} were written"
    return ""
