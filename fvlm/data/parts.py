"""Preparing a dataset part by part. A part is a fixed slice of the source and becomes one shard.

    prepare.json         settings and the source's hash, written first: what may be continued, and with what
    _parts/00017.starts  part 17 was begun, this often, and not finished
    _parts/00017.json    part 17 is done: its entry for the manifest and what it rejected
    shard-00017.parquet  its clips (absent when it has none)

Every file appears whole or not at all, and parts do not depend on each other. So a preparation that is stopped anywhere
goes on with the parts that have no file in `_parts`, and ends with the same bytes. `_parts` is gone at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fvlm import locks
from fvlm.data.captions import Row
from fvlm.data.decode import encode_frame
from fvlm.data.latents import LatentCodec, from_bits
from fvlm.data.read_alone import read_clip_alone
from fvlm.data.schema import MANIFEST, REJECTS, DatasetSpec, EncodedClip, Manifest, ResizePolicy, ShardFile
from fvlm.data.shards import ShardWriter, read_manifest, write_manifest
from fvlm.data.video import RejectedVideo, read_clip
from fvlm.data.video_files import NotFound, find_video
from fvlm.errors import UserError
from fvlm.files import TEMPORARY, unwritable_is_a_user_error, write_atomic

PARTS = "_parts"
SETTINGS = "prepare.json"
MAX_DEATHS = 3
"""Processes that a part may end before its videos are read in processes of their own."""

ReadClip = Callable[[Path, int, int, ResizePolicy], tuple[np.ndarray, dict[str, Any]]]


@dataclass(frozen=True)
class Reject:
    """What did not become a clip, and why; one line of rejects.jsonl.

    row: of the captions table, or index in the source's shard; None where a whole file is meant
    """

    row: int | None
    clip_id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Part:
    """What came of one part. `file` is None when nothing in it was usable."""

    file: ShardFile | None
    rejects: tuple[Reject, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        raw = json.loads(text)
        file = raw["file"] and ShardFile(**raw["file"])
        return cls(file, tuple(Reject(**reject) for reject in raw["rejects"]))


def sidecar(root: Path, index: int) -> Path:
    return root / PARTS / f"{index:05d}.json"


def shard_path(root: Path, index: int) -> Path:
    return root / f"shard-{index:05d}.parquet"


def write_part(root: Path, index: int, spec: DatasetSpec, clips: Iterable[EncodedClip | Reject]) -> Part:
    """Make part `index` of the dataset in `root` out of `clips`, and record it. Holds one row group in memory.

    Raises UserError when the disk is full, `root` cannot be written or the part ends its process again and again, and
    whatever `clips` raises; then there is no record of this part.
    """
    with _counted(root, index), contextlib.ExitStack() as stack:
        rejects, writer = [], None
        for clip in clips:
            if isinstance(clip, Reject):
                rejects.append(clip)
                continue
            # a shard needs at least one clip
            writer = writer or stack.enter_context(ShardWriter(shard_path(root, index), spec))
            writer.add(clip)
    part = Part(writer.file if writer else None, tuple(rejects))
    with unwritable_is_a_user_error(root):
        write_atomic(sidecar(root, index), part.to_json())
    return part


@contextlib.contextmanager
def _counted(root: Path, index: int) -> Iterator[None]:
    """Note that part `index` is begun, and take the note back at the end, which a process that dies does not reach.

    Raises UserError for a part that has ended twice MAX_DEATHS processes; the next try counts anew.
    """
    deaths, starts = count_deaths(root, index), _starts(root, index)
    if deaths >= 2 * MAX_DEATHS:
        starts.unlink()
        raise UserError(
            f"{root}: part {index} ended its process {deaths} times, by its memory or a crash. "
            "Free some memory, or give --tasks 1, and run the same command again."
        )
    write_atomic(starts, str(deaths + 1))
    try:
        yield
    finally:
        starts.unlink(missing_ok=True)


def prepare_part(root: Path, videos: Path, index: int, rows: list[Row], spec: DatasetSpec, codec: LatentCodec) -> Part:
    """Make part `index` of the dataset in `root` out of `rows` of the captions table.

    A part that has ended its process MAX_DEATHS times, by its memory or a crash, gets each of its videos read in a
    process of its own; then that of the video at fault ends, and the video becomes a reject.

    Raises UserError: the videos are gone, and what `write_part` raises.
    """
    read = read_clip_alone if count_deaths(root, index) >= MAX_DEATHS else read_clip
    return write_part(root, index, spec, (_clip(row, videos, spec, codec, read) for row in rows))


def count_deaths(root: Path, index: int) -> int:
    """How often part `index` was begun by a process that ended in it."""
    try:
        return int(_starts(root, index).read_text())
    except FileNotFoundError:
        return 0


def _starts(root: Path, index: int) -> Path:
    return root / PARTS / f"{index:05d}.starts"


def _clip(row: Row, videos: Path, spec: DatasetSpec, codec: LatentCodec, read: ReadClip) -> EncodedClip | Reject:
    if row.refused:
        return Reject(row.number, row.clip_id, *row.refused)
    try:
        file = _find(row, videos)
        frames, source = read(videos / file, spec.num_frames, spec.frame_size, spec.resize)
    except (NotFound, RejectedVideo) as error:
        return Reject(row.number, row.clip_id, error.reason, error.detail)
    latents = codec.encode(frames, row.clip_id)
    if not np.isfinite(from_bits(latents, codec.dtype, codec.shape(spec.frame_size))).all():
        return Reject(row.number, row.clip_id, "wrong latents", "latents hold NaN or infinity")
    frame_bytes = [encode_frame(frame, spec) for frame in frames]
    return EncodedClip(row.clip_id, row.caption, frame_bytes, latents, {"video": file} | source)


def _find(row: Row, videos: Path) -> str:
    """The row's file, as the disk spells it. Raises NotFound for the row, UserError when no video can be had."""
    try:
        return find_video(videos, row.files)
    except NotFound:
        if not _is_folder(videos):  # an unmounted disk must not make rejects of all that follow
            raise UserError(
                f"--videos {videos}: the folder is gone. Bring it back and run the same command again."
            ) from None
        raise


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Hold the dataset in `root` for this process alone.

    Sweeps up what killed processes left half-written, and at the end what ours did; and all, if no part came of it.
    Raises UserError: another process holds it, or the folder cannot be made or written.
    """
    busy = f"{root}: another preparation writes it. Wait for it, or take another --out."
    with contextlib.ExitStack() as stack:
        with unwritable_is_a_user_error(root):
            note = stack.enter_context(locks.exclusive(root / PARTS / "lock", busy))
            _sweep(root)
        if note:
            print(note, flush=True)
        try:
            yield
        finally:
            _sweep(root)
            if not any(root.glob("shard-*")) and not any((root / PARTS).glob("*.json")):
                discard(root)


def _sweep(root: Path) -> None:
    for folder in (root, root / PARTS):
        for leftover in folder.glob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)


def check_begun(root: Path, settings: dict[str, Any]) -> None:
    """Raise UserError when `root` was begun with other settings (naming them), or holds shards of another origin."""
    path = root / SETTINGS
    if not path.exists():
        foreign = next((file for file in [root / MANIFEST, *root.glob("shard-*")] if file.exists()), None)
        if foreign:
            raise UserError(
                f"{root}: {foreign.name} is there, but no {SETTINGS}: this command did not make that dataset. "
                "Choose another --out, or delete that folder."
            )
        return
    try:
        begun = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: damaged ({error}). Delete the folder {root} and prepare again.") from error
    differing = [key for key in settings | begun if settings.get(key) != begun.get(key)]
    if differing:
        listed = ", ".join(f"{key} was {begun.get(key)!r}, now {settings.get(key)!r}" for key in differing)
        raise UserError(
            f"{root}: it was begun with other settings: {listed}. "
            "Repeat those to continue it, choose another --out, or delete that folder."
        )


def begin(root: Path, settings: dict[str, Any]) -> None:
    with unwritable_is_a_user_error(root):
        write_atomic(root / SETTINGS, json.dumps(settings, indent=2) + "\n")


def is_done(root: Path, index: int) -> bool:
    """Whether part `index` has its record, and the shard that it speaks of is there."""
    try:
        part = Part.from_json(sidecar(root, index).read_text())
        return part.file is None or (root / part.file.name).stat().st_size == part.file.bytes
    except FileNotFoundError:
        return False


def completed(root: Path) -> Manifest | None:
    """The finished dataset, or None. What a stop right after the manifest leaves: `continuation.tidy`."""
    return read_manifest(root) if (root / MANIFEST).exists() else None


def finish(root: Path, spec: DatasetSpec, num_parts: int, source: Path, unit: str = "rows") -> Manifest:
    """All parts are done: rejects.jsonl, then the manifest, then `_parts` goes.

    Raises UserError, and leaves nothing behind, when no clip came out of any part of `source`, a thing of `unit`.
    """
    parts = [Part.from_json(sidecar(root, index).read_text()) for index in range(num_parts)]
    rejects = [reject for part in parts for reject in part.rejects]
    files = [part.file for part in parts if part.file]
    if not files:
        discard(root)
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(r.reason for r in rejects).most_common())
        raise UserError(
            f"{source}: none of its {len(rejects)} {unit} became a clip: {reasons} "
            f"(the first: {rejects[0].clip_id or 'row 0'}: {rejects[0].detail})."
        )
    with unwritable_is_a_user_error(root):
        _sweep(root)
        write_atomic(root / REJECTS, reject_lines(rejects))
        manifest = write_manifest(root, spec, files, len(rejects))
        shutil.rmtree(root / PARTS)
    return manifest


def reject_lines(rejects: Iterable[Reject]) -> str:
    """The text of rejects.jsonl."""
    return "".join(json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)


def discard(root: Path) -> None:
    """Remove what a preparation that made no shard has made."""
    shutil.rmtree(root / PARTS, ignore_errors=True)
    (root / SETTINGS).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else lies in it
        root.rmdir()


def read_rejects(root: Path) -> Iterator[Reject]:
    """What a finished dataset does not hold, and why, in the order of the source."""
    with (root / REJECTS).open() as lines:
        for line in lines:
            yield Reject(**json.loads(line))
