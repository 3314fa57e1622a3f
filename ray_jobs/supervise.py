"""Keeps a run going: one start of its ranks after another, until it is finished, asked to stop, or beyond help.

Ray Train runs one start: it places the ranks, joins them, and reports the first failure (`max_failures=0`). What
follows is decided here, in one place for a dead rank, a dead controller, a lost node and a cluster that has grown: the
number of ranks is chosen anew among those that share the lanes evenly, and they begin at the last checkpoint. A start
that is to end for a good reason (SIGTERM, a node that is drained, room for more ranks) saves at the very step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray
import ray.train
from ray._private.state import state as cluster_state
from ray.train import CheckpointConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.config import FailureConfig  # what ray.train.FailureConfig is at run time, with its type
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from fvlm.config import Config
from fvlm.data.corrupt import CorruptList
from fvlm.data.schema import Manifest
from fvlm.errors import StoreUnavailable, UserError
from ray_jobs.failure_reason import reason
from ray_jobs.ingest import cpus_needed, ingest_memory
from ray_jobs.ledger import Ledger
from ray_jobs.process_group import ProcessGroup
from ray_jobs.rank import train_rank
from ray_jobs.room import most_ranks, nodes, ranks_now, wait_for_room
from ray_jobs.shared_folders import SharedFolders, shared_folders
from ray_jobs.stores import Stores

GLANCE_S, LOOK_S = 0.2, 5.0
"""How often it is seen whether a start has ended; and whether the cluster has changed."""
RAY_TRAIN = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # of 2: seconds until a dead rank is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",  # then the number of ranks is thought over
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # draining nodes are watched here
}
STORAGE = "ray"
"""Folder, in the run's, that Ray Train wants for its own notes. Nothing in it is ever read again."""
Failure = ray.train.TrainingFailedError | ray.exceptions.RayError


class StopRequest:
    """SIGTERM (`ray job stop`), SIGHUP (a closed terminal) and Ctrl-C, for the length of a `with` block: a wish to save
    and to end. What is ignored (`nohup`) stays ignored. A second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self._before = {
            number: signal.signal(number, self._take)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def keep_training(config: Config, manifest: Manifest, stop: StopRequest, note: Callable[[str], None]) -> int:
    """-> finished steps. Raises UserError, or the failure after which there was no progress too often; StoreUnavailable
    when a store was away for longer than `scale.store_wait_s`.

    note: takes what a person should know of failures and restarts
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in RAY_TRAIN.items()})
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    use_gpu = on_gpu(config)
    stores = Stores(config, note, lambda: stop.signal)
    done, failures, waits, had_room = stores.finished_steps(0), 0, 0, False
    with stores.there(lambda: shared_folders(config)) as shared:
        while done < config.train.max_steps and stop.signal is None:
            wait_for_room(config, use_gpu, lambda: stop.signal, note, had_room)
            if stop.signal is not None:
                break
            start = Start(config, manifest, ranks_now(config, use_gpu), use_gpu, shared)
            failure = start.run(stop, note)
            before, done = done, stores.finished_steps(done)
            if isinstance(failure, StoreUnavailable):
                stores.wait(failure, progress=done > before)
                continue
            if failure is not None and no_room(failure):
                waits += 1
                if waits == 1:
                    note(f"waiting for {start.world} ranks' place in the cluster")
                continue
            had_room = True
            if failure is None and (done > before or start.told or stop.signal is not None):
                continue
            failures = 1 if done > before else failures + 1
            reason = failure or stores.no_progress(done)
            if failures > config.scale.max_failures:
                raise reason
            note(f"{summary(reason)}; starting again from step {done}, failure {failures} without a new checkpoint, of "
                 f"{config.scale.max_failures} that are borne")  # fmt: skip
    return done


class Start:
    """One start of `world` ranks."""

    def __init__(self, config: Config, manifest: Manifest, world: int, use_gpu: bool, shared: SharedFolders):
        self.config = dataclasses.replace(config, scale=dataclasses.replace(config.scale, workers=world))
        self.manifest, self.world, self.use_gpu = manifest, world, use_gpu
        self.wanted, self.shared = config, shared
        self.failure: BaseException | None = None
        self.told = False
        """Whether the ranks were asked to save and to end."""

    def run(self, stop: StopRequest, note: Callable[[str], None]) -> Failure | StoreUnavailable | None:
        """Returns when the ranks have ended: None, or what Ray says of their failure, or that a store is away.

        Raises UserError.
        """
        corrupt = CorruptList(self.config.run_dir, self.manifest.num_clips, self.config.data.max_corrupt)
        ledger = Ledger.remote(self.config.run_name, corrupt)  # type: ignore[attr-defined]
        thread = threading.Thread(target=self._fit, args=(ledger,), daemon=True)
        thread.start()
        look_at = time.monotonic() + LOOK_S
        while thread.is_alive():
            thread.join(GLANCE_S)
            if self.told or (stop.signal is None and time.monotonic() < look_at):
                continue
            why = "asked to stop" if stop.signal else self._cause_to_move(ledger)
            look_at = time.monotonic() + LOOK_S
            if why and self._ranks_run(ledger):
                note(f"{why}: saving after this step")
                ledger.stop.remote()
                self.told = True
            elif stop.signal:
                return None  # the ranks still wait for a place in the cluster: there is nothing to save
        return self._outcome(ledger)

    def _fit(self, ledger: Any) -> None:
        try:
            self._trainer(ledger).fit()
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits for it
            self.failure = error

    def _trainer(self, ledger: Any) -> TorchTrainer:
        config, memory = self.config, ingest_memory(self.config, self.manifest)
        storage = config.run_dir / STORAGE
        shutil.rmtree(storage, ignore_errors=True)
        return TorchTrainer(
            train_rank,
            train_loop_config={
                "config": config,
                "manifest": self.manifest,
                "memory": memory,
                "ledger": ledger,
                "shared": self.shared,
                "begun": time.time(),
            },
            torch_config=ProcessGroup(),
            scaling_config=ScalingConfig(
                num_workers=self.world,
                use_gpu=self.use_gpu,
                resources_per_worker={"CPU": config.scale.cpus_per_worker} | ({"GPU": 1} if self.use_gpu else {}),
            ),
            run_config=RunConfig(
                name=f"{config.run_name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )

    def _outcome(self, ledger: Any) -> Failure | StoreUnavailable | None:
        try:
            reason = ray.get(ledger.reason.remote(), timeout=GLANCE_S * 50)
        except ray.exceptions.RayError:
            reason = None  # its process was killed: what it knew will be met again
        shutil.rmtree(self.config.run_dir / STORAGE, ignore_errors=True)
        text, away_s = reason or ("", None)
        if text and away_s is None:
            raise UserError(text) from self.failure
        failure = self.failure
        if failure and not text and not isinstance(failure, Failure):
            raise failure
        if failure:
            release_places()
        if text:
            return StoreUnavailable(text, away_s or 0.0)
        return failure if isinstance(failure, Failure) else None

    def _ranks_run(self, ledger: Any) -> bool:
        with contextlib.suppress(ray.exceptions.RayError):
            return bool(ray.get(ledger.nodes.remote(), timeout=LOOK_S))
        return False

    def _cause_to_move(self, ledger: Any) -> str:
        """Why the ranks had better be placed anew; '' while there is no reason."""
        draining = cluster_state.get_draining_nodes()
        with contextlib.suppress(ray.exceptions.RayError):  # the ledger is gone, and the ranks will fail
            if draining and draining.keys() & ray.get(ledger.nodes.remote()):
                return "a node is to be taken away"
        if self.world < self.wanted.scale.workers:
            possible = most_ranks(self.wanted, self.use_gpu, nodes(draining))
            free, more = ray.available_resources(), possible - self.world
            room = free.get("CPU", 0) >= cpus_needed(self.wanted, max(more, 1))
            if more > 0 and room and (not self.use_gpu or free.get("GPU", 0) >= more):
                return f"the cluster has room for {possible} ranks"
        return ""


def on_gpu(config: Config) -> bool:
    """Whether ranks run on GPUs; "auto": when the cluster has one now."""
    device = config.scale.device
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def no_room(failure: BaseException) -> bool:
    return isinstance(failure, ControllerError) and isinstance(
        failure.controller_failure, WorkerGroupStartupTimeoutError
    )


def summary(failure: BaseException) -> str:
    """One line: who failed, and why."""
    if isinstance(failure, WorkerGroupError) and failure.worker_failures:
        rank, error = min(failure.worker_failures.items())
        return f"rank {rank} failed ({reason(error)})"
    if isinstance(failure, ray.exceptions.RayError):
        return f"Ray Train's controller died ({reason(failure)})"
    return reason(failure)


def release_places() -> None:
    """Give back what a controller that was killed had reserved for its ranks: Ray keeps it as long as the job lives."""
    job = ray.get_runtime_context().get_job_id()
    for identifier, group in ray.util.placement_group_table().items():
        if group["state"] != "REMOVED" and job_of(identifier) == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identifier))))


def job_of(placement_group: str) -> str:
    """Of the job that made it: the last four bytes of its id."""
    return placement_group[-8:]
