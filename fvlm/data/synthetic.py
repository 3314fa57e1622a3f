"""The demo's videos: real mp4 files of small moving shapes, with captions about what moves where."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from fvlm.errors import UserError
from fvlm.files import TEMPORARY, no_space_is_a_user_error, write_atomic

FRAMES = 32
FPS = 16
SMALLEST = 32

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""(x, y), y pointing down as in pictures."""


@dataclass(frozen=True)
class Mover:
    """One shape. Lengths are fractions of the frame's side; `across` is where its line lies, from 0 to 1."""

    colour: str
    shape: str
    direction: str
    radius: float
    across: float

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}".replace("a orange", "an orange")

    def centre(self, progress: float) -> tuple[float, float]:
        """(x, y) when the share `progress` of the video is over: from one edge to the other, always in the picture."""
        dx, dy = DIRECTIONS[self.direction]
        along = 0.5 + (progress - 0.5) * (1 - 2 * self.radius) * (dx + dy)
        return (along, self.across) if dx else (self.across, along)


def write_videos(folder: Path, count: int, size: int = 112, seed: int = 0) -> Path:
    """Make `count` videos of `size` x `size` pixels and FRAMES frames in `folder`, and the table of their captions.

    The same arguments make the same videos. What is complete already is left alone, so an interrupted call goes on and
    a finished one does nothing. Returns the path of captions.csv (columns video, caption), which is written last.
    Raises UserError for numbers that make no videos.
    """
    if count < 1:
        raise UserError(f"{count} videos: there must be at least 1.")
    if size < SMALLEST or size % 2:
        raise UserError(f"videos of {size} pixels: the side must be even (the codec's wish) and at least {SMALLEST}.")
    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("video", "caption"))
    for index in range(count):
        movers, background = scene(np.random.default_rng((seed, index)))
        path = folder / f"shapes-{size}-{seed}-{index:05d}.mp4"
        rows.writerow((path.name, " while ".join(map(str, movers))))
        if not path.exists():
            _write_video(path, [draw(movers, background, t / (FRAMES - 1), size) for t in range(FRAMES)])
    captions = folder / "captions.csv"
    if not captions.exists() or captions.read_text() != table.getvalue():
        write_atomic(captions, table.getvalue())
    return captions


def scene(random: np.random.Generator) -> tuple[list[Mover], np.ndarray]:
    """One or two shapes that differ in colour, and the background's RGB [3], dark and nearly grey."""
    colours = random.permutation(list(COLOURS))[: random.integers(1, 3)]
    movers = [
        Mover(
            colour=str(colour),
            shape=str(random.choice(SHAPES)),
            direction=str(random.choice(list(DIRECTIONS))),
            radius=float(random.uniform(0.10, 0.16)),
            across=float(random.uniform(0.2, 0.8)),
        )
        for colour in colours
    ]
    return movers, random.integers(20, 70) + random.uniform(-8, 8, 3)


def draw(movers: list[Mover], background: np.ndarray, progress: float, size: int) -> np.ndarray:
    """[S, S, 3] uint8 RGB. Edges are smoothed over one pixel; later shapes lie on top."""
    picture = np.broadcast_to(background, (size, size, 3)).astype(np.float64)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    for mover in movers:
        cx, cy = mover.centre(progress)
        cover = np.clip(-size * _distance(mover.shape, x - cx, y - cy, mover.radius) + 0.5, 0, 1)[..., None]
        picture += cover * (np.array(COLOURS[mover.colour]) - picture)
    return np.rint(picture).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the edge of a shape around the origin, negative inside (exact along the sides, which is enough)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.9 * radius
    return np.maximum(y - 0.8 * radius, 0.866 * abs(x) - 0.5 * y - 0.5 * radius)


def _write_video(path: Path, frames: list[np.ndarray]) -> None:
    """H.264 where this FFmpeg has an encoder for it, else MPEG-4; one thread, so that the bytes do not vary."""
    import av  # not above: shapes can be drawn without PyAV
    from av.video.stream import VideoStream

    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # Looking ahead makes x264's bytes vary from run to run on frames of 32 pixels.
    options = {"crf": "18", "preset": "veryfast", "rc-lookahead": "0"} if codec == "libx264" else {"qscale": "2"}
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    height, width = frames[0].shape[:2]
    try:
        with no_space_is_a_user_error(path), av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream(codec, rate=Fraction(FPS), options=options)
            assert isinstance(stream, VideoStream)  # `codec` is one of video
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
