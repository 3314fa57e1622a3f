"""Videos and captions -> a dataset. `python -m ray_jobs.prepare --videos DIR --captions FILE --out DIR --latents CODEC`

Interrupted, it is continued by the same command; finished, it says so. On a cluster all three paths have to be seen by
every node.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import ray.data
import tyro

from fvlm.data import continuation, parts
from fvlm.data.captions import Captions, Row
from fvlm.data.latents import BlockTransform, LatentCodec, make_codec
from fvlm.data.schema import DatasetSpec, Manifest
from fvlm.data.shards import read_manifest
from fvlm.data.tables import sha256_table
from fvlm.errors import UserError
from fvlm.files import unwritable_is_a_user_error
from ray_jobs.cli import run_command
from ray_jobs.cluster import connect
from ray_jobs.part_tasks import Rows, as_tasks, follow, outcome_of, print_table, unfinished
from ray_jobs.paths import absolute, absolute_unless_name

ROWS_AT_ONCE = 65536
"""Rows of the table that are handed to the cluster together. Between two such portions it is idle for a few seconds."""


@dataclass(frozen=True)
class PrepareConfig:
    """Make a dataset out of videos and captions."""

    videos: Path
    """Folder that the paths in the captions table start from. Names in the table that lead out of it (absolute paths
    to another place, "..", URLs) are rejected."""
    captions: Path
    """Table with the columns video and caption, or WebVid's videoid and name (and page_dir): a CSV file in UTF-8
    (separated by commas, semicolons or tabs), a Parquet file, or a folder of Parquet files."""
    out: Path
    """Folder of the dataset."""
    num_frames: int = 24
    """Frames stored a clip, at even steps. Videos with fewer are rejected; training may use fewer."""
    frame_size: int = 256
    """Side of the square frames in pixels."""
    resize: Literal["short-side", "stretch"] = "short-side"
    """"short-side": scale the short side, crop the centre. "stretch": ignore the proportions."""
    codec: Literal["jpeg", "png"] = "jpeg"
    """How frames are stored. PNG is lossless and several times larger."""
    quality: int = DatasetSpec.jpeg_quality
    """JPEG quality, 1 to 100."""
    subsampling: Literal["444", "422", "420"] = DatasetSpec.jpeg_subsampling
    """JPEG chroma subsampling."""
    latents: str = ""
    """Has to be chosen: "sd-vae-ft-mse", which the 135M experiment and --import-checkpoint need; "block-transform",
    which needs no weights; or a folder with the weights of another such VAE."""
    clips_per_shard: int = 128
    """Rows of the captions table that make one shard, and the work of one task."""
    tasks: int = 0
    """Tasks at a time. 0: as many as there are CPUs (GPUs, for the VAE)."""
    retry_missing: bool = False
    """Of a finished dataset try again what was missing or unreadable, and rejected videos whose files have changed
    since. What becomes a clip now is appended as further shards; runs that began before refuse the longer dataset."""
    address: str = ""
    """Address of a Ray cluster. Empty: RAY_ADDRESS, and where that is not set this machine alone."""


class PartWorker:
    """Prepares parts in a Ray worker: as a task (an instance is the function) or as an actor (with the class)."""

    def __init__(self, config: PrepareConfig, spec: DatasetSpec, device: str):
        self.config, self.spec, self.device = config, spec, device
        self.codec: LatentCodec | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One part in (batches have one row), one row of figures out."""
        index, rows = int(batch["part"][0]), [Row(**row) for row in json.loads(batch["rows"][0])]
        result: dict[str, Any] = {"clips": [0], "note": [""]}
        deaths = parts.count_deaths(self.config.out, index)

        def make() -> parts.Part:
            self.codec = self.codec or self._make_codec()
            return parts.prepare_part(self.config.out, self.config.videos, index, rows, self.spec, self.codec)

        part, error = outcome_of(make)
        if part:
            result["clips"] = [part.file.rows if part.file else 0]
            if deaths >= parts.MAX_DEATHS:
                result["note"] = [_note(index, deaths, part)]
        return result | error

    def _make_codec(self) -> LatentCodec:
        """Raises UserError as `make_codec` does, and when this node has a VAE of other weights than the dataset."""
        codec = make_codec(self.config.latents, self.device)
        if codec.name != self.spec.latent_codec:
            raise UserError(
                f"--latents {self.config.latents} on {platform.node()}: its weights are {codec.name}, and the dataset "
                f"was begun with {self.spec.latent_codec}. Give all nodes the same weights."
            )
        return codec


def _note(index: int, deaths: int, part: parts.Part) -> str:
    crashed = ", ".join(reject.clip_id for reject in part.rejects if reject.reason == "crashed")
    return (
        f"part {index} ended its process {deaths} times, so each of its videos was read in a process of its own: "
        f"{f'rejected for ending that, too: {crashed}' if crashed else 'none of them ended that'}"
    )


def prepare(config: PrepareConfig) -> None:
    """The whole command. Raises UserError; then what is complete stays, for the same command to continue."""
    started = time.monotonic()
    config = dataclasses.replace(
        config,
        videos=Path(absolute("--videos", str(config.videos))),
        captions=Path(absolute("--captions", str(config.captions))),
        out=Path(absolute("--out", str(config.out))),
        latents=absolute_unless_name("--latents", config.latents),
    )
    _check(config)
    out = config.out
    captions, spec = Captions(config.captions, config.videos), _spec(config)
    settings = spec.to_json() | {
        "clips_per_shard": config.clips_per_shard,
        "captions_rows": len(captions),
        "captions_sha256": sha256_table(config.captions),
    }
    with unwritable_is_a_user_error(out):
        parts.check_begun(out, settings)
        manifest = parts.completed(out)
        if manifest:
            continuation.tidy(out)
    if manifest and config.retry_missing:
        manifest = _retry(config, spec, captions, manifest)
    elif manifest:
        print(f"{out}: complete already, nothing to do", flush=True)
        if continuation.interrupted(manifest):
            print("a continuation of it was interrupted: --retry-missing goes on with it", flush=True)
    else:
        with parts.exclusive(out):
            parts.begin(out, settings)
            rows = {
                part: range(part * config.clips_per_shard, min((part + 1) * config.clips_per_shard, len(captions)))
                for part in range(-(-len(captions) // config.clips_per_shard))
            }
            _prepare_parts(config, spec, captions, rows)
            manifest = parts.finish(out, spec, len(rows), config.captions)
    _print_summary(manifest, time.monotonic() - started)


def _check(config: PrepareConfig) -> None:
    least = {"num_frames": 1, "frame_size": 8, "clips_per_shard": 1, "tasks": 0, "quality": 1}
    for name, least_value in least.items():
        if getattr(config, name) < least_value:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is {getattr(config, name)}; it must be at least {least_value}.")
    if config.quality > 100:
        raise UserError(f"--quality is {config.quality}; JPEG knows 1 to 100.")
    if not config.videos.is_dir():
        raise UserError(f"--videos {config.videos}: no such folder.")


def _spec(config: PrepareConfig) -> DatasetSpec:
    codec = make_codec(config.latents, "cpu")  # missing weights show here, before anything starts
    return DatasetSpec(
        num_frames=config.num_frames,
        frame_size=config.frame_size,
        frame_codec=config.codec,
        resize=config.resize,
        latent_codec=codec.name,
        latent_dtype=codec.dtype,
        latent_shape=codec.shape(config.frame_size),
        jpeg_quality=config.quality,
        jpeg_subsampling=config.subsampling,
    )


def _retry(config: PrepareConfig, spec: DatasetSpec, captions: Captions, manifest: Manifest) -> Manifest:
    """The dataset, longer by what can be had now."""

    def files_of(row: int) -> list[str]:
        (found,) = captions.rows(row, row + 1)
        return [] if found.refused else found.files

    with parts.exclusive(config.out):
        continuation.settle(config.out)
        manifest = read_manifest(config.out)
        going = continuation.begin(manifest, config.videos, files_of)
        if going is None:
            shutil.rmtree(config.out / parts.PARTS)
            print(f"{config.out}: nothing of what it lacks can have changed", flush=True)
            return manifest
        rows: dict[int, Sequence[int]] = dict(going.parts(config.clips_per_shard))
        print(f"{config.out}: {len(going.rows):,} rejected rows are tried again", flush=True)
        _prepare_parts(config, spec, captions, rows)
        longer = continuation.finish(manifest, going, config.clips_per_shard)
    added = longer.num_clips - manifest.num_clips
    print(f"{config.out}: {added:,} clips were added to {manifest.num_clips:,}", flush=True)
    if added:
        print("its fingerprint is another one: a run that began before goes on with a copy of it as it was", flush=True)
    return longer


def _prepare_parts(
    config: PrepareConfig, spec: DatasetSpec, captions: Captions, rows: Mapping[int, Sequence[int]]
) -> None:
    """rows: part -> its rows of the table"""
    with unwritable_is_a_user_error(config.out):
        todo = unfinished(config.out, list(rows))
    if not todo:
        return
    with connect(address=config.address or None):
        follow(_results(config, spec, captions, {part: rows[part] for part in todo}), len(rows), len(rows) - len(todo))


def _items(captions: Captions, rows: Mapping[int, Sequence[int]]) -> list[dict[str, Any]]:
    """What `PartWorker` is given of each part."""
    items = []
    for index, numbers in rows.items():
        found: list[Row] = []
        if isinstance(numbers, range):
            found = captions.rows(numbers.start, numbers.stop)
        else:
            for number in numbers:
                found += captions.rows(number, number + 1)
        items.append({"part": index, "rows": json.dumps([dataclasses.asdict(row) for row in found])})
    return items


def _results(config: PrepareConfig, spec: DatasetSpec, captions: Captions, rows: Mapping[int, Sequence[int]]) -> Rows:
    """Run these parts on the cluster: a row of figures for each, as it is done.

    The rows of a few parts at a time exist as Python objects and in Ray's store, however long the table is.
    """
    step, todo = max(1, ROWS_AT_ONCE // config.clips_per_shard), list(rows)
    for first in range(0, len(todo), step):
        some = {part: rows[part] for part in todo[first : first + step]}
        yield from _run_parts(config, spec, _items(captions, some))


def _run_parts(config: PrepareConfig, spec: DatasetSpec, items: list[dict[str, Any]]) -> Rows:
    if config.latents == BlockTransform.name:
        yield from as_tasks(PartWorker(config, spec, "cpu"), items, config.tasks, "prepare part")
        return
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = config.tasks or gpus or int(ray.cluster_resources()["CPU"])
    done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        PartWorker,
        fn_constructor_args=(config, spec, "cuda" if gpus else "cpu"),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(items))),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
    )
    yield from done.iter_rows()


def _print_summary(manifest: Manifest, seconds: float) -> None:
    rejects = Counter(reject.reason for reject in parts.read_rejects(Path(manifest.root)))
    size = int(manifest.files["bytes"].to_numpy().sum())
    rows = [("dataset", manifest.root), ("clips", f"{manifest.num_clips:,}"), ("rejected", f"{manifest.rejected:,}")]
    rows += [(f"  {reason}", f"{count:,}") for reason, count in rejects.most_common()]
    rows += [
        ("shards", f"{manifest.files.num_rows:,}"),
        ("bytes a clip", f"{size / manifest.num_clips:,.0f}"),
        ("fingerprint", manifest.fingerprint),
        ("seconds", f"{seconds:.1f}"),
    ]
    print_table(rows)


def main() -> None:
    prepare(tyro.cli(PrepareConfig, prog="python -m ray_jobs.prepare"))


if __name__ == "__main__":
    run_command(main)
