"""Video files -> a few square RGB frames, through PyAV (FFmpeg's libraries; no `ffmpeg` program is needed)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from fvlm.data.decode import even_steps
from fvlm.data.schema import ResizePolicy
from fvlm.errors import UserError

RejectReason = Literal["missing", "damaged", "too few frames"]

# libswscale scales and converts to RGB in one pass, straight from the decoder's planes (8 or 10 bits, any chroma);
# Pillow would need a full-size RGB picture first. Its bicubic filter widens with the scale: shrinking does not alias.
# The other flags ask for a result that does not depend on the processor, which a dataset with a fingerprint needs.
SCALER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


class RejectedVideo(Exception):
    """This video cannot become a clip. `reason` is one of few, to be counted; `detail` is for people."""

    def __init__(self, reason: RejectReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class _Pass:
    """One pass over a video. frames: those at even steps among the `believed` first ones, [S, S, 3] uint8 each."""

    count: int
    believed: int
    frames: list[np.ndarray]
    source: dict[str, Any]


def read_clip(path: Path, num_frames: int, frame_size: int, resize: ResizePolicy) -> tuple[np.ndarray, dict[str, Any]]:
    """`num_frames` frames at even steps from the first to the last that the video shows.

    The steps depend on the number of frames, and only decoding the whole video tells that for sure (and whether it is
    damaged anywhere). So the container's own count is believed at first, and where it proves wrong (or, as in Matroska,
    absent) the video is decoded a second time. Either way only the chosen frames are kept, already at their final
    size: an hour of video takes no more memory than a second.

    resize: "short-side" scales the short side to `frame_size` S and crops the centre; "stretch" ignores proportions.

    Returns frames [T, S, S, 3] uint8 RGB, upright also where the camera was turned, and what the file says: width and
    height (as stored), frames, fps, duration_s, and the rotation (degrees counter-clockwise) that put it upright.
    A file with several video streams gives its first; a cover picture does not count.
    Raises RejectedVideo; UserError when the file may not be read.
    """
    if not path.is_file():
        raise RejectedVideo("missing", "no such file")
    try:
        video = _decode(path, None, num_frames, frame_size, resize)
        if video.count < num_frames:
            raise RejectedVideo("too few frames", f"{video.count} frames; {num_frames} wanted")
        if video.count != video.believed:
            video = _decode(path, video.count, num_frames, frame_size, resize)
    except PermissionError as error:
        raise UserError(f"{path}: may not be read ({error.strerror}). Change its permissions.") from error
    except av.FFmpegError as error:
        raise RejectedVideo("damaged", str(error.strerror or error)) from error
    return np.stack(video.frames), video.source


def _decode(path: Path, believed: int | None, num_frames: int, frame_size: int, resize: ResizePolicy) -> _Pass:
    """Decode all of the video, as if it had `believed` frames (None: as many as its container says)."""
    with av.open(str(path)) as container:
        stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            raise RejectedVideo("damaged", "no video stream in the file")
        stream.codec_context.thread_count = 1  # the cores are busy with other videos
        if believed is None:
            believed = stream.frames
        steps = set(even_steps(believed, num_frames).tolist()) if believed >= num_frames else set()
        scaler = VideoReformatter()
        frames: list[np.ndarray] = []
        count, first = 0, None
        for frame in container.decode(stream):  # in the order of presentation
            if frame.is_corrupt:
                raise RejectedVideo("damaged", f"the decoder marks frame {count} as corrupt")
            if count in steps:
                frames.append(_square(frame, stream, scaler, frame_size, resize))
            first = first or frame
            count += 1
        source = _source(container, stream, first, count) if first else {}
    return _Pass(count, believed, frames, source)


def _square(
    frame: av.VideoFrame, stream: VideoStream, scaler: VideoReformatter, size: int, resize: ResizePolicy
) -> np.ndarray:
    """-> [S, S, 3] uint8 RGB, upright."""
    width, height = size, size
    if resize == "short-side":
        shown = frame.width * float(stream.sample_aspect_ratio or 1)  # pixels need not be square
        scale = size / min(shown, frame.height)
        width, height = max(size, round(shown * scale)), max(size, round(frame.height * scale))
    small = scaler.reformat(frame, width, height, "rgb24", interpolation=SCALER, threads=1)
    top, left = (height - size) // 2, (width - size) // 2
    pixels = small.to_ndarray()[top : top + size, left : left + size]
    return np.ascontiguousarray(np.rot90(pixels, _rotation(frame) // 90))


def _rotation(frame: av.VideoFrame) -> int:
    """Quarter turns, in degrees counter-clockwise, that put the picture upright (from the file's display matrix)."""
    return round(frame.rotation / 90) % 4 * 90


def _source(
    container: av.container.InputContainer, stream: VideoStream, first: av.VideoFrame, count: int
) -> dict[str, Any]:
    fps = float(stream.average_rate) if stream.average_rate else None
    duration = container.duration / av.time_base if container.duration else None
    if duration is None and fps:
        duration = count / fps
    return {
        "width": first.width,
        "height": first.height,
        "frames": count,
        "fps": fps and round(fps, 3),
        "duration_s": duration and round(duration, 3),
        "rotation": _rotation(first),
    }
