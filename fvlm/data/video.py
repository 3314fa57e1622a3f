"""Video files -> a few square RGB frames, through PyAV (FFmpeg's libraries; no `ffmpeg` program is needed)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from fvlm.data.decode import even_steps
from fvlm.data.matroska import hidden_edges
from fvlm.data.picture import HDR, View, orientation, pixel_aspect, square
from fvlm.data.schema import ResizePolicy
from fvlm.data.video_file import (
    RejectedVideo,
    candidates,
    check_file,
    check_kind,
    decoded,
    open_video,
    scan_packets,
    shown_stream,
)
from fvlm.errors import StoreUnavailable, UserError
from fvlm.files import away_is_unavailable, is_away


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
    damaged anywhere). So a count is believed at first: the container's own, or where it has none (Matroska, MPEG-TS)
    that of its packets, for which the file is read through but not decoded. Where the count proves wrong the video is
    decoded a second time. Either way only the chosen frames are kept, already at their final size: an hour of video
    takes no more memory than a second.

    resize: "short-side" scales the short side to `frame_size` S and crops the centre; "stretch" ignores proportions.

    Returns frames [T, S, S, 3] uint8 RGB, as a player shows them (turned and mirrored as the file says, high dynamic
    range mapped to that of screens, transparency over black, edges that the container hides left out), and what the
    file says: width and height (as stored), frames, fps, duration_s, the rotation (degrees counter-clockwise) that put
    it upright, and where they apply `mirrored` (left to right, after the rotation), `hdr` ("PQ" or "HLG", what it was)
    and `interlaced` (both fields are in the frames).
    Of several video streams it is the one that a player shows; a cover picture does not count.

    Raises RejectedVideo for whatever is wrong with this video.
    """
    check_file(path)
    check_kind(path)
    with _rejects(path):
        index, believed = _choose(path)
        video = _decode(path, index, believed, num_frames, frame_size, resize)
        if video.count < num_frames:
            raise RejectedVideo("too few frames", f"{video.count} frames; {num_frames} wanted")
        if video.count != video.believed:
            video = _decode(path, index, video.count, num_frames, frame_size, resize)
        return np.stack(video.frames), video.source


@contextmanager
def _rejects(path: Path) -> Iterator[None]:
    """Turn every error of the block into a RejectedVideo: one video never ends the work on the others.

    Raises StoreUnavailable: the disk is away, and would make rejects of all of them.
    """
    try:
        yield
    except (RejectedVideo, UserError, StoreUnavailable):
        raise
    except MemoryError as error:  # FFmpeg's own as well
        raise RejectedVideo("unsupported", "decoding it takes more memory than there is") from error
    except av.FFmpegError as error:
        # FFmpeg's numbers are those of the system, but decoders use them freely: "Operation not permitted" is damage.
        if isinstance(error, OSError) and is_away(error, path):
            _read_through(path)
        raise RejectedVideo("damaged", f"FFmpeg cannot decode it ({error.strerror or error})") from error
    except Exception as error:
        raise RejectedVideo("failed", f"{type(error).__name__}: {error}") from error


def _read_through(path: Path) -> None:
    """Raises StoreUnavailable: the disk does not give the file, so it was no decoder that failed."""
    with away_is_unavailable(path), path.open("rb") as file:
        while file.read(1 << 20):
            pass


def _choose(path: Path) -> tuple[int, int]:
    """-> the index of the stream that a player shows, and the number of frames it is believed to have."""
    with open_video(path) as container:
        streams = candidates(container)
        scan = None if all(stream.frames for stream in streams) else scan_packets(container)
        stream = shown_stream(streams, scan)
        return stream.index, stream.frames or (scan.packets[stream.index] if scan else 0)


def _decode(path: Path, index: int, believed: int, num_frames: int, frame_size: int, resize: ResizePolicy) -> _Pass:
    """Decode all of stream `index`, as if it had `believed` frames."""
    with open_video(path) as container:
        stream = next(stream for stream in container.streams.video if stream.index == index)
        steps = set(even_steps(believed, num_frames).tolist()) if believed >= num_frames else set()
        view = View(frame_size, resize, pixel_aspect(stream.sample_aspect_ratio), hidden_edges(path, container, stream))
        scaler = VideoReformatter()
        frames: list[np.ndarray] = []
        count, first, interlaced = 0, None, False
        for frame in decoded(container, stream):
            if count in steps:
                frames.append(square(frame, view, scaler))
            first = first or frame
            interlaced = interlaced or frame.interlaced_frame
            count += 1
        source = _source(container, stream, first, count) if first else {}
        if interlaced:
            source["interlaced"] = True
    return _Pass(count, believed, frames, source)


def _source(container: InputContainer, stream: VideoStream, first: av.VideoFrame, count: int) -> dict[str, Any]:
    fps = float(stream.average_rate) if stream.average_rate else None
    duration = container.duration / av.time_base if container.duration else None
    if duration is None and fps:
        duration = count / fps
    turned = orientation(first)
    source: dict[str, Any] = {
        "width": first.width,
        "height": first.height,
        "frames": count,
        "fps": fps and round(fps, 3),
        "duration_s": duration and round(duration, 3),
        "rotation": turned.rotation,
    }
    # only where they apply, so that the bytes of ordinary videos' rows stay what they were
    if turned.mirrored:
        source["mirrored"] = True
    if first.color_trc in HDR:
        source["hdr"] = HDR[first.color_trc]
    return source
