"""A safetensors file out of tensors where they lie: for a disk, a network and a hash alike, never all of it in memory.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, the header as JSON, the tensors'
bytes without gaps. Its own writer holds the interpreter while it writes and says nothing of what it wrote; a writer in
the background must not hold up training, and a checkpoint needs the hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping

import torch

PIECE = 8 << 20
"""Bytes that are handed over at a time, at most."""
_SMALL = 1 << 16
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class TensorFile:
    """The file that holds `tensors`, which lie on the CPU and stay as they are while it is used.

    progress: called before each piece
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], progress: Callable[[], None] = lambda: None):
        self._progress = progress
        # Wide types first, so that every tensor begins where its type may.
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        self._tensors = [tensors[name].detach() for name in names]
        entries, end = {}, 0
        for name, tensor in zip(names, self._tensors, strict=True):
            begin, end = end, end + tensor.numel() * tensor.element_size()
            shape = list(tensor.shape)
            entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self.size = len(self._header) + end
        """Bytes."""

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The file's bytes, in order; views of the tensors where these are large."""
        for piece in self._pieces():
            self._progress()
            yield piece

    def _pieces(self) -> Iterator[bytes | memoryview]:
        small = bytearray(self._header)
        for tensor in self._tensors:
            content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            if len(content) < _SMALL:
                small += content
            if small and (len(content) >= _SMALL or len(small) >= PIECE):
                yield bytes(small)
                small.clear()
            if len(content) >= _SMALL:
                for begin in range(0, len(content), PIECE):
                    yield content[begin : begin + PIECE]
        if small:
            yield bytes(small)

    def sha256(self) -> str:
        """Of what ought to be on the disk, not of what a disk says it has."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()
