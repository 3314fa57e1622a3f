"""Which kill comes when: a function of the seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

IN_START = 0.2
"""Share of the kills that hit a start."""
KINDS = {
    "worker": "the process that trains",
    "decoder": "the ingest process that decodes",
    "coordinator": "the ingest process that hands batches out",
    "controller": "Ray Train's controller",
    "ledger": "the actor that the ranks and the command share",
    "raylet": "the node's daemon",
    "driver": "the command that the job runs",
    "head": "the cluster's head (gcs_server)",
    "stop": "ray job stop",
    "disk": "the disk with the run folder is full, and then is not",
}


@dataclass(frozen=True)
class PlannedKill:
    kind: str
    in_start: bool
    """Counted from the last kill, so that what comes up again is hit; otherwise from the first finished step after."""
    share: float
    """Of the longest delay, 0 to 1."""


def plan_kills(seed: int, count: int, kinds: list[str]) -> list[PlannedKill]:
    """Every kind comes once in random order, then every kind again, and so on."""
    draw = random.Random(seed)
    deck: list[str] = []
    planned = []
    for _ in range(count):
        if not deck:
            deck = draw.sample(kinds, len(kinds))
        planned.append(PlannedKill(deck.pop(), draw.random() < IN_START, draw.random()))
    return planned
