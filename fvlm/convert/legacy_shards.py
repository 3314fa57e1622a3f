"""Reading what the earlier trainer trained on: `.pt` shards, and folders of loose `.pt` samples.

    shard_0000.pt   {"samples": [sample, ...], "count": n}
    anything.pt     one sample, in a folder without shards
    a sample        {"frames": uint8 [T, 3, S, S] RGB, "latents": bfloat16 or float16 [T, C, h, w], "caption": str, ...}

Files are memory-mapped, opened for reading only, and unpickled as plain data: code in them is refused, not run. What
cannot be used is a `Reject` that says where it was and why; it never stops the rest.

Clips are named by their place: `shard_0017/42` is sample 42 of shard_0017.pt, and a loose sample has its file's name.
That is unique and the same in every run by construction; a `video_id` need be neither, and to find out would take a
look at every sample first. It is kept, like every other field that JSON can hold, under `fields` of the clip's source.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fvlm.data.parts import Reject
from fvlm.data.schema import LatentDtype
from fvlm.errors import StoreUnavailable, UserError
from fvlm.files import is_away

LOOSE_FILES_A_PART = 128
MAPPED_SAMPLES = 16
"""A shard is opened anew after so many samples. Closing the old mapping is what lets go of the pages read through it;
an opening costs 40 ms for 200 samples."""
PROBED_SAMPLES = 256
NEEDED = ("frames", "latents", "caption")
LATENT_DTYPES: dict[torch.dtype, LatentDtype] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

_SCALAR = np.float64().__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),  # as numpy 1 called it
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdU"},
]
"""What a number such as np.float32(2.5) in a sample is pickled with; harmless, but not on torch's own list."""


@dataclass(frozen=True)
class Layout:
    """What all samples of a source have in common. A sample with another layout is damaged."""

    num_frames: int
    frame_size: int
    latent_dtype: LatentDtype
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Sample:
    """One good sample. The tensors lie in the mapped file: nothing is read before it is looked at.

    frames:  [T, 3, S, S] uint8
    latents: [T, C, h, w], half precision
    source:  file, index, the other fields, and the names of those that JSON cannot hold
    """

    clip_id: str
    caption: str
    frames: torch.Tensor
    latents: torch.Tensor
    source: dict[str, Any]


class Damaged(Exception):
    """This file or sample cannot be used. `reason` is one of few, to be counted; `detail` is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Opened(NamedTuple):
    samples: Sequence[Any]
    claimed: int
    """What the file says that it holds."""
    is_shard: bool


def find_parts(src: Path) -> list[list[Path]]:
    """The files of `src` in sorted order, dealt to parts: every shard is one, loose samples are taken in slices.

    Raises UserError when there is nothing to convert.
    """
    if not src.is_dir():
        raise UserError(f"--src {src}: no such folder.")
    shards = sorted(src.glob("shard_*.pt"))
    if shards:
        return [[path] for path in shards]
    loose = sorted(src.glob("*.pt"))
    if not loose:
        raise UserError(f"--src {src}: neither shards (shard_*.pt) nor loose samples (*.pt) are in that folder.")
    return [loose[start : start + LOOSE_FILES_A_PART] for start in range(0, len(loose), LOOSE_FILES_A_PART)]


def read_samples(path: Path, layout: Layout) -> Iterator[Sample | Reject]:
    """Every sample of a file, in order. Let go of each before the next, or the file's pages stay in memory.

    Raises UserError when the file is gone or may not be read.
    """
    try:
        opened = open_file(path)
        has = len(opened.samples)
        if not has:
            raise Damaged("no samples", "the shard is empty")
        for index in range(has):
            if index and index % MAPPED_SAMPLES == 0:
                opened = open_file(path)
            yield _read(path, opened, index, layout)
        if opened.claimed != has:
            raise Damaged("count differs", f"it says that it holds {opened.claimed} samples, but there are {has}")
    except Damaged as damage:
        yield Reject(None, path.stem, damage.reason, f"{path.name}: {damage.detail}")


def open_file(path: Path) -> Opened:
    """Map a file and unpickle its frame of plain data. Raises Damaged; UserError when it may not be read."""
    try:
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            contents = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # The message of torch goes on to explain how to load the file all the same, which is the wrong advice.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise Damaged("unsafe pickle", f"refused: it asks for {asked[1]}, which is not plain data") from error
        raise Damaged("unreadable file", "its pickle is damaged") from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch looked for the end of an archive before the start of the file
            raise Damaged("unreadable file", "it is cut short") from error
        if is_away(error, path):
            raise StoreUnavailable(f"{path}: the disk does not answer ({error.strerror}). Check the mount.") from error
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Mend that and run the same command again."
        ) from error
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError) as error:
        # Whatever torch's reader stumbles over in a file that is cut short, overwritten, or of another kind.
        raise Damaged(
            "unreadable file", f"{type(error).__name__} {str(error).split('. ')[0]}".splitlines()[0]
        ) from error
    if not isinstance(contents, dict):
        raise Damaged("not a shard", f"it holds a {type(contents).__name__}, not a dict")
    samples = contents.get("samples")
    if isinstance(samples, list | tuple):
        count = contents.get("count")
        return Opened(samples, count if isinstance(count, int) else len(samples), is_shard=True)
    if contents.keys().isdisjoint(NEEDED):
        raise Damaged("not a shard", f"it has neither `samples` nor any of {', '.join(NEEDED)}")
    return Opened([contents], 1, is_shard=False)


def _read(path: Path, opened: Opened, index: int, layout: Layout) -> Sample | Reject:
    raw = opened.samples[index]
    clip_id = f"{path.stem}/{index}" if opened.is_shard else path.stem
    try:
        found = layout_of(raw)
        if found != layout:
            wrong = ", ".join(
                f"{name} {value}, the others {getattr(layout, name)}"
                for name, value in vars(found).items()
                if value != getattr(layout, name)
            )
            raise Damaged("other layout", wrong)
        return _sample(raw, clip_id, path.name, index)
    except Damaged as damage:
        return Reject(index, clip_id, damage.reason, f"{path.name}, sample {index}: {damage.detail}")


def layout_of(raw: Any) -> Layout:
    """The layout of a sample as it was unpickled; looks at no pixel. Raises Damaged."""
    if not isinstance(raw, dict):
        raise Damaged("not a sample", f"it is a {type(raw).__name__}, not a dict")
    for key in NEEDED:
        if key not in raw:
            raise Damaged(f"lacks {key}", f"its keys are {', '.join(sorted(map(str, raw)))}")
    frames, latents = raw["frames"], raw["latents"]
    for key, tensor in (("frames", frames), ("latents", latents)):
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise Damaged(f"wrong {key}", f"{key} is a {type(tensor).__name__}, not a dense tensor")
    if frames.dtype is not torch.uint8:
        raise Damaged("wrong frames", f"frames are {frames.dtype}, not torch.uint8")
    if latents.dtype not in LATENT_DTYPES:
        raise Damaged("wrong latents", f"latents are {latents.dtype}; bfloat16 and float16 can be kept bit for bit")
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] != frames.shape[3] or not frames.numel():
        raise Damaged("wrong frames", f"frames are {list(frames.shape)}, not [T, 3, S, S]")
    if latents.ndim != 4 or len(latents) != len(frames) or not latents.numel():
        raise Damaged("wrong latents", f"latents are {list(latents.shape)}, not [T, C, h, w] with T = {len(frames)}")
    _, channels, height, width = latents.shape
    return Layout(len(frames), frames.shape[2], LATENT_DTYPES[latents.dtype], (channels, height, width))


def _sample(raw: dict[Any, Any], clip_id: str, file: str, index: int) -> Sample:
    caption = raw["caption"]
    if not isinstance(caption, str):
        raise Damaged("wrong caption", f"caption is a {type(caption).__name__}, not a str")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise Damaged("wrong caption", f"caption is no valid Unicode ({error.reason})") from error
    if not torch.isfinite(raw["latents"]).all():
        raise Damaged("wrong latents", "latents hold NaN or infinity")
    fields, left_out = {}, []
    for key, value in raw.items():
        if key in NEEDED:
            continue
        plain = value.item() if isinstance(value, np.generic) else value
        try:
            json.dumps(plain, allow_nan=False)
            fields[str(key)] = plain
        except (TypeError, ValueError):
            left_out.append(str(key))
    source: dict[str, Any] = {"file": file, "index": index, "fields": fields}
    if left_out:
        source["left_out"] = sorted(left_out)
    return Sample(clip_id, caption, raw["frames"].detach(), raw["latents"].detach(), source)


def find_layout(files: Sequence[Path]) -> Layout:
    """The layout of most of the first PROBED_SAMPLES samples: one odd sample in front decides nothing.

    Raises UserError, with the reasons, when none of them is usable.
    """
    layouts: Counter[Layout] = Counter()
    damage: Counter[str] = Counter()
    first = ""
    for path in files:
        try:
            samples = open_file(path).samples
        except Damaged as error:
            samples = []
            damage[error.reason] += 1
            first = first or f"{path.name}: {error.detail}"
        for index, raw in enumerate(samples):
            try:
                layouts[layout_of(raw)] += 1
            except Damaged as error:
                damage[error.reason] += 1
                first = first or f"{path.name}, sample {index}: {error.detail}"
        if layouts.total() + damage.total() >= PROBED_SAMPLES:
            break
    if not layouts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in damage.most_common()) or "no samples in it"
        raise UserError(f"--src {files[0].parent}: no usable sample: {reasons} (the first: {first or files[0].name}).")
    return layouts.most_common(1)[0][0]
