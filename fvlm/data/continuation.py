"""A finished dataset that gets longer: videos that were missing have come, or others have replaced broken ones.

What can have changed is tried again; the clips that come of it are further shards, behind the others, which stay as
they are. The caption table has to be the same: rows that are added to it make another dataset.

    _parts/continuation.json  the rows that are tried again, so that an interrupted continuation goes on with the same
    files-........parquet     the longer list of shards, beside the one that the manifest still names
    rejects.next.jsonl        the new rejects.jsonl
    manifest.json             replaced in one moment: from here on the dataset is the longer one
    rejects.jsonl             the new one, which manifest.json knows by its hash
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fvlm.data import parts
from fvlm.data.parts import PARTS, Part, Reject, read_rejects, reject_lines
from fvlm.data.schema import MANIFEST, REJECTS, Manifest, ShardFile
from fvlm.data.shards import read_manifest, write_manifest
from fvlm.data.video_files import NotFound, find_video
from fvlm.errors import UserError
from fvlm.files import sha256_file, unwritable_is_a_user_error, write_atomic

CONTINUATION = "continuation.json"
NEXT_REJECTS = "rejects.next.jsonl"
COMES_AND_GOES = ("missing", "unreadable")
"""Reasons that are tried again. With any other one it is tried again where its file has changed since."""


@dataclass(frozen=True)
class Continuation:
    """rows: of the table, tried again; first: the number of their first part; dataset: the fingerprint before."""

    rows: tuple[int, ...]
    first: int
    dataset: str

    def parts(self, clips_per_shard: int) -> dict[int, tuple[int, ...]]:
        """Part -> its rows."""
        starts = range(0, len(self.rows), clips_per_shard)
        return {self.first + n: self.rows[start : start + clips_per_shard] for n, start in enumerate(starts)}


def interrupted(manifest: Manifest) -> Continuation | None:
    """The continuation of this very dataset that was begun and not finished."""
    try:
        raw = json.loads((Path(manifest.root) / PARTS / CONTINUATION).read_bytes())
        found = Continuation(tuple(raw["rows"]), raw["first"], raw["dataset"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return found if found.dataset == manifest.fingerprint else None


def begin(manifest: Manifest, videos: Path, files_of: Callable[[int], list[str]]) -> Continuation | None:
    """What is to be tried again, written down; None: nothing. For the process that holds the dataset.

    files_of: where the video of a row of the table may lie, below the folder `videos`; [] for a row that the table
    itself rules out
    Raises UserError: rejects.jsonl is not that of the dataset.
    """
    root = Path(manifest.root)
    if going := interrupted(manifest):
        return going
    finished_at = (root / MANIFEST).stat().st_mtime
    rejects = _rejects(manifest)
    rows = tuple(
        reject.row
        for reject in rejects
        if reject.row is not None and _can_have_changed(reject, files_of(reject.row), videos, finished_at)
    )
    if not rows:
        return None
    numbers = [int(re.sub(r"\D", "", name)) for name in manifest.files["name"].to_pylist()]
    made = Continuation(rows, max(numbers) + 1, manifest.fingerprint)
    with unwritable_is_a_user_error(root):
        for index in range(made.first, made.first + len(rows) + 1):  # of one that was given up
            parts.sidecar(root, index).unlink(missing_ok=True)
        write_atomic(root / PARTS / CONTINUATION, json.dumps(dataclasses.asdict(made)))
    return made


def finish(manifest: Manifest, going: Continuation, clips_per_shard: int) -> Manifest:
    """All parts of `going` are done -> the longer dataset."""
    root = Path(manifest.root)
    done = [Part.from_json(parts.sidecar(root, index).read_text()) for index in going.parts(clips_per_shard)]
    again = set(going.rows)
    rejects = [reject for reject in _rejects(manifest) if reject.row not in again]
    rejects += [reject for part in done for reject in part.rejects]
    rejects.sort(key=lambda reject: -1 if reject.row is None else reject.row)
    files = [ShardFile(**row) for row in manifest.files.to_pylist()] + [part.file for part in done if part.file]
    text = reject_lines(rejects)
    with unwritable_is_a_user_error(root):
        write_atomic(root / NEXT_REJECTS, text)
        longer = write_manifest(
            root, manifest.spec, files, len(rejects), rejects_sha256=hashlib.sha256(text.encode()).hexdigest()
        )
        settle(root)
        shutil.rmtree(root / PARTS)
    return longer


def settle(root: Path) -> None:
    """Bring to its end what a process that was killed between the manifest and the last file has left."""
    raw = json.loads((root / MANIFEST).read_bytes())
    following = root / NEXT_REJECTS
    if following.exists():
        if sha256_file(following) == raw.get("rejects_sha256"):
            following.replace(root / REJECTS)
        else:
            following.unlink()
    for old in root.glob("files-*.parquet"):
        if old.name != raw.get("files"):
            old.unlink()


def tidy(root: Path) -> None:
    """Of a complete dataset: what was left behind goes, unless another process is at work there, or a continuation was
    interrupted, which then can go on."""
    if not (root / PARTS).exists() and not (root / NEXT_REJECTS).exists():
        return
    with contextlib.suppress(UserError), parts.exclusive(root):  # busy, or read-only
        settle(root)
        if not interrupted(read_manifest(root)):
            shutil.rmtree(root / PARTS, ignore_errors=True)


def _rejects(manifest: Manifest) -> list[Reject]:
    """Raises UserError: they are not the manifest's."""
    path = Path(manifest.root) / REJECTS
    try:
        rejects = list(read_rejects(Path(manifest.root)))
        if len(rejects) != manifest.rejected:
            raise ValueError(f"it lists {len(rejects)}, and the manifest counts {manifest.rejected}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the rejects of this dataset ({error}). Restore it from a copy.") from error
    return rejects


def _can_have_changed(reject: Reject, files: list[str], videos: Path, since: float) -> bool:
    """since: seconds since 1970"""
    if not files:
        return False
    if reject.reason in COMES_AND_GOES:
        return True
    try:
        return (videos / find_video(videos, files)).stat().st_ctime > since  # moved or copied there counts, too
    except (NotFound, OSError):
        return False
