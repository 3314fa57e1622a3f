"""What the scripts in cluster/local write for systemd, read as systemd reads it; and a user's home to write it to."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from jobs import LOCAL

AWKWARD = "a b 100% $HOME \"q\" 'r' back\\slash c=d"
"""A name of a folder with all that systemd gives a meaning to."""

FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$HOME/log"
[ ! -e "$HOME/refuse-$(basename "$0")" ]
"""


class Home:
    """A home of its own, whose systemctl and loginctl write down what they are asked."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None, local: Path = LOCAL):
        self.folder, self.local = folder, local
        (folder / "bin").mkdir(parents=True)
        for name in ("systemctl", "loginctl"):
            (folder / "bin" / name).write_text(FAKE)
            (folder / "bin" / name).chmod(0o755)
        env = env or {name: value for name, value in os.environ.items() if not name.startswith(("FVLM_", "XDG_"))}
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
        self.env = env | {"HOME": str(folder), "PATH": path}
        self.env.setdefault("FVLM_CLUSTER_DIR", "/tmp/fvlm-test-cluster")
        self.units = folder / ".config" / "systemd" / "user"
        self.environment = folder / ".config" / "fvlm" / "environment"

    def run(self, script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["bash", self.local / script, *args]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=30)

    def asked(self) -> list[str]:
        lines = (self.folder / "log").read_text().splitlines()
        (self.folder / "log").unlink()
        return lines

    def files(self) -> list[str]:
        """What a script of ours may have written."""
        found = [path for path in self.folder.rglob("*") if not path.is_dir() and path.parent.name != "bin"]
        return sorted(str(path.relative_to(self.folder)) for path in found if path.name != "log")


def single(text: str, sign: str) -> str:
    """Without the doubling that keeps systemd from giving `sign` a meaning."""
    assert sign not in text.replace(sign * 2, ""), f"systemd would take the {sign} in {text} for a variable"
    return text.replace(sign * 2, sign)


class Unit:
    """A unit file, read by the rules of systemd.syntax(7) and systemd.service(5)."""

    def __init__(self, path: Path):
        lines = [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]
        self._values: dict[str, list[str]] = {}
        for line in lines:
            name, _, value = line.partition("=")
            self._values.setdefault(name, []).append(value)

    def plain(self, name: str) -> str:
        (value,) = self._values[name]
        return single(value, "%")

    def words(self, name: str) -> list[str]:
        return [single(word, "%") for value in self._values[name] for word in shlex.split(value)]

    def command(self, name: str) -> list[str]:
        return [single(word, "$") for word in self.words(name)]

    def execute(self, name: str, home: Path) -> subprocess.CompletedProcess[str]:
        """Run the command line as systemd would: with nothing in the environment that the unit does not name."""
        env = {"HOME": str(home)} | dict(word.split("=", 1) for word in self.words("Environment"))
        cwd = self.plain("WorkingDirectory")
        return subprocess.run(
            self.command(name), cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120
        )
