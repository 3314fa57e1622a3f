"""Set-ups for `ray_jobs.doctor` to look at, whole and broken. Each test file makes its fixtures of the first three."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import write_dataset

from fvlm.checks import disk
from fvlm.checks.finding import Finding
from fvlm.checks.machine import Machine
from ray_jobs.checkup import look
from ray_jobs.options import parse

ROOT = Path(__file__).resolve().parents[1]

WSL2_VERSION = (
    "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@f9c826d3017f) (gcc (GCC) 11.2.0, GNU ld (GNU Binutils) "
    "2.37) #1 SMP Tue Nov 5 00:21:55 UTC 2024\n"
)

WSL2_MOUNTS = r"""none /mnt/wsl tmpfs rw,relatime 0 0
none /usr/lib/wsl/drivers 9p ro,nosuid,nodev,noatime,aname=drivers;fmask=222;dmask=222,mmap,access=client,trans=fd 0 0
/dev/sdc / ext4 rw,relatime,discard,errors=remount-ro,data=ordered 0 0
proc /proc proc rw,nosuid,nodev,noexec,noatime 0 0
C:\134 /mnt/c 9p rw,noatime,dirsync,aname=drvfs;path=C:\134;uid=1000;gid=1000;symlinkroot=/mnt/,mmap,trans=fd 0 0
D:\134 /mnt/My\040Disk 9p rw,noatime,dirsync,aname=drvfs;path=D:\134;uid=1000;gid=1000;symlinkroot=/mnt/,trans=fd 0 0
"""


def nothing_set(monkeypatch, tmp_path):
    """Short disk tests, and a shell of a user who has set nothing."""
    monkeypatch.setattr(disk, "MOST_BYTES", 16 << 20)
    for name in list(os.environ):
        if name.startswith(("RAY_", "FVLM_", "WANDB_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("FVLM_CLUSTER_DIR", str(tmp_path / "cluster"))


def dataset(tmp_path_factory) -> Path:
    """A dataset that is never changed."""
    return Path(write_dataset(tmp_path_factory.mktemp("doctor") / "data", clips=24).where)


def copied_dataset(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "data"))


def options(data: Path | str, runs: Path, *more: str) -> list[str]:
    small = "--data.frame-size 56 --data.global-batch 4 --data.lanes 4 --log.wandb off --scale.device cpu"
    return ["demo", "--data.path", str(data), "--runs-dir", str(runs), *small.split(), *more]


def copied_root(folder: Path, **files: str) -> Machine:
    """Real copies of the kernel's files, but for `files`: name with __ for / -> text."""
    for name in ("proc/version", "proc/mounts", "proc/meminfo", "proc/self/cgroup"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(Path("/", name).read_text())
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "dev").mkdir(exist_ok=True)
    (folder / "dev" / "shm").symlink_to("/dev/shm")
    return Machine(folder)


def look_at(args: list[str], machine: Machine | None = None) -> dict[str, Finding]:
    """What is said of a run; of several findings about one thing, the worst."""
    return worst(look(parse(args), 0.12, machine or Machine(), os.environ))


def worst(findings) -> dict[str, Finding]:
    order = ("ok", "note", "warn", "FAIL")
    found: dict[str, Finding] = {}
    for each in findings:
        if each.what not in found or order.index(each.level) > order.index(found[each.what].level):
            found[each.what] = each
    return found


def require(finding: Finding, level: str, value: str, cure: str) -> None:
    assert finding.level == level and value in finding.value and cure in finding.cure, str(finding)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own; where that is not permitted the test is skipped with its reason."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "fvlm-test", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def command(*args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ray_jobs.doctor", *map(str, args)]
    return subprocess.run(line, cwd=ROOT, env=env or os.environ, capture_output=True, text=True, timeout=250)
