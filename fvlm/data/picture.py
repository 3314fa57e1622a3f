"""One decoded frame -> a square RGB picture, as a player shows it."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc, Interpolation, VideoReformatter

from fvlm.data.schema import ResizePolicy
from fvlm.data.video_file import RejectedVideo

# libswscale scales and converts to RGB in one pass, straight from the decoder's planes (8 or 10 bits, any chroma);
# Pillow would need a full-size RGB picture first. Its bicubic filter widens with the scale: shrinking does not alias.
# The other flags ask for a result that does not depend on the processor, which a dataset with a fingerprint needs.
SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT

MAX_ELONGATION = 8
"""Longer pictures are cropped before they are scaled: 2x4096 pixels at 256 would otherwise pass through 256x524288."""
MAX_PIXEL_ASPECT = 10.0
"""A pixel aspect beyond it, or below its inverse, is a mistake of the writer, which players ignore too."""
BACKGROUND = 0
"""Grey level under transparent pixels: black."""
HDR = {int(ColorTrc.SMPTE2084): "PQ", int(ColorTrc.ARIB_STD_B67): "HLG"}
UNSPECIFIED, RESERVED = 2, 3  # values of AVColorSpace
CHROMA_GRID = 8
"""Crops begin at multiples of it, so that every chroma subsampling keeps its phase."""


@dataclass(frozen=True)
class View:
    """How frames of one video are to be shown.

    aspect: width of a pixel over its height
    crop:   pixels that the container hides (top, bottom, left, right)
    """

    size: int
    resize: ResizePolicy
    aspect: float = 1.0
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)


def pixel_aspect(stated: object) -> float:
    """`stated` (a Fraction, or None) as a number, 1.0 where it is absent or absurd."""
    aspect = float(stated or 1)  # type: ignore[arg-type]
    return aspect if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT else 1.0


def square(frame: av.VideoFrame, view: View, scaler: VideoReformatter) -> np.ndarray:
    """-> [S, S, 3] uint8 RGB, upright, its own memory.

    Raises RejectedVideo for colours that cannot be converted; FFmpegError.
    """
    matrix, turned = _matrix(frame), orientation(frame)
    frame = _without_hidden(frame, view.crop)
    width, height, left, top = view.size, view.size, 0, 0
    if view.resize == "short-side":
        frame, width, height, left, top = _short_side(frame, view)
    colours: dict[str, Any] = {"src_colorspace": matrix, **_tone(frame)}
    try:
        frame = _over_background(frame, colours)
        small = scaler.reformat(frame, width, height, "rgb24", interpolation=SCALER, threads=1, **colours)
    except av.FFmpegError as error:
        if error.errno == errno.EOPNOTSUPP:
            detail = f"no conversion to RGB from its colours (matrix {frame.colorspace} of FFmpeg's AVColorSpace)"
            raise RejectedVideo("unsupported", detail) from error
        raise
    pixels = small.to_ndarray()[top : top + view.size, left : left + view.size]
    return turned.apply(pixels).copy()  # a view would keep the whole of `small`


def _short_side(frame: av.VideoFrame, view: View) -> tuple[av.VideoFrame, int, int, int, int]:
    """-> the frame, or its middle where it is long; what to scale it to; where the square begins in that."""
    size = view.size
    shown = frame.width * view.aspect  # pixels need not be square
    scale = size / min(shown, frame.height)
    width, height = max(size, round(shown * scale)), max(size, round(frame.height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    if width > MAX_ELONGATION * size:
        start, length, width, left = _middle(frame.width, width, left, size)
        frame = crop(frame, start, 0, length, frame.height)
    elif height > MAX_ELONGATION * size:
        start, length, height, top = _middle(frame.height, height, top, size)
        frame = crop(frame, 0, start, frame.width, length)
    return frame, width, height, left, top


def _middle(source: int, target: int, offset: int, size: int) -> tuple[int, int, int, int]:
    """Crop before scaling `source` pixels to `target`, of which [offset, offset + size) are wanted.

    -> where the crop begins and how many pixels it has, what it is scaled to, and where the wanted ones begin in that.
    Around them stays what the filter reads, and the ends lie where a source pixel begins with one of the target.
    """
    ratio = source / target
    margin = 8 * max(1.0, ratio)

    def best(ends: range) -> int:
        return min(ends, key=lambda end: (round(abs(end / ratio - round(end / ratio)), 6), abs(end - ends[0])))

    first = max(0, int(offset * ratio - margin)) // CHROMA_GRID * CHROMA_GRID
    start = best(range(first, max(-1, first - 32 * CHROMA_GRID), -CHROMA_GRID))
    last = -(-int((offset + size) * ratio + margin + 1) // CHROMA_GRID) * CHROMA_GRID
    stop = source if last >= source else best(range(last, min(source, last + 32 * CHROMA_GRID), CHROMA_GRID))
    return start, stop - start, round((stop - start) / ratio), offset - round(start / ratio)


def crop(frame: av.VideoFrame, left: int, top: int, width: int, height: int) -> av.VideoFrame:
    """A part of `frame`, without a copy of its pixels."""
    graph = Graph()
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}", pix_fmt=frame.format.name, time_base="1/25", pixel_aspect="1/1",
        colorspace=str(frame.colorspace), range=str(frame.color_range),
    )  # fmt: skip
    window = graph.add("crop", w=str(width), h=str(height), x=str(left), y=str(top), exact="1")
    graph.link_nodes(source, window, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.vpull()


def _without_hidden(frame: av.VideoFrame, hidden: tuple[int, int, int, int]) -> av.VideoFrame:
    top, bottom, left, right = hidden
    width, height = frame.width - left - right, frame.height - top - bottom
    if not any(hidden) or width < 1 or height < 1:
        return frame
    return crop(frame, left, top, width, height)


def _matrix(frame: av.VideoFrame) -> Colorspace | None:
    """What `frame`'s YUV is to be read as, where it does not say so itself: as players do, BT.709 from HD on."""
    if frame.format.is_rgb or frame.format.has_palette:
        return None
    if frame.colorspace == RESERVED:
        frame.colorspace = UNSPECIFIED
    if frame.colorspace != UNSPECIFIED:
        return None
    if frame.color_trc in HDR:
        return Colorspace.BT2020
    thin = max(frame.width, frame.height) > MAX_ELONGATION * min(frame.width, frame.height)
    return Colorspace.ITU709 if not thin and (frame.width >= 1280 or frame.height > 576) else None


def _tone(frame: av.VideoFrame) -> dict[str, int]:
    """High dynamic range is mapped to the range and gamut of screens; everything else is left as it is."""
    if frame.color_trc not in HDR:
        return {}
    if frame.color_primaries == ColorPrimaries.UNSPECIFIED:
        frame.color_primaries = int(ColorPrimaries.BT2020)
    return {"dst_color_trc": ColorTrc.BT709, "dst_color_primaries": ColorPrimaries.BT709}


def _over_background(frame: av.VideoFrame, colours: dict[str, Any]) -> av.VideoFrame:
    """`frame` without transparency. Opaque pictures come back as they are.

    Before scaling: afterwards, the hidden colours would have run into the edges.
    """
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    if not has_alpha:
        return frame
    rgba = frame.reformat(format="rgba", interpolation=SCALER, threads=1, **colours).to_ndarray()
    alpha = rgba[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        return frame
    pixels = (rgba[..., :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255
    return av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")


@dataclass(frozen=True)
class Orientation:
    """What puts a stored picture upright: a turn (degrees counter-clockwise), then a mirroring from left to right."""

    rotation: int = 0
    mirrored: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """[H, W, 3] -> the same, upright; a view."""
        pixels = np.rot90(pixels, self.rotation // 90)
        return pixels[:, ::-1] if self.mirrored else pixels


def orientation(frame: av.VideoFrame) -> Orientation:
    """Of the display matrix, from the container or the stream: a point (x, y) is shown at (a x + c y, b x + d y)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation()
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])  # type: ignore[call-overload]
    mirrored = a * d - b * c < 0
    if mirrored:
        a, c = -a, -c  # the turn that is left when the mirroring is taken off
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(0 if a + d >= 0 else 180, mirrored)
    return Orientation(270 if b - c > 0 else 90, mirrored)  # y points down: b > 0 turns clockwise
