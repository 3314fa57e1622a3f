"""Whether every node that trains sees the folders that the machine sees which started the run, and not others there."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fvlm.config import Config
from fvlm.data.schema import MANIFEST
from fvlm.data.storage import Storage
from fvlm.errors import UserError
from fvlm.files import away_is_unavailable, make_dirs, unwritable_is_a_user_error, write_atomic
from fvlm.train.store import LocalStore, checkpoint_store

TOKEN = "node-check"
PATIENCE_S, POLL_S = 75.0, 1.0
"""A client of a network disk may not see for a minute what another one has just written."""


@dataclass(frozen=True)
class SharedFolders:
    """What the ranks' nodes must see: a value that travels to them. Each entry is (option, folder)."""

    token: str
    written: tuple[tuple[str, Path], ...]
    """Folders that hold TOKEN now."""
    datasets: tuple[tuple[str, Path, str], ...]
    """And the SHA-256 of its manifest.json: a copy on each node's own disk will do."""
    models: tuple[tuple[str, Path], ...]

    def require(self) -> None:
        """On a node. Raises UserError, naming node, option and folder: that is not there, or is another one."""
        deadline = time.monotonic() + PATIENCE_S
        while problem := self._problem():
            if time.monotonic() > deadline:
                raise UserError(
                    f"node {socket.gethostname()} ({address()}): {problem}. Every node that trains must see what the "
                    "machine sees on which the command runs: mount the same disk at the same path on all of them."
                )
            time.sleep(POLL_S)

    def _problem(self) -> str:
        for option, folder in self.written:
            there = content(folder / TOKEN)
            if there != self.token.encode():
                what = "no such folder" if not folder.is_dir() else "another folder, or a copy of it"
                return f"{folder} ({option}) is {what} there"
        for option, folder, sha256 in self.datasets:
            there = content(folder / MANIFEST)
            if there is None or hashlib.sha256(there).hexdigest() != sha256:
                return f"{folder} ({option}) holds {'no dataset' if there is None else 'another dataset'} there"
        for option, folder in self.models:
            if not folder.is_dir():
                return f"{folder} ({option}) is no folder there"
        return ""


def content(file: Path) -> bytes | None:
    """None where it is not there. Raises StoreUnavailable: its disk is away."""
    with away_is_unavailable(file), contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return file.read_bytes()
    return None


def address() -> str:
    """Of this node in the cluster."""
    import ray

    return str(ray.util.get_node_ip_address())


@contextlib.contextmanager
def shared_folders(config: Config) -> Iterator[SharedFolders]:
    """What this machine sees. Folders hold TOKEN for the length of the block. Raises UserError, StoreUnavailable."""
    token, store = secrets.token_hex(16), checkpoint_store(config)
    written = [("--runs-dir", config.run_dir)]
    if config.train.checkpoint_dir and isinstance(store, LocalStore):
        written.append(("--train.checkpoint-dir", store.root))
    datasets = []
    for option, path in (("--data.path", config.data.path), ("--eval.path", config.eval.path)):
        if path and (place := Storage(path)).is_local:
            datasets.append((option, place.folder, hashlib.sha256(place.read_bytes(MANIFEST)).hexdigest()))
    names = (("--model.vision", config.model.vision), ("--model.language", config.model.language))
    models = [(option, Path(name)) for option, name in names if Path(name).is_dir()]
    try:
        for _, folder in written:
            with unwritable_is_a_user_error(folder / TOKEN), away_is_unavailable(folder, writing=True):
                make_dirs(folder)
                write_atomic(folder / TOKEN, token)
        yield SharedFolders(token, tuple(written), tuple(datasets), tuple(models))
    finally:
        for _, folder in written:
            with contextlib.suppress(OSError):
                (folder / TOKEN).unlink(missing_ok=True)
