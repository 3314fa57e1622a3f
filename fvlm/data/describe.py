"""A look at a dataset: the command `python -m fvlm.data.shards ROOT`."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from fvlm.data.decode import decode_frame, even_steps
from fvlm.data.row_groups import RowGroups, stored_captions
from fvlm.data.schema import REJECTS, Manifest, arrow_schema, frame_column
from fvlm.data.shards import read_manifest
from fvlm.data.storage import Storage, pieces
from fvlm.errors import Damaged, UserError
from fvlm.files import unwritable_is_a_user_error

SHEET_FRAMES = 8
"""Frames shown of a clip on the contact sheet, at even steps."""
CAPTION_WIDTH = 120


@dataclass(frozen=True)
class Look:
    """Show what a dataset holds."""

    root: tyro.conf.Positional[str]
    """The dataset: a folder, s3://bucket/path or gs://bucket/path."""
    verify: bool = False
    """Read every byte: size and SHA-256 of every file, checksum of every page."""
    sample: int = 0
    """Draw so many clips, evenly spread over the dataset, into the file --png."""
    png: Path | None = None
    """The picture that --sample draws."""


def describe(manifest: Manifest) -> list[tuple[str, str]]:
    """Names and values to print. Of the shards only the captions are read."""
    spec = manifest.spec
    codec = f"jpeg, quality {spec.jpeg_quality}, {spec.jpeg_subsampling}" if spec.frame_codec == "jpeg" else "png"
    size = int(manifest.files["bytes"].to_numpy().sum())
    rows_per_group = spec.rows_per_row_group
    row_groups = int((-(-manifest.shard_rows // rows_per_group)).sum())
    fullest = min(rows_per_group, int(manifest.shard_rows.max(initial=0)))
    characters, words = caption_lengths(manifest)
    rows = [
        ("dataset", manifest.where),
        ("clips", f"{manifest.num_clips:,}"),
        ("stored frames T", str(spec.num_frames)),
        ("frame size", f"{spec.frame_size} px ({spec.resize})"),
        ("frame codec", codec),
        ("latents", f"{spec.latent_codec}, {spec.latent_dtype} {list(spec.latent_shape)}"),
        ("bytes", f"{size:,}"),
        ("bytes a clip", f"{size / max(manifest.num_clips, 1):,.0f}"),
        ("shards", f"{manifest.files.num_rows:,}"),
        ("row groups", f"{row_groups:,}, of at most {fullest} clips"),
        ("caption length", f"{_spread(characters)} characters, {_spread(words)} words (least / median / most)"),
        ("rejected", f"{manifest.rejected:,}"),
    ]
    if manifest.rejected:
        reasons = Counter(json.loads(line)["reason"] for line in rejects(manifest))
        rows += [(f"  {reason}", f"{count:,}") for reason, count in reasons.most_common()]
    return [*rows, ("fingerprint", manifest.fingerprint)]


def rejects(manifest: Manifest) -> list[str]:
    """The lines of the dataset's rejects.jsonl; none where somebody copied the dataset without it."""
    try:
        # not str.splitlines, which ends a line at U+2028 in a video's name as well
        return [line.decode() for line in Storage(manifest.root).read_bytes(REJECTS).splitlines()]
    except Damaged:
        return []


def caption_lengths(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """[clips] int64 each: characters and words of every caption."""
    characters, words = [], []
    for captions in stored_captions(manifest):
        characters += [len(caption) for caption in captions]
        words += [len(caption.split()) for caption in captions]
    return np.array(characters, np.int64), np.array(words, np.int64)


def _spread(lengths: np.ndarray) -> str:
    return f"{lengths.min()} / {np.median(lengths):g} / {lengths.max()}" if lengths.size else "none"


def damage(manifest: Manifest) -> Iterator[str]:
    """A line for every shard that is not, to the byte, what the manifest says; everything is read."""
    row_groups, columns = RowGroups.of(manifest), arrow_schema(manifest.spec).names
    storage = row_groups.storage
    sizes = storage.sizes()
    for file in manifest.files.to_pylist():
        name, where = file["name"], storage.locate(file["name"])
        try:
            for group in range(len(row_groups.rows(name, file["rows"]))):
                row_groups.read(name, group, columns, file["rows"])
            if sizes[name] != file["bytes"]:
                yield f"{where}: {sizes[name]} bytes, but the manifest says {file['bytes']}"
            elif sha256(storage, name) != file["sha256"]:
                yield f"{where}: its SHA-256 is not that of the manifest"
        except Damaged as error:
            yield str(error)


def sha256(storage: Storage, name: str) -> str:
    """Hex SHA-256 of a file, a piece of it in memory at a time."""
    file, digest = storage.open(name), hashlib.sha256()
    for piece in pieces(0, file.size()):
        digest.update(storage.read_ranges(name, file, [piece])[0].data)
    return digest.hexdigest()


def sample_clips(manifest: Manifest, count: int) -> list[dict[str, Any]]:
    """`count` clips, evenly spread: clip_id, caption and frames [n, S, S, 3] uint8."""
    spec = manifest.spec
    frames = even_steps(spec.num_frames, min(SHEET_FRAMES, spec.num_frames)).tolist()
    rows_before = np.concatenate([[0], np.cumsum(manifest.shard_rows)])
    columns = ["clip_id", "caption", *map(frame_column, frames)]
    row_groups, clips = RowGroups.of(manifest), []
    for number in even_steps(manifest.num_clips, min(count, manifest.num_clips)):
        file = int(np.searchsorted(rows_before, number, side="right")) - 1
        group, row = divmod(int(number - rows_before[file]), spec.rows_per_row_group)
        name = manifest.files["name"][file].as_py()
        table = row_groups.read(name, group, columns, int(manifest.shard_rows[file]))
        clip = table.slice(row, 1).to_pylist()[0]
        pixels = np.empty((len(frames), spec.frame_size, spec.frame_size, 3), np.uint8)
        for image, t in zip(pixels, frames, strict=True):
            try:
                decode_frame(clip[frame_column(t)], image, spec)
            except (ValueError, OSError) as error:
                where = row_groups.storage.locate(name)
                raise UserError(f"{where}: clip {clip['clip_id']}, frame {t}: cannot be decoded ({error}).") from error
        clips.append({"clip_id": clip["clip_id"], "caption": clip["caption"], "frames": pixels})
    return clips


def draw_sheet(clips: list[dict[str, Any]], path: Path) -> None:
    """A row a clip: its frames from left to right under its name and caption."""
    width = len(clips[0]["frames"])
    figure = Figure(figsize=(1.6 * width, 2.2 * len(clips)), layout="constrained")
    rows = figure.subfigures(len(clips), 1, squeeze=False)[:, 0]
    for part, clip in zip(rows, clips, strict=True):
        title = textwrap.shorten(f"{clip['clip_id']}: {clip['caption']}", 2 * CAPTION_WIDTH, placeholder=" ...")
        # parse_math: a caption may hold dollar signs
        part.suptitle(textwrap.fill(title, CAPTION_WIDTH), fontsize=8, parse_math=False)
        for axes, frame in zip(part.subplots(1, width, squeeze=False)[0], clip["frames"], strict=True):
            axes.imshow(frame)
            axes.set_axis_off()
    with unwritable_is_a_user_error(path):
        figure.savefig(path, format="png", dpi=100)


def main() -> None:
    look = tyro.cli(Look, prog="python -m fvlm.data.shards")
    if bool(look.sample) != bool(look.png) or look.sample < 0:
        raise UserError("--sample N and --png FILE go together, and N is at least 1.")
    if look.png and not look.png.parent.is_dir():
        raise UserError(f"--png {look.png}: its folder does not exist. Create it.")
    manifest = read_manifest(look.root)
    if look.png and not manifest.num_clips:
        raise UserError(f"{manifest.where}: there are no clips to draw. Leave out --sample.")
    if look.verify:
        damaged = list(damage(manifest))
        if damaged:
            raise UserError(f"{len(damaged)} of {manifest.files.num_rows} shards are damaged:\n" + "\n".join(damaged))
    for name, value in describe(manifest):
        print(f"{name:<18}{value}")
    if look.verify:
        print("every file has the size and the SHA-256 of the manifest, and every page its checksum")
    if look.png:
        draw_sheet(sample_clips(manifest, look.sample), look.png)
        print(f"drawn: {look.png}")
