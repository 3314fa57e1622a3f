"""What JPEG quality and subsampling cost: python tests/benchmarks/jpeg.py VIDEOS_FOLDER

For every setting, over frames of real videos as `prepare` stores them: PSNR against the frame before compression (the
median and the worst frame), bytes a frame, and microseconds to decode one on one core, as `fvlm.data.decode` does it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import simplejpeg

from fvlm.data.video import RejectedVideo, read_clip

SIZE = 256
FRAMES_A_CLIP = 16
ROUNDS = 3


def frames_of(folder: Path) -> np.ndarray:
    """[n, S, S, 3] uint8"""
    clips = []
    for path in sorted(folder.iterdir()):
        try:
            clips.append(read_clip(path, FRAMES_A_CLIP, SIZE, "short-side")[0])
        except RejectedVideo:
            continue
    return np.concatenate(clips)


def psnr(frame: np.ndarray, other: np.ndarray) -> float:
    """Decibels over all three channels; identical pictures count as 99."""
    error = np.mean((frame.astype(np.float32) - other) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else 99.0


def measure(frames: np.ndarray, quality: int, subsampling: str) -> tuple[float, float, float, float]:
    """-> median PSNR, worst PSNR, bytes a frame, microseconds to decode one"""
    files = [simplejpeg.encode_jpeg(frame, quality, colorsubsampling=subsampling) for frame in frames]
    out = np.empty_like(frames)
    seconds = []
    for _ in range(ROUNDS):
        started = time.process_time()
        for file, buffer in zip(files, out, strict=True):
            simplejpeg.decode_jpeg(file, colorspace="RGB", buffer=buffer)
        seconds.append(time.process_time() - started)
    values = [psnr(frame, decoded) for frame, decoded in zip(frames, out, strict=True)]
    return (
        float(np.median(values)),
        min(values),
        float(np.mean([len(file) for file in files])),
        min(seconds) / len(frames) * 1e6,
    )


def main() -> None:
    frames = frames_of(Path(sys.argv[1]))
    print(f"{len(frames)} frames of {SIZE} px")
    print("| subsampling | quality | median PSNR dB | worst dB | bytes a frame | decode us |")
    print("|---|---|---|---|---|---|")
    for subsampling in ("444", "422", "420"):
        for quality in range(85, 98):
            median, worst, size, micro = measure(frames, quality, subsampling)
            print(f"| {subsampling} | {quality} | {median:.1f} | {worst:.1f} | {size:,.0f} | {micro:.0f} |", flush=True)


if __name__ == "__main__":
    main()
