"""One `python -m ray_jobs.train`, watched while it runs: when its steps and the lines of its log came."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from fvlm.train.sinks import METRICS, TRAIN_LOG

ROOT = Path(__file__).resolve().parents[3]
TICK_S = 0.02
ENDS_WITHIN_S = 15.0
"""A command that was asked to end has so long before it is killed."""
RANK = "RayTrainWorker"
"""In the title of a rank's process."""
LINES_SHOWN = 30
ABORTED = -signal.SIGABRT
"""Exit code of a process that had done its work and was aborted by a library at the interpreter's end, as was seen with
the versions of one machine. What it was to write is there, or its absence is the error."""
STARTED = re.compile(r" started in \d")
SAVED = re.compile(r" saved step-")
FINISHED = re.compile(r" finished \d+ steps in ")


class Failed(Exception):
    """A command failed, or was cut; the text ends with the last lines that it printed."""


def environment(folder: Path) -> dict[str, str]:
    """That of the commands: no cluster but their own, whose files lie in `folder`; no network; this repository's code.

    A cluster of their own is as large as the run needs (`ray_jobs.train.cluster`), and ends with its command.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return kept | {"PYTHONPATH": path, "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def call(command: list[str], output: Path, folder: Path, deadline: float, codes: tuple[int, ...] = (0,)) -> str:
    """Run a Python command until its end. -> what it printed. Raises Failed."""
    with contextlib.closing(Watched(command, output, folder)) as process:
        process.wait(deadline)
        process.require_code((*codes, ABORTED))
        return output.read_text()


class Watched:
    """A process whose output goes to a file, and that leaves nothing behind when it is closed."""

    def __init__(self, command: list[str], output: Path, folder: Path):
        self._output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment(folder), stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self, deadline: float, tick: Callable[[], None] = lambda: None) -> None:
        """Until the process ends, calling `tick` all the time. Raises Failed at `deadline` (time.monotonic)."""
        while self.process.poll() is None:
            tick()
            if time.monotonic() > deadline:
                self.close()
                tick()
                raise Failed(f"cut: its time is over\n{self.tail()}")
            time.sleep(TICK_S)
        tick()

    def require_code(self, codes: tuple[int, ...] = (0,)) -> None:
        """Raises Failed."""
        if self.process.returncode not in codes:
            raise Failed(f"exit code {self.process.returncode}\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self._output.read_text(errors="replace").splitlines()[-LINES_SHOWN:])

    def family(self) -> list[psutil.Process]:
        """Everything that the process has started and that lives."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def close(self) -> None:
        """Ask it to end; kill what is left of it and of what it has started."""
        if self.process.poll() is not None:
            return
        family = self.family()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDS_WITHIN_S)
        self.process.kill()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil knows a process from another with its number
                process.kill()
        self.process.wait()


class Training:
    """A run with its folder. Times are of time.monotonic.

    steps: when how many steps were first seen in metrics.jsonl
    lines: when which line was first seen in train.log
    """

    def __init__(self, folder: Path, name: str, command: list[str]):
        self.folder, self.name = folder, name
        self.run_dir = folder / "runs" / name
        self._command = ["-m", "ray_jobs.train", *command, "--run", name, "--runs-dir", str(folder / "runs")]
        self.steps: list[tuple[float, int]] = []
        self.lines: list[tuple[float, str]] = []
        self.exit_code: int | None = None
        self.killed_at: float | None = None
        self.killed_step = 0
        self._log_read = 0

    def run(self, deadline: float, kill_at: int | None = None) -> None:
        """Until its end. kill_at: once so many steps are done and a checkpoint is safe, SIGKILL its rank.

        Raises Failed.
        """
        watched = Watched(self._command, self.folder / f"{self.name}.txt", self.folder)

        def tick() -> None:
            self.look()
            if kill_at is None or self.killed_at is not None or not self.steps or self.steps[-1][1] < kill_at:
                return
            if self.seen(SAVED):
                self._kill_rank(watched)

        with contextlib.closing(watched):
            watched.wait(deadline, tick)
            self.exit_code = watched.process.returncode
            watched.require_code((0, ABORTED) if self.seen(FINISHED) else (0,))
        if kill_at is not None and self.killed_at is None:
            raise Failed(f"the run ended before it was killed at step {kill_at}\n{watched.tail()}")

    def _kill_rank(self, watched: Watched) -> None:
        (rank,) = [one for one in watched.family() if RANK in " ".join(one.cmdline())]
        rank.send_signal(signal.SIGKILL)
        self.killed_at, self.killed_step = time.monotonic(), self.steps[-1][1]

    def look(self) -> None:
        """Take note of what is new in its files."""
        now, step = time.monotonic(), newest_step(self.run_dir / METRICS)
        if step and (not self.steps or step != self.steps[-1][1]):
            self.steps.append((now, step))
        with contextlib.suppress(FileNotFoundError), (self.run_dir / TRAIN_LOG).open("rb") as log:
            log.seek(self._log_read)
            whole = log.read().rpartition(b"\n")[0]
            if whole:
                self._log_read += len(whole) + 1
                self.lines += [(now, line) for line in whole.decode(errors="replace").split("\n")]

    def seen(self, pattern: re.Pattern[str], after: float = 0.0) -> list[tuple[float, str]]:
        """Lines of train.log in which the pattern is."""
        return [(at, line) for at, line in self.lines if at > after and pattern.search(line)]

    def rows(self) -> list[dict[str, Any]]:
        """metrics.jsonl; the last line may be half-written."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.run_dir / METRICS).read_text()
            return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return []


def newest_step(path: Path) -> int:
    """Of the last whole line; 0 where there is none."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        whole, _, _ = file.read().rpartition(b"\n")
        with contextlib.suppress(ValueError):
            return int(json.loads(whole.rpartition(b"\n")[2])["step"])
    return 0
