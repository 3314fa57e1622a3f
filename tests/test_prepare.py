"""Preparing a dataset, as real commands: what is in it, what is not and why, and what a kill leaves."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import decode_clips
from ray.exceptions import RayTaskError

from fvlm.data import parts
from fvlm.data.captions import Captions
from fvlm.data.decode import even_steps
from fvlm.data.latents import BlockTransform
from fvlm.data.row_groups import RowGroups
from fvlm.data.schema import DatasetSpec, frame_column
from fvlm.data.shards import check_shards, read_manifest
from fvlm.data.synthetic import FRAMES, SMALLEST, draw, scene, write_videos
from fvlm.data.video import read_clip
from fvlm.errors import UserError
from ray_jobs.cli import run_command
from ray_jobs.part_tasks import Progress
from ray_jobs.prepare import PartWorker, PrepareConfig
from ray_jobs.prepare import prepare as run_prepare

SMALL = ("--num-frames", "4", "--frame-size", "32", "--clips-per-shard", "2", "--codec", "png")
"""Tiny clips in many parts: 12 of them out of the 24 videos below."""
FINISHED = ["files.parquet", "manifest.json", "prepare.json", "rejects.jsonl"]


def command(videos: Path, captions: Path, out: Path, *more: str) -> list[str]:
    paths = ["--videos", str(videos), "--captions", str(captions), "--out", str(out)]
    latents = [] if "--latents" in more else ["--latents", BlockTransform.name]
    return [sys.executable, "-m", "ray_jobs.prepare", *paths, *latents, *more]


def prepare(videos: Path, captions: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(videos, captions, out, *more), capture_output=True, text=True, timeout=120)


def rejects(root: Path) -> dict[str, str]:
    lines = (root / "rejects.jsonl").read_bytes().splitlines()
    return {reject["clip_id"]: reject["reason"] for reject in map(json.loads, lines)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 small videos with captions.csv."""
    return write_videos(tmp_path_factory.mktemp("shapes"), 24, SMALLEST).parent


@pytest.fixture(scope="module")
def prepared(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of those videos, made without disturbance."""
    out = tmp_path_factory.mktemp("prepared") / "dataset"
    done = prepare(shapes, shapes / "captions.csv", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "parts 12/12" in done.stdout and "clips             24" in done.stdout
    return out


Done = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def real(shared_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The dataset of the real videos, by the command with its defaults, and what the command said."""
    out = tmp_path_factory.mktemp("real") / "dataset"
    return out, prepare(shared_videos, shared_videos / "captions.csv", out)


def test_real_videos_give_8_clips_and_6_counted_rejects(shared_videos: Path, real: Done) -> None:
    out, done = real
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    check_shards(manifest)
    columns = ["clip_id", "caption", "source", frame_column(23)]
    table = RowGroups.of(manifest).read("shard-00000.parquet", 0, columns)
    with (shared_videos / "captions.csv").open() as file:
        rows = {row["video"]: row["caption"] for row in csv.DictReader(file)}
    kept = dict(zip(table["clip_id"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert len(kept) == manifest.num_clips == 8 and kept.items() <= rows.items()
    reasons = {
        "video_0.mov": "too few frames",
        "video_90.mov": "too few frames",
        "h265_video.mp4": "too few frames",
        "unordered.mov": "too few frames",
        "corrupted.mp4": "damaged",
        "missing.mp4": "missing",
    }
    assert rejects(out) == reasons and kept.keys() | reasons.keys() == rows.keys() and manifest.rejected == 6
    sources = dict(zip(kept, map(json.loads, table["source"].to_pylist()), strict=True))
    assert sources["nasa_13013.mp4"]["frames"] == 325 and sources["nasa_13013.mp4"]["video"] == "nasa_13013.mp4"
    for reason, count in Counter(reasons.values()).items():
        assert f"  {reason:<16}{count}\n" in done.stdout
    # the last of the stored frames is the last of the video, as another decoding of it shows it
    size = manifest.spec.frame_size
    stored = np.empty((8, 1, size, size, 3), np.uint8)
    decode_clips([table[frame_column(23)].to_pylist()], stored, manifest.spec)
    shown, _ = read_clip(shared_videos / "bikes.mp4", 250, size, "short-side")
    assert np.abs(stored[list(kept).index("bikes.mp4"), 0].astype(int) - shown[-1]).mean() < 4


@pytest.mark.long
def test_twenty_steps_on_the_real_clips_lower_the_caption_loss(real: Done, tmp_path: Path) -> None:
    options = "--data.frame-size 256 --data.num-frames 4 --data.global-batch 4 --data.lanes 4 --train.max-steps 20"
    more = ["--data.path", str(real[0]), "--runs-dir", str(tmp_path), "--log.wandb", "off", *options.split()]
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", "demo", *more], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_bytes().splitlines()]
    losses = [row["caption/loss_fine"] for row in rows]
    assert len(losses) == 20
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])  # two steps are one epoch: each clip once


def spec(num_frames: int) -> DatasetSpec:
    return DatasetSpec(num_frames, 32, "jpeg", "short-side", BlockTransform.name, "float16", (4, 4, 4))


def parts_folder(root: Path) -> None:
    (root / parts.PARTS).mkdir()


def test_fewer_frames_accept_a_shorter_video(shared_videos: Path, tmp_path: Path) -> None:
    rows = Captions(shared_videos / "captions.csv").rows(0, 100)
    parts_folder(tmp_path)
    part = parts.prepare_part(tmp_path, shared_videos, 0, rows, spec(8), BlockTransform())
    assert part.file and part.file.rows == 9
    assert "h265_video.mp4" not in {reject.clip_id for reject in part.rejects}


def test_clips_hold_the_frames_that_the_generator_drew(shapes: Path, prepared: Path) -> None:
    manifest = read_manifest(prepared)
    table = RowGroups.of(manifest).read("shard-00003.parquet", 0, ["clip_id", "caption", *map(frame_column, range(4))])
    assert table["clip_id"].to_pylist() == ["shapes-32-0-00006.mp4", "shapes-32-0-00007.mp4"]
    stored = np.empty((2, 4, 32, 32, 3), np.uint8)
    decode_clips([table[frame_column(t)].to_pylist() for t in range(4)], stored, manifest.spec)
    for row, index in enumerate((6, 7)):
        movers, background = scene(np.random.default_rng((0, index)))
        assert table["caption"][row].as_py() == " while ".join(map(str, movers))
        drawn = [draw(movers, background, t / (FRAMES - 1), 32) for t in even_steps(FRAMES, 4)]
        assert np.abs(stored[row].astype(int) - np.stack(drawn)).mean() < 6


def test_killed_in_the_middle_and_started_again_it_makes_the_same_bytes(
    shapes: Path, prepared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "dataset"
    process = subprocess.Popen(
        command(shapes, shapes / "captions.csv", out, *SMALL, "--tasks", "1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(list(out.glob("_parts/000*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # Ray's own processes notice and end
    assert not (out / "manifest.json").exists()
    finished = sorted(out.glob("_parts/000*.json"))
    assert 3 <= len(finished) < 12, "the kill came too late to prove anything"
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    (out / ".tmp-1-shard-00011.parquet").write_bytes(b"what a writer killed in mid-write leaves")
    (out / "_parts" / ".tmp-1-00011.json").write_bytes(b"{")

    again = prepare(shapes, shapes / "captions.csv", out, *SMALL)
    assert again.returncode == 0, again.stderr
    assert f"continuing: {len(finished)} of 12 parts" in again.stdout
    for name in (f"shard-{path.stem}.parquet" for path in finished):
        assert (out / name).stat().st_mtime_ns == times[name]  # not made twice
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    assert contents == {path.name: path.read_bytes() for path in prepared.iterdir()}
    assert sorted(contents) == sorted(FINISHED + [f"shard-{index:05d}.parquet" for index in range(12)])
    assert read_manifest(out).fingerprint == read_manifest(prepared).fingerprint


def test_a_complete_dataset_is_left_alone_and_other_settings_are_refused(shapes: Path, prepared: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    same = prepare(shapes, shapes / "captions.csv", prepared, *SMALL)
    assert same.returncode == 0 and "complete already" in same.stdout
    other = prepare(shapes, shapes / "captions.csv", prepared, *SMALL, "--resize", "stretch", "--clips-per-shard", "3")
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert "resize was 'short-side', now 'stretch', clips_per_shard was 2, now 3" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_other_captions_or_a_dataset_of_another_origin_are_refused(tmp_path: Path) -> None:
    begun = {"num_frames": 4, "captions_rows": 24, "captions_sha256": "aa"}
    parts.begin(tmp_path, begun)
    parts.check_begun(tmp_path, begun)
    with pytest.raises(UserError, match="captions_rows was 24, now 25, captions_sha256 was 'aa', now 'bb'"):
        parts.check_begun(tmp_path, begun | {"captions_rows": 25, "captions_sha256": "bb"})
    (tmp_path / "prepare.json").rename(tmp_path / "shard-00000.parquet")
    with pytest.raises(UserError, match=r"shard-00000.parquet is there, but no prepare.json"):
        parts.check_begun(tmp_path, begun)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with parts.exclusive(tmp_path), pytest.raises(UserError, match="another preparation"), parts.exclusive(tmp_path):
        pass


def test_a_part_whose_shard_was_deleted_is_made_again(shapes: Path, tmp_path: Path) -> None:
    parts_folder(tmp_path)
    rows = Captions(shapes / "captions.csv").rows(0, 2)
    parts.prepare_part(tmp_path, shapes, 0, rows, spec(4), BlockTransform())
    assert parts.is_done(tmp_path, 0) and not parts.is_done(tmp_path, 1)
    (tmp_path / "shard-00000.parquet").unlink()
    assert not parts.is_done(tmp_path, 0)


def test_when_nothing_is_usable_there_is_an_error_and_no_folder(shapes: Path, tmp_path: Path) -> None:
    captions = write_csv(tmp_path / "t.csv", "video,caption\nabsent.mp4,a\nabsent.mp4,b\nalso-absent.mp4,c\n")
    out = tmp_path / "out"
    with (
        pytest.raises(UserError, match="none of its 3 rows became a clip: 2 missing, 1 duplicate"),
        parts.exclusive(out),
    ):
        parts.begin(out, {})
        parts.prepare_part(out, shapes, 0, Captions(captions).rows(0, 9), spec(4), BlockTransform())
        parts.finish(out, spec(4), 1, captions)
    assert not out.exists()


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip,text\na.mp4,b\n", "its columns are clip, text. Wanted are video and caption"),
        ("video,caption\n", "no rows"),
        ("", "cannot be read"),
        (None, "no such file"),
        ("video,caption\na.mp4,b,c\n", "line 2: 3 columns, but the header has 2"),
    ],
)
def test_a_captions_table_that_cannot_be_used_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "captions.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        Captions(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-frames", "-1"), "--num-frames is -1"),
        (("--frame-size", "36"), "Take 32 or 40"),
        (("--quality", "101"), "--quality is 101"),
        (("--latents", "vq"), "block-transform and sd-vae-ft-mse"),
        (("--videos", "/absent"), "/absent: no such folder"),
    ],
)
def test_flags_that_cannot_be_right_are_named(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, str], message: str
) -> None:
    from ray_jobs import prepare as module

    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare", *command(shapes, shapes / "captions.csv", out, *flags)[3:]])
    with pytest.raises(UserError, match=message):
        module.main()
    assert not out.exists()


def test_rows_without_video_or_caption_and_repeated_videos_are_refused_and_counted(tmp_path: Path) -> None:
    text = 'video,caption\na.mp4,one\n,two\nb.mp4, \n./a.mp4,"three\nlines"\nb.mp4,four\n'
    path = write_csv(tmp_path / "t.csv", text)
    rows = Captions(path).rows(0, 100)
    assert [row.refused and row.refused[0] for row in rows] == [None, "no video", "no caption", "duplicate", None]
    assert rows[3].refused == ["duplicate", "row 0 has the same video"]
    assert Captions(path).rows(3, 5) == rows[3:]  # a part sees the verdicts of the whole table


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_webvid_tables_are_read_by_their_own_names(shapes: Path, tmp_path: Path, kind: str) -> None:
    videos = tmp_path / "videos"
    (videos / "000001_000050").mkdir(parents=True)
    (videos / "0012.mp4").symlink_to(shapes / "shapes-32-0-00000.mp4")
    (videos / "000001_000050" / "13.mp4").symlink_to(shapes / "shapes-32-0-00001.mp4")
    table = {
        "videoid": ["0012", "13", "14"],
        "contentUrl": ["https://a", "https://b", "https://c"],
        "duration": ["PT00H00M02S"] * 3,
        "page_dir": ["000001_000050"] * 3,
        "name": ["twelve", "thirteen", "fourteen"],
    }
    path = tmp_path / f"webvid.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(table), path)
    else:
        path.write_text("\n".join([",".join(table), *map(",".join, zip(*table.values(), strict=True))]) + "\n")
    parts_folder(tmp_path)
    part = parts.prepare_part(tmp_path, videos, 0, Captions(path).rows(0, 9), spec(4), BlockTransform())
    shard = pq.read_table(tmp_path / "shard-00000.parquet")
    assert shard["clip_id"].to_pylist() == ["0012", "13"] and shard["caption"].to_pylist() == ["twelve", "thirteen"]
    assert [(reject.clip_id, reject.reason) for reject in part.rejects] == [("14", "missing")]


def test_a_full_disk_in_a_worker_comes_back_as_the_users_error(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    parts_folder(tmp_path)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    config = PrepareConfig(shapes, shapes / "captions.csv", tmp_path, latents=BlockTransform.name)
    rows = json.dumps([vars(row) for row in Captions(config.captions).rows(0, 2)])
    result = PartWorker(config, spec(4), "cpu")({"part": [0], "rows": [rows]})
    assert "no space left on the disk" in result["error"][0] and result["clips"] == [0]
    assert list(tmp_path.glob("shard-*")) == list(tmp_path.glob(".tmp*")) == list(tmp_path.glob("_parts/*")) == []


def test_a_users_error_is_one_line_and_exit_code_2_even_inside_rays_own_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def job() -> None:
        try:
            raise RayTaskError("work", "Traceback: ...", UserError("x.mp4: no space")).as_instanceof_cause()
        except RayTaskError as error:
            raise RuntimeError("training failed") from error

    with pytest.raises(SystemExit) as caught:
        run_command(job)
    assert (caught.value.code, capsys.readouterr().err) == (2, "error: x.mp4: no space\n")


def test_a_cluster_that_does_not_answer_is_named_and_leaves_no_folder(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for address, message in (("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"), ("http://a:8265", "dashboard")):
        config = PrepareConfig(shapes, shapes / "captions.csv", out, latents=BlockTransform.name, address=address)
        with pytest.raises(UserError, match=message):
            run_prepare(config)
        assert not out.exists()


def test_an_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: print(1 / 0))


def test_progress_is_a_line_every_few_seconds_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(num_parts=20, done=10)
    for _ in range(10):
        now[0] += 2
        progress.add(64)
    assert capsys.readouterr().out.splitlines() == [
        "parts 13/20  192 clips  32.0 clips/s  ETA 0h00m14s",
        "parts 16/20  384 clips  32.0 clips/s  ETA 0h00m08s",
        "parts 19/20  576 clips  32.0 clips/s  ETA 0h00m02s",
        "parts 20/20  640 clips  32.0 clips/s  ETA 0h00m00s",
    ]


def test_generated_videos_are_deterministic_and_not_made_twice(tmp_path: Path) -> None:
    one, two = (write_videos(tmp_path / name, 3, SMALLEST, seed=1).parent for name in ("one", "two"))
    contents = {path.name: path.read_bytes() for path in one.iterdir()}
    assert contents == {path.name: path.read_bytes() for path in two.iterdir()} and len(contents) == 4
    times = {path: path.stat().st_mtime_ns for path in one.iterdir()}
    write_videos(one, 3, SMALLEST, seed=1)
    assert {path: path.stat().st_mtime_ns for path in one.iterdir()} == times
    frames, source = read_clip(one / "shapes-32-1-00000.mp4", FRAMES, SMALLEST, "short-side")
    assert source["frames"] == FRAMES and source["fps"] == 16 and frames.std() > 5
    with pytest.raises(UserError, match="even"):
        write_videos(tmp_path, 3, 33)
