"""What a video file holds: whether it can be read at all, which of its streams a player shows, and its packets."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from fvlm.data import matroska
from fvlm.files import away_is_unavailable

RejectReason = Literal["missing", "unreadable", "unsupported", "damaged", "too few frames", "failed", "crashed"]

MAX_PIXELS = 8192 * 8192
"""Larger pictures are refused: one decoder keeps up to 17 of them."""
LIMITS = {"max_pixels": str(MAX_PIXELS)}
NOT_VIDEO = {"tty", "bin", "adf", "idf", "xbin", "concat", "hls", "dash", "image2", "imf", "sdp", "rtsp"}
"""Demuxers that draw text as pictures, or read other files than the one that was named."""
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"<ASX", b"<asx", b"<smil", b"[playlist]", b"v=0")
COVERS = Disposition.attached_pic | Disposition.timed_thumbnails
SECONDARY = Disposition.dependent | Disposition.still_image
LENGTH_OF_FILE = {"matroska", "webm", "flv", "asf"}
"""Formats whose header says when the last stream of the file ends."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave out the alpha plane."""


class RejectedVideo(Exception):
    """This video cannot become a clip. `reason` is one of few, to be counted; `detail` is for people.

    reason: "missing"         there is no such file
            "unreadable"      the system refuses to read it (permissions, a failing disk)
            "unsupported"     a whole file that cannot be decoded here, or no video
            "damaged"         its bytes make no sense, or end too early
            "too few frames"  fewer than a clip has
            "crashed"         decoding it ends the process
            "failed"          any other error while it was read
    """

    def __init__(self, reason: RejectReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass
class Scan:
    """What demuxing a whole file tells without decoding it.

    packets: of each stream that hold data
    end_s:   when the last packet of any stream ends
    """

    packets: Counter[int] = field(default_factory=Counter)
    end_s: float = 0.0


def check_file(path: Path) -> None:
    """Raise RejectedVideo when there is no such file ("missing"), or the system does not let one see ("unreadable")."""
    try:
        with away_is_unavailable(path):
            mode = path.stat().st_mode
    except ValueError as error:  # a NUL in the name
        raise RejectedVideo("missing", "no such file") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            detail = "" if error.errno == errno.ENOENT else f" ({error.strerror})"
            raise RejectedVideo("missing", f"no such file{detail}") from error
        raise RejectedVideo("unreadable", f"cannot be reached ({error.strerror})") from error
    if not stat.S_ISREG(mode):
        raise RejectedVideo("missing", "no such file (something else has this name)")


def check_kind(path: Path) -> None:
    """Raise RejectedVideo for what the first bytes show: no permission, an empty or cut file, another kind of file."""
    try:
        with away_is_unavailable(path), path.open("rb") as file:
            head = file.read(4096)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise RejectedVideo("unreadable", f"may not be read ({error.strerror})") from error
    if not head:
        raise RejectedVideo("damaged", "the file is empty")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(PLAYLISTS):
        raise RejectedVideo("unsupported", "no video: a playlist or another text file")
    if head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20] & 2:
        raise RejectedVideo("unsupported", "an animated WebP, which FFmpeg cannot decode")
    stated = matroska.stated_bytes(head)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        stated = int.from_bytes(head[4:8], "little") + 8
    if size < stated:
        raise RejectedVideo("damaged", f"cut short: {stated:,} bytes long by its header, of which {size:,} are there")


def open_video(path: Path) -> InputContainer:
    """Open for demuxing. Tags need not be UTF-8. Raises RejectedVideo, FFmpegError."""
    try:
        container = av.open(
            str(path),
            metadata_errors="replace",
            container_options={"protocol_whitelist": "file"},  # never the network
        )
    except av.InvalidDataError as error:
        raise RejectedVideo("damaged", f"FFmpeg finds no video in it ({error.strerror})") from error
    if NOT_VIDEO & set(container.format.name.split(",")):
        container.close()
        raise RejectedVideo("unsupported", f"no video: FFmpeg reads it as {container.format.long_name}")
    return container


def candidates(container: InputContainer) -> list[VideoStream]:
    """The video streams that can be decoded, cover pictures left out; at least one. Raises RejectedVideo."""
    streams = [stream for stream in container.streams.video if not stream.disposition & COVERS]
    if not streams:
        raise RejectedVideo("damaged", "no video stream in the file")
    if all("enc_key_id" in stream.metadata for stream in streams):  # Matroska's
        raise RejectedVideo("unsupported", "encrypted")
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise RejectedVideo("unsupported", f"no decoder for codec of its video stream {streams[0].index}")
    return decodable


def shown_stream(streams: list[VideoStream], scan: Scan | None) -> VideoStream:
    """The stream of `streams` that a player shows: more than one picture, default flag, first in the file."""

    def rank(stream: VideoStream) -> tuple[bool, bool, bool]:
        pictures = scan.packets[stream.index] if scan else stream.frames
        return pictures < 2, bool(stream.disposition & SECONDARY), not stream.disposition & Disposition.default

    stream = min(streams, key=rank)  # the first of equals
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise RejectedVideo("unsupported", f"pictures of {width}x{height} pixels; the largest read are {MAX_PIXELS}")
    return stream


def scan_packets(container: InputContainer) -> Scan:
    """Demux the whole file: all its packets, none decoded. Raises RejectedVideo when it ends before its header says."""
    scan = Scan()
    for packet in container.demux():
        if not packet.size:
            continue
        scan.packets[packet.stream_index] += 1
        scan.end_s = max(scan.end_s, _end_s(packet))
    if LENGTH_OF_FILE & set(container.format.name.split(",")) and container.duration:
        rates = [float(stream.average_rate) for stream in candidates(container) if stream.average_rate]
        _check_length(container.duration / av.time_base, scan.end_s, min(rates, default=0.0))
    return scan


def decoder_of(stream: VideoStream) -> VideoCodecContext:
    """The decoder of `stream`, one thread: the cores are busy with other videos."""
    decoder: VideoCodecContext = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
        decoder = VideoCodecContext.create(ALPHA_DECODERS[decoder.name], "r")  # type: ignore[assignment]
    decoder.thread_count = 1
    decoder.options = decoder.options | LIMITS
    return decoder


def decoded(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames of `stream`, in the order of presentation.

    Raises RejectedVideo when it is encrypted, a frame is corrupt or the file is cut short; FFmpegError.
    """
    decoder, packets, end_s, count = decoder_of(stream), 0, 0.0, 0
    for packet in container.demux(stream):
        packets += packet.dts is not None
        if not packet.size:  # a dropped frame, which shows the one before; to the decoder it would mean the end
            continue
        if packet.has_sidedata("encryption_info"):
            raise RejectedVideo("unsupported", "encrypted")
        end_s = max(end_s, _end_s(packet))
        for frame in decoder.decode(packet):
            yield _checked(frame, count)
            count += 1
    for frame in decoder.decode(None):
        yield _checked(frame, count)
        count += 1
    formats = set(container.format.name.split(","))
    indexed = len(stream.index_entries)
    if "mov" in formats and packets < indexed:
        raise RejectedVideo("damaged", f"cut short: {packets} of {indexed} samples are in the file")
    if {"avi", "mxf"} & formats and stream.duration and stream.time_base:
        rate = float(stream.average_rate) if stream.average_rate else 0.0
        _check_length(float(stream.duration * stream.time_base), end_s, rate)


def _checked(frame: av.VideoFrame, number: int) -> av.VideoFrame:
    if frame.is_corrupt:
        raise RejectedVideo("damaged", f"the decoder marks frame {number} as corrupt")
    return frame


def _end_s(packet: av.Packet) -> float:
    start = packet.pts if packet.pts is not None else packet.dts
    if start is None or not packet.time_base:
        return 0.0
    return float((start + (packet.duration or 0)) * packet.time_base)


def _check_length(stated_s: float, end_s: float, rate: float) -> None:
    """Raise RejectedVideo when packets end well before the stated length. rate: frames a second, 0 for unknown.

    The last packet need not say how long it lasts, and writers round: 2 frames, 1 % and a quarter second are borne.
    """
    borne = max(0.25, 2.5 / rate if rate else 0.0, min(0.01 * stated_s, 2.0))
    if end_s < stated_s - borne:
        raise RejectedVideo(
            "damaged", f"cut short: {stated_s:.2f} s long by its header, of which {end_s:.2f} s are there"
        )
