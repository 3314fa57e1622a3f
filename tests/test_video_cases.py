"""Videos of other people: each file of cases/videos with its right outcome, and the brothers of its kind."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from test_video import greys, write_video

from fvlm.data import video
from fvlm.data.video import RejectedVideo, read_clip

CASES = Path(__file__).parent / "cases" / "videos"
RED, GREEN, BLUE, YELLOW = (200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20)
CORNERS = ((10, 10), (10, 53), (53, 10), (53, 53))
UPRIGHT = (RED, GREEN, BLUE, YELLOW)
"""At the corners top left, top right, bottom left, bottom right."""


def read(name: str, num_frames: int = 24, size: int = 64) -> tuple[np.ndarray, dict[str, object]]:
    return read_clip(CASES / name, num_frames, size, "short-side")


def rejection(path: Path, num_frames: int = 4) -> RejectedVideo:
    with pytest.raises(RejectedVideo) as caught:
        read_clip(path, num_frames, 64, "short-side")
    return caught.value


def corners(frame: np.ndarray) -> np.ndarray:
    return np.array([frame[y, x] for y, x in CORNERS], int)


def off(frame: np.ndarray, expected: tuple[tuple[int, int, int], ...] = UPRIGHT) -> int:
    """The largest difference at the four corners."""
    return int(np.abs(corners(frame) - expected).max())


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("ok.mp4", 32),
        ("n24.mp4", 24),
        ("meta_latin1.avi", 32),
        ("meta_latin1.mp4", 32),
        ("meta_sjis.mp4", 32),
        ("thumb1_first.mp4", 32),
        ("anim.avif", 32),
        ("zero_samples.mov", 30),
        ("pasp_1000_1.mp4", 32),
        ("col_untagged709_hd.mp4", 26),
        ("mkvcrop.mkv", 32),
        ("whole.webm", 64),
    ],
)
def test_these_become_clips_of_the_picture_as_it_was_drawn(name: str, frames: int) -> None:
    clip, source = read(name)
    assert source["frames"] == frames
    assert all(off(frame) <= 3 for frame in clip)
    greys = clip[:, 32, 32].astype(int).mean(1)
    assert greys[0] < 20 and (np.diff(greys) > -3).all() and greys[-1] > 130  # a grey patch that grows lighter


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("unknown_fourcc.mp4", "unsupported", "no decoder for codec"),
        ("unknown_codecid.mkv", "unsupported", "no decoder for codec"),
        ("damaged.gif", "damaged", "Operation not permitted"),
        ("anim.webp", "unsupported", "animated WebP"),
        ("encrypted.mp4", "unsupported", "encrypted"),
        ("cut.webm", "damaged", "cut short"),
        ("col_tag_ycgco.mp4", "unsupported", "no conversion to RGB from its colours"),
    ],
)
def test_these_are_rejected_for_the_true_reason(name: str, reason: str, detail: str) -> None:
    rejected = rejection(CASES / name)
    assert rejected.reason == reason and detail in rejected.detail


def test_text_is_no_video(shared_dir: Path) -> None:
    path = shared_dir / "cases" / "videos" / "notes.txt"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    rejected = rejection(path)
    assert rejected.reason == "unsupported" and "no video" in rejected.detail


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("long.txt", "a line of a text that is long enough for a demuxer\n" * 3000),
        ("list.m3u8", "#EXTM3U\n#EXTINF:1,\nok.mp4\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile ok.mp4\n"),
        ("list.mp4", "\ufeff#EXTM3U\nhttp://127.0.0.1:9/a.ts\n"),
        ("manifest.mpd", '<?xml version="1.0"?><MPD></MPD>'),
    ],
)
def test_playlists_and_text_are_no_video_even_beside_the_video_that_they_name(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / "ok.mp4").symlink_to(CASES / "ok.mp4")
    (tmp_path / name).write_text(content)
    rejected = rejection(tmp_path / name)
    assert rejected.reason == "unsupported" and "no video" in rejected.detail


# Pictures as players show them


@pytest.mark.parametrize(
    ("name", "expected"),
    [("show_0h.mp4", (GREEN, RED, YELLOW, BLUE)), ("show_0v.mp4", (BLUE, YELLOW, RED, GREEN))],
)
def test_a_mirror_in_the_display_matrix_is_obeyed(name: str, expected: tuple[tuple[int, int, int], ...]) -> None:
    clip, source = read(name)
    assert all(off(frame, expected) <= 3 for frame in clip) and source["mirrored"] is True


def drawn_upright() -> np.ndarray:
    """[4, 64, 64, 3]: the four quadrants, for four frames."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32], picture[:32, 32:], picture[32:, :32], picture[32:, 32:] = UPRIGHT
    return np.repeat(picture[None], 4, 0)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("mirror", [{}, {"hflip": True}, {"vflip": True}])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_all_eight_orientations_are_what_ffmpegs_autorotate_makes_of_them(
    tmp_path: Path, suffix: str, degrees: int, mirror: dict[str, bool]
) -> None:
    """`degrees` counter-clockwise, then the mirroring, put the stored picture upright."""
    path = tmp_path / f"turned.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv444p"
        stream.set_display_rotation(degrees, **mirror)
        for frame in drawn_upright():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    clip, source = read_clip(path, 4, 64, "short-side")
    shown = np.rot90(drawn_upright()[0], degrees // 90)
    shown = shown[:, ::-1] if "hflip" in mirror else shown[::-1] if "vflip" in mirror else shown
    assert np.abs(corners(clip[0]) - corners(shown)).max() <= 3
    assert source.get("mirrored", False) is bool(mirror)


@pytest.mark.parametrize(("name", "curve"), [("hdr_pq.mp4", "PQ"), ("hdr_hlg.mp4", "HLG")])
def test_high_dynamic_range_keeps_its_colours_on_a_screen(name: str, curve: str) -> None:
    clip, source = read(name)
    patches = corners(clip[0])
    assert (patches.max(1) - patches.min(1) >= 130).all()
    assert ((patches > 100) == (np.array(UPRIGHT) > 100)).all() and source["hdr"] == curve


@pytest.mark.parametrize("name", ["alpha_qtrle.mov", "alpha_vp9.webm"])
def test_what_is_transparent_is_black_and_never_the_colour_below(name: str) -> None:
    clip, _ = read(name)
    assert all(off(frame, ((0, 0, 0),) * 4) <= 2 for frame in clip)
    assert (np.abs(clip[-1].astype(int) - (255, 220, 0)).max(-1) < 10).any()  # the disc
    # no magenta at its edge either, except where the file's own chroma, at half the resolution, holds both sides
    assert (clip[..., 2] > 60).mean() < (0.03 if name.endswith("webm") else 1e-9)


def test_an_opaque_picture_in_a_format_with_alpha_is_as_without(tmp_path: Path) -> None:
    frames = drawn_upright()
    for codec, pix_fmt in (("qtrle", "argb"), ("qtrle", "rgb24")):
        with av.open(str(tmp_path / f"{pix_fmt}.mov"), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.height = stream.width = 64
            stream.pix_fmt = pix_fmt
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)))
            container.mux(stream.encode())
    with_alpha, without = (read_clip(tmp_path / f"{f}.mov", 4, 48, "short-side")[0] for f in ("argb", "rgb24"))
    assert (with_alpha == without).all()


def test_interlaced_video_is_noted(tmp_path: Path) -> None:
    for name, options in (("interlaced", {"x264-params": "tff=1"}), ("progressive", {})):
        with av.open(str(tmp_path / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25, options=options)
            stream.height = stream.width = 64
            stream.pix_fmt = "yuv420p"
            for frame in greys(4, 64, 64):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    assert read_clip(tmp_path / "interlaced.mp4", 4, 64, "short-side")[1]["interlaced"] is True
    assert "interlaced" not in read_clip(tmp_path / "progressive.mp4", 4, 64, "short-side")[1]


@pytest.mark.parametrize("width", [1280, 640])
def test_untagged_video_is_bt709_from_hd_on(tmp_path: Path, width: int) -> None:
    """The same planes, said to be BT.709 or not: equal in HD only."""
    height, clips = width * 9 // 16, []
    planes = av.VideoFrame.from_ndarray(np.full((height, width, 3), (200, 60, 30), np.uint8), format="rgb24")
    planes = planes.reformat(format="yuv420p")
    for tag in (2, 1):
        path = tmp_path / f"{tag}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"colorspace": str(tag)})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            planes.colorspace = tag
            for pts in range(2):
                planes.pts = pts
                container.mux(stream.encode(planes))
            container.mux(stream.encode())
        clips.append(read_clip(path, 2, 32, "short-side")[0].astype(int))
    assert bool(np.abs(clips[0] - clips[1]).max() <= 1) == (width == 1280)


# Thin and huge pictures


def peak_mb(path: Path, size: int) -> float:
    """Peak memory of a process that reads 24 frames of `path`."""
    code = (
        "import resource, sys; from pathlib import Path; from fvlm.data.video import read_clip;"
        "read_clip(Path(sys.argv[1]), 24, int(sys.argv[2]), 'short-side');"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(size)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_thin_picture_takes_no_memory_to_speak_of() -> None:
    # pages that the test process shares with its child until exec count in ru_maxrss of some kernels: a floor
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name in ("size_2x4096.mp4", "size_3000x1.mkv"):
        assert peak_mb(CASES / name, 256) < max(500, floor + 100), name
    clip, _ = read("size_2x4096.mp4", 32, 256)
    expected = 10 + 6 * np.arange(32)  # the middle of the picture is the grey patch, 10 + 6 x frame
    assert np.abs(clip.mean((1, 2, 3)) - expected).max() <= 2 and clip.std((1, 2, 3)).max() < 1


@pytest.mark.parametrize(("width", "height"), [(640, 16), (16, 560), (1000, 34), (900, 6)])
def test_cropping_before_scaling_gives_the_pixels_of_scaling_before_cropping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    from fvlm.data import picture

    random = np.random.default_rng(0).integers(0, 255, (2, -(-height // 4), -(-width // 4), 3), np.uint8)
    frames = random.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    path = write_video(tmp_path / "long.mp4", frames)
    cropped, _ = read_clip(path, 2, 32, "short-side")
    monkeypatch.setattr(picture, "MAX_ELONGATION", 10_000)
    scaled, _ = read_clip(path, 2, 32, "short-side")
    assert cropped.std() > 20 and np.abs(cropped.astype(int) - scaled).mean() < 2


def test_pictures_beyond_the_limit_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "huge.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 9000, 8000, "yuvj420p"
        huge = av.VideoFrame(9000, 8000, "yuvj420p")
        for pts in range(2):
            huge.pts = pts
            container.mux(stream.encode(huge))
        container.mux(stream.encode())
    rejected = rejection(path, 2)
    assert rejected.reason == "unsupported" and "pictures of 9000x8000 pixels" in rejected.detail


# Streams, packets, and files that end too early


def two_streams(path: Path, counts: tuple[int, int], default: int) -> Path:
    """Two video streams of `counts` frames, 32 and 48 pixels wide; stream `default` has the flag."""
    with av.open(str(path), "w") as container:
        streams = []
        for index, width in enumerate((32, 48)):
            stream = container.add_stream("mpeg4", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, 32, "yuv420p"
            stream.disposition = Disposition.default if index == default else Disposition(0)
            streams.append(stream)
        for stream, count in zip(streams, counts, strict=True):
            for frame in greys(count, 32, stream.width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("counts", "default", "width"),
    [((8, 8), 1, 48), ((8, 8), 0, 32), ((1, 8), 0, 48), ((8, 1), 1, 32), ((0, 8), 0, 48)],
)
def test_the_stream_is_the_one_that_a_player_shows(
    tmp_path: Path, suffix: str, counts: tuple[int, int], default: int, width: int
) -> None:
    _, source = read_clip(two_streams(tmp_path / f"two.{suffix}", counts, default), 8, 32, "short-side")
    assert (source["width"], source["frames"]) == (width, 8)


def test_matroska_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    decode = video._decode
    monkeypatch.setattr(video, "_decode", lambda *args: passes.append(1) or decode(*args))
    for suffix, codec in (("mkv", "libx264"), ("webm", "libvpx-vp9"), ("ts", "libx264")):
        path = tmp_path / f"clip.{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            for frame in greys(50, 64, 64):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        passes.clear()
        assert read_clip(path, 8, 32, "short-side")[1]["frames"] == 50 and len(passes) == 1, suffix


@pytest.mark.parametrize("share", [0.95, 0.5])
@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("mkv", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
        ("avi", "mpeg4", {}),
        ("mp4", "libx264", {"movflags": "faststart"}),
        ("mov", "mjpeg", {"movflags": "faststart"}),
        ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        ("mxf", "mpeg2video", {}),
    ],
)
def test_a_file_cut_short_is_damaged_and_no_shorter_clip(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], share: float
) -> None:
    path = tmp_path / f"whole.{suffix}"
    random = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for _ in range(50):
            noise = random.integers(0, 255, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    assert read_clip(path, 4, 32, "short-side")[1]["frames"] == 50
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert rejection(cut).reason == "damaged"
