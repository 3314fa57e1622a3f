"""Shards written so that a half-written one is never seen, and the manifest that vouches for them. To read them:
`fvlm/data/row_groups.py`.

`python -m fvlm.data.shards ROOT` shows what a dataset holds (`fvlm/data/describe.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.data.row_groups import RowGroups
from fvlm.data.schema import (
    FILES,
    FILES_SCHEMA,
    MANIFEST,
    DatasetSpec,
    EncodedClip,
    Manifest,
    ShardFile,
    arrow_schema,
)
from fvlm.data.storage import Storage
from fvlm.errors import Damaged, UserError
from fvlm.files import TEMPORARY, fsync_dir, fsync_file, sha256_file, unwritable_is_a_user_error, write_atomic

FOOTERS_CHECKED_AT_START = 64
"""A start opens at most this many shards, evenly spread; every shard is checked again when it is first read."""
REMOTE_FOOTERS_CHECKED_AT_START = 8
LIST_OF_SHARDS = r"files(-[0-9a-f]{16})?\.parquet"
"""Names that a manifest may give its list; one without a name for it means FILES."""


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
        with unwritable_is_a_user_error(self.path):
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
        with unwritable_is_a_user_error(self.path):
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=len(clips))
        self._rows += len(clips)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._pending:
                self._write_row_group()
            with unwritable_is_a_user_error(self.path):
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


def write_manifest(
    root: Path, spec: DatasetSpec, files: Sequence[ShardFile], rejected: int, rejects_sha256: str = ""
) -> Manifest:
    """Make `root` a dataset: files.parquet first, manifest.json, which vouches for it, last.

    rejects_sha256: of the new rejects.jsonl of a dataset that is there already and gets longer. Its list of shards has
    a name of its own then, so that the old manifest stays true until the new one is there.
    """
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
    digest = hashlib.sha256(content).hexdigest()
    name = f"files-{digest[:16]}.parquet" if rejects_sha256 else FILES
    write_atomic(root / name, content)
    summary = {
        "spec": spec.to_json(),
        "clips": sum(f.rows for f in files),
        "shards": len(files),
        "bytes": sum(f.bytes for f in files),
        "rejected": rejected,
        "files_sha256": digest,
    } | ({"files": name, "rejects_sha256": rejects_sha256} if rejects_sha256 else {})
    write_atomic(root / MANIFEST, json.dumps(summary, indent=2) + "\n")
    return read_manifest(root)


def read_manifest(root: Path | str) -> Manifest:
    """The dataset at `root`, a local path or a URI (`Storage`).

    Raises UserError when there is none, when its manifest is damaged or not ours, or when it cannot be reached.
    """
    storage = Storage(str(root))
    where = storage.locate(MANIFEST)
    try:
        text = storage.read_bytes(MANIFEST)
    except Damaged as error:
        raise UserError(
            f"{storage.locate()}: not a dataset (it has no {MANIFEST}). Make one with "
            "`python -m ray_jobs.prepare --videos DIR --captions FILE --out DIR --latents CODEC`; "
            "if that was interrupted, the same command continues it."
        ) from error
    try:
        raw = json.loads(text)
        spec_raw, files_sha256, rejected = raw["spec"], raw["files_sha256"], raw["rejected"]
        name = raw.get("files", FILES)
        if re.fullmatch(LIST_OF_SHARDS, name) is None:
            raise ValueError(f"files is {name!r:.60}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: damaged ({type(error).__name__}: {error}). Prepare the dataset again.") from error
    spec = DatasetSpec.from_json(spec_raw, where)
    files_where, content = storage.locate(name), storage.read_bytes(name)
    if hashlib.sha256(content).hexdigest() != files_sha256:
        raise UserError(f"{files_where}: its SHA-256 is not the one in {MANIFEST}. Restore both from one copy.")
    files = pq.read_table(pa.BufferReader(content))
    if files.column_names != FILES_SCHEMA.names:
        raise UserError(
            f"{files_where}: its columns are {files.column_names}; this release reads {FILES_SCHEMA.names}. "
            "Prepare the dataset again."
        )
    files = files.cast(FILES_SCHEMA)
    identity = json.dumps(spec.to_json(), sort_keys=True) + files_sha256
    return Manifest(str(root), spec, files, hashlib.sha256(identity.encode()).hexdigest(), int(rejected))


def check_shards(manifest: Manifest, damage_is_error: bool = True) -> list[str]:
    """Look, before anything starts, for shards that are missing, cut short, or of another dataset.

    All sizes are looked at, by one listing, and the footers of a few shards: of at most FOOTERS_CHECKED_AT_START, or
    REMOTE_FOOTERS_CHECKED_AT_START where each costs two requests.

    Returns what is damaged, a message each, where `damage_is_error` is False: whoever reads goes round it. Raises
    Damaged for the first otherwise; and always for a shard of another dataset, which nobody should go round.
    UserError: the store cannot be reached.
    """
    names, sizes = manifest.files["name"].to_pylist(), manifest.files["bytes"].to_numpy()
    rows, row_groups = manifest.shard_rows, RowGroups.of(manifest)
    storage = row_groups.storage
    damage: dict[int, Damaged] = {}
    there = storage.sizes()
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        if there.get(name) != size:
            damage[index] = _wrong_size(storage.locate(name), there.get(name), size)
            if damage_is_error:
                raise damage[index]
    most = FOOTERS_CHECKED_AT_START if storage.is_local else REMOTE_FOOTERS_CHECKED_AT_START
    for index in np.unique(np.linspace(0, len(names) - 1, min(len(names), most)).astype(int)).tolist():
        if index in damage:
            continue
        try:
            row_groups.rows(names[index], int(rows[index]))
        except Damaged as error:
            if damage_is_error or error.reason == "foreign":
                raise
            damage[index] = error
    return [str(damage[index]) for index in sorted(damage)]


def _wrong_size(where: str, actual: int | None, size: int) -> Damaged:
    if actual is None:
        return Damaged(f"{where}: the manifest lists this shard, but it is not there. Restore it.", "missing")
    return Damaged(
        f"{where}: {actual} bytes, but the manifest says {size}: truncated or replaced. Restore it.", "footer"
    )


if __name__ == "__main__":
    from fvlm.data.describe import main
    from fvlm.entry_point import run_command

    run_command(main)
