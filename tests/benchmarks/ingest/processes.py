"""What a tree of processes costs: CPU seconds and proportional memory, from /proc (Linux only).

Runs in every environment of the benchmark, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36
MEMORY = {"Pss": "total", "Pss_Anon": "anon", "Pss_File": "file", "Pss_Shmem": "shmem"}


def adopt_orphans() -> None:
    """Whatever a descendant leaves behind becomes this process's child, and so stays in its tree."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def tree(root: int) -> dict[int, list[str]]:
    """pid -> fields of /proc/PID/stat from the third on, for `root` and all its descendants; zombies too."""
    stats: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            stats[int(entry.name)] = text[text.rindex(")") + 2 :].split()  # the name may hold spaces
    inside = {root}
    while grown := {pid for pid, fields in stats.items() if pid not in inside and int(fields[1]) in inside}:
        inside |= grown
    return {pid: stats[pid] for pid in inside if pid in stats}


def cpu_seconds(root: int) -> float:
    """User and system time of the tree: of all that live, and of all that died and were waited for."""
    return sum(sum(map(int, fields[11:15])) for fields in tree(root).values()) / TICK


def memory_bytes(root: int) -> dict[str, int]:
    """Proportional set size of the tree (a page that n processes map counts 1/n in each), in all and by kind."""
    sizes = dict.fromkeys(MEMORY.values(), 0)
    for pid in tree(root):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in lines[1:]:
            key, value = line.split(":")
            if key in MEMORY:
                sizes[MEMORY[key]] += int(value.split()[0]) * 1024
    return sizes


def kill_tree(root: int) -> None:
    for pid in tree(root):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
