"""Ranks for tests: processes joined by gloo, that live as long as a test file."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_run import make_batch

from fvlm.model.objective import compute_losses
from fvlm.train.loop import Run


class Ranks:
    """Processes that form a process group and do what they are told, all the same at the same time."""

    def __init__(self) -> None:
        self._ranks = [ProcessPoolExecutor(1, mp.get_context("spawn")) for _ in range(4)]
        self._world = 0

    def all(self, world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """-> what `work` returned on every one of `world` ranks"""
        if self._world != world:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            self._each(self._world, leave_group)
            for rank, joined in enumerate([r.submit(join_group, i, world, port) for i, r in self._first(world)]):
                assert joined.result(250) == rank
            self._world = world
        return self._each(world, work, *args)

    def _first(self, count: int) -> list[tuple[int, ProcessPoolExecutor]]:
        return list(enumerate(self._ranks[:count]))

    def _each(self, count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        return [future.result(250) for future in [rank.submit(work, *args) for _, rank in self._first(count)]]

    def close(self) -> None:
        for rank in self._ranks:
            rank.shutdown(wait=False)


def join_group(rank: int, world: int, port: int) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    return dist.get_rank()


def leave_group() -> None:
    dist.destroy_process_group()


def loss_of(run: Run) -> torch.Tensor:
    """Of other clips on every rank."""
    return compute_losses(run.model, make_batch(1 + dist.get_rank()), run.config.objective).loss
