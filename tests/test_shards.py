"""A shard appears whole or not at all, and a wrong byte in one is an error, never data."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import signal
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import decode_clips

from fvlm.data.decode import encode_frame
from fvlm.data.describe import caption_lengths
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.row_groups import RowGroups
from fvlm.data.schema import (
    DatasetSpec,
    EncodedClip,
    Manifest,
    ShardFile,
    arrow_schema,
    frame_column,
    latent_column,
)
from fvlm.data.shards import ShardWriter, check_shards, read_manifest, write_manifest
from fvlm.data.storage import Storage
from fvlm.errors import Damaged, UserError
from fvlm.files import sha256_file

SPEC = DatasetSpec(
    num_frames=6,
    frame_size=32,
    frame_codec="png",
    resize="short-side",
    latent_codec="block-transform",
    latent_dtype="float16",
    latent_shape=(4, 4, 4),
    rows_per_row_group=4,
)


@pytest.fixture(autouse=True)
def no_shard_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files change under one name here, footers too; a reader that keeps a shard open keeps its footer as well."""
    monkeypatch.setattr("fvlm.data.row_groups.OPEN_SHARDS", 0)


def make_clip(index: int, spec: DatasetSpec = SPEC) -> tuple[EncodedClip, np.ndarray]:
    """A clip of noise, and its frames [T, S, S, 3]."""
    random = np.random.default_rng(index)
    frames = random.integers(0, 256, (spec.num_frames, spec.frame_size, spec.frame_size, 3), dtype=np.uint8)
    latents = random.integers(0, 256, (spec.num_frames, spec.latent_bytes), dtype=np.uint8)
    encoded = [encode_frame(frame, spec) for frame in frames]
    return EncodedClip(f"clip-{index}", f"caption {index}: é", encoded, latents, {"row": index}), frames


def write_dataset(root: Path, spec: DatasetSpec = SPEC, shards: int = 2, clips: int = 10) -> Manifest:
    files = []
    for number in range(shards):
        with ShardWriter(root / f"shard-{number:05d}.parquet", spec) as writer:
            for index in range(clips):
                writer.add(make_clip(number * clips + index, spec)[0])
        assert writer.file
        files.append(writer.file)
    return write_manifest(root, spec, files, rejected=0)


def read_all(root: Path) -> None:
    """Read every row group of every shard, as an epoch of training does."""
    manifest = read_manifest(root)
    for name in manifest.files["name"].to_pylist():
        read_shard(manifest, name)


def read_shard(manifest: Manifest, name: str) -> list[pa.Table]:
    row_groups, columns = RowGroups.of(manifest), arrow_schema(manifest.spec).names
    return [row_groups.read(name, group, columns) for group in range(len(row_groups.rows(name)))]


def test_what_is_read_is_what_was_written_to_the_bit(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    assert manifest.num_clips == 20 and manifest.shard_rows.tolist() == [10, 10]
    for name in manifest.files["name"].to_pylist():
        footer = pq.ParquetFile(tmp_path / name).metadata
        assert [footer.row_group(group).num_rows for group in range(3)] == [4, 4, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "files.parquet", "manifest.json", "shard-00000.parquet", "shard-00001.parquet",
    ]  # fmt: skip
    columns = ["clip_id", "caption", *(column(t) for t in (1, 4) for column in (frame_column, latent_column))]
    table = RowGroups.of(manifest).read("shard-00001.parquet", 2, columns)
    assert table["clip_id"].to_pylist() == ["clip-18", "clip-19"]
    assert table["caption"].to_pylist() == ["caption 18: é", "caption 19: é"]
    decoded = np.empty((2, 2, 32, 32, 3), np.uint8)
    decode_clips([table[frame_column(t)].to_pylist() for t in (1, 4)], decoded, SPEC)
    for row, index in enumerate((18, 19)):
        clip, frames = make_clip(index)
        assert np.array_equal(decoded[row], frames[[1, 4]])
        for t in (1, 4):
            assert table[latent_column(t)][row].as_py() == clip.latents[t].tobytes()


def test_the_same_clips_make_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = write_dataset(tmp_path / "a"), write_dataset(tmp_path / "b")
    assert one.fingerprint == two.fingerprint
    other = dataclasses.replace(SPEC, rows_per_row_group=5)
    (tmp_path / "c").mkdir()
    assert write_dataset(tmp_path / "c", other).fingerprint != one.fingerprint


def test_an_exception_while_writing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path / "shard-00000.parquet", SPEC) as writer:
        for index in range(6):
            writer.add(make_clip(index)[0])
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def _write_then_die(old: Path, new: Path) -> None:
    with ShardWriter(old, SPEC) as first, ShardWriter(new, SPEC) as second:
        for index in range(6):
            first.add(make_clip(index)[0])
            second.add(make_clip(index)[0])
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_killed_in_the_middle_leaves_no_shard_and_keeps_the_old_one(tmp_path: Path) -> None:
    write_dataset(tmp_path, shards=1)
    old, new = tmp_path / "shard-00000.parquet", tmp_path / "shard-00001.parquet"
    before = old.read_bytes()
    process = multiprocessing.get_context("spawn").Process(target=_write_then_die, args=(old, new))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert old.read_bytes() == before and not new.exists()
    assert [path.name[:5] for path in tmp_path.iterdir() if path.name.startswith(".")] == [".tmp-", ".tmp-"]


def test_a_clip_of_another_shape_is_refused(tmp_path: Path) -> None:
    clip, _ = make_clip(0)
    for wrong in (
        dataclasses.replace(clip, frames=clip.frames[:-1]),
        dataclasses.replace(clip, latents=clip.latents[:, :-2]),
        dataclasses.replace(clip, latents=clip.latents.astype(np.float32)),
    ):
        with pytest.raises(ValueError, match="clip-0"), ShardWriter(tmp_path / "s.parquet", SPEC) as writer:
            writer.add(wrong)


def test_a_flipped_byte_anywhere_in_the_data_names_the_file_and_the_row_group(tmp_path: Path) -> None:
    write_dataset(tmp_path, shards=1)
    path = tmp_path / "shard-00000.parquet"
    good = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for column in (0, 1, 3, 8, 9, 14):  # clip_id, caption, first and last frame, first and last latent
            chunk = metadata.row_group(group).column(column)
            bad = bytearray(good)
            bad[chunk.data_page_offset + chunk.total_compressed_size - 5] ^= 1
            path.write_bytes(bad)
            with pytest.raises(UserError, match=f"shard-00000.parquet: row group {group}"):
                read_all(tmp_path)
    path.write_bytes(good)
    read_all(tmp_path)


def test_no_flipped_byte_is_ever_delivered(tmp_path: Path) -> None:
    """At 60 places spread over the whole file, headers and footer included: an error, or the right data."""
    write_dataset(tmp_path, shards=1)
    path = tmp_path / "shard-00000.parquet"
    good = path.read_bytes()
    expected = read_shard(read_manifest(tmp_path), path.name)
    assert [table.num_rows for table in expected] == [4, 4, 2]
    caught = 0
    for place in np.linspace(0, len(good) - 1, 60).astype(int):
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bad)
        try:
            check_shards(read_manifest(tmp_path))
            assert read_shard(read_manifest(tmp_path), path.name) == expected, place
        except UserError as error:
            assert path.name in str(error)
            caught += 1
    assert caught > 50  # the few others fell on bytes that a reader does not look at


@pytest.mark.parametrize("keep", [0, 3, 1000, -1, -8])
def test_a_shard_cut_short_is_found_before_anything_starts(tmp_path: Path, keep: int) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"shard-00001.parquet: .*truncated"):
        check_shards(read_manifest(tmp_path))
    with pytest.raises(Damaged, match=r"shard-00001.parquet: .*truncated or damaged"):
        RowGroups(Storage(str(tmp_path)), SPEC, "").rows(path.name)


def test_a_missing_shard_is_found_before_anything_starts(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "shard-00000.parquet").unlink()
    with pytest.raises(UserError, match=r"shard-00000.parquet: .*not there"):
        check_shards(read_manifest(tmp_path))
    with pytest.raises(UserError, match=r"shard-00000.parquet: .*not there"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_frames": 5},
        {"frame_size": 40},
        {"frame_codec": "jpeg"},
        {"latent_dtype": "bfloat16"},
        {"latent_shape": (4, 2, 8)},
        {"resize": "stretch"},
    ],
)
def test_a_shard_of_another_dataset_is_refused_with_the_difference(tmp_path: Path, change: dict[str, object]) -> None:
    write_dataset(tmp_path)
    other = dataclasses.replace(SPEC, **change)  # type: ignore[arg-type]
    manifest = dataclasses.replace(read_manifest(tmp_path), spec=other)
    with pytest.raises(UserError, match=rf"shard-00000.parquet: .*{next(iter(change))}"):
        check_shards(manifest)


def regroup(path: Path, sizes: list[int]) -> ShardFile:
    """Write the shard's clips again in row groups of these sizes -> its new line of the list of files."""
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema, compression="none", write_page_checksum=True) as writer:
        for size, end in zip(sizes, np.cumsum(sizes).tolist(), strict=True):
            writer.write_table(table.slice(end - size, size), row_group_size=size)
    return ShardFile(path.name, sum(sizes), path.stat().st_size, sha256_file(path))


def read_with_plan(manifest: Manifest) -> None:
    """One epoch of training's reads."""
    plan = Plan(manifest.shard_rows, manifest.spec.rows_per_row_group, 0, 2, 1, 100, manifest.fingerprint)
    list(BlockReader(ClipReader(manifest, plan, 2)).steps(0, plan.steps_per_epoch))


@pytest.mark.parametrize("sizes, had", [([4, 2, 4], "2, 4"), ([5, 5], "5"), ([10], "10"), ([2, 4, 4], "2, 4")])
def test_row_groups_other_than_the_plan_takes_them_for_are_refused(tmp_path: Path, sizes: list[int], had: str) -> None:
    """The plan computes where a clip lies. Were a group in the middle short, it would read other clips, or none."""
    files = [ShardFile(**file) for file in write_dataset(tmp_path).files.to_pylist()]
    path = tmp_path / "shard-00001.parquet"
    manifest = write_manifest(tmp_path, SPEC, [files[0], regroup(path, sizes)], rejected=0)
    wanted = rf"shard-00001.parquet: its row groups have {had} rows, .* must have 4 \(.*\. Restore"
    for look in (check_shards, read_with_plan):
        with pytest.raises(UserError, match=wanted):
            look(manifest)
    read_with_plan(write_manifest(tmp_path, SPEC, [files[0], regroup(path, [4, 4, 2])], rejected=0))


@pytest.mark.parametrize("rows", [9, 11, 8])
def test_other_rows_than_the_manifest_says_are_refused(tmp_path: Path, rows: int) -> None:
    files = [ShardFile(**file) for file in write_dataset(tmp_path).files.to_pylist()]
    wrong = dataclasses.replace(files[1], rows=rows)
    manifest = write_manifest(tmp_path, SPEC, [files[0], wrong], rejected=0)
    for look in (check_shards, read_with_plan, caption_lengths):
        with pytest.raises(UserError, match=rf"shard-00001.parquet: 10 rows, but the manifest says {rows}\. Restore"):
            look(manifest)


def test_a_start_opens_a_few_shards_evenly_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_dataset(tmp_path, shards=9, clips=1)
    opened = []
    monkeypatch.setattr("fvlm.data.shards.FOOTERS_CHECKED_AT_START", 3)
    monkeypatch.setattr(RowGroups, "rows", lambda _, name, rows: opened.append((name, rows)))
    assert check_shards(manifest) == []
    assert opened == [(f"shard-{number:05d}.parquet", 1) for number in (0, 4, 8)]


def test_damage_at_the_start_of_a_run_that_goes_round_it_is_told_but_a_foreign_shard_is_an_error(
    tmp_path: Path,
) -> None:
    files = [ShardFile(**file) for file in write_dataset(tmp_path, shards=4).files.to_pylist()]
    (tmp_path / "shard-00000.parquet").unlink()
    cut, bad = tmp_path / "shard-00001.parquet", tmp_path / "shard-00003.parquet"
    cut.write_bytes(cut.read_bytes()[:-9])
    bad.write_bytes(bad.read_bytes()[:-4] + b"nope")  # of the right size
    told = check_shards(read_manifest(tmp_path), damage_is_error=False)
    assert [line.split(": ")[0] for line in told] == [str(tmp_path / files[index].name) for index in (0, 1, 3)]
    assert [word in line for word, line in zip(("not there", "truncated", "damaged"), told, strict=True)] == [True] * 3
    with pytest.raises(Damaged, match=r"shard-00000.parquet: .*not there"):
        check_shards(read_manifest(tmp_path))
    foreign = dataclasses.replace(files[2], rows=files[2].rows + 1)
    manifest = write_manifest(tmp_path, SPEC, [*files[:2], foreign, files[3]], rejected=0)
    with pytest.raises(Damaged, match=r"shard-00002.parquet: 10 rows, but the manifest says 11"):
        check_shards(manifest, damage_is_error=False)


def test_a_list_of_files_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    table = pq.read_table(tmp_path / "files.parquet")
    pq.write_table(table.append_column("row_groups", pa.array([[4, 4, 2]] * 2)), tmp_path / "files.parquet")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["files_sha256"] = sha256_file(tmp_path / "files.parquet")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"files.parquet: its columns are .*row_groups.*Prepare"):
        read_manifest(tmp_path)


def test_another_format_version_is_refused_by_its_number(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(UserError, match=r"manifest.json: format_version is 2; this release reads version 1"):
        read_manifest(tmp_path)


def test_a_damaged_manifest_or_file_list_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with pytest.raises(UserError, match="not a dataset"):
        read_manifest(tmp_path / "absent")
    with pytest.raises(UserError, match="not a dataset"):
        read_manifest(tmp_path / "shard-00000.parquet")  # no folder
    files = tmp_path / "files.parquet"
    content = bytearray(files.read_bytes())
    content[len(content) // 2] ^= 1
    files.write_bytes(content)
    with pytest.raises(UserError, match=r"files.parquet: its SHA-256"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        read_manifest(tmp_path)


class CountingFile(io.FileIO):
    """Counts the bytes that are read through it."""

    counted = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.counted += len(data)
        return data


def test_reading_8_of_24_frames_reads_a_third_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SPEC, num_frames=24, rows_per_row_group=8)
    monkeypatch.setattr("fvlm.data.row_groups.OPEN_SHARDS", 1)
    manifest = write_dataset(tmp_path, spec, shards=1, clips=16)
    path = tmp_path / "shard-00000.parquet"
    counted = {}
    for wanted in (8, 24):
        frames = np.linspace(0, 23, wanted, dtype=int).tolist()
        columns = ["clip_id", "caption", *map(frame_column, frames), *map(latent_column, frames)]
        with CountingFile(str(path)) as file:
            monkeypatch.setattr("fvlm.data.storage._open_file", lambda _, file=file: pa.PythonFile(file))
            monkeypatch.setattr("fvlm.data.row_groups._OPEN", OrderedDict())  # opened anew, through the file above
            row_groups = RowGroups.of(manifest)
            groups = len(row_groups.rows(path.name))
            opening, file.counted = file.counted, 0
            for group in range(groups):
                row_groups.read(path.name, group, columns)
            counted[wanted] = file.counted
        assert 0 < opening < 65536 + 1024  # the footer
    assert counted[24] == pytest.approx(path.stat().st_size, rel=0.1)
    assert counted[8] / counted[24] == pytest.approx(1 / 3, abs=0.02)
