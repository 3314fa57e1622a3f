"""What `prepare` never writes, where it cannot write, and what a stopped one leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_captions import SPEC, write_named_videos, written

from fvlm.data import parts
from fvlm.data.captions import Captions
from fvlm.data.latents import BlockTransform, to_bits
from fvlm.data.synthetic import SMALLEST
from fvlm.errors import UserError
from ray_jobs.prepare import PrepareConfig
from ray_jobs.prepare import prepare as run_prepare


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return write_named_videos(tmp_path / "videos")


class NotFinite(BlockTransform):
    """A codec whose arithmetic overflows for one clip."""

    def encode(self, frames: np.ndarray, clip_id: str) -> np.ndarray:
        bits = super().encode(frames, clip_id)
        if clip_id == "a.mp4":
            bits.view("<f2")[1, 7] = np.inf
        return bits


def test_latents_that_are_not_finite_are_rejected(videos: Path, tmp_path: Path) -> None:
    rows = Captions(written(tmp_path / "t.csv", "video,caption\na.mp4,one\nb.mp4,two\n")).rows(0, 9)
    (tmp_path / parts.PARTS).mkdir()
    part = parts.prepare_part(tmp_path, videos, 0, rows, SPEC, NotFinite())
    assert part.file and part.file.rows == 1
    assert [(reject.clip_id, reject.reason) for reject in part.rejects] == [("a.mp4", "wrong latents")]


def test_bfloat16_keeps_what_is_not_finite() -> None:
    numbers = np.array([[0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x3F800000]], "<u4").view("<f4")
    bits = to_bits(numbers, "bfloat16").view("<u2").astype(np.uint32)
    kept = (bits << 16).view(np.float32)[0]
    assert np.isnan(kept[:2]).all() and kept[2:].tolist() == [np.inf, -np.inf, 1.0]


def config(videos: Path, out: Path) -> PrepareConfig:
    table = written(videos.parent / "t.csv", "video,caption\na.mp4,one\n")
    return PrepareConfig(videos, table, out, num_frames=4, frame_size=SMALLEST, latents=BlockTransform.name)


def test_an_output_that_cannot_be_written_is_one_line(videos: Path, tmp_path: Path) -> None:
    for out in (written(tmp_path / "file", b""), tmp_path / "file" / "below", Path("/proc/fvlm")):
        with pytest.raises(UserError, match=rf"{out}: cannot be written") as caught:
            run_prepare(config(videos, out))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_preparation_says_so_in_one_line_and_goes_on_later(
    videos: Path, tmp_path: Path, number: signal.Signals
) -> None:
    for index in range(400):
        (videos / f"{index}.mp4").hardlink_to(videos / "ok.mp4")
    table = written(tmp_path / "t.csv", "video,caption\n" + "".join(f"{index}.mp4,words\n" for index in range(400)))
    out = tmp_path / "out"
    options = f"--latents block-transform --num-frames 4 --frame-size {SMALLEST} --clips-per-shard 1 --tasks 1"
    paths = ["--videos", str(videos), "--captions", str(table), "--out", str(out)]
    command = [sys.executable, "-m", "ray_jobs.prepare", *paths, *options.split()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(list(out.glob("_parts/*.json"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said == f"stopped by {number.name}; what was complete stays\n"
    done = [index for index in range(400) if parts.is_done(out, index)]
    assert 3 <= len(done) < 400 and not list(out.rglob(".tmp-*"))
