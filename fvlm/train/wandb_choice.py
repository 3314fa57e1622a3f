"""Where W&B's part of a run goes: our options, and where those are at their default W&B's own variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fvlm import presets
from fvlm.config import Config

Mode = Literal["online", "offline", "off"]
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}
"""Values of WANDB_MODE."""


@dataclass(frozen=True)
class WandbChoice:
    mode: Mode
    project: str
    entity: str | None
    """None: W&B's own default."""
    said: str
    """What is done and what decided it, on one line."""


def wandb_choice(config: Config) -> WandbChoice:
    mode, by = _mode(config)
    if mode == "off":
        return WandbChoice(mode, config.log.wandb_project, None, f"W&B: off ({by})")
    project, of_project = config.log.wandb_project, "--log.wandb-project"
    default = presets.get(config.preset) if config.preset in presets.PRESETS else Config()
    if variable := os.environ.get("WANDB_PROJECT", ""):
        if project == default.log.wandb_project:
            project, of_project = variable, "WANDB_PROJECT"
        elif project != variable:
            of_project += f", over WANDB_PROJECT={variable}"
    entity = os.environ.get("WANDB_ENTITY") or None
    said = f"W&B: {mode} ({by}), project {project} ({of_project})"
    return WandbChoice(mode, project, entity, said + (f", entity {entity} (WANDB_ENTITY)" if entity else ""))


def _mode(config: Config) -> tuple[Mode, str]:
    """-> mode, and what decided it."""
    option, variable = config.log.wandb, os.environ.get("WANDB_MODE", "").strip()
    if not variable and os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes"):
        variable = "disabled"
    wanted = MODES.get(variable.lower())
    if option != "auto":
        over = f", over WANDB_MODE={variable}" if variable and wanted != option else ""
        return option, f"--log.wandb {option}{over}"
    if wanted:
        return wanted, f"WANDB_MODE={variable}"
    unknown = f"; WANDB_MODE={variable} means nothing to W&B" if variable else ""
    if wandb_key():
        return "online", f"{wandb_key()} has a key{unknown}"
    return "offline", f"there is no key{unknown}"


def wandb_key() -> str:
    """What holds W&B's key: "WANDB_API_KEY" or the path of a netrc file; "" for none. Never the key."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return str(netrc) if "api.wandb.ai" in netrc.read_text() else ""
    except (OSError, ValueError):
        return ""
