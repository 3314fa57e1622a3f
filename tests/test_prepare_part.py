"""One video never ends the work on the others: what becomes of a part of a dataset, and of its worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
from test_video_cases import CASES

from fvlm.data import parts, video
from fvlm.data.captions import Row
from fvlm.data.latents import BlockTransform
from fvlm.data.schema import DatasetSpec
from fvlm.data.shards import check_shards, read_manifest
from fvlm.data.video import RejectedVideo, read_clip
from fvlm.errors import UserError

SPEC = DatasetSpec(4, 32, "png", "short-side", BlockTransform.name, "float16", (4, 4, 4))


def prepare_part(root: Path, videos: Path, *names: str) -> parts.Part:
    (root / parts.PARTS).mkdir(parents=True, exist_ok=True)
    rows = [Row(number, name, "a caption", [name]) for number, name in enumerate(names)]
    return parts.prepare_part(root, videos, 0, rows, SPEC, BlockTransform())


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("ok.mp4", "n24.mp4"):
        (folder / name).symlink_to(CASES / name)
    return folder


def test_a_name_longer_than_the_file_system_allows_is_missing(videos: Path, tmp_path: Path) -> None:
    part = prepare_part(tmp_path / "out", videos, "ok.mp4", "x" * 300 + ".mp4", "n24.mp4")
    assert part.file and part.file.rows == 2
    assert [(reject.row, reject.reason) for reject in part.rejects] == [(1, "missing")]


@pytest.mark.parametrize("call", ["stat", "open"])
def test_what_may_not_be_entered_or_read_is_a_reject_with_the_systems_reason(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Not with chmod: the tests may run as root, who may enter everything."""
    kept = getattr(Path, call)

    def denied(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == "ok.mp4":
            raise PermissionError(13, "Permission denied", str(self))
        return kept(self, *args, **kwargs)

    monkeypatch.setattr(Path, call, denied)
    part = prepare_part(tmp_path / "out", videos, "ok.mp4", "n24.mp4")
    assert part.file and part.file.rows == 1
    (reject,) = part.rejects
    assert (reject.clip_id, reject.reason) == ("ok.mp4", "unreadable") and "Permission denied" in reject.detail


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ValueError("odd"), "failed"), (MemoryError(), "unsupported"), (av.error.BugError(1, "a bug"), "damaged")],
)
def test_any_other_error_of_one_video_is_its_reject(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    decode = video._decode

    def fails(path: Path, *args: object) -> object:
        if path.name == "ok.mp4":
            raise error
        return decode(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(video, "_decode", fails)
    part = prepare_part(tmp_path / "out", videos, "ok.mp4", "n24.mp4")
    assert part.file and part.file.rows == 1
    assert [(reject.clip_id, reject.reason) for reject in part.rejects] == [("ok.mp4", reason)]


def test_a_folder_of_videos_that_is_gone_is_an_error_and_no_rejects(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder is gone"):
        prepare_part(tmp_path / "out", tmp_path / "unmounted", "ok.mp4")
    assert not list((tmp_path / "out" / parts.PARTS).iterdir())


def test_one_command_over_all_of_them_gives_clips_and_rejects_and_no_traceback(tmp_path: Path) -> None:
    names = sorted(path.name for path in CASES.iterdir())
    (tmp_path / "t.csv").write_text("video,caption\n" + "".join(f"{name},a picture\n" for name in names))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ray_jobs.prepare", "--videos", str(CASES), "--captions", str(tmp_path / "t.csv")]
    command += ["--out", str(out), "--num-frames", "24", "--frame-size", "64", "--tasks", "1"]
    command += ["--latents", "block-transform"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr, done.stderr
    rejects = {line["clip_id"]: line["reason"] for line in map(json.loads, (out / "rejects.jsonl").open())}
    assert rejects == {
        "anim.webp": "unsupported",
        "col_tag_ycgco.mp4": "unsupported",
        "cut.webm": "damaged",
        "damaged.gif": "damaged",
        "encrypted.mp4": "unsupported",
        "unknown_codecid.mkv": "unsupported",
        "unknown_fourcc.mp4": "unsupported",
    }
    manifest = read_manifest(out)
    assert manifest.num_clips == len(names) - len(rejects)
    check_shards(manifest)


# Videos that end the process that reads them

KILLER = """
import os, sys

def end(event, args):
    if event == "open" and str(args[0]).endswith("killer.mp4"):
        os.kill(os.getpid(), 9)

sys.addaudithook(end)
"""


def test_the_video_that_kills_its_worker_is_found_and_rejected_and_the_others_are_kept(
    videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)  # every Python process that opens it ends at once
    (videos / "killer.mp4").symlink_to(CASES / "ok.mp4")
    (videos / "whole.webm").symlink_to(CASES / "whole.webm")
    table, out = tmp_path / "t.csv", tmp_path / "out"
    table.write_text("video,caption\nok.mp4,a\nkiller.mp4,b\nn24.mp4,c\nwhole.webm,d\n")
    command = [sys.executable, "-m", "ray_jobs.prepare", "--videos", str(videos), "--captions", str(table)]
    command += ["--out", str(out), "--num-frames", "4", "--frame-size", "32", "--tasks", "1"]
    command += ["--latents", "block-transform"]
    paths = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 0, done.stderr
    (reject,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert (reject["clip_id"], reject["reason"]) == ("killer.mp4", "crashed") and "SIGKILL" in reject["detail"]
    assert "clips             3" in done.stdout and "Traceback" not in done.stderr
    assert f"part 0 ended its process {parts.MAX_DEATHS} times" in done.stdout and "too: killer.mp4" in done.stdout


def test_a_video_read_alone_is_the_same_clip_and_the_same_reject() -> None:
    from fvlm.data.read_alone import read_clip_alone

    here, there = (f(CASES / "ok.mp4", 24, 64, "short-side") for f in (read_clip, read_clip_alone))
    assert (here[0] == there[0]).all() and here[1] == there[1]
    with pytest.raises(RejectedVideo) as caught:
        read_clip_alone(CASES / "cut.webm", 24, 64, "short-side")
    assert caught.value.reason == "damaged" and "cut short" in caught.value.detail


def test_a_part_that_ends_its_process_even_so_is_given_up_and_named(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    (root / parts.PARTS).mkdir(parents=True)
    (root / parts.PARTS / "00000.starts").write_text(str(2 * parts.MAX_DEATHS))
    with pytest.raises(UserError, match="part 0 ended its process 6 times"):
        prepare_part(root, videos, "ok.mp4", "n24.mp4")
    part = prepare_part(root, videos, "ok.mp4", "n24.mp4")  # the next try starts anew
    assert part.file and part.file.rows == 2 and not parts.count_deaths(root, 0)
