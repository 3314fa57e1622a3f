"""Metrics, pictures, config and code of a run on W&B. The training never waits for it, and never fails with it."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fvlm.config import Config
from fvlm.proxies import keep_loopback_direct
from fvlm.train.metrics import Row
from fvlm.train.sinks import Picture, wandb_id
from fvlm.train.wandb_choice import Mode, wandb_choice

COMMIT = "FVLM_COMMIT"
"""Environment variable: what code runs, where that is a copy without .git, as a job's is."""
MOST_WAITING = 10_000
"""Entries that wait for W&B, at most: hours of a network that is away."""
FINISH_S, MORE_S = 120.0, 30.0
"""How long W&B may take to send the rest at the end, and how long it is then waited for."""
REASON = 200
"""Characters of an error in a note, at most."""


@dataclass(frozen=True)
class Entry:
    step: int
    values: dict[str, Any]
    pictures: list[Picture] = field(default_factory=list)


class Wandb:
    """One W&B run for the whole life of a run folder: its id lies there, and every restart uses it.

    A thread of its own does everything, W&B's start included. What fails, a full disk, a dead service, is counted and
    noted once (`note`, always from the thread that calls `write`); what W&B cannot take in time waits in memory, up to
    MOST_WAITING entries. When it cannot be reached at the start, this start is kept in an offline file.

    W&B's own step is the training's, and never goes back: it drops a row that is behind. A restart goes over the steps
    since the checkpoint again. Their metrics have the same values, so those that W&B has are not sent again; an
    evaluation that W&B may lack is sent at W&B's step, and stands in its charts where `eval/step` says.

    code: folders whose Python files are kept with the run, beside the commit
    """

    def __init__(self, config: Config, note: Callable[[str], None], code: Sequence[Path] = ()):
        self._config, self._note, self._code = config, note, code
        self._choice = wandb_choice(config)
        self._id = wandb_id(config.run_dir)  # now: checkpoints tell it
        self._next = 0
        """W&B takes no step before this one."""
        self._entries: queue.Queue[Entry | None] = queue.Queue(MOST_WAITING)
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._missed = 0
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self._thread.start()

    def write(self, rows: list[Row], latest: Row) -> None:
        self._give(Entry(int(latest["step"]), {key: value for key, value in latest.items() if key != "step"}))

    def evaluated(self, row: Row, pictures: list[Picture]) -> None:
        values = {key: value for key, value in row.items() if key != "step"}
        self._give(Entry(int(row["step"]), values | {"eval/step": int(row["step"])}, pictures))

    def note(self, text: str) -> None:
        """W&B shows numbers; train.log has the notes."""

    def close(self) -> None:
        """Returns when W&B has everything, or cannot have it within FINISH_S."""
        with contextlib.suppress(queue.Full):
            self._entries.put(None, timeout=MORE_S)
        self._thread.join(FINISH_S + MORE_S)
        if self._thread.is_alive():
            self._news.put(f"W&B did not end within {FINISH_S + MORE_S:.0f} s and was ended; {self._later()}")
            kill_service()  # or this process would wait for it when it exits
        self._tell()
        if self._missed:
            self._note(f"W&B lacks {self._missed} entries of this start; metrics.jsonl and evals.jsonl have them")

    def _give(self, entry: Entry) -> None:
        self._tell()
        try:
            self._entries.put_nowait(entry)
        except queue.Full:
            self._miss("it has not taken anything for long")

    def _tell(self) -> None:
        while not self._news.empty():
            self._note(self._news.get())

    def _miss(self, why: str) -> None:
        self._missed += 1
        if self._missed == 1:
            self._news.put(f"W&B: {why[:REASON]}. Training goes on; what W&B lacks is counted at the end")

    def _later(self) -> str:
        return f"`wandb sync {self._config.run_dir}/wandb/*run-*` sends what is kept there"

    # ---- in the thread

    def _serve(self) -> None:
        run = self._begin()
        while (entry := self._entries.get()) is not None:
            try:
                if run is None:
                    self._missed += 1
                else:
                    self._log(run, entry)
            except Exception as error:  # noqa: BLE001  whatever happens to W&B, it is not the training's business
                self._miss(describe(error))
        try:
            if run is not None:
                run.finish()
        except Exception as error:  # noqa: BLE001  as above
            self._news.put(f"W&B: {describe(error)}; {self._later()}")

    def _begin(self) -> Any:
        """W&B's run; None where none can be had."""
        mode, run = self._choice.mode, None
        try:
            try:
                run = self._init(mode)
            except Exception as error:
                if mode == "offline":
                    raise
                self._news.put(f"W&B cannot be reached: {describe(error)}; {self._later()}")
                import wandb

                wandb.teardown()  # its service keeps the id of the run that it could not begin
                run = self._init("offline")
            self._introduce(run)
        except Exception as error:  # noqa: BLE001  as above
            self._news.put(f"W&B: {describe(error)}. Training goes on{'' if run else ' without it'}")
        return run

    def _init(self, mode: Mode) -> Any:
        folder = self._config.run_dir
        # Copies of what is to be sent belong to the run: they are needed as long as its offline files.
        keep_loopback_direct()  # a server of W&B's on this machine
        os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb" / "data"))
        import wandb  # heavy, and not wanted with --log.wandb off

        with own_argv():
            return wandb.init(
                project=self._choice.project,
                entity=self._choice.entity,
                name=self._config.run_name,
                id=self._id,
                resume="allow",
                dir=str(folder),
                mode="offline" if mode == "offline" else "online",
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    finish_timeout=FINISH_S,
                    # It would ask the checkout, if any, in which the run folder lies, and tell its remote's URL, in
                    # which people have tokens.
                    disable_git=True,
                ),
            )

    def _introduce(self, run: Any) -> None:
        """What W&B is told of this start before its metrics."""
        self._next = run.starting_step
        run.define_metric("eval/step", hidden=True)
        run.define_metric("eval/*", step_metric="eval/step")
        run.config.update(self._config.to_dict() | {"commit": code_version(self._code)}, allow_val_change=True)
        for package in self._code:
            run.log_code(str(package), name=f"source-{self._choice.project}-{package.name}")

    def _log(self, run: Any, entry: Entry) -> None:
        import wandb

        values, behind = dict(entry.values), entry.step < self._next
        if entry.pictures:
            values["eval/pictures"] = [wandb.Image(str(p.path), caption=p.caption) for p in entry.pictures]
        if not behind:
            run.log(values, step=entry.step)
        elif "eval/step" in values:
            run.log(values, step=self._next, commit=True)  # or the next evaluation would be put into the same row
            self._next += 1


def describe(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:REASON]}"


@contextlib.contextmanager
def own_argv() -> Iterator[None]:
    """W&B shows the command line of the process, and a Ray worker's may hold the password of the cluster's Redis."""
    before, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = before


def code_version(code: Sequence[Path]) -> str:
    """The commit that runs, with "-dirty" where files differ from it; "" where nobody knows."""
    if commit := os.environ.get(COMMIT):
        return commit
    if not code:
        return ""
    command = ["git", "-C", str(code[0]), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def kill_service() -> None:
    """W&B's own process, of this one."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if process.name() == "wandb-core":
                process.kill()
