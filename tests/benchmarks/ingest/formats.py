"""The same clips in the formats of other loaders: `python formats.py FORMAT FOLDER`, where its writer is installed.

Reads FOLDER/parquet, writes FOLDER/FORMAT. Nothing of fvlm is used: the peers' environment does not have it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from peers_env import stand_in_for_torchvision

FRAMES, SIZE = 8, 256
LATENT = (4, SIZE // 8, SIZE // 8)
CLIPS_A_SHARD = 128
LEGACY_FRAMES, LEGACY_CLIPS_A_SHARD, LEGACY_CLIPS = 24, 200, 400
"""The earlier trainer's shards hold three times the frames, uncompressed: 5 MB a clip, so they get fewer clips."""


class Stored(NamedTuple):
    """A clip as it lies on disk."""

    clip_id: str
    caption: str
    jpegs: list[bytes]
    latents: bytes


def columns() -> list[str]:
    return ["clip_id", "caption", *[f"{kind}_{t:02d}" for kind in ("frame", "latent") for t in range(FRAMES)]]


def stored_clips(parquet: Path) -> Iterator[Stored]:
    for path in sorted(parquet.glob("shard-*.parquet")):
        shard = pq.ParquetFile(path)
        for group in range(shard.num_row_groups):
            yield from rows(shard, group)


def rows(shard: pq.ParquetFile, group: int) -> Iterator[Stored]:
    table = shard.read_row_group(group, columns=columns(), use_threads=False)
    for clip_id, caption, *parts in zip(*(column.to_pylist() for column in table.columns), strict=True):
        yield Stored(clip_id, caption, parts[:FRAMES], b"".join(parts[FRAMES:]))


def as_dict(clip: Stored) -> dict[str, str | bytes]:
    """One flat dict of bytes: what MDS and LitData store with the least work on either side."""
    frames = {f"frame_{t}": jpeg for t, jpeg in enumerate(clip.jpegs)}
    return {"clip_id": clip.clip_id, "caption": clip.caption, "latents": clip.latents, **frames}


def of_dict(sample: dict[str, str | bytes]) -> Stored:
    return Stored(
        sample["clip_id"], sample["caption"], [sample[f"frame_{t}"] for t in range(FRAMES)], sample["latents"]
    )


def write_mds(parquet: Path, out: Path) -> None:
    stand_in_for_torchvision()
    from streaming import MDSWriter

    kinds = {key: "str" if isinstance(value, str) else "bytes" for key, value in as_dict(first(parquet)).items()}
    with MDSWriter(out=str(out), columns=kinds, size_limit=CLIPS_A_SHARD * clip_bytes(parquet)) as writer:
        for clip in stored_clips(parquet):
            writer.write(as_dict(clip))


def write_litdata(parquet: Path, out: Path) -> None:
    from litdata.streaming.writer import BinaryWriter

    out.mkdir()
    writer = BinaryWriter(str(out), chunk_size=CLIPS_A_SHARD)
    for number, clip in enumerate(stored_clips(parquet)):
        writer.add_item(number, as_dict(clip))
    writer.done()
    writer.merge()


def write_webdataset(parquet: Path, out: Path) -> None:
    import webdataset as wds

    out.mkdir()
    with wds.ShardWriter(str(out / "shard-%05d.tar"), maxcount=CLIPS_A_SHARD, verbose=0) as writer:
        for clip in stored_clips(parquet):
            frames = {f"{t}.jpg": jpeg for t, jpeg in enumerate(clip.jpegs)}
            writer.write({"__key__": clip.clip_id, "txt": clip.caption, "latents": clip.latents, **frames})


def write_legacy(parquet: Path, out: Path) -> None:
    import simplejpeg
    import torch

    out.mkdir()
    samples = []
    source = np.arange(LEGACY_FRAMES) * FRAMES // LEGACY_FRAMES  # a stored frame three times in a row
    for number, clip in enumerate(stored_clips(parquet)):
        if number == LEGACY_CLIPS:
            break
        frames = np.stack([simplejpeg.decode_jpeg(jpeg, "RGB") for jpeg in clip.jpegs])[source]
        latents = np.frombuffer(clip.latents, np.float16).reshape(FRAMES, *LATENT)[source]
        samples.append({
            "frames": torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),
            "latents": torch.from_numpy(latents).bfloat16(),
            "caption": clip.caption,
            "video_id": clip.clip_id,
        })  # fmt: skip
        if len(samples) == LEGACY_CLIPS_A_SHARD:
            save_legacy(samples, out)
    if samples:
        save_legacy(samples, out)


def save_legacy(samples: list[dict], out: Path) -> None:
    import torch

    torch.save({"samples": samples, "count": len(samples)}, out / f"shard_{len(list(out.iterdir())):04d}.pt")
    samples.clear()


def first(parquet: Path) -> Stored:
    return next(stored_clips(parquet))


def clip_bytes(parquet: Path) -> int:
    return sum(path.stat().st_size for path in parquet.glob("shard-*")) // sum(1 for _ in stored_clips(parquet))


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "mds": write_mds,
    "litdata": write_litdata,
    "webdataset": write_webdataset,
    "legacy": write_legacy,
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    making = folder / f"{name}.making"
    shutil.rmtree(making, ignore_errors=True)
    WRITERS[name](folder / "parquet", making)
    making.rename(folder / name)


if __name__ == "__main__":
    main()
