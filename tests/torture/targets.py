"""How each kind of kill is made."""

from __future__ import annotations

import contextlib
import random
import signal
from dataclasses import dataclass

import psutil

from torture.disk import SmallDisk
from torture.terminal import Terminal

ACTORS = {
    # Part of the name that Ray gives a worker's process: what it is, or what it does at the moment.
    "worker": "RayTrainWorker",
    "decoder": "ingest decode",
    "coordinator": "SplitCoordinator",
    "controller": "TrainController",
    "ledger": "Ledger",
}
DAEMONS = {"raylet": "raylet", "head": "gcs_server"}
LONGEST_FULL_S = 20.0
"""A job that has not ended for a full disk by then is not waited for any more."""
ENDS_THE_JOB = {"raylet", "driver", "head", "stop"}
"""After these the run goes on with another submission, and not before."""
GOES_ON_AFTER_S = {"decoder": 5.0, "ledger": 5.0, "disk": LONGEST_FULL_S + 5.0}
"""The ranks may get over these without a start: so many seconds of going on show that they do."""


@dataclass
class Targets:
    terminal: Terminal
    disk: SmallDisk | None

    def hit(self, kind: str, draw: random.Random) -> str:
        """Make the kill. Returns what was hit; '' while there is nothing to hit."""
        if kind == "stop":
            return "ray job stop" if self.terminal.stop_job() else ""
        if kind == "disk":
            assert self.disk is not None
            return f"{self.disk.fill() / 1e6:.0f} MB filled" if self.terminal.following else ""
        there = [process for process in self.terminal.members() if is_target(kind, process)]
        if not there:
            return ""
        victim = draw.choice(sorted(there, key=lambda process: process.pid))
        with contextlib.suppress(psutil.Error):
            victim.send_signal(signal.SIGKILL)  # psutil looks whether it is still the same process
            return f"process {victim.pid}"
        return ""


def is_target(kind: str, process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        if kind == "driver":
            return "ray_jobs.train" in line and line[0].rpartition("/")[2].startswith("python")
        if kind in DAEMONS:
            return process.name() == DAEMONS[kind]
        title = " ".join(line)
        return title.startswith("ray::") and ACTORS[kind] in title
    return False
