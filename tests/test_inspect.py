"""The look at a dataset, `python -m fvlm.data.shards`: what it says, what it notices, what it draws."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import make_clip, make_spec, write_dataset
from PIL import Image

from fvlm.data.describe import draw_sheet, sample_clips
from fvlm.data.schema import Manifest, ShardFile
from fvlm.data.shards import read_manifest, write_manifest

WITHOUT_RAY = "import runpy, sys; sys.modules['ray'] = None; runpy.run_module('fvlm.data.shards', run_name='__main__')"


def look(folder: Path, *flags: str, ray: bool = True) -> subprocess.CompletedProcess[str]:
    how = ["-m", "fvlm.data.shards"] if ray else ["-c", WITHOUT_RAY]
    return subprocess.run(
        [sys.executable, *how, str(folder), *flags], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Manifest:
    """22 clips in 3 shards of 8, 7 and 7, in row groups of 4."""
    return write_dataset(tmp_path / "dataset", clips=22)


def flip(path: Path, needle: bytes) -> None:
    """Change one bit in the middle of `needle`, whose place in the file is unique."""
    content = bytearray(path.read_bytes())
    assert content.count(needle) == 1
    content[content.index(needle) + len(needle) // 2] ^= 1
    path.write_bytes(content)


def test_it_says_what_is_inside_and_needs_no_ray(dataset: Manifest) -> None:
    done = look(Path(dataset.root), "--verify", ray=False)
    assert done.returncode == 0, done.stderr
    captions = [make_clip(index, dataset.spec).caption for index in range(22)]
    characters, words = [len(text) for text in captions], [text.count(" ") + 1 for text in captions]
    shards = sorted(Path(dataset.root).glob("shard-*"))
    size = sum(path.stat().st_size for path in shards)
    spread = [f"{min(lengths)} / {np.median(lengths):g} / {max(lengths)}" for lengths in (characters, words)]
    wanted = {
        "clips": "22",
        "stored frames T": "8",
        "frame size": "56 px (as-is)",
        "frame codec": f"jpeg, quality {dataset.spec.jpeg_quality}, {dataset.spec.jpeg_subsampling}",
        "latents": "test-noise, float16 [4, 7, 7]",
        "bytes": f"{size:,}",
        "bytes a clip": f"{size / 22:,.0f}",
        "shards": "3",
        "row groups": f"{sum(pq.ParquetFile(path).num_row_groups for path in shards)}, of at most 4 clips",
        "caption length": f"{spread[0]} characters, {spread[1]} words (least / median / most)",
        "rejected": "0",
        "fingerprint": dataset.fingerprint,
    }
    for name, value in wanted.items():
        assert f"{name:<18}{value}\n" in done.stdout
    assert "every file has the size and the SHA-256" in done.stdout


def test_what_was_rejected_is_counted_by_reason(dataset: Manifest) -> None:
    root = Path(dataset.root)
    files = [pq.read_table(root / "files.parquet").to_pylist()[0]]
    write_manifest(root, dataset.spec, [ShardFile(**file) for file in files], rejected=3)
    (root / "rejects.jsonl").write_text('{"reason": "damaged"}\n{"reason": "missing"}\n{"reason": "damaged"}\n')
    done = look(root)
    assert "rejected          3\n  damaged         2\n  missing         1\n" in done.stdout


def test_verify_names_every_damaged_file_and_only_verify_reads_the_frames(dataset: Manifest) -> None:
    root = Path(dataset.root)
    last_frame = make_clip(0, dataset.spec).frames[-1]
    flip(root / "shard-00000.parquet", last_frame)
    assert look(root).returncode == 0  # captions alone are read: the frames are not missed
    with (root / "shard-00002.parquet").open("ab") as file:
        file.write(b"more")
    done = look(root, "--verify")
    assert done.returncode == 2
    first, *lines = done.stderr.splitlines()
    assert first == "error: 2 of 3 shards are damaged:"
    assert len(lines) == 2 and "shard-00000.parquet: row group 0 cannot be read" in lines[0]
    assert "shard-00002.parquet" in lines[1]
    (root / "shard-00001.parquet").unlink()
    assert "3 of 3 shards" in look(root, "--verify").stderr


def test_verify_notices_a_whole_shard_in_the_place_of_another(dataset: Manifest) -> None:
    """Its pages are sound and its size may be right; its SHA-256 is not."""
    root = Path(dataset.root)
    other = write_dataset(root.parent / "other", clips=22, seed=1)
    content = (Path(other.root) / "shard-00001.parquet").read_bytes()
    (root / "shard-00001.parquet").write_bytes(content)
    files = pq.read_table(root / "files.parquet").to_pylist()
    files[1]["bytes"] = len(content)
    write_manifest(root, dataset.spec, [ShardFile(**file) for file in files], rejected=0)
    done = look(root, "--verify")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [f"{root}/shard-00001.parquet: its SHA-256 is not that of the manifest"]


def test_the_sheet_shows_clips_evenly_spread_as_they_are_stored(dataset: Manifest) -> None:
    clips = sample_clips(dataset, 4)
    assert [clip["clip_id"] for clip in clips] == [f"clip-{index:05d}" for index in (0, 7, 14, 21)]
    for clip, index in zip(clips, (0, 7, 14, 21), strict=True):
        stored = make_clip(index, dataset.spec)
        assert clip["caption"] == stored.caption
        for shown, frame in zip(clip["frames"], stored.frames, strict=True):
            image = np.asarray(Image.open(io.BytesIO(frame)), np.int16)
            assert np.abs(shown - image).max() <= 2  # two decoders
    assert len(sample_clips(dataset, 100)) == 22


def test_the_sheet_is_a_picture_that_grows_with_the_clips(dataset: Manifest, tmp_path: Path) -> None:
    sizes = []
    for count in (1, 3):
        png = tmp_path / f"{count}.png"
        assert look(Path(dataset.root), "--sample", str(count), "--png", str(png)).returncode == 0
        with Image.open(png) as image:
            sizes.append(image.size)
            assert np.asarray(image.convert("RGB")).std() > 20  # not blank
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] == 3 * sizes[0][1]


def test_bad_requests_are_named(dataset: Manifest, tmp_path: Path) -> None:
    for folder, flags, message in (
        (tmp_path, (), "not a dataset"),
        (dataset.root, ("--sample", "3"), "--sample N and --png FILE go together"),
        (dataset.root, ("--sample", "1", "--png", str(tmp_path / "absent" / "a.png")), "its folder does not exist"),
    ):
        done = look(Path(folder), *flags)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_caption_with_dollars_is_text_and_no_formula(tmp_path: Path) -> None:
    frames = np.zeros((8, 56, 56, 3), np.uint8)
    draw_sheet([{"clip_id": "a", "caption": r"costs $5 \frac{ and $6", "frames": frames}], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_an_empty_dataset_can_be_looked_at(tmp_path: Path) -> None:
    write_manifest(tmp_path, make_spec(), [], rejected=0)
    done = look(tmp_path, "--verify")
    assert done.returncode == 0 and "caption length    none characters" in done.stdout, done.stderr
    assert read_manifest(tmp_path).num_clips == 0
    drawn = look(tmp_path, "--sample", "1", "--png", str(tmp_path / "a.png"))
    assert drawn.returncode == 2 and "no clips to draw" in drawn.stderr
