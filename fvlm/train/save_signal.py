"""What rank 0 does about a save that is due, told to the other ranks: they take part in it, or wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from fvlm.ranks import world_size

What = Literal[0, 1, 2]
WAIT: What = 0
TAKE: What = 1
LEAVE_OUT: What = 2


class SaveSignal:
    """All ranks make one, at the same place. At a save rank 0 tells WAIT any number of times, then one of the others.

    WAIT       the write of the checkpoint before gets further. A rank that hears it is no rank that hangs: without it,
               it would wait in the next step's collective, for longer than `scale.hang_s` and than a process group does
    TAKE       the snapshot is taken now
    LEAVE_OUT  it is not: the store is away

    In a process group of its own, on the host: it does not touch the GPU.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def tell(self, what: What) -> None:
        """On rank 0."""
        if self._group is not None:
            dist.broadcast(torch.tensor([what]), 0, group=self._group)

    def is_taken(self, alive: Callable[[], None]) -> bool:
        """On the others: whether the snapshot is taken, once that is known. alive: called at each WAIT"""
        what = torch.tensor([TAKE])
        while self._group is not None:
            dist.broadcast(what, 0, group=self._group)
            if what.item() != WAIT:
                break
            alive()
        return bool(what.item() == TAKE)
