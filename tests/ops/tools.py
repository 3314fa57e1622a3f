"""The checkers: programs that the product does not need. They are installed under build/ops-tools on first use."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FOLDER = ROOT / "build" / "ops-tools"
INSTALL_S = 900
CHROMIUM = ("chromium", "chromium-driver")
"""Debian's packages."""


def run(
    *command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, seconds: float = 300
) -> tuple[int, str]:
    """-> exit code, and all that the command printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    return done.returncode, done.stdout


@cache
def checkers() -> Path:
    """bin/ of the environment with kubectl, kubernetes-validate, hadolint, Google's and Grafana's own descriptions."""
    return _environment("checkers", Path(__file__).with_name("requirements.txt"))


@cache
def skypilot() -> Path:
    """bin/ of the environment with SkyPilot."""
    return _environment("sky", Path(__file__).with_name("requirements-sky.txt"))


@cache
def prometheus() -> Path:
    """The folder of `prometheus` and `promtool`: installed ones, or Debian's package, unpacked and not installed."""
    found = shutil.which("promtool")
    if found and shutil.which("prometheus"):
        return Path(found).parent
    folder = FOLDER / "prometheus"
    programs = folder / "usr" / "bin"
    if not (programs / "prometheus").exists():
        if not shutil.which("apt-get"):
            pytest.skip("no prometheus on the PATH, and this is no Debian. Install prometheus and promtool.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if os.geteuid() == 0:
            run("apt-get", "update")
        code, said = run("apt-get", "download", "prometheus", cwd=folder)
        if code:
            pytest.skip(f"no prometheus: {said.strip().splitlines()[-1]}. Try: sudo apt-get install prometheus")
        (package,) = folder.glob("*.deb")
        assert run("dpkg", "-x", package, folder) == (0, "")
    return programs


@cache
def chromium() -> tuple[Path, Path]:
    """Chromium and its driver, from Debian's packages; installed where we may, since unpacked they lack libraries."""
    if not _found("chromium", "chromedriver") and shutil.which("apt-get") and os.geteuid() == 0:
        run("apt-get", "update")
        run("apt-get", "install", "-y", "--no-install-recommends", *CHROMIUM, seconds=INSTALL_S)
    if found := _found("chromium", "chromedriver"):
        return found[0], found[1]
    pytest.skip(f"no chromium and chromedriver on the PATH. Try: sudo apt-get install {' '.join(CHROMIUM)}")


def _found(*programs: str) -> list[Path]:
    """All of them, or none."""
    paths = [shutil.which(program) for program in programs]
    return [Path(path) for path in paths if path] if all(paths) else []


def _environment(name: str, requirements: Path) -> Path:
    """Made anew when the requirements have changed."""
    folder = FOLDER / name
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    ready = folder / "ready"
    if not (ready.exists() and ready.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        subprocess.run(
            [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements],
            check=True,
            timeout=INSTALL_S,
        )
        ready.write_text(wanted)
    return folder / "bin"


if __name__ == "__main__":  # to install them before the tests, whose time is limited
    for tool in (checkers, skypilot, prometheus, chromium):
        try:
            print(tool(), file=sys.stderr)
        except pytest.skip.Exception as lacking:
            print(f"left out: {lacking}", file=sys.stderr)
