"""What Ray Train runs on every rank: choose where to begin, start the ingest, and train.

Only light imports here: Ray Train's controller imports this module too, and transformers takes seconds, in which the
ingest can start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from fvlm.config import Config
from fvlm.data.memory import IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.schema import Manifest
from fvlm.errors import StoreUnavailable
from fvlm.train.resume import Choice, choose_checkpoint
from fvlm.train.run_folder import Claim
from fvlm.train.store import checkpoint_store
from ray_jobs.cli import told_error
from ray_jobs.feed import Feed, begun
from ray_jobs.ingest import rank_batches, share_of_one_rank
from ray_jobs.startup import StartUp


def train_rank(task: dict[str, Any]) -> None:
    """One rank of one start, from the checkpoint that it begins at to the step that it ends with."""
    config, manifest, memory, ledger = (task[key] for key in ("config", "manifest", "memory", "ledger"))
    try:
        task["shared"].require()
        run_rank(config, manifest, memory, ledger, StartUp(task["begun"]))
    except Exception as error:
        reason = told_error(error)
        if reason is None:
            raise
        away_s = reason.for_s if isinstance(reason, StoreUnavailable) else None
        ray.get(ledger.record.remote(str(reason), away_s))
        if ray.train.get_context().get_world_size() > 1:
            raise  # others may wait for this rank in a collective, and only a failure ends them


def run_rank(config: Config, manifest: Manifest, memory: IngestMemory, ledger: Any, start_up: StartUp) -> None:
    start_up.passed("until the ranks ran and were joined")
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    ray.get(ledger.joined.remote(ray.get_runtime_context().get_node_id()))
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Threads without a core of their own wait for each other in spin loops: two on one core are 5 times slower.
        torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
    run_dir = config.run_dir
    store = checkpoint_store(config, Claim(run_dir).require) if rank == 0 else checkpoint_store(config)
    choice = told_by_rank_0(lambda: choose_checkpoint(store, run_dir), rank, ledger)
    start_up.passed("to choose the checkpoint")

    plan = dataclasses.replace(Plan.of_config(manifest, config), origin=choice.origin)
    reader = ClipReader.of_config(manifest, plan, config)
    share = share_of_one_rank(config, memory, device.type == "cuda")
    raw = begun(rank_batches(reader, share, rank, world, choice.step, config.train.max_steps))
    feed = Feed(raw, share, rank, lambda clips: ray.get(ledger.replaced.remote(clips)))

    from ray_jobs.training import Place, train_on  # not earlier: see above

    start_up.passed("for imports")
    train_on(Place(rank, world, device), config, manifest, store, choice, feed, ledger, start_up)


def told_by_rank_0(choose: Callable[[], Choice], rank: int, ledger: Any) -> Choice:
    """Rank 0's choice, on every rank. What keeps rank 0 from choosing ends them all.

    Not a collective: a slow store may take longer than a process group waits.
    """
    if rank == 0:
        choice = choose()
        ray.get(ledger.choose.remote((choice.name, choice.step, choice.origin, choice.notes)))
        return choice
    return Choice(*ray.get(ledger.chosen.remote()))
