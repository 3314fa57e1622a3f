"""The clips that all loaders read: noise with the spectrum of photographs, moving, as JPEG files of about 18 kB."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from touch import touch

from fvlm.data.decode import decode_frame, encode_frame
from fvlm.data.latents import to_bits
from fvlm.data.schema import MANIFEST, DatasetSpec, EncodedClip, ShardFile
from fvlm.data.shards import ShardWriter, write_manifest
from fvlm.data.text import save_tokenizer, train_tokenizer

FRAMES, SIZE, MARGIN = 8, 256, 64
SLOPE = 1.55
"""Amplitude falls with 1 / frequency ** SLOPE; photographs have 1 to 2."""
FRAME_BYTES = 18_000
CLIPS_A_SHARD = 128
PROBED_CLIPS = 8
NOUNS = ["a red ball", "the green car", "one small dog", "some large tree", "two people", "an old house"]
VERBS = ["moves", "turns", "falls", "jumps over", "hides under", "stands behind", "comes near", "slowly leaves"]


def spec_of(quality: int) -> DatasetSpec:
    return DatasetSpec(
        FRAMES, SIZE, "jpeg", "as-is", "normal-noise", "float16", (4, SIZE // 8, SIZE // 8), jpeg_quality=quality
    )


def frames_of(number: int) -> np.ndarray:
    """[T, S, S, 3] uint8: a view that drifts over one picture. Channels are alike, as those of photographs are."""
    random = np.random.default_rng((1, number))
    side = SIZE + MARGIN
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf  # no constant part
    white = random.standard_normal((4, *frequency.shape)) + 1j * random.standard_normal((4, *frequency.shape))
    noise = np.fft.irfft2(white / frequency**SLOPE, (side, side))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    picture = np.clip(128 + 52 * (0.9 * noise[0, ..., None] + 0.35 * np.moveaxis(noise[1:], 0, -1)), 0, 255)
    start, stop = random.integers(0, MARGIN + 1, (2, 2))
    corners = np.linspace(start, stop, FRAMES).astype(int)
    return np.stack([picture[y : y + SIZE, x : x + SIZE] for y, x in corners]).astype(np.uint8)


def quality_for(frame_bytes: int) -> int:
    """The JPEG quality whose files come nearest to `frame_bytes` on the mean."""
    probes = np.concatenate([frames_of(number) for number in range(PROBED_CLIPS)])

    def miss(quality: int) -> float:
        return float(np.mean([len(encode_frame(frame, spec_of(quality))) for frame in probes])) - frame_bytes

    low, high = 40, 98
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if miss(middle) < 0 else (low, middle)
    return min(low, high, key=lambda quality: abs(miss(quality)))


def make_clip(number: int, spec: DatasetSpec) -> tuple[EncodedClip, int]:
    """A clip, and what `touch` finds in its decoded frames."""
    random = np.random.default_rng((2, number))
    frames = [encode_frame(frame, spec) for frame in frames_of(number)]
    latents = to_bits(random.standard_normal((FRAMES, spec.latent_bytes // 2), np.float32), spec.latent_dtype)
    caption = " ".join(f"{random.choice(NOUNS)} {random.choice(VERBS)}" for _ in range(random.integers(2, 10)))
    decoded = np.empty((1, FRAMES, SIZE, SIZE, 3), np.uint8)
    for file, out in zip(frames, decoded[0], strict=True):
        decode_frame(file, out, spec)
    return EncodedClip(f"clip-{number:06d}", caption, frames, latents, {}), touch(decoded)[0]


def write_shard(folder: Path, clips: int, spec: DatasetSpec, shard: int) -> tuple[ShardFile, dict[str, int], list[str]]:
    touched, captions = {}, []
    with ShardWriter(folder / f"shard-{shard:05d}.parquet", spec) as writer:
        for number in range(shard * CLIPS_A_SHARD, min((shard + 1) * CLIPS_A_SHARD, clips)):
            clip, touched[clip.clip_id] = make_clip(number, spec)
            captions.append(clip.caption)
            writer.add(clip)
    assert writer.file is not None
    return writer.file, touched, captions


def make_clips(folder: Path, clips: int) -> None:
    """folder/parquet: a dataset of ours. Beside it a tokenizer, and touch.json: what `touch` must find in each clip."""
    parquet = folder / "parquet"
    if (parquet / MANIFEST).exists():
        return
    parquet.mkdir(parents=True, exist_ok=True)
    spec = spec_of(quality_for(FRAME_BYTES))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(partial(write_shard, parquet, clips, spec), range(-(-clips // CLIPS_A_SHARD))))
    files = [file for file, _, _ in done]
    (folder / "touch.json").write_text(json.dumps({key: value for _, sums, _ in done for key, value in sums.items()}))
    save_tokenizer(train_tokenizer((text for _, _, texts in done for text in texts), 400), folder / "tokenizer")
    write_manifest(parquet, spec, files, rejected=0)  # last: a folder with a manifest is whole
