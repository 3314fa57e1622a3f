"""Reading and decoding what the plan asks for. Runs in the ingest's processes, never in the training process.

No torch here: an ingest process starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fvlm.data.decode import decode_frame, even_steps
from fvlm.data.plan import Plan
from fvlm.data.schema import DatasetSpec, Manifest, frame_column, latent_column
from fvlm.data.shards import open_shard, read_rows
from fvlm.errors import UserError

RawBatch = dict[str, Any]
"""One rank's clips of one step:
frames  [B, T, H, W, 3] uint8      latents  [B, T, C, h, w] int16, the bits of the stored half-precision type
caption [B] strings                clip_id  [B] strings
"""


@dataclass(frozen=True)
class ClipReader:
    """Reads windows of the plan from one dataset: T of the stored frames, their latents, captions and ids."""

    manifest: Manifest
    plan: Plan
    num_frames: int

    @property
    def frame_indices(self) -> np.ndarray:
        """[T]: which of the stored frames are used; the same for every clip."""
        return even_steps(self.manifest.spec.num_frames, self.num_frames)

    def read(self, lo: int, hi: int, rank: int = 0, world: int = 1) -> Iterator[RawBatch]:
        """One RawBatch for every step in [lo, hi), which must lie inside one window.

        Each row group is read once and held compressed while the window lasts; one step is decoded at a time.
        Raises UserError naming shard, row group, row and clip when something is damaged.
        """
        groups, rows = self.plan.rows(lo, hi, rank, world)  # [steps, B] each
        tables = {int(group): self._row_group(int(group)) for group in np.unique(groups)}
        for step_groups, step_rows in zip(groups, rows, strict=True):
            yield self._decode([(tables[int(g)], int(g), int(r)) for g, r in zip(step_groups, step_rows, strict=True)])

    def _decode(self, clips: list[tuple[pa.Table, int, int]]) -> RawBatch:
        spec, indices = self.manifest.spec, self.frame_indices
        size = spec.frame_size
        frames = np.empty((len(clips), len(indices), size, size, 3), np.uint8)
        latents = np.empty((len(clips), len(indices), *spec.latent_shape), np.int16)
        for b, (table, group, row) in enumerate(clips):
            for t, index in enumerate(indices):
                image = memoryview(table[frame_column(index)][row].as_buffer()).cast("B")  # Arrow's bytes are signed
                try:
                    decode_frame(image, frames[b, t], spec)
                except (ValueError, OSError) as error:
                    path, local = self._locate(group)
                    raise UserError(
                        f"{path}: row group {local}, row {row}, clip {table['clip_id'][row].as_py()!r}, frame {index}: "
                        f"cannot be decoded ({error}). Restore the shard from a copy."
                    ) from error
                raw = np.frombuffer(table[latent_column(index)][row].as_buffer(), np.int16)
                latents[b, t] = raw.reshape(spec.latent_shape)
        return {
            "frames": frames,
            "latents": latents,
            "caption": [table["caption"][row].as_py() for table, _, row in clips],
            "clip_id": [table["clip_id"][row].as_py() for table, _, row in clips],
        }

    def _row_group(self, group: int) -> pa.Table:
        path, local = self._locate(group)
        return read_rows(_open(path, self.manifest.spec), path, local, self.frame_indices.tolist())

    def _locate(self, group: int) -> tuple[Path, int]:
        """Row group number in the dataset -> its shard, and its number there."""
        starts = _first_row_groups(self.manifest.fingerprint, self.manifest)
        file = int(np.searchsorted(starts, group, side="right")) - 1
        return Path(self.manifest.root) / self.manifest.files["name"][file].as_py(), group - int(starts[file])


@functools.lru_cache(maxsize=64)
def _open(path: Path, spec: DatasetSpec) -> pq.ParquetFile:
    """Footers are parsed once a process, not once a window."""
    return open_shard(path, spec)


_STARTS: dict[str, np.ndarray] = {}


def _first_row_groups(fingerprint: str, manifest: Manifest) -> np.ndarray:
    """[F] number of the first row group of every shard."""
    if fingerprint not in _STARTS:
        counts = manifest.row_groups_per_file
        _STARTS.clear()
        _STARTS[fingerprint] = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return _STARTS[fingerprint]
