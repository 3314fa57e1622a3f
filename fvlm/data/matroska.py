"""What a Matroska header says and PyAV does not hand on: the file's length, and the edges of the picture to be hidden.

Source: RFC 8794 (EBML), RFC 9559 (Matroska).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from av.container import InputContainer
from av.video.stream import VideoStream

EBML, SEGMENT, TRACKS, TRACK, VIDEO = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x16\x54\xae\x6b", b"\xae", b"\xe0"
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


def stated_bytes(head: bytes) -> int:
    """Length of the file whose first bytes these are; 0 where it is another format, or its header does not say."""
    if not head.startswith(EBML):
        return 0
    for identity, start, size in _elements(head):
        if identity == SEGMENT:
            return start + size if size is not None else 0
    return 0


def _children(data: bytes, wanted: bytes) -> Iterator[bytes]:
    """The contents of the elements `wanted` among those in `data`. One that is cut off is given as far as it goes."""
    for identity, start, size in _elements(data):
        if identity == wanted:
            yield data[start : None if size is None else start + size]


def _elements(data: bytes) -> Iterator[tuple[bytes, int, int | None]]:
    """Of each element in `data`: its id, where its content begins, and how long it is (None: to the end)."""
    at = 0
    while at < len(data):
        identity_end = at + _length(data[at], 4)
        if identity_end == at or identity_end >= len(data):
            return
        start = identity_end + _length(data[identity_end], 8)
        if start == identity_end:
            return
        bits = 7 * (start - identity_end)
        size = _number(data[identity_end:start]) & ((1 << bits) - 1)
        known = size != (1 << bits) - 1
        yield data[at:identity_end], start, size if known else None
        at = start + size if known else len(data)


def _length(first: int, longest: int) -> int:
    """Bytes of a variable-length number by its first byte; 0 for none that may be."""
    length = 9 - first.bit_length()
    return length if length <= longest else 0


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
