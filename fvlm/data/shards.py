"""Shards: written so that a half-written one is never seen, read so that a wrong byte is never delivered.

`python -m fvlm.data.shards DIR` shows what a dataset holds (`fvlm/data/describe.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.data.schema import (
    FILES,
    FILES_SCHEMA,
    MANIFEST,
    SPEC_KEY,
    DatasetSpec,
    EncodedClip,
    Manifest,
    ShardFile,
    arrow_schema,
    frame_column,
    latent_column,
)
from fvlm.errors import UserError
from fvlm.files import TEMPORARY, fsync_dir, fsync_file, no_space_is_a_user_error, sha256_file, write_atomic

FOOTERS_CHECKED_AT_START = 64
"""A start opens at most this many shards, evenly spread; every shard is checked again when it is first read."""


class ShardWriter:
    """Writes one shard: clips in, a file that appears whole or not at all.

        with ShardWriter(folder / "shard-00000.parquet", spec) as writer:
            writer.add(clip)
        entry = writer.file

    Every row group is full but the last. Holds one in memory. An exception inside the block removes what was written.
    """

    def __init__(self, path: Path, spec: DatasetSpec):
        self.path, self.spec = path, spec
        self.file: ShardFile | None = None
        self._temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        self._schema = arrow_schema(spec)
        self._pending: list[EncodedClip] = []
        self._rows = 0

    def __enter__(self) -> ShardWriter:
        # Images and latents do not compress further (NOTES.md), so no codec; checksums catch every flipped byte.
        self._writer = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        return self

    def add(self, clip: EncodedClip) -> None:
        wanted = (self.spec.num_frames, self.spec.latent_bytes)
        if len(clip.frames) != self.spec.num_frames or clip.latents.shape != wanted or clip.latents.dtype != np.uint8:
            raise ValueError(
                f"clip {clip.clip_id!r}: {len(clip.frames)} frames, latents {clip.latents.dtype} {clip.latents.shape}; "
                f"the dataset has {self.spec.num_frames} frames and latents uint8 {wanted}"
            )
        self._pending.append(clip)
        if len(self._pending) == self.spec.rows_per_row_group:
            self._write_row_group()

    def _write_row_group(self) -> None:
        clips, self._pending = self._pending, []
        columns: list[pa.Array] = [
            pa.array([clip.clip_id for clip in clips]),
            pa.array([clip.caption for clip in clips]),
            pa.array([json.dumps(clip.source, sort_keys=True) for clip in clips]),
        ]
        columns += [pa.array([clip.frames[t] for clip in clips], pa.binary()) for t in range(self.spec.num_frames)]
        latent = pa.binary(self.spec.latent_bytes)
        columns += [
            pa.array([clip.latents[t].tobytes() for clip in clips], latent) for t in range(self.spec.num_frames)
        ]
        with no_space_is_a_user_error(self.path):
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=len(clips))
        self._rows += len(clips)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._pending:
                self._write_row_group()
            with no_space_is_a_user_error(self.path):
                self._writer.close()
            if kind is None:
                fsync_file(self._temporary)
                self.file = ShardFile(
                    self.path.name,
                    self._rows,
                    self._temporary.stat().st_size,
                    sha256_file(self._temporary),
                )
                self._temporary.replace(self.path)
                fsync_dir(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


def write_manifest(root: Path, spec: DatasetSpec, files: Sequence[ShardFile], rejected: int) -> Manifest:
    """Make `root` a dataset: files.parquet first, manifest.json, which vouches for it, last."""
    rows = [(f.name, f.rows, f.bytes, f.sha256) for f in files]
    table = pa.table(
        [pa.array(list(column), kind) for column, kind in zip(zip(*rows, strict=True), FILES_SCHEMA.types, strict=True)]
        if rows
        else [pa.array([], kind) for kind in FILES_SCHEMA.types],
        schema=FILES_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    write_atomic(root / FILES, content)
    summary = {
        "spec": spec.to_json(),
        "clips": sum(f.rows for f in files),
        "shards": len(files),
        "bytes": sum(f.bytes for f in files),
        "rejected": rejected,
        "files_sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomic(root / MANIFEST, json.dumps(summary, indent=2) + "\n")
    return read_manifest(root)


def read_manifest(root: Path | str) -> Manifest:
    """The dataset in folder `root`. Raises UserError when there is none, or its manifest is damaged or not ours."""
    root = Path(root)
    path = root / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{root}: not a dataset (it has no {MANIFEST}). Make one with "
            "`python -m ray_jobs.prepare --videos DIR --captions FILE --out DIR`; "
            "if that was interrupted, the same command continues it."
        )
    try:
        raw = json.loads(path.read_bytes())
        content = (root / FILES).read_bytes()
        spec_raw, files_sha256, rejected = raw["spec"], raw["files_sha256"], raw["rejected"]
    except (json.JSONDecodeError, KeyError, OSError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}). Prepare the dataset again.") from error
    spec = DatasetSpec.from_json(spec_raw, str(path))
    if hashlib.sha256(content).hexdigest() != files_sha256:
        raise UserError(f"{root / FILES}: its SHA-256 is not the one in {MANIFEST}. Restore both from one copy.")
    files = pq.read_table(pa.BufferReader(content))
    if files.column_names != FILES_SCHEMA.names:
        raise UserError(
            f"{root / FILES}: its columns are {files.column_names}; this release reads {FILES_SCHEMA.names}. "
            "Prepare the dataset again."
        )
    files = files.cast(FILES_SCHEMA)
    identity = json.dumps(spec.to_json(), sort_keys=True) + files_sha256
    return Manifest(str(root), spec, files, hashlib.sha256(identity.encode()).hexdigest(), int(rejected))


def open_shard(path: Path, spec: DatasetSpec, rows: int | None = None) -> pq.ParquetFile:
    """Open one shard and check that it is what the manifest says. Raises UserError that names the file.

    rows: of this shard in the manifest; None where it is not known, then the footer's own number
    """
    try:
        shard = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the manifest lists this shard, but it is not there. Restore it.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: cannot be opened as Parquet; truncated or damaged ({str(error).splitlines()[0]}). "
            "Restore it from a copy, or delete it with manifest.json and prepare the dataset again."
        ) from error
    raw = (shard.schema_arrow.metadata or {}).get(SPEC_KEY)
    if raw is None:
        raise UserError(f"{path}: not one of our shards (no {SPEC_KEY.decode()} in its footer).")
    difference = spec.difference(DatasetSpec.from_json(json.loads(raw), str(path)))
    if difference:
        raise UserError(
            f"{path}: the shard is not of this dataset: manifest against shard: {difference}. "
            "Shards of different datasets cannot be mixed; restore the right one."
        )
    _check_row_groups(shard.metadata, path, spec, rows)
    return shard


def _check_row_groups(footer: pq.FileMetaData, path: Path, spec: DatasetSpec, rows: int | None) -> None:
    """The plan computes where a clip lies, and never asks the shard."""
    if rows is not None and footer.num_rows != rows:
        raise UserError(f"{path}: {footer.num_rows} rows, but the manifest says {rows}. Restore it from a copy.")
    groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if groups != spec.row_groups(footer.num_rows):
        raise UserError(
            f"{path}: its row groups have {', '.join(map(str, sorted(set(groups))))} rows, where all but the last "
            f"must have {spec.rows_per_row_group} (rows_per_row_group in {MANIFEST}) and the last no more. "
            "Restore it from a copy, or prepare the dataset again."
        )


def read_rows(
    shard: pq.ParquetFile, path: Path, group: int, frames: Sequence[int], extra: Sequence[str] = ()
) -> pa.Table:
    """One row group: clip_id, caption, `extra` columns, those of `frames`. A flipped byte is an error, never data."""
    columns = ["clip_id", "caption", *extra, *map(frame_column, frames), *map(latent_column, frames)]
    try:
        return shard.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(
            f"{path}: row group {group} cannot be read; damaged ({str(error).splitlines()[0]}). "
            "Restore the shard from a copy."
        ) from error


def check_shards(manifest: Manifest) -> None:
    """Fail before anything starts when a shard is missing, cut short, or of another dataset. Raises UserError.

    All sizes are looked at, and the footers of at most FOOTERS_CHECKED_AT_START shards.
    """
    names, sizes = manifest.files["name"].to_pylist(), manifest.files["bytes"].to_numpy()
    rows = manifest.shard_rows
    root = Path(manifest.root)
    for name, size in zip(names, sizes, strict=True):
        path = root / name
        actual = path.stat().st_size if path.is_file() else None
        if actual is None:
            raise UserError(f"{path}: the manifest lists this shard, but it is not there. Restore it.")
        if actual != size:
            raise UserError(f"{path}: {actual} bytes, but the manifest says {size}: truncated or replaced. Restore it.")
    picked = np.unique(np.linspace(0, len(names) - 1, min(len(names), FOOTERS_CHECKED_AT_START)).astype(int))
    for index in picked:
        open_shard(root / names[index], manifest.spec, int(rows[index]))


if __name__ == "__main__":
    from fvlm.data.describe import command

    command()
