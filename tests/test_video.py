"""Videos are decoded whole, in order, upright, and refused for a stated reason."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from fvlm.data import video
from fvlm.data.video import RejectedVideo, read_clip

MATRICES = {  # degrees clockwise that the player turns the picture: the matrix a, b, c, d of the mp4's track header
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


def write_video(path: Path, frames: np.ndarray, codec: str = "libx264", aspect: Fraction | None = None) -> Path:
    """[T, H, W, 3] uint8 -> a video that loses next to nothing."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "1"} if codec == "libx264" else {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv444p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def turn(path: Path, degrees: int) -> None:
    """Write a rotation into the track header of an mp4 file, as a phone does."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # type, version and flags, times and ids, reserved, layer and volume
    a, b, c, d = (value << 16 for value in MATRICES[degrees])
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def greys(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Frame t is uniformly 4 t."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 4, height * width * 3).reshape(count, height, width, 3)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "avi"])
def test_frames_lie_at_even_steps_in_the_order_of_presentation(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", greys(50))
    frames, source = read_clip(path, 8, 32, "short-side")
    expected = 4 * np.array([0, 7, 14, 21, 28, 35, 42, 49])
    assert np.abs(frames.mean((1, 2, 3)) - expected).max() < 2
    assert frames.shape == (8, 32, 32, 3) and frames.dtype == np.uint8
    assert (source["width"], source["height"], source["frames"], source["fps"]) == (32, 32, 50, 25.0)
    assert source["duration_s"] == pytest.approx(2.0, abs=0.05)


def test_only_the_chosen_frames_are_scaled_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    square = video.square
    monkeypatch.setattr(video, "square", lambda *args: kept.append(1) or square(*args))
    for suffix in ("mp4", "mkv"):  # mkv does not say how many frames it has: its packets are counted first
        kept.clear()
        read_clip(write_video(tmp_path / f"clip.{suffix}", greys(50)), 8, 16, "short-side")
        assert len(kept) == 8


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_video_filmed_with_the_camera_turned_comes_out_upright(tmp_path: Path, degrees: int) -> None:
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32, :32], upright[:32, 32:], upright[32:, :32] = (220, 20, 20), (20, 200, 20), (20, 20, 220)
    stored = np.rot90(upright, degrees // 90)  # counter-clockwise, so that the player's clockwise turn undoes it
    path = write_video(tmp_path / "turned.mp4", np.repeat(stored[None], 4, 0))
    turn(path, degrees)
    frames, source = read_clip(path, 4, 64, "short-side")
    assert np.abs(frames[0].astype(int) - upright).mean() < 4
    assert source["rotation"] == (360 - degrees) % 360


def test_short_side_crops_the_centre_and_stretch_keeps_all(tmp_path: Path) -> None:
    wide = np.zeros((4, 32, 96, 3), np.uint8)
    wide[:, :, :32, 0], wide[:, :, 32:64, 1], wide[:, :, 64:, 2] = 200, 200, 200  # red, green, blue thirds
    path = write_video(tmp_path / "wide.mp4", wide)
    cropped, _ = read_clip(path, 4, 32, "short-side")
    assert (cropped[0, :, 4:-4].argmax(-1) == 1).all()
    stretched, _ = read_clip(path, 4, 96, "stretch")
    assert [stretched[0, 48, x].argmax() for x in (10, 48, 86)] == [0, 1, 2]


def test_pixels_that_are_not_square_are_shown_in_their_proportions(tmp_path: Path) -> None:
    narrow = np.zeros((4, 32, 32, 3), np.uint8)
    narrow[:, :, 8:24] = 200  # shown twice as wide as high: the crop of the centre is just this
    path = write_video(tmp_path / "narrow.mp4", narrow, aspect=Fraction(2))
    frames, _ = read_clip(path, 4, 32, "short-side")
    assert frames[0, :, 4:-4].min() > 150


def test_a_picture_is_shrunk_without_aliasing(tmp_path: Path) -> None:
    stripes = np.zeros((4, 256, 256, 3), np.uint8)
    stripes[:, :, ::2] = 255
    frames, _ = read_clip(write_video(tmp_path / "stripes.mp4", stripes), 4, 48, "short-side")
    assert frames[0, 4:-4, 4:-4].std() < 8  # one pixel out of five and a third would give 127


def rejection(path: Path, num_frames: int = 4) -> str:
    with pytest.raises(RejectedVideo) as caught:
        read_clip(path, num_frames, 32, "short-side")
    return caught.value.reason


def test_what_cannot_be_used_is_rejected_for_a_stated_reason(tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mp4", greys(5))
    assert rejection(tmp_path / "absent.mp4") == rejection(tmp_path) == "missing"
    assert rejection(good, num_frames=6) == "too few frames"
    read_clip(good, 5, 32, "short-side")
    for name, content in {"empty": b"", "text": b"not a video" * 100, "cut": good.read_bytes()[:-400]}.items():
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(content)
        assert rejection(path) == "damaged", name


def test_a_sound_without_pictures_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert rejection(path) == "damaged"


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("h264_10bits.mp4", 30),
        ("h265_video.mp4", 10),
        ("newtonscradle.gif", 36),
        ("flipping_a_pancake.mkv", 310),
        ("nasa_13013.mp4", 325),
        ("unordered.mov", 4),
        ("video_90.mov", 3),
    ],
)
def test_real_files_of_every_kind_are_read(shared_videos: Path, name: str, frames: int) -> None:
    clip, source = read_clip(shared_videos / name, 3, 64, "short-side")
    assert clip.shape == (3, 64, 64, 3) and source["frames"] == frames


def test_a_real_video_damaged_in_its_middle_is_rejected(shared_videos: Path) -> None:
    assert rejection(shared_videos / "corrupted.mp4") == "damaged"
