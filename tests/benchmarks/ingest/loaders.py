"""The loaders that people use today, each at its best: iterables of (frames, latents, captions, clip ids).

All of them decode whole batches with simplejpeg, in place, straight into the shared memory that a DataLoader worker
hands over (what torch's own collate does with `_new_shared`). Runs in the peers' environment; imports no fvlm.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import torch
from formats import FRAMES, LATENT, SIZE, Stored, of_dict, rows
from peers_env import stand_in_for_torchvision
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

Delivered = tuple[torch.Tensor, torch.Tensor, list[str], list[str]]
"""frames [B, T, H, W, 3] uint8, latents [B, T, C, h, w] half precision, captions, clip ids"""

SEED = 0
SHUFFLE_CLIPS = 256
"""Clips among which a stream is shuffled where a loader asks for it: as many as one of our windows holds."""
LEGACY_FRAMES = np.linspace(0, 23, FRAMES, dtype=int)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def collate(clips: list[Stored]) -> Delivered:
    frames = new_batch((len(clips), FRAMES, SIZE, SIZE, 3), torch.uint8)
    latents = new_batch((len(clips), FRAMES, *LATENT), torch.float16)
    decode_batch([clip.jpegs for clip in clips], frames.numpy())
    for clip, out in zip(clips, latents.numpy(), strict=True):
        out[:] = np.frombuffer(clip.latents, np.float16).reshape(FRAMES, *LATENT)
    return frames, latents, [clip.caption for clip in clips], [clip.clip_id for clip in clips]


def decode_batch(clips: list[list[bytes]], out: np.ndarray) -> None:
    """`clips[b][t]` into `out` [B, T, H, W, 3]"""
    for jpegs, frames in zip(clips, out, strict=True):
        for jpeg, frame in zip(jpegs, frames, strict=True):
            simplejpeg.decode_jpeg(jpeg, colorspace="RGB", buffer=frame)


def new_batch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In a worker: in shared memory, so that handing it over copies nothing."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def loader_over(dataset: Any, batch: int, workers: int, collate_fn: Callable[..., Any] | None = collate) -> DataLoader:
    return DataLoader(
        dataset, batch_size=batch, num_workers=workers, collate_fn=collate_fn, drop_last=True, persistent_workers=True
    )


def mds(folder: Path, batch: int, workers: int) -> Iterable[Delivered]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Clips(StreamingDataset):
        def __getitem__(self, index: int) -> Stored:
            return of_dict(super().__getitem__(index))

    clean_stale_shared_memory()
    return loader_over(
        Clips(local=str(folder / "mds"), shuffle=True, shuffle_seed=SEED, batch_size=batch), batch, workers
    )


def import_package(loader: str) -> None:
    """What the loader needs, before any clock runs."""
    if loader == "mds":
        stand_in_for_torchvision()
    if loader in PACKAGES:
        importlib.import_module(PACKAGES[loader])


def litdata(folder: Path, batch: int, workers: int) -> Iterable[Delivered]:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder / "litdata"), shuffle=True, drop_last=True, seed=SEED)
    return StreamingDataLoader(
        dataset, batch_size=batch, num_workers=workers, collate_fn=collate_dicts, persistent_workers=True
    )


def collate_dicts(samples: list[dict[str, Any]]) -> Delivered:
    return collate([of_dict(sample) for sample in samples])


def webdataset(folder: Path, batch: int, workers: int) -> Iterable[Delivered]:
    import webdataset as wds

    shards = sorted(map(str, (folder / "webdataset").glob("*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), detshuffle=True, seed=SEED)
    shuffled = dataset.compose(wds.detshuffle(SHUFFLE_CLIPS, SHUFFLE_CLIPS // 2, seed=SEED)).map(of_tar)
    return loader_over(shuffled, batch, workers)


def of_tar(sample: dict[str, Any]) -> Stored:
    jpegs = [sample[f"{t}.jpg"] for t in range(FRAMES)]
    return Stored(sample["__key__"], sample["txt"].decode(), jpegs, sample["latents"])


class ParquetClips(IterableDataset):
    """Row groups in a shuffled order, dealt to the workers, rows shuffled among SHUFFLE_CLIPS."""

    def __init__(self, folder: Path):
        self.paths, self.epoch = sorted(folder.glob("shard-*.parquet")), 0

    def __iter__(self) -> Iterator[Stored]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        shards = [pq.ParquetFile(path, memory_map=True) for path in self.paths]
        groups = [(shard, group) for shard in shards for group in range(shard.num_row_groups)]
        np.random.default_rng((SEED, self.epoch)).shuffle(groups)
        random = np.random.default_rng((SEED, self.epoch, number))
        self.epoch += 1  # a persistent worker keeps its copy
        held: list[Stored] = []
        for shard, group in groups[number::workers]:
            held += rows(shard, group)
            while len(held) >= SHUFFLE_CLIPS:
                yield taken(held, random)
        while held:
            yield taken(held, random)


def taken(held: list[Stored], random: np.random.Generator) -> Stored:
    """One of `held`, by chance; the last one fills its place."""
    place = int(random.integers(len(held)))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


def parquet(folder: Path, batch: int, workers: int) -> Iterable[Delivered]:
    return loader_over(ParquetClips(folder / "parquet"), batch, workers)


class LegacyClips(IterableDataset):
    """The earlier trainer's way: a worker holds a whole shard, drops 16 of 24 frames, normalises in float32."""

    def __init__(self, folder: Path):
        self.paths, self.epoch = sorted(folder.glob("shard_*.pt")), 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, str, str]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        random = np.random.default_rng((SEED, self.epoch))
        self.epoch += 1
        paths = [self.paths[place] for place in random.permutation(len(self.paths))]
        for path in paths[number::workers]:
            samples = torch.load(path, weights_only=True)["samples"]
            for place in random.permutation(len(samples)):
                sample = samples[place]
                frames = sample["frames"][LEGACY_FRAMES].float() / 255  # [T, 3, H, W]
                frames = (frames - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
                yield frames, sample["latents"][LEGACY_FRAMES].float(), sample["caption"], sample["video_id"]


def legacy(folder: Path, batch: int, workers: int) -> Iterable[Delivered]:
    return loader_over(LegacyClips(folder / "legacy"), batch, workers, collate_fn=None)


PACKAGES = {"mds": "streaming", "litdata": "litdata", "webdataset": "webdataset"}
LOADERS: dict[str, Callable[[Path, int, int], Iterable[Delivered]]] = {
    "mds": mds,
    "litdata": litdata,
    "webdataset": webdataset,
    "parquet": parquet,
    "legacy": legacy,
}
