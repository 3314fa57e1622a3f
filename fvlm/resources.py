"""What this process may use of its machine: memory, CPUs, processes, as containers and units limit them.

`root` may be a folder with copies of the kernel's files.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # Windows, from which runs are submitted and looked at
    resource = None  # type: ignore[assignment]

ROOT = Path("/")


def total_memory(root: Path = ROOT) -> int:
    """Bytes of the machine, or those that a container or unit may have, where that is less."""
    import psutil  # here and below, not above: the doctor says in words what cannot be imported

    return min([psutil.virtual_memory().total, *memory_limits(root)])


def available_memory(root: Path = ROOT) -> int:
    """Bytes that are free now, for this container or unit too."""
    import psutil

    free = psutil.virtual_memory().available
    return max(0, min([free, *(limit - used for limit, used in _memory_use(root))]))


def memory_limits(root: Path = ROOT) -> list[int]:
    """Bytes: of the control groups that this process is in, and of those above them (versions 1 and 2)."""
    return [limit for limit, _ in _memory_use(root)]


def _memory_use(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used), bytes, of every control group that has a limit. Pages that only cache files count as free."""
    for folder in _groups(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),  # above it everything is slowed down
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read(folder / limit_name)
            if limit.isdigit():
                used = _read(folder / used_name)
                yield int(limit), max(0, (int(used) if used.isdigit() else 0) - _cached(folder))


def _cached(folder: Path) -> int:
    """Bytes of files that the kernel drops when memory is wanted."""
    numbers = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    found = numbers.get("inactive_file") or numbers.get("total_inactive_file") or "0"
    return int(found) if found.isdigit() else 0


def usable_cpus(root: Path = ROOT) -> int:
    """CPUs that this process may run on: its affinity, and whole CPUs of its control groups' quota; at least 1."""
    has = getattr(os, "sched_getaffinity", None)
    cpus = [len(has(0)) if has else os.cpu_count() or 1]
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not period:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            cpus.append(int(quota) // int(period))
    return max(1, min(cpus))


def processes_left(root: Path = ROOT) -> int | None:
    """Processes and threads that may still be started: by `ulimit -u`, which root is free of, and by the control groups
    (Docker's --pids-limit). None: without a limit."""
    left = []
    for folder in _groups(root, "pids"):
        limit, used = _read(folder / "pids.max"), _read(folder / "pids.current")
        if limit.isdigit():
            left.append(int(limit) - (int(used) if used.isdigit() else 0))
    if resource and os.getuid() != 0:
        soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
        if soft != resource.RLIM_INFINITY:
            left.append(soft - _threads_of_this_user())
    return max(0, min(left)) if left else None


def most_open_files() -> int | None:
    """To which a process may raise its limit; None: without one."""
    if not resource:
        return None
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def _threads_of_this_user() -> int:
    import psutil

    count = 0
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid():
                count += process.num_threads()
        except psutil.Error:  # it has just ended, or is closed to us
            continue
    return count


def missing_for_compiling(device: str) -> str:
    """What torch.compile needs of this machine and does not find, in words; "" when it has all. device: "cuda", "cpu"

    Triton takes CC, gcc or clang; inductor, for a CPU, CXX or g++.
    """
    variable, names = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++",))
    given = os.environ.get(variable, "")
    if given and not shutil.which(given.split()[0]):
        return f"the compiler that {variable} names, {given}"
    if not given and not any(shutil.which(name) for name in names):
        return f"a compiler ({' or '.join(names)}, or one that {variable} names)"
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if headers.is_file() else f"Python's headers ({headers})"


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that limit this process with `controller`, its own first (versions 1 and 2)."""
    for line in _read(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        if line.count(":") < 2:
            continue
        number, controllers, path = line.split(":", 2)
        if number == "0":
            bases = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            bases = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        group = Path(path)
        for base in dict.fromkeys(bases):
            for above in (group, *group.parents):
                yield base / str(above).strip("/")


def _read(path: Path) -> str:
    """The text of a file of the kernel's, without blanks around it; "" where there is none."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
