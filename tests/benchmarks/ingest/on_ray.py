"""Loaders on Ray: ours as training uses it, and Ray Data as its own documentation shows it."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.data
import simplejpeg
import torch
from consume import consume
from formats import FRAMES, LATENT, SIZE
from formats import columns as stored_columns

from fvlm.config import Config, DataConfig
from fvlm.data.collate import Collator
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.shards import read_manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer
from ray_jobs.cluster import connect
from ray_jobs.ingest import cpus_needed, ingest_memory, rank_batches, share_of_one_rank, store_needed

Task = dict[str, Any]
DOCUMENTED_STORE = 0.3
"""Share of the machine's memory that a plain `ray.init()` gives to its object store."""
SHUFFLE_CLIPS = 256


def config_of(task: Task) -> Config:
    lanes = math.gcd(DataConfig.lanes, task["batch"])
    data = DataConfig(
        f"{task['folder']}/parquet", global_batch=task["batch"], lanes=lanes, decode_threads=task["variant"]
    )
    memory = "1.5GB" if task["loader"] == "ours_roomy" else "auto"
    return Config(run="bench-ingest", runs_dir=f"{task['folder']}/runs", ingest_memory=memory, data=data)


@ray.remote
class Rank:
    """Stands where the training process stands: in a Ray worker that reserves a rank's CPUs."""

    def __init__(self, task: Task, root: int):
        self.task, self.root, self.config = task, root, config_of(task)
        manifest = read_manifest(self.config.data.path)
        plan = Plan.of_config(manifest, self.config)
        self.reader = ClipReader.of_config(manifest, plan, self.config)
        self.memory = ingest_memory(self.config, manifest)
        tokenizer = load_tokenizer(Path(task["folder"]) / "tokenizer")
        data = self.config.data
        self.collate = Collator(manifest.spec, CaptionTokenizer(tokenizer, data.max_caption_tokens, data.train_eos))
        self.stop = task["epochs"] * plan.steps_per_epoch
        self.start = plan.steps_per_epoch // 2 if task["from_middle"] else 0

    def ready(self) -> None:
        """Answers once the constructor is done."""

    def run(self) -> dict[str, Any]:
        batches, plan = self._batches(), self.reader.plan
        ends = [*range(plan.steps_per_epoch, self.stop + 1, plan.steps_per_epoch)]
        begins = [self.start, *ends[:-1]]
        return consume(
            (itertools.islice(batches, end - begin) for begin, end in zip(begins, ends, strict=True)), self.root
        )

    def _batches(self) -> Iterator[tuple[Any, ...]]:
        share = share_of_one_rank(self.config, self.memory, on_gpu=True)  # as its consumer, this one hardly computes
        for raw in rank_batches(self.reader, share, 0, 1, self.start, self.stop):
            batch = self.collate(raw)
            yield batch.frames, batch.latents.view(torch.int16), batch.caption_ids, batch.clip_ids


@contextlib.contextmanager
def ours(task: Task) -> Iterator[Callable[[], dict[str, Any]]]:
    config = config_of(task)
    store = store_needed(config, ingest_memory(config, read_manifest(config.data.path)))
    with connect(max(os.cpu_count() or 1, cpus_needed(config)), store):
        rank = Rank.options(num_cpus=config.scale.cpus_per_worker).remote(task, os.getpid())  # type: ignore[attr-defined]
        ray.get(rank.ready.remote())
        yield lambda: ray.get(rank.run.remote()) | store_figures()


@contextlib.contextmanager
def documented(task: Task) -> Iterator[Callable[[], dict[str, Any]]]:
    """Ray Data as in its user guide: one row, one object; batches and shuffling at the end. `variant`: concurrency."""
    with connect(object_store_bytes=int(DOCUMENTED_STORE * psutil.virtual_memory().total)):
        yield lambda: consume(documented_epochs(task), os.getpid()) | store_figures()


def documented_epochs(task: Task) -> Iterator[Iterable[Any]]:
    shards = sorted(map(str, Path(task["folder"]).glob("parquet/shard-*.parquet")))
    stored = ray.data.read_parquet(shards, shuffle="files").select_columns(stored_columns())
    dataset = stored.map(decode_row, concurrency=task["variant"] or None)
    for _ in range(task["epochs"]):
        yield dataset.iter_torch_batches(
            batch_size=task["batch"],
            drop_last=True,
            collate_fn=to_torch,
            local_shuffle_buffer_size=SHUFFLE_CLIPS,
            local_shuffle_seed=0,
        )


def decode_row(row: dict[str, Any]) -> dict[str, Any]:
    frames = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for t, out in enumerate(frames):
        simplejpeg.decode_jpeg(row[f"frame_{t:02d}"], colorspace="RGB", buffer=out)
    latents = np.frombuffer(b"".join(row[f"latent_{t:02d}"] for t in range(FRAMES)), np.float16)
    return {
        "clip_id": row["clip_id"],
        "caption": row["caption"],
        "frames": frames,
        "latents": latents.reshape(FRAMES, *LATENT),
    }


def to_torch(batch: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    return (
        torch.as_tensor(batch["frames"]),
        torch.as_tensor(batch["latents"]),
        batch["caption"].tolist(),
        batch["clip_id"].tolist(),
    )


def store_figures() -> dict[str, int]:
    """What the object store says about itself; `ray memory --stats-only` prints the same."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return {"spilled_bytes": stats.spilled_bytes_total, "fallback_bytes": stats.object_store_bytes_fallback}
