"""Shards as the earlier trainer wrote them, from the description of its format alone, and what must come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from fvlm.convert.legacy_shards import Layout
from fvlm.data.schema import DatasetSpec

FRAMES = 24
LAYOUT = Layout(FRAMES, 32, "bfloat16", (4, 4, 4))
"""Of samples as `make_sample` makes them by default."""


def make_sample(number: int, size: int = 32, frames: int = FRAMES, latent: int = 4) -> dict[str, Any]:
    """A smooth moving picture of `size` pixels; latents of normal numbers; a caption of its own."""
    random = np.random.default_rng(number)
    patch = size // 3 + 3
    coarse = random.uniform(0, 255, (3, 6, 6)).repeat(patch, 1).repeat(patch, 2)
    kernel = np.ones(size // 4) / (size // 4)
    for axis in (1, 2):
        coarse = np.apply_along_axis(np.convolve, axis, coarse, kernel, mode="same")
    moved = [coarse[:, t // 2 : t // 2 + size, t // 3 : t // 3 + size] for t in range(frames)]
    pixels = np.rint(np.stack(moved)).astype(np.uint8)
    latents = torch.from_numpy(random.standard_normal((frames, 4, latent, latent), np.float32)).bfloat16()
    return {
        "frames": torch.from_numpy(pixels),
        "latents": latents,
        "caption": f"  clip {number}, \u00e9\n\u2603 ",  # neither trimmed nor normalised may it be
        "video_id": f"v{number % 2}",  # not unique, as nothing promises that it is
    }


def write_shard(path: Path, samples: list[Any], **changes: Any) -> Path:
    torch.save({"samples": samples, "count": len(samples), **changes}, path)
    return path


def write_source(folder: Path) -> Path:
    """Two small shards."""
    folder.mkdir()
    for number in range(2):
        write_shard(folder / f"shard_{number:04d}.pt", [make_sample(2 * number), make_sample(2 * number + 1)])
    return folder


def spec(layout: Layout = LAYOUT, **changes: Any) -> DatasetSpec:
    fields = {"num_frames": layout.num_frames, "frame_codec": "png", "resize": "as-is", "latent_codec": "sd-vae-ft-mse"}
    fields |= {"latent_dtype": layout.latent_dtype, "latent_shape": layout.latent_shape}
    return DatasetSpec(**fields | {"frame_size": layout.frame_size} | changes)


def rows_of(dataset: Path) -> list[dict[str, Any]]:
    """Every clip, as a reader who knows nothing of our code finds it."""
    return [row for path in sorted(dataset.glob("shard-*")) for row in pq.read_table(path).to_pylist()]


def assert_same(row: dict[str, Any], sample: dict[str, Any], taken: np.ndarray) -> None:
    """Caption, the other fields and the latents of the frames `taken` are stored as they were, bit for bit."""
    assert row["caption"] == sample["caption"]
    assert json.loads(row["source"])["fields"] == {"video_id": sample["video_id"]}
    latents = b"".join(row[f"latent_{t:02d}"] for t in range(len(taken)))
    wanted = sample["latents"][torch.from_numpy(taken)].contiguous()
    assert latents == wanted.view(torch.uint8).numpy().tobytes()
