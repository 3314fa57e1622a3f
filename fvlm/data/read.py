"""Reading and decoding what the plan asks for. Runs in the ingest's processes, never in the training process.

No torch here: an ingest process starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

RING = 3
"""Buffers that `read(reuse=True)` goes round: one is decoded into, one is handed out, one may still be copied from."""


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

    def read(
        self, lo: int, hi: int, rank: int = 0, world: int = 1, threads: int = 1, reuse: bool = False
    ) -> Iterator[RawBatch]:
        """One RawBatch for every step in [lo, hi), which must lie inside one window.

        Each row group is read once and held compressed while the window lasts. Decoding runs one step ahead, on
        `threads` threads (libjpeg-turbo works without the interpreter's lock).

        reuse: a batch is good only until the one after the next is asked for, because its memory is decoded into
        again. Fresh memory costs as much as decoding: the kernel has to clear and map every page of it.

        Raises UserError naming shard, row group, row and clip when something is damaged.
        """
        places = np.stack(self.plan.rows(lo, hi, rank, world), axis=-1)  # [steps, B, 3]: shard, row group, row
        wanted = np.unique(places[..., :2].reshape(-1, 2), axis=0)
        tables = {(shard, group): self._row_group(shard, group) for shard, group in wanted.tolist()}
        with ThreadPoolExecutor(threads) as pool:
            ahead: tuple[RawBatch, list[Future[None]]] | None = None
            for step, clips in enumerate(places.tolist()):
                frames, latents = self._buffers(len(clips), step % RING if reuse else None)
                decoding = [
                    pool.submit(self._decode, tables[s, g], (s, g, r), frames[b], latents[b])
                    for b, (s, g, r) in enumerate(clips)
                ]
                if ahead:
                    yield _finished(*ahead)
                texts = {key: [tables[s, g][key][r].as_py() for s, g, r in clips] for key in ("caption", "clip_id")}
                ahead = {"frames": frames, "latents": latents} | texts, decoding
            if ahead:
                yield _finished(*ahead)

    def _buffers(self, b: int, slot: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Memory for one batch: fresh, or this process's own number `slot`."""
        spec, t = self.manifest.spec, self.num_frames
        shapes = ((b, t, spec.frame_size, spec.frame_size, 3), (b, t, *spec.latent_shape))
        return _allocate(*shapes) if slot is None else _ring(*shapes)[slot]

    def _decode(self, table: pa.Table, place: tuple[int, int, int], frames: np.ndarray, latents: np.ndarray) -> None:
        """One clip (shard, row group, row) into `frames` [T, H, W, 3] and `latents` [T, C, h, w]."""
        spec, (shard, group, row) = self.manifest.spec, place
        for t, index in enumerate(self.frame_indices):
            image = memoryview(table[frame_column(index)][row].as_buffer()).cast("B")  # Arrow's bytes are signed
            try:
                decode_frame(image, frames[t], spec)
            except (ValueError, OSError) as error:
                raise UserError(
                    f"{self._path(shard)}: row group {group}, row {row}, clip {table['clip_id'][row].as_py()!r}, "
                    f"frame {index}: cannot be decoded ({error}). Restore the shard from a copy."
                ) from error
            raw = np.frombuffer(table[latent_column(index)][row].as_buffer(), np.int16)
            latents[t] = raw.reshape(spec.latent_shape)

    def _row_group(self, shard: int, group: int) -> pa.Table:
        path, rows = self._path(shard), self.manifest.files["rows"][shard].as_py()
        return read_rows(_open(path, self.manifest.spec, rows), path, group, self.frame_indices.tolist())

    def _path(self, shard: int) -> Path:
        return Path(self.manifest.root) / self.manifest.files["name"][shard].as_py()


def _finished(batch: RawBatch, decoding: list[Future[None]]) -> RawBatch:
    for clip in decoding:
        clip.result()
    return batch


def _allocate(frames: tuple[int, ...], latents: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(frames, np.uint8), np.empty(latents, np.int16)


@functools.lru_cache(maxsize=1)
def _ring(frames: tuple[int, ...], latents: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [_allocate(frames, latents) for _ in range(RING)]


@functools.lru_cache(maxsize=64)
def _open(path: Path, spec: DatasetSpec, rows: int) -> pq.ParquetFile:
    """Footers are parsed once a process, not once a window."""
    return open_shard(path, spec, rows)
