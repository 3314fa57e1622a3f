"""How many processes train together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

# A plain global, which torch's compiler can guard on; it cannot trace a context variable.
_alone = False


def world_size() -> int:
    """Return the number of ranks: 1 where no process group was made, and inside `as_one_rank`."""
    return dist.get_world_size() if not _alone and dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def as_one_rank() -> Iterator[None]:
    """Let this process compute as if it were the only one: what asks `world_size` does not communicate."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before
