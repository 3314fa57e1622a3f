"""Shell scripts, and those inside other files, read by shellcheck; the commands of ours that stand in them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from fvlm.presets import PRESETS

SHELLCHECK = Path(sys.executable).with_name("shellcheck")


def shellcheck(script: str, leave_out: str = "") -> list[str]:
    """What it says of a bash script, a line a finding."""
    command = [SHELLCHECK, "--shell=bash", "--format=gcc", f"--exclude={leave_out}", "-"]
    done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=60, check=False)
    return (done.stdout + done.stderr).splitlines()


def training_commands(text: str) -> list[list[str]]:
    """What follows `ray_jobs.train` or `ray_jobs.submit` wherever it stands, in comments too."""
    text = re.sub(r"\\\n[# ]*", " ", text)
    presets = "|".join(PRESETS)
    found = re.findall(rf"(?:ray_jobs\.(?:train|submit)|slurm\.sbatch) +((?:{presets}) .*)", text)
    return [shlex.split(one) for one in found]
