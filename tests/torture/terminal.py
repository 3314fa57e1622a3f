"""A person at a terminal who knows the README: start.sh, stop.sh, ray_jobs.submit, `ray job stop`, and nothing else.

Nothing here waits: `tick` looks at the command that runs, and starts the next one when it has ended.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from jobs import free_ports

PROJECT = Path(__file__).resolve().parents[2]
LOCAL = PROJECT / "cluster" / "local"
BIN = Path(sys.executable).parent
PORTS = 9
LOOK_S, PATIENCE_S = 0.5, 5.0
"""How often the person looks whether the cluster can be reached; and how long it cannot be until it is given up."""
SUBMIT, START, STOP, STOP_JOB = "submit", "start.sh", "stop.sh", "ray job stop"
TAIL_LINES = 40


@dataclass
class Running:
    name: str
    process: subprocess.Popen[bytes]
    log: Path
    interrupted_at: float | None = None

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


@dataclass
class Terminal:
    """`folder`: for the cluster, the logs, and HOME."""

    folder: Path
    cpus: int
    store_mb: int
    commands: list[tuple[float, str]] = field(default_factory=list)
    """Every command that was given, and when."""
    sessions: set[int] = field(default_factory=set)
    """Process sessions of all clusters that were started."""
    finished: bool = False
    hands_off: bool = False
    """The person waits before giving another command."""

    def __post_init__(self) -> None:
        self._base = free_ports(PORTS)
        self.url = f"http://127.0.0.1:{self._base + 7}"
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FVLM_", "WANDB_"))}
        self._env = bare | {
            "HOME": str(self.folder),
            "PATH": f"{BIN}:{bare['PATH']}",
            "FVLM_CLUSTER_DIR": str(self.cluster),
            "FVLM_BASE_PORT": str(self._base),
            "FVLM_DASHBOARD_PORT": str(self._base + 7),
            "FVLM_METRICS_PORT": str(self._base + 8),
            "FVLM_NUM_CPUS": str(self.cpus),
            "FVLM_OBJECT_STORE_MB": str(self.store_mb),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.cluster / "token"),
        }
        (self.folder / "logs").mkdir(exist_ok=True)
        self._training: list[str] = []
        self._current: Running | None = None
        self._beside: list[Running] = []
        self._lost_since: float | None = None
        self._looked_at = 0.0

    @property
    def cluster(self) -> Path:
        return self.folder / "c"

    # ---- commands

    def train(self, training: list[str]) -> None:
        """Begin a run. training: what follows `python -m ray_jobs.submit`."""
        self._training, self.finished = training, False
        self.give(SUBMIT if self.is_up() else START)

    def give(self, name: str) -> None:
        """Give the command that is to be looked after from now on."""
        commands = {
            START: [str(LOCAL / "start.sh")],
            STOP: [str(LOCAL / "stop.sh")],
            SUBMIT: [sys.executable, "-m", "ray_jobs.submit", *self._training, "--address", self.url],
        }
        self._lost_since = None
        self._current = self._start(name, commands[name])

    def stop_job(self) -> bool:
        """`ray job stop`, as the submit command has told. Returns False while there is no job yet."""
        told = re.findall(r"stop it: +(ray job stop .*)", self._current.output) if self._current else []
        if not (told and self.following):
            return False
        self._beside.append(self._start(STOP_JOB, told[-1].split()))
        return True

    def _start(self, name: str, command: list[str]) -> Running:
        log = self.folder / "logs" / f"{len(self.commands):03d}-{name.replace(' ', '-')}.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._env, cwd=PROJECT,
                start_new_session=True,
            )  # fmt: skip
        self.commands.append((time.monotonic(), name))
        return Running(name, process, log)

    def tick(self) -> None:
        """See what has become of the command, and give the next one."""
        self._beside = [other for other in self._beside if other.process.poll() is None]
        self._know_session()
        current = self._current
        if current is None or self.finished:
            return
        code = current.process.poll()
        if code is None:
            if current.name == SUBMIT and self._is_lost():
                self._interrupt(current)
        elif current.name == SUBMIT and code == 0:
            self.finished = True
        elif not self.hands_off:
            self.give(self._next(current.name, code))

    def _next(self, name: str, code: int) -> str:
        if name == START:
            return SUBMIT if code == 0 else STOP
        if name == STOP:
            return START
        return SUBMIT if self.is_up() else START

    def _interrupt(self, command: Running) -> None:
        """Ctrl-C, and after a while no more patience."""
        now = time.monotonic()
        if command.interrupted_at is None:
            command.interrupted_at = now
            command.process.send_signal(signal.SIGINT)
        elif now > command.interrupted_at + PATIENCE_S:
            command.process.kill()

    @property
    def following(self) -> bool:
        """Whether a submit command runs."""
        return self._current is not None and self._current.name == SUBMIT and self._current.process.poll() is None

    # ---- the cluster

    def leader(self) -> int | None:
        """The process that start.sh left in charge, while it lives."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.cluster / "pid").read_text())
            if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return pid
        return None

    def _know_session(self) -> None:
        if leader := self.leader():
            self.sessions.add(leader)

    def is_up(self) -> bool:
        """Whether the dashboard can be reached."""
        if self.leader() is None:
            return False
        try:
            socket.create_connection(("127.0.0.1", self._base + 7), timeout=1).close()
        except OSError:
            return False
        return True

    def _is_lost(self) -> bool:
        """Whether it has been out of reach for longer than a person waits."""
        now = time.monotonic()
        if now < self._looked_at + LOOK_S:
            return False
        self._looked_at = now
        if self.is_up():
            self._lost_since = None
        elif self._lost_since is None:
            self._lost_since = now
        return self._lost_since is not None and now > self._lost_since + PATIENCE_S

    def tail(self) -> str:
        """The last lines of the last two commands."""
        logs = sorted((self.folder / "logs").glob("*.txt"))[-2:]
        return "\n".join(
            line
            for log in logs
            for line in [f"---- {log}", *log.read_text(errors="replace").splitlines()[-TAIL_LINES:]]
        )

    def close(self) -> list[str]:
        """stop.sh. Returns what it left behind, a line for each process, after killing that too."""
        for command in [*self._beside, *([self._current] if self._current else [])]:
            command.process.kill()
            command.process.wait()
        self._know_session()
        with (self.folder / "logs" / "at-the-end-stop.sh.txt").open("wb") as output:
            subprocess.run([LOCAL / "stop.sh"], env=self._env, stdout=output, stderr=output, timeout=120, check=False)
        deadline = time.monotonic() + 15  # Ray's guard of a job's driver looks once a second
        while (left := self.members()) and time.monotonic() < deadline:
            time.sleep(0.3)
        told = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                told.append(f"{process.pid} {' '.join(process.cmdline())[:120]}")
                process.kill()
        return told

    def members(self) -> list[psutil.Process]:
        """Every living process of our clusters: of their sessions, or with our folder in the command line (drivers)."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                ours = os.getsid(process.pid) in self.sessions or self._is_driver(process)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _is_driver(self, process: psutil.Process) -> bool:
        line = process.cmdline()
        return "ray_jobs.train" in line and any(part.startswith(f"{self.folder}/") for part in line)
