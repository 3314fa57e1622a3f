"""What state.json says of a run, besides step and files: everything that its future depends on or that is shown.

Read strictly: a key that is missing, foreign or of another kind is an error that names it, never a default.
"""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

import fvlm
from fvlm.config import Config
from fvlm.data.plan import Plan
from fvlm.errors import UserError
from fvlm.ranks import world_size
from fvlm.train.metrics import Metrics, require_keys
from fvlm.train.same_run import changes_of_identity
from fvlm.train.sinks import WANDB_ID


@dataclass(frozen=True)
class RunState:
    plan: str
    """Fingerprint of the plan in which the step counts. World size has no part in it."""
    origin: int
    """Step at which epoch 0 began."""
    dataset: str
    """Its fingerprint."""
    metrics: dict[str, Any]
    """Windows of the running averages, newest readings, best averages: `Metrics.state_dict`."""
    trained_s: float
    """The clock, without pauses."""
    wandb: dict[str, Any]
    """"id": the W&B run, None without one; "step": the last that it was given."""
    world_size: int
    """Ranks that trained it. For people: any number may go on."""
    config: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def of(cls, config: Config, plan: Plan, metrics: dict[str, Any], trained_s: float, step: int) -> RunState:
        wandb_id = config.run_dir / WANDB_ID
        return cls(
            plan=plan.fingerprint,
            origin=plan.origin,
            dataset=plan.dataset,
            metrics=metrics,
            trained_s=trained_s,
            wandb={"id": wandb_id.read_text().strip() if wandb_id.exists() else None, "step": step},
            world_size=world_size(),
            config=config.to_dict(),
            versions={"fvlm": fvlm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, file: str, state: dict[str, Any]) -> RunState:
        """From all of state.json. Raises UserError that names `file` and the key."""
        state = dict(state)
        if state.get("format_version") == 1:
            state |= _unknown_to_version_1(state)
        try:
            kinds: dict[str, type] = {
                **dict.fromkeys(("plan", "dataset"), str),
                **dict.fromkeys(("origin", "world_size", "step", "format_version"), int),
                **dict.fromkeys(("metrics", "wandb", "config", "versions", "files"), dict),
                "trained_s": float,
            }
            require_keys("the file", state, set(kinds))
            for key, kind in kinds.items():
                if type(state[key]) is not kind:
                    raise UserError(f"{key} is {state[key]!r:.60}, not a {kind.__name__}")
            require_keys("wandb", state["wandb"], {"id", "step"})
            if not isinstance(state["wandb"]["id"], str | None) or type(state["wandb"]["step"]) is not int:
                raise UserError(f"wandb is {state['wandb']}; id is a string or null, step an integer")
            Metrics(1).load_state_dict(state["metrics"])
        except UserError as error:
            raise UserError(
                f"{file}: {error}. Its bytes are what was written, so another program or release wrote it; "
                "go on with that one, or use another --run name."
            ) from None
        return cls(**{key: state[key] for key in cls.__dataclass_fields__})

    def require_same_run(self, file: str, config: Config, plan: Plan) -> None:
        """Raises UserError, with the differences, for the checkpoint of another experiment, dataset or order."""
        changes = changes_of_identity(self.config, config)
        if self.dataset != plan.dataset:
            changes.append("dataset: another one, or in another order")
        elif not changes and self.plan != plan.fingerprint:
            changes.append("plan: another order of the same clips, by another release of fvlm")
        if changes:
            raise UserError(
                f"{file}: a checkpoint of another run; what may not change within a run has changed:\n  "
                + "\n  ".join(changes)
                + "\nUse the old values to continue it, or another --run name to start a new one."
            )


def _unknown_to_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """What that format did not keep: empty, as at a run's beginning."""
    metrics = state.get("metrics")
    return {
        "metrics": metrics | {"best": {}} if isinstance(metrics, dict) else metrics,
        "wandb": {"id": None, "step": state.get("step")},
        "world_size": 1,
    }
