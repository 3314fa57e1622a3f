"""Runs one pass in a fresh process and watches it from outside."""

from __future__ import annotations

import contextlib
import json
import re
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from processes import kill_tree, memory_bytes

HERE = Path(__file__).parent
SAMPLE_S = 0.1
WATCHING = 0.1
"""Largest share of one core that reading the memory may take (the kernel walks every page of every process)."""
LONGEST_S = 900


class PassFailed(Exception):
    """A pass that ended without a result; the message says why."""


def run_pass(python: Path, task: dict[str, Any], log: Path, watch_memory: bool) -> dict[str, Any]:
    """The result of `one_pass.py`, with `memory` where that was asked for. Raises PassFailed.

    Reading memory takes CPU time from the loader, so passes that are timed are not watched.
    """
    warm(Path(task["folder"]) / task["format"])
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(HERE / "one_pass.py"), json.dumps(task)]
    with log.open("w") as errors:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdin is not None
        try:
            answer = wait_for_line(child, None)
            idle = memory_bytes(child.pid) if watch_memory else None
            if answer == "idle":
                child.stdin.write("\n")
                child.stdin.flush()
                samples: list[dict[str, int]] | None = [] if watch_memory else None
                answer = wait_for_line(child, samples)
            with contextlib.suppress(subprocess.TimeoutExpired):  # its figures count, however it ends
                child.wait(timeout=60)
        finally:
            if child.poll() is None:
                kill_tree(child.pid)
                child.wait()
    if not isinstance(answer, dict):
        errors_said = [line for line in log.read_text().splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)]
        raise PassFailed(errors_said[-1] if errors_said else f"exit code {child.returncode}")
    if idle and samples:
        answer["memory"] = memory_figures(idle, samples)
    return answer


def memory_figures(idle: dict[str, int], samples: list[dict[str, int]]) -> dict[str, Any]:
    """The peak by kind, and the peak of each third of the time: with three epochs, whether they are alike."""
    peak = max(samples, key=lambda sample: sample["total"])
    third = -(-len(samples) // 3)
    thirds = [max(s["total"] for s in samples[i : i + third]) for i in range(0, len(samples), third)]
    return {"peak": peak, "idle": idle, "above_idle": peak["total"] - idle["total"], "peak_of_thirds": thirds}


def wait_for_line(child: subprocess.Popen[str], samples: list[dict[str, int]] | None) -> Any:
    """The next JSON value that the child says; None: it ended. Meanwhile its memory goes to `samples`."""
    assert child.stdout is not None
    deadline, pause = time.monotonic() + LONGEST_S, SAMPLE_S
    while time.monotonic() < deadline:
        ready, _, _ = select.select([child.stdout], [], [], pause)
        if ready:
            line = child.stdout.readline()
            return json.loads(line) if line else None
        if samples is not None:
            begin = time.process_time()
            samples.append(memory_bytes(child.pid))
            pause = max(SAMPLE_S, (time.process_time() - begin) / WATCHING)
    raise PassFailed(f"no answer within {LONGEST_S} s")


def warm(folder: Path) -> None:
    """Every pass finds its files in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass
