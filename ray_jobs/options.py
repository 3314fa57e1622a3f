"""The command line of a run: a preset and its overrides. Light to import, so that a typo is told at once."""

from __future__ import annotations

import tyro

from fvlm import presets
from fvlm.config import Config, validate


def parse(args: list[str] | None = None, prog: str = "python -m ray_jobs.train") -> Config:
    """The preset with its overrides. An unknown or ill-typed key ends the process with code 2 and the nearest name."""
    choices = {name: ((preset.__doc__ or "").split("\n")[0], preset()) for name, preset in presets.PRESETS.items()}
    return validate(tyro.extras.overridable_config_cli(choices, args=args, prog=prog))
