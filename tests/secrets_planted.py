"""Recognisable secrets for the environment of a command, and where they turn up afterwards."""

from __future__ import annotations

import os
from pathlib import Path

SECRETS = {
    "WANDB_API_KEY": "1badc0de" * 5,
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-2badc0de",
    "HF_TOKEN": "hf_planted3badc0de",
    "RAY_AUTH_TOKEN": "4badc0de" * 8,
}


def leaks(*places: Path | str) -> list[str]:
    """The secrets that stand in a text, or in a file (its name included) below a folder; each with its place."""
    found = []
    for place in places:
        if isinstance(place, str):
            found += [f"{name} in the text" for name, secret in SECRETS.items() if secret in place]
            continue
        for folder, _, files in os.walk(place):
            for path in (Path(folder) / name for name in files):
                content = path.read_bytes() if path.is_file() else b""
                found += [
                    f"{name} in {path}"
                    for name, secret in SECRETS.items()
                    if secret.encode() in content or secret in str(path)
                ]
    return found
