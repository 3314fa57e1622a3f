"""The cache of row groups: bounded whatever happens, shared by processes, and never the source of a wrong byte."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import write_dataset

from fvlm.data import cache as module
from fvlm.data.cache import STATE, STATE_FORMAT, SUFFIX, RowGroupCache
from fvlm.data.counts import counted
from fvlm.data.row_groups import RowGroups
from fvlm.data.storage import Storage
from fvlm.errors import UserError
from fvlm.files import TEMPORARY

spawn = multiprocessing.get_context("spawn")
ROWS = 50_000


def table(key: str, nbytes: int = ROWS) -> pa.Table:
    return pa.table({"clip_id": [key], "frame_00": [random.Random(key).randbytes(nbytes)]})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))


def snapshot(folder: Path) -> tuple[int, int]:
    """(bytes of all files of the cache, bytes that its state says), at one moment: nobody adds while we look."""
    with (folder / STATE).open("rb") as state:
        fcntl.flock(state, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in files(folder)), STATE_FORMAT.unpack(state.read())[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of the file that `table` makes."""
    folder = tmp_path_factory.mktemp("one")
    RowGroupCache(str(folder), 1 << 30).put("k0", table("k0"))
    (only,) = files(folder)
    return only.stat().st_size


def test_what_was_put_comes_back_whole_and_only_under_its_key(folder: Path) -> None:
    cache = RowGroupCache(str(folder), 1 << 20)
    put = table("a").replace_schema_metadata({b"fvlm.spec": b"{}"})
    assert cache.get("a") is None
    cache.put("a", put)
    got = cache.get("a")
    assert got == put and got.schema.metadata == put.schema.metadata and cache.get("b") is None
    (only,) = files(folder)
    shutil.copy(only, cache._path("b"))
    assert cache.get("b") is None, "a whole file under another's name"


def test_a_flipped_byte_or_a_missing_end_is_thrown_away_and_never_delivered(folder: Path, caplog) -> None:
    cache = RowGroupCache(str(folder), 1 << 20)
    cache.put("a", table("a"))
    (path,) = files(folder)
    good = path.read_bytes()
    places = [*range(0, len(good), len(good) // 40), *range(len(good) - 40, len(good))]
    before = counted()["cache_damaged"]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        path.write_bytes(bad)
        assert cache.get("a") is None and not path.exists(), place
    for length in (0, 3, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        assert cache.get("a") is None and not path.exists(), length
    assert counted()["cache_damaged"] - before == len(places) + 4
    assert f"{path}: not what was written there; thrown away" in caplog.text


def test_a_damaged_cached_row_group_is_read_anew_from_the_dataset(tmp_path: Path, folder: Path) -> None:
    manifest = write_dataset(tmp_path / "set", shards=1)
    storage = Storage(manifest.root)
    cached = RowGroups(storage, manifest.spec, manifest.fingerprint, RowGroupCache(str(folder), 1 << 30))
    columns = ["clip_id", "frame_00", "latent_07"]
    expected = RowGroups(storage, manifest.spec, manifest.fingerprint).read("shard-00000.parquet", 1, columns)
    before = counted()
    assert cached.read("shard-00000.parquet", 1, columns) == expected
    (path,) = files(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    assert cached.read("shard-00000.parquet", 1, columns) == expected
    assert cached.read("shard-00000.parquet", 1, columns) == expected
    events = counted() - before
    assert (events["cache_damaged"], events["cache_misses"], events["cache_hits"]) == (1, 2, 1)
    for other in ((1, ["clip_id"]), (2, columns)):  # another choice of columns or group is another file
        assert cached.read("shard-00000.parquet", *other).num_columns == len(other[1])
    assert len(files(folder)) == 3


def test_the_least_recently_used_goes_first(folder: Path, one_file: int) -> None:
    cache = RowGroupCache(str(folder), 3 * one_file)
    for key in ("k1", "k2", "k3"):
        cache.put(key, table(key))
        time.sleep(0.02)  # the kernel's clock for files moves in steps of a few milliseconds
    assert cache.get("k1")
    time.sleep(0.02)
    cache.put("k4", table("k4"))
    assert [key for key in ("k1", "k2", "k3", "k4") if cache._path(key).exists()] == ["k1", "k3", "k4"]
    assert cache.get("k3")  # next in the queue, and used since
    cache.put("k5", table("k5"))
    assert [key for key in ("k1", "k2", "k3", "k4", "k5") if cache._path(key).exists()] == ["k3", "k4", "k5"]


def test_the_folder_is_not_looked_through_at_each_insertion(
    folder: Path, one_file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    scandir = os.scandir
    monkeypatch.setattr(module.os, "scandir", lambda path: looks.append(1) or scandir(path))
    cache = RowGroupCache(str(folder), 20 * one_file)
    for index in range(200):
        cache.put(f"k{index:03d}"[:2] + f"{index:03d}", table("k0"))
    assert len(files(folder)) == 20 and snapshot(folder) == (20 * one_file,) * 2
    assert len(looks) <= 200 / 20 + 2
    assert STATE_FORMAT.unpack((folder / STATE).read_bytes())[1] > 0, "nor is the queue read from its beginning"


def work(folder: str, limit: int, seed: int, rounds: int, pause_s: float) -> None:
    cache = RowGroupCache(folder, limit)
    draw = random.Random(seed)
    for _ in range(rounds):
        key = f"k{draw.randrange(8)}"
        got = cache.get(key)
        if got is None:
            cache.put(key, table(key))
        elif got != table(key):
            os._exit(3)
        time.sleep(pause_s * draw.random())


def started(target, *args) -> BaseProcess:
    process = spawn.Process(target=target, args=args)
    process.start()
    return process


def test_a_limit_of_two_holds_for_uneven_processes_that_share_the_cache(folder: Path, one_file: int) -> None:
    limit = 2 * one_file
    RowGroupCache(str(folder), limit).check()
    uneven = [(300, 0.0), (150, 0.005), (30, 0.05)]
    processes = [started(work, str(folder), limit, seed, *args) for seed, args in enumerate(uneven)]
    most = 0
    while any(process.is_alive() for process in processes):
        actual, said = snapshot(folder)
        assert actual <= limit and said <= limit
        most = max(most, actual)
        time.sleep(0.001)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert most == limit and snapshot(folder) == (limit, limit), "all of it was used, and the books are right"


def test_one_process_finds_what_another_put(folder: Path) -> None:
    process = started(work, str(folder), 1 << 30, 0, 40, 0.0)
    process.join()
    assert process.exitcode == 0
    cache = RowGroupCache(str(folder), 1 << 30)
    assert all(cache.get(f"k{index}") == table(f"k{index}") for index in range(8))


@pytest.mark.parametrize("looked_through", [False, True])
def test_two_that_write_the_same_key_at_once_leave_one_file_and_right_books(
    folder: Path, one_file: int, monkeypatch: pytest.MonkeyPatch, looked_through: bool
) -> None:
    cache = RowGroupCache(str(folder), 1 << 30)
    cache.check()
    close, open_ = os.close, os.open
    locks = []

    def close_then_put(fd: int) -> None:
        """The first has made its temporary file and lets go of the lock: the second comes and is done first."""
        monkeypatch.setattr(module.os, "close", close)
        close(fd)
        cache.put("k0", table("k0"))
        assert len(files(folder)) == 2
        monkeypatch.setattr(module.os, "open", look_then_open)

    def look_then_open(*args) -> int:
        """Before the first takes the lock to remove its file, closed by now, another looks through the folder."""
        locks.append(args)
        if looked_through and len(locks) == 2:
            cache.check()
            assert len(files(folder)) == 1
        return open_(*args)

    monkeypatch.setattr(module.os, "close", close_then_put)
    cache.put("k0", table("k0"))
    assert len(locks) >= 2
    assert snapshot(folder) == (one_file, one_file) and cache.get("k0") == table("k0")


def put_and_stop(folder: str, limit: int, how: signal.Signals, locked: bool) -> None:
    """Put, and signal ourselves when the temporary file has its size and no content yet."""
    truncate, close = os.ftruncate, os.close

    def stop_after_truncate(fd: int, size: int) -> None:
        truncate(fd, size)
        if locked:
            os.kill(os.getpid(), how)
        os.close = stop_after_close

    def stop_after_close(fd: int) -> None:
        close(fd)
        os.close = close
        os.kill(os.getpid(), how)

    os.ftruncate = stop_after_truncate
    RowGroupCache(folder, limit).put("k1", table("k1"))


@pytest.mark.parametrize("locked", [True, False])
def test_what_a_killed_writer_left_is_counted_then_removed(folder: Path, one_file: int, locked: bool) -> None:
    limit = 2 * one_file
    RowGroupCache(str(folder), limit).check()
    process = started(put_and_stop, str(folder), limit, signal.SIGKILL, locked)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = files(folder)
    assert left.name.startswith(TEMPORARY) and snapshot(folder) == (one_file, one_file)
    cache = RowGroupCache(str(folder), limit)
    assert cache.get("k1") is None
    for key in ("k2", "k3"):  # the second needs the room
        cache.put(key, table(key))
        assert snapshot(folder) == (2 * one_file,) * 2
    assert not left.exists() and cache.get("k2") and cache.get("k3")


def test_a_living_writer_keeps_its_file_and_its_room(folder: Path, one_file: int) -> None:
    cache = RowGroupCache(str(folder), one_file)
    cache.check()
    process = started(put_and_stop, str(folder), one_file, signal.SIGSTOP, False)
    try:
        while not files(folder):
            time.sleep(0.01)
        cache.check()
        assert len(files(folder)) == 1
        before = counted()["cache_skipped"]
        cache.put("k2", table("k2"))  # all room is the writer's
        assert counted()["cache_skipped"] == before + 1 and cache.get("k2") is None
        assert snapshot(folder) == (one_file, one_file)
    finally:
        while process.exitcode is None:
            os.kill(process.pid, signal.SIGCONT)
            process.join(0.1)
    assert cache.get("k1") == table("k1")


def test_who_has_read_a_row_group_keeps_it_when_it_is_evicted(folder: Path, one_file: int) -> None:
    cache = RowGroupCache(str(folder), one_file)
    cache.put("k1", table("k1"))
    held = cache.get("k1")
    (path,) = files(folder)
    with path.open("r+b") as f:  # harsher than eviction: the file is overwritten too
        f.write(b"\0" * one_file)
    cache.put("k2", table("k2"))
    assert not path.exists() and held == table("k1")


@pytest.mark.parametrize("wrong", [b"", b"\1" * 7])
def test_a_state_that_was_not_written_whole_is_made_anew(folder: Path, one_file: int, wrong: bytes) -> None:
    cache = RowGroupCache(str(folder), 2 * one_file)
    cache.put("k1", table("k1"))
    (folder / STATE).write_bytes(wrong)
    for key in ("k2", "k3"):
        cache.put(key, table(key))
    assert snapshot(folder) == (2 * one_file,) * 2


def test_a_limit_below_one_row_group_is_an_error_with_both_numbers(folder: Path, one_file: int) -> None:
    cache = RowGroupCache(str(folder), one_file - 1)
    with pytest.raises(UserError, match=rf"hold {one_file - 1:,} bytes.*alone has {one_file:,}.*--data.cache-gb"):
        cache.put("k0", table("k0"))
    with pytest.raises(UserError, match=r"--data\.cache-gb"):
        RowGroupCache(str(folder), 0).check()


def test_a_folder_that_cannot_be_used_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for use in (lambda c: c.check(), lambda c: c.get("a"), lambda c: c.put("a", table("a"))):
        with pytest.raises(UserError, match=r"file/cache: cannot be used as a cache .*--data.cache-dir"):
            use(RowGroupCache(str(tmp_path / "file" / "cache"), 1 << 20))


def test_a_folder_that_vanishes_costs_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = RowGroupCache(str(folder), 1 << 20)
    cache.put("a", table("a"))
    shutil.rmtree(folder)
    for key in "abc":
        assert cache.get(key) is None
        cache.put(key, table(key))
    assert sum("the cache cannot be used" in record.getMessage() for record in caplog.records) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if not done or done.returncode:
        pytest.skip("a full disk needs a small file system of its own, and mounting one is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_costs_one_warning_and_what_is_cached_stays(small_disk: Path, caplog) -> None:
    cache = RowGroupCache(str(small_disk), 1 << 30)
    before = counted()["cache_skipped"]
    for index in range(12):
        cache.put(f"k{index}", table(f"k{index}"))
    kept = [f"k{index}" for index in range(12) if cache.get(f"k{index}") == table(f"k{index}")]
    assert kept == ["k0", "k1", "k2", "k3"]
    assert counted()["cache_skipped"] - before == 8
    assert sum("the disk of the cache is full" in record.getMessage() for record in caplog.records) == 1
    assert not [path for path in files(small_disk) if path.name.startswith(TEMPORARY)]
    assert len(set(snapshot(small_disk))) == 1


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="fvlm")
