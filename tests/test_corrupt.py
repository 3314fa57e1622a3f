"""Damaged data: real Parquet files, really damaged; no wrong byte is ever delivered, and nothing goes unsaid."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import make_clip, make_spec, write_dataset

from fvlm.data.corrupt import CORRUPT, CorruptClip, CorruptList, Place, known_corrupt, neighbours
from fvlm.data.decode import decode_frame
from fvlm.data.memory import IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader, RawBatch
from fvlm.data.row_groups import RowGroups
from fvlm.data.schema import DatasetSpec
from fvlm.data.shards import ShardWriter, read_manifest, write_manifest
from fvlm.data.storage import Storage
from fvlm.errors import Damaged, UserError
from ray_jobs.cluster import connect
from ray_jobs.ingest import Share, rank_batches

CLIPS, SHARDS, ROWS, GLOBAL_BATCH = 24, 3, 4, 4
STOP = 12
"""Two epochs."""
BAD = "shard-00001.parquet"


class Clip(NamedTuple):
    """What arrived: the id, and a digest of every byte that a model would see."""

    clip_id: str
    digest: str


Step = list[Clip]


def clips_of(batch: RawBatch) -> Step:
    columns = (batch[key] for key in ("clip_id", "caption", "frames", "latents"))
    return [
        Clip(str(clip_id), hashlib.sha256(str(text).encode() + frames.tobytes() + latents.tobytes()).hexdigest())
        for clip_id, text, frames, latents in zip(*columns, strict=True)
    ]


def replaced_in(batch: RawBatch) -> list[CorruptClip | None]:
    return [CorruptClip.from_json(str(text)) if text else None for text in batch["replaced"]]


def reader_of(folder: Path, known: dict[Place, CorruptClip] | None = None, replace: bool = True) -> ClipReader:
    manifest = read_manifest(folder)
    plan = Plan(manifest.shard_rows, manifest.spec.rows_per_row_group, 0, GLOBAL_BATCH, 4, 4, manifest.fingerprint)
    return ClipReader(manifest, plan, manifest.spec.num_frames, replace=replace, known_bad=known or {})


def read(reader: ClipReader, start: int = 0, stop: int = STOP) -> tuple[list[Step], list[list[CorruptClip | None]]]:
    """-> every step's clips, and beside each the damaged clip whose place it took."""
    blocks = BlockReader(reader)
    try:
        both = [(clips_of(batch), replaced_in(batch)) for batch in blocks.steps(start, stop)]
    finally:
        blocks.close()
    return [clips for clips, _ in both], [bad for _, bad in both]


def share(reader: ClipReader, world: int) -> Share:
    block = 2 * reader.clip_bytes * (GLOBAL_BATCH // world)
    return Share(IngestMemory(block_steps=2, block_bytes=block, waiting=2, compressed=0), threads=2)


def over_ray(reader: ClipReader, start: int, world: int) -> list[Step]:
    """Global batches through the whole pipeline, each rank for itself."""
    ranks = [
        [clips_of(batch) for batch in rank_batches(reader, share(reader, world), rank, world, start, STOP)]
        for rank in range(world)
    ]
    return [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connect(num_cpus=4, object_store_bytes=128 << 20):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_dataset(folder, CLIPS, stored_frames=2, frame_size=16, rows_per_row_group=ROWS, shards=SHARDS)
    return folder


@pytest.fixture(scope="module")
def undamaged(whole: Path) -> list[Step]:
    return read(reader_of(whole))[0]


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def flip_in(path: Path, group: int, column: str) -> None:
    """One byte in the middle of what the row group holds of the column."""
    footer = pq.ParquetFile(path).metadata
    chunk = footer.row_group(group).column(footer.schema.names.index(column))
    flip(path, chunk.data_page_offset + chunk.total_compressed_size - 20)


def write_cut(folder: Path, spec: DatasetSpec, clips: int, cut: Container[int]) -> Path:
    """A dataset of one shard, with pictures that were cut short before they were written: page checksums are right."""
    folder.mkdir()
    with ShardWriter(folder / "shard-00000.parquet", spec) as writer:
        for index in range(clips):
            clip = make_clip(index, spec)
            if index in cut:
                clip.frames[-1] = clip.frames[-1][:60]
            writer.add(clip)
    write_manifest(folder, spec, [writer.file], 0)
    return folder


# Any byte


@pytest.mark.parametrize("replace", [False, True], ids=["stop", "replace"])
def test_any_flipped_byte_changes_nothing_or_is_named_and_never_reaches_a_batch(replace, whole, undamaged, tmp_path):
    """A sample over the whole file, pages, headers and footer; a third of it over the footer and its last bytes."""
    by_id = dict(itertools.chain(*undamaged))
    size = (whole / BAD).stat().st_size
    draw = random.Random(7)
    outcomes: Counter[str] = Counter()
    for number in range(150):
        folder = shutil.copytree(whole, tmp_path / str(number))
        flip(folder / BAD, draw.randrange(size * 2 // 3 if number % 3 == 0 else 0, size), 1 << draw.randrange(8))
        try:
            steps, bad = read(reader_of(folder, replace=replace), stop=6)
        except UserError as error:
            assert BAD in str(error)
            # What says that it is of another dataset is never gone round.
            assert not replace or not isinstance(error, Damaged)
            outcomes["stopped"] += 1
            continue
        for clip, record, right in zip(*map(itertools.chain.from_iterable, (steps, bad, undamaged[:6])), strict=True):
            assert clip.digest == by_id[clip.clip_id]
            assert clip == right if record is None else record.file == BAD and record.replaced_by == clip.clip_id
        outcomes["replaced" if any(itertools.chain(*bad)) else "same"] += 1
    assert outcomes["replaced" if replace else "stopped"] > 60 and outcomes["same"] > 5
    assert not replace or outcomes["stopped"] < 40


def test_a_footer_with_a_flipped_bit_gives_the_same_numbers_or_counts_as_damaged(whole, tmp_path):
    """It has no checksum: the types and names of columns, which come first in it, are compared with ours."""
    manifest, content = read_manifest(whole), (whole / BAD).read_bytes()
    row_groups = RowGroups(Storage(str(tmp_path)), manifest.spec, manifest.fingerprint)
    columns = ["clip_id", "caption", "latent_00", "latent_01"]
    right = RowGroups.of(manifest).read(BAD, 0, columns)
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    damaged = 0
    for offset, mask in itertools.product(range(begin, begin + 450), (4, 16, 128)):
        name = f"{offset}-{mask}.parquet"
        (tmp_path / name).write_bytes(content)
        flip(tmp_path / name, offset, mask)
        try:
            assert row_groups.read(name, 0, columns).equals(right), (offset - begin, mask)
        except Damaged:
            damaged += 1
    assert damaged > 300


@pytest.mark.parametrize("column", ["clip_id", "caption", "frame_01", "latent_00"])
def test_damage_in_any_one_column_loses_its_row_group_and_no_other(column, copy, undamaged):
    flip_in(copy / BAD, 1, column)
    steps, bad = read(reader_of(copy))
    lost = [record for record in itertools.chain(*bad) if record]
    assert {record.place for record in lost} == {Place(1, 1, row) for row in range(ROWS)}
    assert all("row group 1 cannot be read" in record.error for record in lost)
    # The id comes from its own column, as long as that is whole.
    ids = {None} if column == "clip_id" else {f"clip-{12 + row:05d}" for row in range(ROWS)}
    assert {record.clip_id for record in lost} == ids
    assert differs(steps, undamaged) == places_of(bad)


def differs(a: list[Step], b: list[Step]) -> set[tuple[int, int]]:
    """(step, place in its batch) of every clip that is not the same."""
    return {(s, i) for s, (x, y) in enumerate(zip(a, b, strict=True)) for i in range(len(x)) if x[i] != y[i]}


def places_of(bad: list[list[CorruptClip | None]]) -> set[tuple[int, int]]:
    """(step, place in its batch) of every clip that stands in for another."""
    return {(s, i) for s, step in enumerate(bad) for i, record in enumerate(step) if record}


@pytest.mark.parametrize("codec", ["jpeg", "png"])
def test_a_picture_that_does_not_decode_loses_that_clip_alone(codec, tmp_path):
    folder = write_cut(tmp_path / "cut", make_spec(2, 16, ROWS, frame_codec=codec), 8, [5])
    _, bad = read(reader_of(folder), stop=2)
    (record,) = (record for record in itertools.chain(*bad) if record)
    assert record.place == Place(0, 1, 1) and record.clip_id == "clip-00005"
    assert record.replaced_by == "clip-00006" and record.stand_in == Place(0, 1, 2)
    with pytest.raises(Damaged, match=r"shard-00000\.parquet: row group 1, row 1, clip 'clip-00005', frame 1: cannot"):
        read(reader_of(folder, replace=False), stop=2)


def test_a_png_that_pillow_calls_a_syntax_error_counts_as_damaged():
    spec = make_spec(2, 16, ROWS, frame_codec="png")
    good = make_clip(0, spec).frames[0]
    length = good.index(b"IDAT") - 4  # cut short, so that pixels stand where the next chunk's name should
    with pytest.raises(ValueError, match="broken PNG"):
        decode_frame(good[: length + 3] + b"\x09" + good[length + 4 :], np.empty((16, 16, 3), np.uint8), spec)


def test_by_default_the_error_has_shard_row_group_row_and_clip(copy):
    flip_in(copy / BAD, 1, "frame_00")
    with pytest.raises(Damaged, match=rf"{BAD}: row group 1 cannot.* row group 1, row \d, clip 'clip-0001[2-5]'\."):
        read(reader_of(copy, replace=False))


def test_a_damaged_row_group_read_ahead_ends_the_run_at_its_own_step_and_not_before(copy, undamaged):
    flip_in(copy / BAD, 1, "frame_00")
    reader = reader_of(copy, replace=False)
    first = min(s for s, i in differs(read(reader_of(copy))[0], undamaged))
    assert first >= 1
    received = []
    with pytest.raises(Damaged):
        for batch in BlockReader(reader).steps(0, STOP):
            received.append(clips_of(batch))
    assert received == undamaged[:first]


def test_a_shard_of_another_dataset_stops_the_run_even_where_clips_are_replaced(copy, tmp_path):
    other = tmp_path / "other"
    write_dataset(other, CLIPS, stored_frames=2, frame_size=24, rows_per_row_group=ROWS, shards=SHARDS)
    shutil.copy(other / BAD, copy / BAD)
    with pytest.raises(UserError, match=rf"{BAD}: the shard is not of this dataset: .*frame_size 16 != 24"):
        read(reader_of(copy))
    # Nor does it pass as one that a neighbour of a damaged clip happened to lie in.
    (copy / "shard-00000.parquet").unlink()
    with pytest.raises(UserError, match=rf"{BAD}: the shard is not of this dataset"):
        read(reader_of(copy))


# Who stands in


def test_neighbours_are_all_other_places_each_once_the_nearest_first_and_never_the_clip_itself():
    rows = np.array([9, 1, 4])
    places = {Place(s, r // 4, r % 4) for s, n in enumerate(rows) for r in range(n)}
    for place in places:
        found = list(neighbours(place, rows, 4))
        assert place not in found and set(found) <= places and len(found) == len(set(found))
        groups = {found_place[:2] for found_place in found} | {place[:2]}
        assert groups == {other[:2] for other in places}
        near = [found_place.shard == place.shard for found_place in found]
        assert near == sorted(near, reverse=True)
    assert list(neighbours(Place(0, 1, 2), rows, 4))[:5] == [(0, 1, 3), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 0, 2)]
    assert list(neighbours(Place(0, 0, 0), np.array([1]), 4)) == []


def test_where_nobody_can_stand_in_the_error_is_the_clips_own(tmp_path):
    folder = write_cut(tmp_path / "all", make_spec(2, 16, ROWS), 8, range(8))
    with pytest.raises(Damaged, match=r"row group \d, row \d, clip 'clip-0000\d', frame 1: cannot be decoded"):
        read(reader_of(folder), stop=2)


# The list


def record_of(row: int) -> CorruptClip:
    return CorruptClip(0, 0, row, "shard-00000.parquet", f"clip-{row}", "why", "clip-9", Place(0, 2, 1))


def test_the_list_holds_each_clip_once_and_is_whole_again_after_a_crash_in_mid_line(tmp_path):
    listed = CorruptList(tmp_path, 10, 0.5)
    assert [listed.add(record_of(row)) for row in (3, 1, 3)] == [True, True, False]
    path = tmp_path / CORRUPT
    before = path.read_bytes()
    for cut in (1, 30):
        path.write_bytes(before + before[:cut])
        assert [*known_corrupt(tmp_path).values()] == [record_of(3), record_of(1)]
        assert path.read_bytes() == before + before[:cut]  # reading changes nothing: another process may be the writer
    again = CorruptList(tmp_path, 10, 0.5)
    assert not again.add(record_of(1)) and again.add(record_of(2))
    assert path.read_bytes() == before + record_of(2).to_json().encode() + b"\n"


def test_too_many_stop_the_run_when_they_are_met_and_at_every_later_start(tmp_path):
    listed = CorruptList(tmp_path, 1000, 0.001)
    listed.add(record_of(0))
    said = r"corrupt\.jsonl: 2 of 1000 clips are damaged, above --data\.max-corrupt 0\.001.* why .*raise the limit"
    with pytest.raises(UserError, match=said):
        listed.add(record_of(1))
    with pytest.raises(UserError, match=said):
        CorruptList(tmp_path, 1000, 0.001)
    assert len(CorruptList(tmp_path, 1000, 0.002).known) == 2


@pytest.mark.parametrize("content", [b"what?\n", b"null\n", b"{}\n", b"\xff\xfe\n", b'{"shard": 1}\n'])
def test_a_list_that_is_none_is_refused_by_name(content, tmp_path):
    (tmp_path / CORRUPT).write_bytes(content)
    with pytest.raises(UserError, match=r"corrupt\.jsonl: not a list of damaged clips .*Restore it, or move it away"):
        CorruptList(tmp_path, 10, 0.5)
    assert (tmp_path / CORRUPT).read_bytes() == content


# Restarts


def first_start(reader: ClipReader, run: Path, stop: int) -> None:
    """A start of a run that ended at step `stop`: what it met is in its list."""
    run.mkdir()
    listed = CorruptList(run, CLIPS, 1.0)
    for record in filter(None, itertools.chain(*read(reader, 0, stop)[1])):
        listed.add(record)


@pytest.mark.parametrize("restored", [False, True], ids=["still-damaged", "restored"])
@pytest.mark.parametrize("damage", ["row-group", "shard-gone"])
def test_known_clips_are_replaced_by_the_same_ones_after_a_restart_whatever_became_of_the_file(
    damage, restored, whole, copy, tmp_path
):
    if damage == "row-group":
        flip_in(copy / BAD, 1, "frame_00")
    else:
        (copy / BAD).unlink()
    undisturbed, bad = read(reader_of(copy))
    # All that is damaged was met in the first of the two epochs.
    first_start(reader_of(copy), tmp_path / "run", 6)
    known = known_corrupt(tmp_path / "run")
    assert known.keys() == {record.place for record in itertools.chain(*bad) if record}
    reader = reader_of(shutil.copytree(whole, tmp_path / "restored") if restored else copy, known, replace=not restored)
    for step in (0, 6, 8, 11):
        assert read(reader, step)[0] == undisturbed[step:], step
    assert read(reader)[1] == bad  # and each time it is counted, with the words of the first


@pytest.mark.timeout(120)
def test_the_order_of_a_run_with_replaced_clips_is_the_same_over_resumes_and_numbers_of_ranks(
    cluster, copy, undamaged, tmp_path
):
    flip_in(copy / BAD, 1, "latent_01")
    undisturbed, bad = read(reader_of(copy))
    assert differs(undisturbed, undamaged) == places_of(bad) and len(places_of(bad)) == 2 * ROWS
    first_start(reader_of(copy), tmp_path / "run", 4)
    known = known_corrupt(tmp_path / "run")
    assert len(known) > 0
    for step, world in ((0, 2), (4, 1), (7, 1)):
        assert over_ray(reader_of(copy, known), step, world) == undisturbed[step:], (step, world)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_a_lost_shard_is_a_named_error_or_counted_replacements_within_10_seconds(damage, cluster, copy, undamaged):
    shard = copy / BAD
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2 if damage == "truncated" else 0)
    first = min(s for s, _ in differs(read(reader_of(copy))[0], undamaged))
    received = []
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"{BAD}: .*row group \d, row \d, a clip whose id cannot be read"):
        reader = reader_of(copy, replace=False)
        for batch in rank_batches(reader, share(reader, 1), 0, 1, 0, STOP):
            received.append(clips_of(batch))
    assert received == undamaged[:first]  # the steps before it all came
    assert time.monotonic() - begin < 10
    begin = time.monotonic()
    counted: list[CorruptClip] = []
    reader = reader_of(copy)
    for batch, right in zip(rank_batches(reader, share(reader, 1), 0, 1, 0, 6), undamaged, strict=False):
        records = replaced_in(batch)
        counted += filter(None, records)
        assert all(clip == ok for clip, ok, record in zip(clips_of(batch), right, records, strict=True) if not record)
    assert time.monotonic() - begin < 10
    assert {record.place for record in counted} == {Place(1, row // ROWS, row % ROWS) for row in range(8)}
