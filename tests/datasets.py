"""Small datasets for tests: real Parquet shards with real JPEG frames of moving shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fvlm.data.decode import decode_frame, encode_frame
from fvlm.data.latents import to_bits
from fvlm.data.schema import DatasetSpec, EncodedClip, Manifest, ShardFile
from fvlm.data.shards import ShardWriter, write_manifest
from fvlm.data.synthetic import draw, scene


def make_spec(stored_frames: int = 8, frame_size: int = 56, rows_per_row_group: int = 4, **changes) -> DatasetSpec:
    return DatasetSpec(
        **{
            "num_frames": stored_frames,
            "frame_size": frame_size,
            "frame_codec": "jpeg",
            "resize": "as-is",
            "latent_codec": "test-noise",
            "latent_dtype": "float16",
            "latent_shape": (4, frame_size // 8, frame_size // 8),
            "rows_per_row_group": rows_per_row_group,
            **changes,
        }
    )


def make_clip(index: int, spec: DatasetSpec, seed: int = 0) -> EncodedClip:
    """Clip `index` of the dataset with this seed: `clip-00007`, one or two moving shapes, normal latents."""
    random = np.random.default_rng((seed, index))
    movers, background = scene(random)
    last = max(spec.num_frames - 1, 1)
    frames = [draw(movers, background, t / last, spec.frame_size) for t in range(spec.num_frames)]
    latents = random.standard_normal((spec.num_frames, math.prod(spec.latent_shape)), np.float32)
    return EncodedClip(
        f"clip-{index:05d}",
        " while ".join(map(str, movers)),
        [encode_frame(frame, spec) for frame in frames],
        to_bits(latents, spec.latent_dtype),
        {"video": f"clip-{index:05d}.mp4"},
    )


def write_shard(path: Path, spec: DatasetSpec, clips: range, seed: int = 0) -> ShardFile:
    with ShardWriter(path, spec) as writer:
        for index in clips:
            writer.add(make_clip(index, spec, seed))
    assert writer.file is not None
    return writer.file


def write_dataset(
    folder: Path,
    clips: int = 24,
    stored_frames: int = 8,
    frame_size: int = 56,
    rows_per_row_group: int = 4,
    shards: int = 3,
    seed: int = 0,
) -> Manifest:
    """A dataset in `folder`, its clips dealt to the shards as evenly as they go. Equal arguments, equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = make_spec(stored_frames, frame_size, rows_per_row_group)
    bounds = np.linspace(0, clips, shards + 1).astype(int)
    files = [
        write_shard(folder / f"shard-{number:05d}.parquet", spec, range(bounds[number], bounds[number + 1]), seed)
        for number in range(shards)
        if bounds[number] < bounds[number + 1]
    ]
    return write_manifest(folder, spec, files, rejected=0)


def decode_clips(columns: Sequence[Sequence[bytes | memoryview]], out: np.ndarray, spec: DatasetSpec) -> None:
    """Decode `columns[t][b]`, the frame t of clip b, into `out` [B, T, H, W, 3]."""
    for t, column in enumerate(columns):
        for b, data in enumerate(column):
            decode_frame(data, out[b, t], spec)
