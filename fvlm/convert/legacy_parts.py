"""One part of the earlier trainer's data -> one shard of ours, and the comparison of the two."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fvlm.convert.legacy_shards import Damaged, Layout, Sample, layout_of, open_file, read_samples
from fvlm.data.decode import decode_frame, encode_frame, even_steps
from fvlm.data.parts import Part, Reject, shard_path, write_part
from fvlm.data.row_groups import RowGroups
from fvlm.data.schema import DatasetSpec, EncodedClip, arrow_schema, frame_column, latent_column
from fvlm.data.storage import Storage
from fvlm.errors import UserError

ESTIMATED_FILES, ESTIMATED_CLIPS = 8, 2
"""So many files, and clips of each, are encoded to foresee how large the dataset will be."""
ESTIMATE_MARGIN = 1.1
SAME_PICTURE_DB = 99.0
"""PSNR of identical pictures, which by the formula is infinite."""

_AGAIN = "Delete the dataset's folder and convert again."


@dataclass(frozen=True)
class Conversion:
    """What of the source's samples is stored, and how."""

    layout: Layout
    spec: DatasetSpec
    strict: bool = False
    """A damaged sample is a UserError, not a Reject."""

    @property
    def indices(self) -> list[int]:
        """[T stored]: which of the source's frames are stored; a run that trains on 8 takes the same 8 from either."""
        return even_steps(self.layout.num_frames, self.spec.num_frames).tolist()

    def samples(self, files: Sequence[Path]) -> Iterator[Sample | Reject]:
        for file in files:
            for sample in read_samples(file, self.layout):
                if self.strict and isinstance(sample, Reject):
                    raise UserError(
                        f"{sample.reason}: {sample.detail}. Mend it, or leave out --strict to convert the rest."
                    )
                yield sample

    def write(self, root: Path, index: int, files: Sequence[Path]) -> Part:
        """Convert part `index`. Raises UserError: disk full, source gone, or a damaged sample where that is fatal."""
        clips = (sample if isinstance(sample, Reject) else self.encode(sample) for sample in self.samples(files))
        return write_part(root, index, self.spec, clips)

    def encode(self, sample: Sample) -> EncodedClip:
        frames = [encode_frame(picture(sample, t), self.spec) for t in self.indices]
        latents = np.stack([latent_bits(sample, t) for t in self.indices])
        return EncodedClip(sample.clip_id, sample.caption, frames, latents, sample.source)

    def estimate(self, files: Sequence[Path]) -> int:
        """Bytes that these files will take as a dataset: their size, times what a few clips come to."""
        before, after = 0.0, 0
        for number in np.unique(np.linspace(0, len(files) - 1, min(len(files), ESTIMATED_FILES)).astype(int)):
            try:
                samples = open_file(files[number]).samples
            except Damaged:
                continue  # the conversion will report it
            for place in np.unique(np.linspace(0, len(samples), ESTIMATED_CLIPS, endpoint=False).astype(int)):
                if place >= len(samples) or not self._is_usual(samples[place]):
                    continue
                clip = self.encode(Sample("", "", samples[place]["frames"], samples[place]["latents"], {}))
                before += files[number].stat().st_size / len(samples)
                after += sum(map(len, clip.frames)) + clip.latents.nbytes
        total = sum(file.stat().st_size for file in files)
        return int(total * (after / before if before else 1) * ESTIMATE_MARGIN)

    def _is_usual(self, raw: Any) -> bool:
        try:
            return layout_of(raw) == self.layout
        except Damaged:
            return False

    def verify(self, root: Path, index: int, files: Sequence[Path]) -> Comparison:
        """Compare shard `index` with its source. Raises UserError that names the first clip that is not the same."""
        path = shard_path(root, index)
        rows = self._stored(path) if path.exists() else iter(())
        clips, rejected, worst_clip, least = 0, 0, "", math.inf
        psnr: list[float] = []
        for sample in self.samples(files):
            if isinstance(sample, Reject):
                rejected += 1
                continue
            row = next(rows, None)
            if row is None:
                raise UserError(f"{path}: clip {sample.clip_id} of the source is not in it. {_AGAIN}")
            found = self._compare(sample, row, path)
            if found and min(found) < least:
                worst_clip, least = sample.clip_id, min(found)
            psnr += found
            clips += 1
        left = next(rows, None)
        if left is not None:
            raise UserError(f"{path}: clip {left['clip_id']} is not in the source. {_AGAIN}")
        return Comparison(clips, rejected, psnr, worst_clip)

    def _stored(self, path: Path) -> Iterator[dict[str, Any]]:
        row_groups = RowGroups(Storage(str(path.parent)), self.spec, fingerprint="")  # a part has no manifest yet
        for group in range(len(row_groups.rows(path.name))):
            table = row_groups.read(path.name, group, arrow_schema(self.spec).names)
            for start in range(table.num_rows):
                yield table.slice(start, 1).to_pylist()[0]

    def _compare(self, sample: Sample, row: dict[str, Any], path: Path) -> list[float]:
        """-> PSNR of every frame (none where frames are stored without loss: then they are equal)."""
        where = f"{path}: clip {sample.clip_id}"
        texts = {
            "clip_id": sample.clip_id,
            "caption": sample.caption,
            "source": json.dumps(sample.source, sort_keys=True),
        }
        for column, wanted in texts.items():
            if row[column] != wanted:
                raise UserError(f"{where}: its {column} is {row[column]!r}, in the source {wanted!r}. {_AGAIN}")
        psnr = []
        size = self.spec.frame_size
        stored = np.empty((size, size, 3), np.uint8)
        for place, t in enumerate(self.indices):
            if row[latent_column(place)] != latent_bits(sample, t).tobytes():
                raise UserError(f"{where}: the latent of frame {t} differs from the source. {_AGAIN}")
            try:
                decode_frame(row[frame_column(place)], stored, self.spec)
            except (ValueError, OSError) as error:
                raise UserError(f"{where}: frame {t} cannot be decoded ({error}). {_AGAIN}") from error
            if self.spec.frame_codec == "jpeg":
                psnr.append(peak_signal_to_noise(picture(sample, t), stored))
            elif not np.array_equal(picture(sample, t), stored):
                raise UserError(f"{where}: frame {t} differs from the source. {_AGAIN}")
        return psnr


@dataclass(frozen=True)
class Comparison:
    """psnr:       decibels of every stored frame, clip after clip; empty where frames are stored without loss
    worst_clip: the one with the least of them
    """

    clips: int
    rejected: int
    psnr: list[float]
    worst_clip: str


def picture(sample: Sample, t: int) -> np.ndarray:
    """[S, S, 3] uint8: frame t of the source."""
    return np.ascontiguousarray(sample.frames[t].permute(1, 2, 0).numpy())


def latent_bits(sample: Sample, t: int) -> np.ndarray:
    """[latent_bytes] uint8: latent t of the source, bit for bit."""
    return sample.latents[t].contiguous().view(torch.int16).numpy().reshape(-1).view(np.uint8)


def peak_signal_to_noise(picture: np.ndarray, other: np.ndarray) -> float:
    """PSNR in dB over all three channels of two uint8 pictures."""
    error = float(np.mean(np.square(picture.astype(np.float32) - other)))
    return min(float(10 * np.log10(255**2 / error)), SAME_PICTURE_DB) if error else SAME_PICTURE_DB
