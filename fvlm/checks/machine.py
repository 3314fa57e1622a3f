"""The machine, by the files in which the kernel describes it. `root` may be a folder with copies of such files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fvlm.checks.finding import Finding, gb
from fvlm.errors import UserError
from fvlm.resources import memory_limits, most_open_files, processes_left, usable_cpus
from fvlm.wsl2 import is_wsl2

WINDOWS_DRIVES = ("9p", "drvfs")
"""File systems through which WSL2 sees the drives of Windows."""
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "virtiofs", "fuse.sshfs", "ceph", "lustre")
IN_MEMORY = ("tmpfs", "ramfs")
FEWEST_PROCESSES, ENOUGH_PROCESSES = 400, 2000
"""Processes and threads. One rank and its cluster took 501 at the most, measured on two CPUs; with more CPUs and ranks
it takes more."""
FEWEST_OPEN_FILES = 4096
"""Below this Ray warns: each worker process costs the raylet several."""
COMMIT_STRICTLY = 2
"""Value of vm.overcommit_memory."""


@dataclass(frozen=True)
class Mount:
    source: str
    point: str
    kind: str
    """Type of the file system."""
    options: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        return "ro" in self.options


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    total: int
    available: int
    limit: int | None
    """What a container or a unit allows, where that is less than the machine has."""

    @property
    def usable(self) -> int:
        return min(self.total, self.limit or self.total)


@dataclass(frozen=True)
class Machine:
    root: Path = Path("/")

    def read(self, path: str) -> str:
        """The text of a file of the kernel's; "" where there is none."""
        try:
            return (self.root / path).read_text(errors="replace")
        except OSError:
            return ""

    @property
    def kernel(self) -> str:
        return self.read("proc/version").split(" (")[0].removeprefix("Linux version ").strip() or "unknown"

    @property
    def is_wsl2(self) -> bool:
        return is_wsl2(self.kernel)

    def mounts(self) -> list[Mount]:
        fields = [line.split() for line in self.read("proc/mounts").splitlines()]
        return [
            Mount(_plain(line[0]), _plain(line[1]), line[2], tuple(line[3].split(",")))
            for line in fields
            if len(line) > 3
        ]

    def mount_of(self, path: Path) -> Mount | None:
        """Where `path` lies, links followed; None where nothing is known of mounts. The last of one place is on top."""
        found = None
        real = path.resolve()
        for mount in self.mounts():
            if real.is_relative_to(mount.point) and (not found or len(mount.point) >= len(found.point)):
                found = mount
        return found

    def memory(self) -> Memory:
        known = {name: int(kb) << 10 for name, kb in re.findall(r"(\w+):\s+(\d+) kB", self.read("proc/meminfo"))}
        total, available = known.get("MemTotal", 0), known.get("MemAvailable", 0)
        limits = [limit for limit in memory_limits(self.root) if limit < total]
        return Memory(total, min([available, *limits]), min(limits, default=None))

    def nvidia_gpus(self) -> list[str]:
        """Device nodes of NVIDIA GPUs; WSL2 has one for all, and tells by the driver's library that it is NVIDIA's."""
        nodes = sorted(path for path in (self.root / "dev").glob("nvidia*") if path.name[6:].isdigit())
        if not nodes and (self.root / "dev/dxg").exists() and (self.root / "usr/lib/wsl/lib/libcuda.so.1").exists():
            nodes = [self.root / "dev/dxg"]
        return ["/" + str(path.relative_to(self.root)) for path in nodes]


def _plain(text: str) -> str:
    r"""/mnt/my\040disk -> /mnt/my disk"""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def look_at_machine(machine: Machine) -> list[Finding]:
    """Kernel, memory, limits."""
    memory, found = machine.memory(), []
    cpus, all_cpus = usable_cpus(machine.root), os.cpu_count() or 1
    system = f"Linux {machine.kernel}, {all_cpus} CPUs"
    if cpus < all_cpus:
        system += f", of which this process may use {cpus}"
    if machine.is_wsl2:
        found.append(
            Finding(
                "note",
                "system",
                f"{system}, WSL2 with {gb(memory.total)} of the computer's memory",
                "WSL2 takes half of the memory unless .wslconfig in Windows says `memory=`; cluster/README.md says how "
                "a run goes on after a reboot there.",
            )
        )
    else:
        found.append(Finding("ok", "system", system))
    limit = f", of which this container or unit may use {gb(memory.limit)}" if memory.limit else ""
    found.append(Finding("ok", "memory", f"{gb(memory.total)}{limit}, {gb(memory.available)} available"))
    return found + _limits(machine)


def look_at_processes(machine: Machine) -> list[Finding]:
    """Nothing where there is room for Ray's processes and their threads."""
    left = processes_left(machine.root)
    if left is None or left >= ENOUGH_PROCESSES:
        return []
    return [
        Finding(
            "FAIL" if left < FEWEST_PROCESSES else "warn",
            "processes",
            f"{left} more processes and threads may be started here; a run takes hundreds, with many CPUs thousands",
            "Raise `ulimit -u` (/etc/security/limits.conf), TasksMax of the unit, --pids-limit in Docker, or "
            "podPidsLimit in Kubernetes.",
        )
    ]


def require_processes(machine: Machine) -> None:
    """Raises UserError where a cluster of this machine could not come up: it would hang, or die without a word."""
    for finding in look_at_processes(machine):
        if finding.level == "FAIL":
            raise UserError(f"{finding.value}. {finding.cure}")


def _limits(machine: Machine) -> list[Finding]:
    found = []
    hard = most_open_files()  # Ray raises its own limit to this
    if hard is not None and hard < FEWEST_OPEN_FILES:
        found.append(
            Finding(
                "warn",
                "open files",
                f"a process may have {hard}; Ray wants {FEWEST_OPEN_FILES} or more",
                "LimitNOFILE=65536 in its unit, `--ulimit nofile=65536` in Docker, or /etc/security/limits.conf.",
            )
        )
    found += look_at_processes(machine)
    if machine.read("proc/sys/vm/overcommit_memory").strip() == str(COMMIT_STRICTLY):
        found.append(
            Finding(
                "warn",
                "memory policy",
                "vm.overcommit_memory is 2: processes may not reserve more than they use, as torch and Ray do",
                "sudo sysctl vm.overcommit_memory=0",
            )
        )
    return found
