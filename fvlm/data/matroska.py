"""The edges of a Matroska picture that its header hides (PixelCropTop and the like).

FFmpeg reads them, but PyAV does not hand them on. Source: RFC 8794 (EBML), RFC 9559 (Matroska).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from av.container import InputContainer
from av.video.stream import VideoStream

SEGMENT, TRACKS, TRACK, VIDEO = b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
TRACK_TYPE, IS_VIDEO = b"\x83", 1
EDGES = (b"\x54\xbb", b"\x54\xaa", b"\x54\xcc", b"\x54\xdd")  # top, bottom, left, right
HEADER_BYTES = 1 << 20
"""How far into the file the tracks are looked for; writers put them before the first cluster."""

Edges = tuple[int, int, int, int]
NONE: Edges = (0, 0, 0, 0)


def hidden_edges(path: Path, container: InputContainer, stream: VideoStream) -> Edges:
    """Pixels that the container hides of `stream`: top, bottom, left, right; zeros where the format knows none."""
    if "matroska" not in container.format.name.split(","):
        return NONE
    with path.open("rb") as file:
        data = file.read(HEADER_BYTES)
    position = [one.index for one in container.streams.video].index(stream.index)
    tracks = [
        track
        for segment in _children(data, SEGMENT)
        for block in _children(segment, TRACKS)
        for track in _children(block, TRACK)
        if any(_number(kind) == IS_VIDEO for kind in _children(track, TRACK_TYPE))
    ]
    if position >= len(tracks):
        return NONE
    video = next(_children(tracks[position], VIDEO), b"")
    top, bottom, left, right = (_number(next(_children(video, edge), b"")) for edge in EDGES)
    return top, bottom, left, right


def _children(data: bytes, wanted: bytes) -> Iterator[bytes]:
    """The contents of the elements `wanted` among those in `data`. One that is cut off is given as far as it goes."""
    at = 0
    while at < len(data):
        id_length = _length(data[at], 4)
        identity = data[at : at + id_length]
        at += id_length
        if not id_length or at >= len(data):
            return
        size_length = _length(data[at], 8)
        if not size_length:
            return
        size = _number(data[at : at + size_length]) & ((1 << 7 * size_length) - 1)
        at += size_length
        if size == (1 << 7 * size_length) - 1:  # unknown: to the end
            size = len(data) - at
        if identity == wanted:
            yield data[at : at + size]
        at += size


def _length(first: int, longest: int) -> int:
    """Bytes of a variable-length number by its first byte; 0 for none that may be."""
    length = 9 - first.bit_length()
    return length if length <= longest else 0


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
