"""The earlier trainer's `.pt` shards -> a dataset. `python -m ray_jobs.convert --src DIR --out DIR`

The source is only ever read. Interrupted, the conversion is continued by the same command; finished, it says so.
With --verify everything is read back and compared with the source, at the end or on its own later. On a cluster both
folders have to be seen by every node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from fvlm.convert.legacy_parts import Conversion
from fvlm.convert.legacy_shards import find_layout, find_parts
from fvlm.data import continuation, parts
from fvlm.data.latents import SD_VAE
from fvlm.data.schema import DatasetSpec, Manifest
from fvlm.data.shards import check_shards
from fvlm.errors import UserError
from fvlm.files import unwritable_is_a_user_error
from ray_jobs.cli import run_command
from ray_jobs.cluster import connect
from ray_jobs.part_tasks import as_tasks, follow, outcome_of, print_table, unfinished
from ray_jobs.paths import absolute

LATENT_CODEC = SD_VAE
"""What made the latents of every file of the earlier trainer."""
MEDIAN_DB, LEAST_DB = 40.0, 35.0
"""PSNR that JPEG frames must reach in --verify: the median of all, and every single one."""
REJECTS_SHOWN = 20


@dataclass(frozen=True)
class ConvertConfig:
    """Turn the earlier trainer's .pt shards, or a folder of loose .pt samples, into a dataset."""

    src: Path
    """Folder with shard_*.pt files; or, where there are none, with one sample in every .pt file. Never changed."""
    out: Path
    """Folder of the dataset."""
    frames: Literal["all", "8"] = "all"
    """"8" keeps the 8 frames that the earlier trainer trained on, and their latents: a third of the bytes."""
    codec: Literal["jpeg", "png", "lossless"] = "jpeg"
    """How frames are stored. "png" and "lossless" are the same: every bit, several times larger."""
    quality: int = DatasetSpec.jpeg_quality
    """JPEG quality, 1 to 100."""
    subsampling: Literal["444", "422", "420"] = DatasetSpec.jpeg_subsampling
    """JPEG chroma subsampling."""
    verify: bool = False
    """Read everything back and compare it with the source. A dataset that is complete is only verified."""
    strict: bool = False
    """End at the first damaged sample, instead of reporting it and going on."""
    tasks: int = 0
    """Tasks at a time. 0: as many as there are CPUs. Each takes about 0.4 GB of memory."""
    address: str = ""
    """Address of a Ray cluster. Empty: RAY_ADDRESS, and where that is not set this machine alone."""


@dataclass(frozen=True)
class PartTask:
    """`work` on a part, as Ray Data calls it: batches have one row."""

    work: Callable[[int, list[Path]], tuple[int, dict[str, Any]]]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        files = [Path(name) for name in json.loads(batch["files"][0])]
        made, error = outcome_of(lambda: self.work(int(batch["part"][0]), files))
        clips, figures = made or (0, {})
        return {"clips": [clips], "figures": [json.dumps(figures)]} | error


def convert(config: ConvertConfig) -> None:
    """The whole command. Raises UserError; then what is complete stays, for the same command to continue."""
    started = time.monotonic()
    src, out = (Path(absolute(option, str(path))) for option, path in (("--src", config.src), ("--out", config.out)))
    config = dataclasses.replace(config, src=src, out=out)
    _check(config)
    sources = find_parts(src)
    files = [path for part in sources for path in part]
    conversion = _conversion(config, files)
    settings = conversion.spec.to_json() | _identity(files)
    with unwritable_is_a_user_error(out):
        parts.check_begun(out, settings)
        manifest, converted = parts.completed(out), 0
        if manifest:
            continuation.tidy(out)
    if not manifest:
        _say_what_is_left_alone(src, files)
        _check_space(out, conversion, sources)
    with contextlib.ExitStack() as cluster:
        if not manifest or config.verify:
            cluster.enter_context(connect(num_cpus=config.tasks or None, address=config.address or None))
        if manifest:
            print(f"{out}: complete already, nothing to convert", flush=True)
        else:
            with parts.exclusive(out):
                parts.begin(out, settings)
                converted = _convert_parts(config, conversion, sources)
                manifest = parts.finish(out, conversion.spec, len(sources), src, "samples")
        _report(manifest, files, converted, time.monotonic() - started)
        if config.strict and manifest.rejected:
            raise UserError(f"{out}: {manifest.rejected} damaged samples were left out; --strict wants none.")
        if config.verify:
            _verify(config, conversion, sources, manifest)


def _check(config: ConvertConfig) -> None:
    if not 1 <= config.quality <= 100:
        raise UserError(f"--quality is {config.quality}; JPEG knows 1 to 100.")
    if config.tasks < 0:
        raise UserError(f"--tasks is {config.tasks}; it must be at least 0.")
    if config.out.resolve().is_relative_to(config.src.resolve()):  # links must not lead there either
        raise UserError(
            f"--out {config.out} lies in --src {config.src}, which is never written to. Choose another --out."
        )


def _conversion(config: ConvertConfig, files: list[Path]) -> Conversion:
    layout = find_layout(files)
    wanted = layout.num_frames if config.frames == "all" else int(config.frames)
    if wanted > layout.num_frames:
        raise UserError(f"--frames {config.frames}: the samples have {layout.num_frames} frames. Take --frames all.")
    spec = DatasetSpec(
        num_frames=wanted,
        frame_size=layout.frame_size,
        frame_codec="jpeg" if config.codec == "jpeg" else "png",
        resize="as-is",
        latent_codec=LATENT_CODEC,
        latent_dtype=layout.latent_dtype,
        latent_shape=layout.latent_shape,
        jpeg_quality=config.quality,
        jpeg_subsampling=config.subsampling,
    )
    return Conversion(layout, spec, config.strict)


def _identity(files: list[Path]) -> dict[str, Any]:
    """What tells one source from another without reading it: names and sizes."""
    sizes = [(path.name, path.stat().st_size) for path in files]
    return {
        "command": "convert",
        "source_files": len(files),
        "source_bytes": sum(size for _, size in sizes),
        "source_sha256": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
    }


def _say_what_is_left_alone(src: Path, files: list[Path]) -> None:
    others = sorted({path.name for path in src.glob("*.pt")} - {path.name for path in files})
    if others:
        print(f"left alone, being no shard_*.pt: {', '.join(others[:5])}{' ...' * (len(others) > 5)}", flush=True)


def _check_space(out: Path, conversion: Conversion, sources: list[list[Path]]) -> None:
    """Raises UserError when what is still to be written is foreseen not to fit on the disk."""
    todo = [path for index, part in enumerate(sources) if not parts.is_done(out, index) for path in part]
    if not todo:
        return
    needed = conversion.estimate(todo)
    disk = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    print(f"about {needed / 1e9:,.1f} GB will be written; {free / 1e9:,.1f} GB are free", flush=True)
    if needed > free:
        raise UserError(
            f"--out {out}: about {needed / 1e9:,.3f} GB will be written, but only {free / 1e9:,.3f} GB are free there. "
            "Free some space, choose another disk, or store less (--frames 8, a lower --quality)."
        )


def _items(sources: list[list[Path]], indices: list[int]) -> list[dict[str, Any]]:
    return [{"part": index, "files": json.dumps([str(path) for path in sources[index]])} for index in indices]


def _convert_parts(config: ConvertConfig, conversion: Conversion, sources: list[list[Path]]) -> int:
    """Convert the parts that are not done yet. Returns their clips."""
    todo = unfinished(config.out, range(len(sources)))
    if not todo:
        return 0
    work = functools.partial(_convert_part, conversion, config.out)
    rows = as_tasks(PartTask(work), _items(sources, todo), config.tasks, "convert part")
    return sum(row["clips"] for row in follow(rows, len(sources), len(sources) - len(todo)))


def _convert_part(conversion: Conversion, out: Path, index: int, files: list[Path]) -> tuple[int, dict[str, Any]]:
    part = conversion.write(out, index, files)
    return part.file.rows if part.file else 0, {}


def _verify(config: ConvertConfig, conversion: Conversion, sources: list[list[Path]], manifest: Manifest) -> None:
    """Compare the dataset with the source. Raises UserError that names what is not as it should be."""
    started = time.monotonic()
    check_shards(manifest)
    print("verifying: everything is read back and compared with the source", flush=True)
    # what the conversion reported must not end the comparison
    work = functools.partial(_verify_part, dataclasses.replace(conversion, strict=False), config.out)
    rows = as_tasks(PartTask(work), _items(sources, list(range(len(sources)))), config.tasks, "verify part")
    compared = [(row["clips"], json.loads(row["figures"])) for row in follow(rows, len(sources))]
    clips = sum(clips for clips, _ in compared)
    rejected = sum(figures["rejected"] for _, figures in compared)
    if (clips, rejected) != (manifest.num_clips, manifest.rejected):
        raise UserError(
            f"{config.out}: the manifest speaks of {manifest.num_clips} clips and {manifest.rejected} rejected, "
            f"the source gives {clips} and {rejected}. Delete the dataset's folder and convert again."
        )
    print_table([("verified", f"{clips:,} clips"), ("latents, texts", "the same, bit for bit")])
    if manifest.spec.frame_codec == "png":
        print_table([("frames", "the same, bit for bit")])
    else:
        _judge([figures for _, figures in compared if figures["psnr"]])
    print_table([("seconds", f"{time.monotonic() - started:.1f}")])


def _verify_part(conversion: Conversion, out: Path, index: int, files: list[Path]) -> tuple[int, dict[str, Any]]:
    comparison = conversion.verify(out, index, files)
    return comparison.clips, dataclasses.asdict(comparison)


def _judge(figures: list[dict[str, Any]]) -> None:
    """Print the PSNR of all frames. Raises UserError when it is too low."""
    psnr = np.concatenate([part["psnr"] for part in figures])
    median, least = float(np.median(psnr)), float(psnr.min())
    worst = min(figures, key=lambda part: min(part["psnr"]))["worst_clip"]
    print_table([("PSNR of frames", f"median {median:.1f} dB, least {least:.1f} dB (in clip {worst})")])
    if median < MEDIAN_DB or least < LEAST_DB:
        raise UserError(
            f"clip {worst}: a frame of it has {least:.1f} dB, and the median of all is {median:.1f} dB; wanted are "
            f"{LEAST_DB:g} and {MEDIAN_DB:g} at least. Convert again with a higher --quality, or --codec lossless."
        )


def _report(manifest: Manifest, files: list[Path], converted: int, seconds: float) -> None:
    before, after = sum(path.stat().st_size for path in files), int(manifest.files["bytes"].to_numpy().sum())
    clips, rejects = manifest.num_clips, list(parts.read_rejects(Path(manifest.root)))
    reasons = Counter(reject.reason for reject in rejects)
    samples = clips + sum(reject.row is not None for reject in rejects)
    print_table([
        ("dataset", manifest.root),
        ("clips in", f"{samples:,}"),
        ("clips out", f"{clips:,}"),
        ("damaged", f"{manifest.rejected:,}"),
        *[(f"  {reason}", f"{count:,}") for reason, count in reasons.most_common()],
        ("bytes before", f"{before:,} ({before / max(samples, 1):,.0f} a clip)"),
        ("bytes after", f"{after:,} ({after / clips:,.0f} a clip)"),
        ("fingerprint", manifest.fingerprint),
        ("seconds", f"{seconds:.1f}" + (f" ({converted / seconds:.1f} clips/s)" if converted else "")),
    ])  # fmt: skip
    for reject in rejects[:REJECTS_SHOWN]:
        print(f"damaged: {reject.reason}: {reject.detail}", flush=True)
    if len(rejects) > REJECTS_SHOWN:
        print(f"and {len(rejects) - REJECTS_SHOWN} more: see {Path(manifest.root) / parts.REJECTS}", flush=True)


def main() -> None:
    convert(tyro.cli(ConvertConfig, prog="python -m ray_jobs.convert"))


if __name__ == "__main__":
    run_command(main)
