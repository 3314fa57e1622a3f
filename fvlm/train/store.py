"""Where checkpoints are kept: a folder, or an object store. Each is there whole, or not at all, whatever kills us.

In a folder a checkpoint is written under a temporary name, fsynced and renamed. An object store has no rename: there
state.json is written last and deleted first, and is what makes a checkpoint one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from fvlm.config import Config
from fvlm.data.counts import count
from fvlm.data.storage import Storage
from fvlm.errors import Damaged, StoreUnavailable, UserError
from fvlm.files import (
    TEMPORARY,
    away_is_unavailable,
    fsync_dir,
    make_dirs,
    no_space_is_a_user_error,
    write_atomic,
    write_synced,
)
from fvlm.train.state import (
    MODEL,
    OPTIMIZER,
    REPLACED,
    STATE,
    Contents,
    DamagedCheckpoint,
    checkpoints,
    is_checkpoint_name,
    step_of,
    verify,
)

CHECKPOINTS = "checkpoints"
DAMAGED = "damaged-"
SAVED = "saved"
"""File in the run folder: that checkpoints were saved, and where, when that is elsewhere."""
DOWNLOADS = 3
"""Times that a checkpoint is fetched from a store before what arrives is taken for what is there."""


class CheckpointStore(Protocol):
    """One run's checkpoints. They go by their names; `locate` tells people where one is.

    One process at a time may write; any may read. What cannot be done raises UserError; a store or network disk that
    is away raises StoreUnavailable, and has what it had before.
    """

    def locate(self, name: str = "") -> str: ...

    def names(self) -> list[str]:
        """Of all whole checkpoints, oldest first, as far as names tell."""

    def damaged(self) -> list[str]:
        """What was set aside."""

    def write(self, contents: Contents) -> None:
        """Returns when it is safe. One of the same step is replaced; in a folder it is there until the new one is."""

    def delete(self, name: str) -> None: ...

    def open(self, name: str, progress: Callable[[], None] = ...) -> AbstractContextManager[Path]:
        """The checkpoint as a local folder, to be verified by whoever reads it.

        progress: called whenever a few MB more have been fetched
        """

    def set_aside(self, name: str) -> str:
        """Keep a damaged checkpoint's files, but under a name that nobody takes for one. Returns where they are."""

    def clean(self) -> None:
        """Remove what a killed writer left. For the process that owns the run."""


Guard = Callable[[], None]
"""Asked right before a checkpoint appears or goes; raises when that is no longer ours to do."""


def no_guard() -> None: ...


def checkpoint_store(config: Config, guard: Guard = no_guard) -> CheckpointStore:
    """Where this run's checkpoints are: `train.checkpoint_dir`, or the run's own folder."""
    place = config.train.checkpoint_dir
    if not place:
        return LocalStore(config.run_dir / CHECKPOINTS, guard)
    storage = Storage(place)
    if storage.is_local:
        return LocalStore(storage.folder / config.run_name, guard)
    path, question, options = place.partition("?")
    return RemoteStore(Storage(f"{path.rstrip('/')}/{config.run_name}{question}{options}"), guard)


class LocalStore:
    """A folder."""

    def __init__(self, root: Path, guard: Guard = no_guard):
        self.root, self._guard = root, guard

    def locate(self, name: str = "") -> str:
        return str(self.root / name)

    def names(self) -> list[str]:
        with away_is_unavailable(self.root):
            return [path.name for path in checkpoints(self.root)]

    def damaged(self) -> list[str]:
        with away_is_unavailable(self.root):
            return sorted(path.name for path in self.root.glob(f"{DAMAGED}*"))

    def write(self, contents: Contents) -> None:
        final = self.root / contents.name
        temporary = self.root / f"{TEMPORARY}{os.getpid()}-{final.name}"
        try:
            with no_space_is_a_user_error(final), away_is_unavailable(final, writing=True):
                make_dirs(self.root)
                shutil.rmtree(temporary, ignore_errors=True)  # of a process that had our number
                temporary.mkdir()
                files = contents.tensor_files()
                for name, file in files.items():
                    write_synced(temporary / name, file.pieces())
                write_synced(temporary / STATE, [contents.state_file(files)])
                fsync_dir(temporary)
                self._publish(temporary, final)
        except OSError as error:
            raise UserError(
                f"{final}: the checkpoint could not be written ({error}). Older ones are untouched. Mend that, and run "
                "the same command again."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _publish(self, temporary: Path, final: Path) -> None:
        self._guard()
        replaced = final.with_name(final.name + REPLACED)
        replaces = final.exists()
        if replaces:
            if replaced.exists():
                self._delete(replaced)
            final.rename(replaced)  # still a checkpoint to every reader, and no moment is without one
        temporary.rename(final)
        fsync_dir(self.root)
        if replaces:
            self._delete(replaced)

    def delete(self, name: str) -> None:
        with away_is_unavailable(self.root / name, writing=True):
            self._guard()
            self._delete(self.root / name)

    def _delete(self, path: Path) -> None:
        """Out of sight first, and for good: a half-deleted checkpoint must not look like one."""
        doomed = path.with_name(f"{TEMPORARY}{os.getpid()}-delete-{path.name}")
        path.rename(doomed)
        fsync_dir(self.root)
        shutil.rmtree(doomed)

    @contextlib.contextmanager
    def open(self, name: str, progress: Callable[[], None] = no_guard) -> Iterator[Path]:
        yield self.root / name

    def set_aside(self, name: str) -> str:
        with away_is_unavailable(self.root / name, writing=True):
            return self._set_aside(name)

    def _set_aside(self, name: str) -> str:
        aside = self.root / f"{DAMAGED}{name}"
        number = 1
        while aside.exists():  # the same step, damaged again
            number += 1
            aside = self.root / f"{DAMAGED}{name}.{number}"
        (self.root / name).rename(aside)
        fsync_dir(self.root)
        return str(aside)

    def clean(self) -> None:
        with away_is_unavailable(self.root, writing=True):
            self._clean()

    def _clean(self) -> None:
        for path in self.root.glob(f"{TEMPORARY}*"):
            shutil.rmtree(path)
        for path in self.root.glob(f"*{REPLACED}"):
            whole = path.with_name(path.name.removesuffix(REPLACED))
            if (whole / STATE).is_file():
                self._delete(path)
            else:
                path.rename(whole)
                fsync_dir(self.root)


class RemoteStore:
    """An object store, through `Storage`: each request is retried, each retry counted and logged."""

    def __init__(self, storage: Storage, guard: Guard = no_guard):
        self.storage, self._guard = storage, guard

    def locate(self, name: str = "") -> str:
        return self.storage.locate(name)

    def names(self) -> list[str]:
        whole = {folder for folder, file in self._files() if file == STATE and is_checkpoint_name(folder)}
        return sorted(whole)

    def damaged(self) -> list[str]:
        return sorted(folder for folder, file in self._files() if file == DAMAGED + STATE)

    def _files(self) -> set[tuple[str, str]]:
        """(folder, file) of everything that there is."""
        parts = (path.partition("/") for path in self.storage.tree())
        return {(folder, file) for folder, _, file in parts if file}

    def write(self, contents: Contents) -> None:
        files = contents.tensor_files()
        self._guard()
        self.storage.remove(f"{contents.name}/{STATE}")  # one of this step stops being one before it is changed
        self.storage.remove(f"{contents.name}/{DAMAGED}{STATE}")
        for name, file in files.items():
            self.storage.write(f"{contents.name}/{name}", file.pieces, file.size)
        state = contents.state_file(files)
        self._guard()
        self.storage.write(f"{contents.name}/{STATE}", lambda: [state], len(state))

    def delete(self, name: str) -> None:
        self._guard()
        for file in (STATE, MODEL, OPTIMIZER):
            self.storage.remove(f"{name}/{file}")

    @contextlib.contextmanager
    def open(self, name: str, progress: Callable[[], None] = no_guard) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="fvlm-checkpoint-") as folder:
            local = Path(folder) / name
            local.mkdir()
            self._fetch(name, local, progress)
            yield local

    def _fetch(self, name: str, local: Path, progress: Callable[[], None]) -> None:
        for attempt in range(DOWNLOADS):
            for file in (STATE, MODEL, OPTIMIZER):
                # What is not there shows when the folder is verified.
                with contextlib.suppress(Damaged), no_space_is_a_user_error(local):
                    self.storage.download(f"{name}/{file}", local / file, progress)
            try:
                verify(local)
                return
            except DamagedCheckpoint:
                if attempt + 1 < DOWNLOADS:
                    count("rereads")

    def set_aside(self, name: str) -> str:
        """Nothing can be renamed here: without its state.json it is no checkpoint any more."""
        with contextlib.suppress(Damaged):
            state = self.storage.read_bytes(f"{name}/{STATE}")
            self.storage.write(f"{name}/{DAMAGED}{STATE}", lambda: [state], len(state))
        self.storage.remove(f"{name}/{STATE}")
        return self.locate(f"{name}/{DAMAGED}{STATE}")

    def clean(self) -> None:
        found = self._files()
        for folder, file in sorted(found):
            vouched = {(folder, STATE), (folder, DAMAGED + STATE)} & found
            if is_checkpoint_name(folder) and not vouched:
                self.storage.remove(f"{folder}/{file}")


def prune(store: CheckpointStore, newest: int, keep_last: int, milestones: tuple[int, ...]) -> list[str]:
    """Delete all but the last `keep_last` checkpoints up to step `newest` and the milestones. Returns what went.

    One that was saved because somebody asked the run to stop is one of the last like any other. What is newer than
    `newest` is none of ours to judge.
    """
    ours = [name for name in store.names() if step_of(name) <= newest]
    old = [name for name in ours[:-keep_last] if not is_milestone(step_of(name), milestones)]
    for name in old:
        store.delete(name)
    return old


def is_milestone(step: int, milestones: tuple[int, ...]) -> bool:
    """One of the steps named, or a multiple of the last."""
    return step in milestones or (bool(milestones) and step % milestones[-1] == 0)


def newest_step(store: CheckpointStore) -> int:
    """Finished steps, from names alone; 0 before the first checkpoint."""
    names = store.names()
    return step_of(names[-1]) if names else 0


# ---- a place that is not the run's own folder may be empty because it is not mounted


def remember_place(store: CheckpointStore, run_dir: Path, name: str) -> None:
    """Let the run folder say that `store` has checkpoints, of which `name` is one; unless it says so already."""
    if (run_dir / SAVED).exists() and (run_dir / SAVED).read_text().endswith(f" in {store.locate()}\n"):
        return
    write_atomic(run_dir / SAVED, f"{name} in {store.locate()}\n")


def require_known(store: CheckpointStore, run_dir: Path, names: list[str]) -> None:
    """A run never starts over by itself: where it has saved, and `names` is empty, something is wrong with the place.

    Raises StoreUnavailable when the folder itself is not there, as without its mount; UserError when it is, and empty.
    """
    if names or not (run_dir / SAVED).exists():
        return
    saved = (run_dir / SAVED).read_text().strip()
    what = f"{store.locate()}: there is no checkpoint, and {run_dir / SAVED} says that this run saved {saved}"
    if isinstance(store, LocalStore) and not store.root.is_dir():
        raise StoreUnavailable(f"{what}. Mount the disk, or give its place as --train.checkpoint-dir.")
    raise UserError(f"{what}. Bring them back, give their place as --train.checkpoint-dir, or use another --run name.")
