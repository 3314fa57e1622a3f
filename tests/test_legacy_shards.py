"""Reading the earlier trainer's files and comparing with them: one process, no cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from legacy_shards import LAYOUT, assert_same, make_sample, rows_of, spec, write_shard, write_source

from fvlm.convert.legacy_parts import Conversion
from fvlm.convert.legacy_shards import Layout, find_layout, find_parts, read_samples
from fvlm.data.parts import Reject
from fvlm.data.schema import EncodedClip
from fvlm.data.shards import ShardWriter
from fvlm.errors import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "src")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_happens_to_a_file_it_is_damage_and_no_crash(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.pt", [make_sample(0, size=8, latent=1)]).read_bytes()
    path, draw = tmp_path / "shard_0000.pt", np.random.default_rng(0)
    layout = Layout(24, 8, "bfloat16", (4, 1, 1))
    for cut in draw.integers(0, len(whole), 60):
        path.write_bytes(whole[:cut])
        (reject,) = read_samples(path, layout)
        assert isinstance(reject, Reject) and reject.reason == "unreadable file"
    pickled = whole.index(b"samples")
    for place in [*draw.integers(0, len(whole), 100), *(pickled + draw.integers(-60, 500, 300))]:
        damaged = bytearray(whole)
        damaged[place] = draw.integers(256)
        path.write_bytes(damaged)
        list(read_samples(path, layout))


def test_the_foreseen_size_is_near_the_real_one(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"shard_{number}.pt", [make_sample(8 * number + i, size=98) for i in range(8)])
    layout, files = Layout(24, 98, "bfloat16", (4, 4, 4)), sorted(tmp_path.iterdir())
    for codec in ("jpeg", "png"):
        for frames in (24, 8):
            conversion = Conversion(layout, spec(layout, frame_codec=codec, num_frames=frames))
            out = tmp_path / f"{codec}-{frames}"
            (out / "_parts").mkdir(parents=True)
            made = [conversion.write(out, index, [file]).file for index, file in enumerate(files)]
            real = sum(file.bytes for file in made if file)
            assert real <= conversion.estimate(files) <= 1.2 * real


def test_float16_latents_keep_their_bits(tmp_path: Path) -> None:
    sample = make_sample(0)
    half = sample | {"latents": torch.arange(24 * 64).reshape(24, 4, 4, 4).to(torch.int16).view(torch.float16)}
    path = write_shard(tmp_path / "shard_0000.pt", [half])
    layout = find_layout([path])
    assert layout == Layout(24, 32, "float16", (4, 4, 4))
    (tmp_path / "_parts").mkdir()
    Conversion(layout, spec(layout)).write(tmp_path, 0, [path])
    (row,) = rows_of(tmp_path)
    assert_same(row, half, np.arange(24))


def test_one_odd_sample_in_front_does_not_decide_the_layout(source: Path) -> None:
    odd = make_sample(9, frames=23)
    write_shard(source / "shard_0000.pt", [odd, make_sample(0), make_sample(1)])
    assert find_layout([part[0] for part in find_parts(source)]) == LAYOUT


def test_verify_names_the_clip_that_is_not_as_it_was(source: Path, tmp_path: Path) -> None:
    conversion, files = Conversion(LAYOUT, spec()), [source / "shard_0000.pt"]
    clips = [conversion.encode(sample) for sample in read_samples(files[0], LAYOUT)]

    def verify(*stored: EncodedClip) -> None:
        with ShardWriter(tmp_path / "shard-00000.parquet", spec()) as writer:
            for clip in stored:
                writer.add(clip)
        conversion.verify(tmp_path, 0, files)

    def changed(**changes: Any) -> EncodedClip:
        return EncodedClip(**vars(clips[1]) | changes)

    verify(*clips)
    latents = clips[1].latents.copy()
    latents[23, -1] ^= 1
    with pytest.raises(UserError, match="clip shard_0000/1: the latent of frame 23"):
        verify(clips[0], changed(latents=latents))
    frames = [*clips[1].frames[:5], clips[1].frames[-1], *clips[1].frames[6:]]
    with pytest.raises(UserError, match="clip shard_0000/1: frame 5 differs"):
        verify(clips[0], changed(frames=frames))
    with pytest.raises(UserError, match="clip shard_0000/1: frame 5 cannot be decoded"):
        verify(clips[0], changed(frames=[*frames[:5], b"no picture", *frames[6:]]))
    for name, value in {"caption": "another", "clip_id": "shard_0000/2", "source": {}}.items():
        with pytest.raises(UserError, match=f"clip shard_0000/1: its {name} is"):
            verify(clips[0], changed(**{name: value}))
    with pytest.raises(UserError, match="clip shard_0000/1 of the source is not in it"):
        verify(clips[0])
    with pytest.raises(UserError, match="clip shard_0000/1 is not in the source"):
        verify(*clips, clips[1])


MEMORY = """
import sys
from pathlib import Path
from fvlm.convert.legacy_shards import Layout, read_samples

def megabytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024

used = []
for sample in read_samples(Path(sys.argv[1]), Layout(24, 256, "bfloat16", (4, 4, 4))):
    sample.frames.sum()
    used.append(megabytes())
print(len(used), used[0], max(used))
"""


def test_a_shard_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    count, megabytes = 64, 24 * 3 * 256**2 / 2**20
    frames = torch.zeros(24, 3, 256, 256, dtype=torch.uint8)
    path = write_shard(tmp_path / "shard_0000.pt", [make_sample(0) | {"frames": frames + i} for i in range(count)])
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    samples, first, most = map(float, done.stdout.split())
    assert samples == count
    assert most - first < 20 * megabytes
