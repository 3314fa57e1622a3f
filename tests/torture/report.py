"""The figures of an attack."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torture.attack import Kill
from torture.compare import Comparison


@dataclass(frozen=True)
class Outcome:
    seed: int
    steps: int
    planned: int
    kills: list[Kill]
    left_out: dict[str, str]
    """Kind of kill that could not be made here -> why."""
    repeated: int
    """Steps that were done again."""
    commands: list[str]
    """That brought the run back."""
    comparison: Comparison | None
    """None: it never came to an end."""
    stuck: str
    """Why not."""
    left_behind: list[str]
    """Processes that outlived stop.sh."""
    seconds: float

    def problems(self) -> list[str]:
        """Why this run does not pass, a line each."""
        if self.comparison is None:
            return [self.stuck]
        found = list(self.comparison.differences)
        if len(self.kills) < self.planned:
            found.append(
                f"the run was finished after {len(self.kills)} of {self.planned} kills: give it more --steps than "
                f"{self.steps}"
            )
        return found + [f"left behind by stop.sh: {process}" for process in self.left_behind]

    def figures(self) -> dict[str, Any]:
        """What the line of JSON holds."""
        recovered = [kill for kill in self.kills if kill.recovered]
        seconds = [kill.seconds for kill in recovered if kill.seconds is not None]
        comparison = asdict(self.comparison) if self.comparison else {"stuck": self.stuck}
        comparison.pop("differences", None)
        return {
            "kills": dict(Counter(kill.kind for kill in self.kills)),
            "kills_made": len(self.kills),
            "kills_in_a_start": sum(kill.in_start for kill in self.kills),
            "kills_left_out": self.left_out,
            "killed_again_before_the_next_step": len(self.kills) - len(recovered),
            "restarts_by_itself": sum(not kill.commands for kill in recovered),
            "restarts_by_command": sum(bool(kill.commands) for kill in recovered),
            "commands": dict(Counter(self.commands)),
            "steps": self.steps,
            "steps_repeated": self.repeated,
            **comparison,
            "median_s_to_next_step": round(statistics.median(seconds), 1) if seconds else None,
            "longest_s_to_next_step": round(max(seconds), 1) if seconds else None,
            "processes_left": len(self.left_behind),
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
        }

    def line(self) -> str:
        return json.dumps(self.figures())
