"""What `ray_jobs.doctor` looks at, in order. What can do without Ray is in `fvlm/checks`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from fvlm.checks.access import LocalCluster, look_at_cluster, look_at_hub, look_at_secret, look_at_wandb
from fvlm.checks.disk import free_bytes, look_at_reading, look_at_writing
from fvlm.checks.finding import Finding, gb, of_error
from fvlm.checks.machine import Machine, look_at_machine
from fvlm.checks.run import (
    BYTES_OF_STATE,
    look_at_checkpoint_disk,
    look_at_compiler,
    look_at_import,
    look_at_run,
    parameters,
)
from fvlm.checks.software import look_at_gpus, look_at_software
from fvlm.config import Config
from fvlm.data.memory import IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.storage import Storage
from fvlm.errors import Unavailable, UserError
from fvlm.model.hub import kept_architecture
from fvlm.resources import usable_cpus
from fvlm.train.held_out import eval_clips
from fvlm.train.memory import clips_of_a_rank, estimate, settle_memory
from fvlm.train.spill import usable
from ray_jobs.ingest import cpus_needed, ingest_memory, store_needed
from ray_jobs.options import STEP_MS, command_line
from ray_jobs.train import check_evaluation, open_dataset, settle

LARGEST_SLOW_STORE = 10**10
"""Bytes: Ray refuses a larger object store for which /dev/shm has no room; a smaller one it lays on the disk."""
RAYS_PROCESSES, A_RANKS_PROCESS = 10**9, 10**9
"""Bytes: of an idle cluster of one machine; of a rank before it has a model."""
TRAINED_ON_CPU = 16
"""Bytes of a parameter where the CPU trains: itself, its gradient, two moments."""
FULL = 0.95
"""Share of a disk from which on Ray makes no more objects that might have to be spilled."""
SHARDS_READ = 64
DEFAULT_LATENT = (4, 32, 32)
"""SD-VAE's of 256 px, where no dataset says otherwise."""
SECRETS = "~/.config/fvlm/environment"
"""The file that cluster/local/install.sh makes."""


def checkup(options: list[str]) -> Iterator[Finding]:
    """Of the run with these options; of the machine alone where there are none. Raises UserError for options."""
    logging.disable(logging.WARNING)  # of a store's retries; what comes of them is found
    if not options:
        return look(None, STEP_MS / 1000, Machine(), os.environ)
    config, test = command_line(options, prog="python -m ray_jobs.doctor")
    return look(settle(config), test.step_s if test else STEP_MS / 1000, Machine(), os.environ)


def look(config: Config | None, step_s: float, machine: Machine, env: Mapping[str, str]) -> Iterator[Finding]:
    """All findings, as they are made. step_s: seconds that a step of the GPU is taken to last."""
    yield from look_at_machine(machine)
    yield from look_at_software()
    wanted, begun = None, False
    if config is None:
        yield from look_at_gpus(machine)
    else:
        yield from look_at_gpus(machine, config.scale.device, config.scale.workers, config.train.precision == "bf16")
        yield from look_at_compiler(config)
        manifest, memory, found = look_at_data(config)
        yield from found
        if manifest and config.eval.path:
            yield from look_at_held_out(config, manifest)
        latent = manifest.spec.latent_shape if manifest else DEFAULT_LATENT
        if manifest and memory:
            wanted = store_needed(config, memory)
            yield from look_at_data_disk(config, manifest, machine, step_s)
            yield from look_at_room(config, memory, machine, latent)
        yield from look_at_step_memory(config, latent)
        found, begun = look_at_run(config, manifest, time.time())
        yield from found
        if not begun:
            yield from look_at_import(config, manifest)
        yield from look_at_checkpoint_disk(config, machine, latent)
        if config.data.cache_dir:
            most = int(config.data.cache_gb * 1e9)
            yield from look_at_writing(machine, "cache", Path(config.data.cache_dir), "--data.cache-dir", most, 0)
    yield from look_at_temporary(machine)
    yield from look_at_store(machine, env, wanted)
    if config:
        yield from look_at_hub(config, begun)
    yield from look_at_wandb(config or Config(run="RUN"))
    yield from look_at_cluster(env)
    secrets = Path(SECRETS).expanduser()
    if secrets.is_file():
        yield from look_at_secret("environment", secrets)


def look_at_held_out(config: Config, manifest: Manifest) -> list[Finding]:
    """Whether a start would take the clips of `eval.path`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            check_evaluation(config, manifest)
    except (UserError, Unavailable) as error:
        return [of_error("evaluation", error)]
    damaged = [Finding("warn", "evaluation", line) for line in said.getvalue().splitlines()]
    return damaged or [Finding("ok", "evaluation", str(eval_clips(config, manifest)))]


def look_at_data(config: Config) -> tuple[Manifest | None, IngestMemory | None, list[Finding]]:
    """Whether a start would take the dataset, by what a start does; its manifest, and one rank's share of memory."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            manifest = open_dataset(config)
        memory = ingest_memory(config, manifest)
    except (UserError, Unavailable) as error:
        return None, None, [of_error("data", error)]
    damaged = [Finding("warn", "data", line) for line in said.getvalue().splitlines()]
    spec, size = manifest.spec, int(np.sum(manifest.files["bytes"].to_numpy()))
    text = (
        f"{manifest.num_clips:,} clips of {spec.num_frames} frames, {spec.frame_size} px, in {manifest.files.num_rows} "
        f"shards, {gb(size)}; all sizes and the footers of at most {SHARDS_READ} shards are right"
    )
    return manifest, memory, damaged or [Finding("ok", "data", text)]


def look_at_data_disk(config: Config, manifest: Manifest, machine: Machine, step_s: float) -> list[Finding]:
    storage = Storage(config.data.path)
    if not storage.is_local:
        cure = "`--feed-test` measures whether it feeds the GPU."
        return [Finding("note", "data disk", f"{storage.locate()} answers", cure)]
    reader = ClipReader.of_config(manifest, Plan.of_config(manifest, config), config)
    names = manifest.files["name"]
    some = np.unique(np.linspace(0, len(names) - 1, min(len(names), SHARDS_READ)).astype(int)).tolist()
    files = [storage.folder / names[index].as_py() for index in some]
    return look_at_reading(
        machine,
        storage.folder,
        files,
        int(np.sum(manifest.files["bytes"].to_numpy())),
        config.data.global_batch / step_s * reader.stored_bytes,
        f"{1000 * step_s:.0f} ms a step",
    )


def look_at_room(
    config: Config, memory: IngestMemory, machine: Machine, latent: tuple[int, int, int]
) -> Iterator[Finding]:
    """Memory and CPUs against what a run on this machine takes at least; what a step computes with is not counted."""
    ranks = config.scale.workers
    try:
        size = parameters(config.model, latent, kept_architecture(config))
    except (UserError, Unavailable) as error:
        yield of_error("model", error)
        return
    on_gpu = config.scale.device != "cpu" and torch.cuda.is_available()
    parts = {
        "ingest": memory.total * ranks,
        "Ray": RAYS_PROCESSES,
        "ranks": ranks * A_RANKS_PROCESS + (0 if on_gpu else ranks * TRAINED_ON_CPU * size),
        "the snapshot of a checkpoint": BYTES_OF_STATE * size,
    }
    need, has = sum(parts.values()), machine.memory()
    text = f"at least {gb(need)}: " + ", ".join(f"{name} {gb(count)}" for name, count in parts.items())
    if has.usable < need:
        cure = "Fewer --scale.workers, a smaller --ingest-memory, or a machine with more memory (WSL2: .wslconfig)."
        yield Finding("FAIL", "memory of the run", f"{text}; there are {gb(has.usable)}", cure)
    elif has.available < need:
        cure = "End what else runs here; Ray kills a rank when the memory is nearly full."
        yield Finding("warn", "memory of the run", f"{text}; {gb(has.available)} are available now", cure)
    else:
        yield Finding("ok", "memory of the run", f"{text}; {gb(has.available)} are available")
    cpus = usable_cpus(machine.root)
    if cpus < cpus_needed(config):
        text = f"{cpus} for {ranks} ranks and their decoding, which want {cpus_needed(config)}"
        yield Finding("warn", "CPUs", text, "They share them. --feed-test shows whether decoding keeps up.")


def look_at_step_memory(config: Config, latent: tuple[int, int, int]) -> list[Finding]:
    """What a step is estimated to take, against what is free on the fullest of the GPUs that would be used."""
    if config.scale.device == "cpu" or not torch.cuda.is_available():
        return []
    gpus = range(min(config.scale.workers, torch.cuda.device_count()))
    index = min(gpus, key=lambda gpu: torch.cuda.mem_get_info(gpu)[0])
    free = torch.cuda.mem_get_info(index)[0]
    try:
        settled = settle_memory(config, latent, torch.device("cuda", index))
        need = estimate(settled, latent, clips_of_a_rank(config))
    except (UserError, Unavailable) as error:
        return [of_error("model", error)]
    text = f"about {need} with train.memory {settled.train.memory}; GPU {index} has {gb(free)} free"
    if need.peak > usable(free):
        cure = "--train.memory small, more ranks (--scale.workers), or a smaller --data.global-batch."
        return [Finding("FAIL", "memory of a step", text, cure)]
    return [Finding("ok", "memory of a step", text)]


def look_at_temporary(machine: Machine) -> list[Finding]:
    """Where Ray keeps its sockets, logs, and what does not fit into the object store."""
    folder = Path(tempfile.gettempdir())
    found = look_at_writing(machine, "temporary", folder, "TMPDIR", 0, 0)
    disk = os.statvfs(folder)
    used = 1 - disk.f_bavail / max(disk.f_bavail + disk.f_blocks - disk.f_bfree, 1)
    if used > FULL:
        text = (
            f"{100 * used:.1f} % of the disk of {folder} are used; from {100 * FULL:.0f} % on Ray makes no new objects"
        )
        found.append(Finding("warn", "temporary disk", text, "Free some room, or set TMPDIR to a folder elsewhere."))
    return found


def look_at_store(machine: Machine, env: Mapping[str, str], wanted: int | None) -> list[Finding]:
    """/dev/shm and the object store of cluster/local against what the ingest wants of them; None: no run is given."""
    found = []
    try:
        cluster = LocalCluster.of(env)
    except ValueError:
        return []  # said where ports are looked at
    need = wanted or cluster.store_bytes
    shared = machine.root / "dev/shm"
    free = free_bytes(shared) if shared.is_dir() else 0
    text = f"/dev/shm has {gb(free)} free, {gb(need)} wanted"
    if cluster.process is not None and not wanted:
        found.append(Finding("ok", "object store", f"our own cluster has one of {gb(cluster.store_bytes)}"))
    elif free >= need:
        found.append(Finding("ok", "object store", text))
    else:
        cure = f"sudo mount -o remount,size={-(-2 * need // 10**9)}G /dev/shm; in Docker --shm-size; or a smaller "
        cure += "--ingest-memory (FVLM_OBJECT_STORE_MB for cluster/local)."
        if need > LARGEST_SLOW_STORE:
            found.append(Finding("FAIL", "object store", f"{text}: Ray refuses to start", cure))
        else:
            found.append(Finding("warn", "object store", f"{text}: Ray would lay it on the disk, far slower", cure))
    if wanted and cluster.store_bytes < wanted:
        mb = -(-wanted // (1 << 20))
        has = "has" if cluster.process is not None else "would have"
        found.append(
            Finding(
                "FAIL" if cluster.process is not None else "warn",
                "cluster's store",
                f"our own cluster {has} {gb(cluster.store_bytes)}, and the run wants {gb(wanted)}: a job refuses",
                f"FVLM_OBJECT_STORE_MB={mb} before cluster/local/start.sh, or a smaller --ingest-memory.",
            )
        )
    return found
