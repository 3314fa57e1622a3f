"""The actor that all ranks of one start, and the command, share."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from fvlm.data.corrupt import CorruptClip, CorruptList


@ray.remote(num_cpus=0)
class Ledger:
    """Of one start: why a rank gave up, whether all are to stop, and the one writer of the list of damaged clips."""

    def __init__(self, run: str, corrupt: CorruptList) -> None:
        self._run = run
        self._reason: tuple[str, float | None] | None = None
        self._stop, self._chosen = asyncio.Event(), asyncio.Event()
        self._choice: tuple[Any, ...] = ()
        self._nodes: set[str] = set()
        self._corrupt = corrupt
        self._news: list[CorruptClip] = []
        self._replaced = 0

    def __repr__(self) -> str:
        return f"ledger of {self._run}"

    async def replaced(self, clips: list[CorruptClip]) -> None:
        """Others stood in for these, on one rank. Raises UserError when too many are damaged."""
        self._replaced += len(clips)
        self._news += [clip for clip in clips if self._corrupt.add(clip)]

    async def damage(self) -> tuple[list[CorruptClip], int, int]:
        """-> clips found damaged since the last call, on any rank; how many are known; how often others stood in."""
        news, self._news = self._news, []
        return news, len(self._corrupt.known), self._replaced

    async def record(self, reason: str, away_s: float | None = None) -> None:
        """A rank stopped for this reason. The user has to mend it, and there is no use in another start; or a store has
        been away for `away_s` seconds, which may pass by itself."""
        self._reason = self._reason or (reason, away_s)

    async def reason(self) -> tuple[str, float | None] | None:
        """-> the first that was recorded, and for how long a store had been away, if that was it."""
        return self._reason

    async def choose(self, choice: tuple[Any, ...]) -> None:
        """Rank 0 has chosen where the start begins. The fields of a `Choice`, whose module imports torch."""
        self._choice = choice
        self._chosen.set()

    async def chosen(self) -> tuple[Any, ...]:
        """Returns when rank 0 has, however long it takes to fetch and verify a checkpoint."""
        await self._chosen.wait()
        return self._choice

    async def joined(self, node_id: str) -> None:
        """A rank has begun on this node."""
        self._nodes.add(node_id)

    async def nodes(self) -> set[str]:
        return self._nodes

    async def stop(self) -> None:
        """All ranks are to save after the step that they are at, and to return."""
        self._stop.set()

    async def stopping(self) -> None:
        """Returns when `stop` is called."""
        await self._stop.wait()
