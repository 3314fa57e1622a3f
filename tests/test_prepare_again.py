"""A finished dataset that is continued when videos arrive later: longer, old shards as they were, whenever killed."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from runs import killed_at

from fvlm.data import continuation, parts
from fvlm.data.captions import Captions
from fvlm.data.latents import BlockTransform
from fvlm.data.row_groups import stored_captions
from fvlm.data.shards import check_shards, read_manifest
from fvlm.data.synthetic import SMALLEST, write_videos
from fvlm.errors import UserError

SMALL = ("--num-frames", "4", "--frame-size", "32", "--clips-per-shard", "2", "--codec", "png", "--tasks", "1")
SMALL += ("--latents", "block-transform")
LATE, BROKEN = range(3, 8), 9
"""Rows whose videos are not there at first, and one that is cut short."""


def prepare(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    paths = ["--videos", str(folder), "--captions", str(folder / "captions.csv"), "--out", str(out)]
    line = [sys.executable, "-m", "ray_jobs.prepare", *paths, *SMALL, *more]
    return subprocess.run(line, capture_output=True, text=True, timeout=240)


def rejects(root: Path) -> list[tuple[int, str]]:
    lines = (root / "rejects.jsonl").read_text().splitlines()
    return [(reject["row"], reject["reason"]) for reject in map(json.loads, lines)]


def digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.glob("shard-*")}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    """12 videos in the order of their table."""
    folder = tmp_path_factory.mktemp("videos")
    captions = Captions(write_videos(folder, 12, SMALLEST))
    return [folder / row.files[0] for row in captions.rows(0, 12)]


@pytest.fixture(scope="module")
def first(videos, tmp_path_factory) -> Path:
    """folder/videos, and folder/out: the dataset of what was there at first. Never changed."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copytree(videos[0].parent, folder / "videos")
    for row in LATE:
        (folder / "videos" / videos[row].name).unlink()
    broken = folder / "videos" / videos[BROKEN].name
    broken.write_bytes(broken.read_bytes()[:100])
    done = prepare(folder / "videos", folder / "out")
    assert done.returncode == 0, done.stderr
    assert Counter(reason for _, reason in rejects(folder / "out"))["missing"] == 5
    return folder


@pytest.fixture
def folder(first, tmp_path) -> Path:
    shutil.copytree(first, tmp_path / "copy")
    return tmp_path / "copy"


def arrive(folder: Path, videos: list[Path], *rows: int) -> None:
    for row in rows:
        shutil.copy(videos[row], folder / "videos")


def test_videos_that_arrive_later_become_further_shards_and_nothing_else_changes(folder, videos):
    out = folder / "out"
    before, shards = read_manifest(out), digests(out)
    assert before.num_clips == 6
    nothing = prepare(folder / "videos", out, "--retry-missing")
    assert nothing.returncode == 0 and "0 clips were added" in nothing.stdout, nothing.stderr
    assert read_manifest(out).fingerprint == before.fingerprint

    arrive(folder, videos, 3, 5, 6, BROKEN)
    plain = prepare(folder / "videos", out)
    assert plain.returncode == 0 and "complete already" in plain.stdout
    assert read_manifest(out).fingerprint == before.fingerprint
    done = prepare(folder / "videos", out, "--retry-missing")
    assert done.returncode == 0 and "4 clips were added to 6" in done.stdout, done.stderr
    after = read_manifest(out)
    assert (after.num_clips, after.rejected) == (10, 2)
    assert after.fingerprint != before.fingerprint
    names = after.files["name"].to_pylist()
    assert names[: len(shards)] == before.files["name"].to_pylist() and len(set(names)) == len(names)
    assert {name: digest for name, digest in digests(out).items() if name in shards} == shards
    assert rejects(out) == [(4, "missing"), (7, "missing")]
    assert check_shards(after) == [] and len([text for texts in stored_captions(after) for text in texts]) == 10
    assert not (out / "_parts").exists() and not (out / "rejects.next.jsonl").exists()

    arrive(folder, videos, 4, 7)
    assert "2 clips were added to 10" in prepare(folder / "videos", out, "--retry-missing").stdout
    assert rejects(out) == [] and len(list(out.glob("files-*.parquet"))) == 1
    again = prepare(folder / "videos", out, "--retry-missing")
    assert again.returncode == 0 and "nothing of what it lacks can have changed" in again.stdout
    assert "complete already" in prepare(folder / "videos", out).stdout
    assert not (out / "_parts").exists()


def test_rows_that_are_added_to_the_table_are_refused(folder):
    table = folder / "videos" / "captions.csv"
    table.write_text(table.read_text() + "new.mp4,a new one\n")
    done = prepare(folder / "videos", folder / "out", "--retry-missing")
    assert done.returncode == 2 and "captions_rows was 12, now 13" in done.stderr


def files_of(captions: Captions):
    def call(row: int) -> list[str]:
        (found,) = captions.rows(row, row + 1)
        return [] if found.refused else found.files

    return call


def make_parts(folder: Path, going: continuation.Continuation, how_many: int) -> None:
    captions, out = Captions(folder / "videos" / "captions.csv"), folder / "out"
    for index, rows in list(going.parts(2).items())[:how_many]:
        found = [row for number in rows for row in captions.rows(number, number + 1)]
        parts.prepare_part(out, folder / "videos", index, found, read_manifest(out).spec, BlockTransform())


def test_an_interrupted_one_goes_on_with_the_rows_that_it_began_with(folder, videos):
    arrive(folder, videos, 3, 5, 6)
    out = folder / "out"
    captions = Captions(folder / "videos" / "captions.csv")
    with parts.exclusive(out):
        going = continuation.begin(read_manifest(out), folder / "videos", files_of(captions))
        assert going.rows == (3, 4, 5, 6, 7, BROKEN)  # the copy's videos are newer than the dataset
        make_parts(folder, going, 1)
    arrive(folder, videos, 4)  # too late for its part: for the next time
    plain = prepare(folder / "videos", out)
    assert "complete already" in plain.stdout and "--retry-missing goes on with it" in plain.stdout
    done = prepare(folder / "videos", out, "--retry-missing")
    assert "continuing: 1 of 3 parts are done" in done.stdout and "3 clips were added" in done.stdout, done.stderr
    assert read_manifest(out).num_clips == 9
    assert "1 clips were added to 9" in prepare(folder / "videos", out, "--retry-missing").stdout


def test_killed_at_any_moment_of_its_end_it_is_the_old_dataset_or_the_new_one_and_can_go_on(folder, videos, tmp_path):
    arrive(folder, videos, 3, 5, 6)
    out, captions = folder / "out", Captions(folder / "videos" / "captions.csv")
    old = read_manifest(out).fingerprint
    with parts.exclusive(out):
        going = continuation.begin(read_manifest(out), folder / "videos", files_of(captions))
        make_parts(folder, going, 3)
    seen, number, kills = set(), 0, 0
    while True:
        number += 1
        trial = tmp_path / f"{number}"
        shutil.copytree(out, trial)
        killed = killed_at(number, functools.partial(continuation.finish, read_manifest(trial), going, 2), "before")
        longer = read_manifest(trial)  # never damaged
        assert (longer.fingerprint == old) == (longer.num_clips == 6)
        seen.add(longer.num_clips)
        continuation.tidy(trial)
        if longer.fingerprint == old:
            assert continuation.interrupted(longer) == going
            continuation.finish(longer, going, 2)
        assert read_manifest(trial).num_clips == 9
        assert [row for row, _ in rejects(trial)] == [4, 7, BROKEN]
        assert not list(trial.glob("_parts")) and not list(trial.glob("rejects.next*"))
        shutil.rmtree(trial)
        if not killed:
            break
        kills += 1
    assert kills > 10
    assert seen == {6, 9}


def test_rejects_that_are_not_those_of_the_dataset_end_it_before_anything_changes(folder):
    out = folder / "out"
    lines = (out / "rejects.jsonl").read_text().splitlines(keepends=True)
    (out / "rejects.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"rejects.jsonl: not the rejects of this dataset .*it lists 5"):
        continuation.begin(read_manifest(out), folder / "videos", lambda row: ["a.mp4"])
    assert not (out / "_parts").exists()


def test_a_manifest_names_no_file_outside_its_folder(folder):
    path = folder / "out" / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"files": "../other/files.parquet"}))
    with pytest.raises(UserError, match=r"damaged .*files is"):
        read_manifest(folder / "out")
