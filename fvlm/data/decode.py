"""Images <-> bytes: JPEG through libjpeg-turbo (simplejpeg), PNG through Pillow."""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

from fvlm.data.schema import DatasetSpec


def encode_frame(frame: np.ndarray, spec: DatasetSpec) -> bytes:
    """[H, W, 3] uint8 RGB -> a JPEG or PNG file, as `spec` says."""
    if spec.frame_codec == "png":
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", compress_level=6)
        return buffer.getvalue()
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(frame), quality=spec.jpeg_quality, colorsubsampling=spec.jpeg_subsampling
    )


def decode_frame(data: bytes | memoryview, out: np.ndarray, spec: DatasetSpec) -> None:
    """Decode one image into `out` [H, W, 3] uint8, in place. Raises ValueError: damaged, or of another size."""
    if spec.frame_codec == "png":
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image)
        except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's words for some broken files
            raise ValueError(str(error)) from error
        if pixels.shape != out.shape:
            raise ValueError(f"image is {pixels.shape}, the dataset says {out.shape}")
        out[:] = pixels
        return
    decoded = simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out)  # ValueError: larger than `out`
    if decoded.shape != out.shape:
        raise ValueError(
            f"image is {decoded.shape[0]}x{decoded.shape[1]}, the dataset says {out.shape[0]}x{out.shape[1]}"
        )


def even_steps(available: int, wanted: int) -> np.ndarray:
    """[wanted] indices at even steps from the first to the last of `available` frames, rounded down."""
    return np.linspace(0, available - 1, wanted, dtype=int)
