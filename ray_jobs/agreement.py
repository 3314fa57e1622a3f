"""When to stop: decided by all ranks together, after the same step."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import ray
import torch
import torch.distributed as dist


class StopAgreement:
    """Call it after every step: true, on all ranks at the same step, once the ledger has said that they are to stop.

    One rank may hear of it a step before another, and one that left would leave the others waiting in the next step's
    collectives. So each step sends what the rank has heard to all, in a group of its own that does not touch the GPU,
    and reads what the step before has sent, which has long arrived.
    """

    def __init__(self, ledger: Any, world: int):
        self._heard = False
        self._group = dist.new_group(backend="gloo") if world > 1 else None
        self._sent: tuple[dist.Work, torch.Tensor] | None = None
        threading.Thread(target=self._listen, args=(ledger,), name="stop", daemon=True).start()

    def _listen(self, ledger: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the command is gone, and this process is about to be
            ray.get(ledger.stopping.remote())
            self._heard = True

    def __call__(self) -> bool:
        if self._group is None:
            return self._heard
        agreed = False
        if self._sent:
            work, flag = self._sent
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor([self._heard], dtype=torch.int32)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._sent = work, flag
        return agreed
