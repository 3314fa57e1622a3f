"""A real cluster with token authentication, the commands that talk to it, and tiny runs: for the tests of jobs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests
from datasets import write_dataset

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "cluster" / "local"
RAY = Path(sys.executable).with_name("ray")
STEPS = re.compile(r"step (\d+)/")


@dataclass
class Cluster:
    """A cluster of this test file, and a place for its jobs."""

    folder: Path
    url: str
    metrics_url: str
    env: dict[str, str]
    """What a user's shell has: with the token."""
    start_env: dict[str, str]
    """What start.sh and stop.sh are told."""
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def jobs(self) -> dict[str, dict]:
        token = (self.folder / "token").read_text().strip()
        answer = requests.get(f"{self.url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=30)
        return {job["submission_id"]: job for job in answer.json() if job["submission_id"]}

    def stop(self, job: str) -> None:
        token = (self.folder / "token").read_text().strip()
        header = {"Authorization": f"Bearer {token}"}
        requests.post(f"{self.url}/api/jobs/{job}/stop", headers=header, timeout=30).raise_for_status()

    def training(self, run: str, steps: int) -> list[str]:
        """Options of a tiny run, all paths inside the cluster's folder."""
        paths = ["--run", run, "--data.path", str(self.folder / "data"), "--runs-dir", str(self.folder / "runs")]
        small = "--data.frame-size 56 --data.lanes 4 --data.global-batch 4 --data.window-steps 2 --log.wandb off"
        often = f"--train.max-steps {steps} --train.save-every 5 --train.log-every 1"
        return ["demo", *paths, *small.split(), *often.split()]


class Command:
    """A process with its output in a file that can be read while it runs."""

    def __init__(self, cluster: Cluster, args: list[str], env: dict[str, str] | None = None, cwd: Path = ROOT):
        with tempfile.NamedTemporaryFile(dir=cluster.folder, suffix=".txt", delete=False) as file:
            self._path = Path(file.name)
            self._process = subprocess.Popen(
                args, stdout=file, stderr=subprocess.STDOUT, env=env or cluster.env, cwd=cwd, start_new_session=True
            )
        cluster.started.append(self._process)

    @property
    def output(self) -> str:
        return self._path.read_text()

    def wait(self) -> int:
        return self._process.wait(timeout=150)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def running(self) -> bool:
        return self._process.poll() is None


def submit(cluster: Cluster, args: list[str], env: dict[str, str] | None = None, address: str = "") -> Command:
    command = [sys.executable, "-m", "ray_jobs.submit", *args, "--address", address or cluster.url]
    return Command(cluster, command, env)


def until(true: Callable[[], object], command: Command, seconds: float = 120) -> None:
    """Wait until `true()`, as long as the command that brings it about is running."""
    deadline = time.monotonic() + seconds
    while not true():
        assert command.running(), command.output
        assert time.monotonic() < deadline, command.output
        time.sleep(0.5)


def free_ports(count: int) -> int:
    """The first of `count` ports in a row on which nobody listens, below those that the system hands out; processes
    look in different places first."""
    for first in range(23000 + 50 * (os.getpid() % 100), 32000, 50):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError(f"no {count} free ports in a row below 32000")


def settings(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of a user whose home is `folder`, and that of start.sh and stop.sh: ports, a small cluster."""
    port = free_ports(9)
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FVLM_", "WANDB_"))}
    bare |= {"HOME": str(folder), "PATH": f"{RAY.parent}:{bare['PATH']}"}
    start = bare | {
        "FVLM_CLUSTER_DIR": str(folder),
        "FVLM_BASE_PORT": str(port),
        "FVLM_DASHBOARD_PORT": str(port + 7),
        "FVLM_METRICS_PORT": str(port + 8),
        "FVLM_NUM_CPUS": "4",
        "FVLM_OBJECT_STORE_MB": "512",
    }
    return bare, start


def joined(folder: Path, bare: dict[str, str], start: dict[str, str], said: str) -> Cluster:
    """The cluster that start.sh has started, by the lines that it `said`."""
    exports = dict(re.findall(r"^export (\w+)=(.*)$", said, re.MULTILINE))
    url, metrics = (f"http://127.0.0.1:{start[name]}" for name in ("FVLM_DASHBOARD_PORT", "FVLM_METRICS_PORT"))
    return Cluster(folder, url, f"{metrics}/metrics", bare | exports, start)


@contextlib.contextmanager
def workstation(environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """One machine's cluster, with token authentication and a tiny dataset; `environment` is everybody's there."""
    folder = Path(tempfile.mkdtemp(prefix="fvlm-"))  # pytest's own folders are too deep for Ray's sockets
    bare, start = (each | dict(environment or {}) for each in settings(folder))
    write_dataset(folder / "data")
    try:
        started = subprocess.run([LOCAL / "start.sh"], env=start, capture_output=True, text=True, check=False)
        assert started.returncode == 0, started.stderr
        cluster = joined(folder, bare, start, started.stdout)
        try:
            yield cluster
        finally:
            for process in cluster.started:
                process.kill()
                process.wait()
    finally:
        subprocess.run([LOCAL / "stop.sh"], env=start, check=True)
        shutil.rmtree(folder)


def members(cluster: Cluster, session: int) -> list[psutil.Process]:
    """Every living process of the cluster: of its session, or with its folder in the command line (a job's driver)."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = os.getsid(process.pid) == session or str(cluster.folder) in " ".join(process.cmdline())
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found
