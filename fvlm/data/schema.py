"""What a dataset on disk is: the columns of a shard, and the manifest that speaks for all shards.

A dataset is a folder:

    manifest.json    DatasetSpec, counts, SHA-256 of files.parquet; written last: without it a folder is no dataset
    files.parquet    one row a shard: name, rows, bytes, SHA-256; of a dataset that was continued (`continuation.py`)
                     files-<hash>.parquet, which manifest.json names
    rejects.jsonl    what the preparation could not use, and why
    shard-*.parquet  one row a clip

All row groups of a shard are full (`rows_per_row_group`) but its last one. So the rows of the shards say where every
clip lies, and no list of row groups is kept anywhere.

A shard has ONE COLUMN A FRAME (`frame_00`, `frame_01`, ... and `latent_00`, ...). Parquet stores columns apart, so
a run that trains on 8 of 24 stored frames reads the bytes of 8, whichever 8 it asks for (NOTES.md has the figures).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from fvlm.data.storage import Storage
from fvlm.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = "files.parquet"
REJECTS = "rejects.jsonl"
SPEC_KEY = b"fvlm.spec"
"""Parquet footer key under which every shard carries its own DatasetSpec as JSON."""

FrameCodec = Literal["jpeg", "png"]
LatentDtype = Literal["float16", "bfloat16"]
ResizePolicy = Literal["short-side", "stretch", "as-is"]


@dataclass(frozen=True)
class DatasetSpec:
    """What every clip of one dataset has in common. Two shards with different specs never share a dataset.

    num_frames:   frames stored a clip (T stored; training may read fewer)
    frame_size:   side of the square frames, pixels
    frame_codec:  "jpeg" (lossy, `jpeg_quality` and `jpeg_subsampling` say how) or "png" (lossless)
    resize:       how a video became square: "short-side" (scale the short side, crop the centre), "stretch", "as-is"
    latent_codec: codec that made the latents: "block-transform", "sd-vae-ft-mse", or another VAE by the hash of its
                  weights. (Datasets of earlier releases have the name of that VAE's folder.)
    latent_dtype: half-precision type of the stored latents, bit for bit
    latent_shape: (channels, height, width) of one frame's latent
    """

    num_frames: int
    frame_size: int
    frame_codec: FrameCodec
    resize: ResizePolicy
    latent_codec: str
    latent_dtype: LatentDtype
    latent_shape: tuple[int, int, int]
    jpeg_quality: int = 90
    jpeg_subsampling: Literal["444", "422", "420"] = "444"
    rows_per_row_group: int = 8
    format_version: int = FORMAT_VERSION

    @property
    def latent_bytes(self) -> int:
        """Bytes of one frame's latent."""
        return int(np.prod(self.latent_shape)) * 2

    def row_groups(self, rows: int) -> list[int]:
        """Rows of each row group of a shard that holds `rows`."""
        full, rest = divmod(rows, self.rows_per_row_group)
        return [self.rows_per_row_group] * full + [rest] * (rest > 0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"latent_shape": list(self.latent_shape)}

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> DatasetSpec:
        """Raises UserError, naming `where` and the key, when a key is missing or foreign or the version is not ours."""
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{where}: format_version is {version!r}; this release reads version {FORMAT_VERSION}. "
                "Read the data with the release that wrote it, or prepare it again."
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if raw.keys() != names:
            missing, foreign = sorted(names - raw.keys()), sorted(raw.keys() - names)
            raise UserError(f"{where}: missing keys {missing}, unknown keys {foreign}. Prepare the dataset again.")
        return cls(**raw | {"latent_shape": tuple(raw["latent_shape"])})

    def difference(self, other: DatasetSpec) -> str:
        """'frame_size 256 != 224, ...' for every field in which `other` differs; '' when none does."""
        mine, theirs = self.to_json(), other.to_json()
        return ", ".join(f"{key} {mine[key]!r} != {theirs[key]!r}" for key in mine if mine[key] != theirs[key])


def frame_column(index: int) -> str:
    return f"frame_{index:02d}"


def latent_column(index: int) -> str:
    return f"latent_{index:02d}"


def arrow_schema(spec: DatasetSpec) -> pa.Schema:
    """Columns of a shard: clip_id, caption, source (JSON text), then T frames and T latents, one column each."""
    latent = pa.binary(spec.latent_bytes)
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("clip_id", "caption", "source")]
    fields += [pa.field(frame_column(t), pa.binary(), nullable=False) for t in range(spec.num_frames)]
    fields += [pa.field(latent_column(t), latent, nullable=False) for t in range(spec.num_frames)]
    return pa.schema(fields, metadata={SPEC_KEY: json.dumps(spec.to_json(), sort_keys=True).encode()})


@dataclass(frozen=True)
class EncodedClip:
    """One row of a shard.

    frames:  T encoded images (JPEG or PNG files, as bytes)
    latents: [T, latent_bytes] uint8, the raw half-precision numbers in C order, little endian
    source:  where the clip came from; anything JSON can hold
    """

    clip_id: str
    caption: str
    frames: list[bytes]
    latents: np.ndarray
    source: dict[str, Any]


@dataclass(frozen=True)
class ShardFile:
    """One line of files.parquet."""

    name: str
    rows: int
    bytes: int
    sha256: str


FILES_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """A dataset as one value.

    root:        the folder: a local path, or a URI (`fvlm.data.storage.Storage`)
    spec:        what all clips share
    files:       the shards, as the pyarrow table of files.parquet (a table, so that a million of them stay small)
    fingerprint: SHA-256 over spec and files.parquet; equal fingerprints mean equal bytes in equal order
    rejected:    inputs the preparation could not use (listed in rejects.jsonl)
    """

    root: str
    spec: DatasetSpec
    files: pa.Table
    fingerprint: str
    rejected: int

    @property
    def where(self) -> str:
        """`root` for people and for files that outlive the run: no credentials, no options."""
        return Storage(self.root).locate()

    @property
    def num_clips(self) -> int:
        return int(self.shard_rows.sum())

    @property
    def shard_rows(self) -> np.ndarray:
        """[F] int64: rows of every shard, in the order of files.parquet."""
        return self.files["rows"].to_numpy()
