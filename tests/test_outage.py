"""A store that is away: an error of its own, no end of the training, no damage; with lines that say for how long."""

from __future__ import annotations

import errno
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import faulty_store
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import write_dataset
from faulty_store import Proxy, Store
from test_order import plan_of

from fvlm.data import outage as outage_module
from fvlm.data import row_groups as row_groups_module
from fvlm.data.outage import Outage, wait_out
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.retries import Patience
from fvlm.data.row_groups import RowGroups
from fvlm.data.shards import read_manifest
from fvlm.data.storage import Storage
from fvlm.data.synthetic import write_videos
from fvlm.data.video import RejectedVideo, read_clip
from fvlm.errors import Damaged, StoreUnavailable, Unavailable, UserError
from fvlm.files import away_is_unavailable, is_away, is_on_network, write_synced
from fvlm.train.store import LocalStore, remember_place, require_known
from ray_jobs.cli import run_command
from ray_jobs.ingest import steps_of

QUICK = Patience(attempts=2, first_wait_s=0.001, longest_wait_s=0.01, timeout_s=1.0)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.stop()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage_module, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(outage_module, "LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(outage_module, "POLL_S", 0.01)


# ---- the error


@pytest.mark.parametrize(("error", "code"), [(StoreUnavailable("s: away", 3.0), 75), (UserError("s: wrong"), 2)])
def test_only_bad_input_ends_a_command_with_2(capsys, error, code) -> None:
    def command() -> None:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("in a worker") from cause

    with pytest.raises(SystemExit) as end:
        run_command(command)
    assert end.value.code == code and capsys.readouterr().err == f"error: {error}\n"
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and type(again) is type(error)
    assert not issubclass(Unavailable, UserError) and getattr(again, "for_s", 3.0) == 3.0


@pytest.mark.parametrize(
    "status, kind, said",
    [(status, UserError, "was refused") for status in (301, 400, 401, 403, 407)]
    + [(status, StoreUnavailable, "could not be reached") for status in (429, 500, 502, 503, 504)],
)
def test_a_wrong_address_or_a_refusal_is_the_users_at_once_and_what_is_busy_or_broken_may_pass(
    proxy, status, kind, said, monkeypatch
) -> None:
    monkeypatch.setitem(faulty_store.ERRORS, status, "Odd")
    answering = proxy(**{f"s{status}": 1.0})
    for ask in (lambda s: s.tree(), lambda s: s.open("x"), lambda s: s.write("x", lambda: [b"1"], 1)):
        with pytest.raises(kind, match=said):
            ask(Storage(answering.uri("set"), QUICK))


def test_a_bucket_that_is_missing_is_not_one_without_checkpoints(proxy) -> None:
    there = proxy()
    assert Storage(there.uri("nothing/yet"), QUICK).tree() == {}
    with pytest.raises(UserError, match=r"s3://absent/run: .* was refused .*NO_SUCH_BUCKET"):
        Storage(there.uri("run").replace("@clips", "@absent"), QUICK).tree()


def test_all_attempts_to_read_one_thing_end_in_time(proxy) -> None:
    """Ahead of the watch for hanging ranks, which is armed for longer."""
    silent = proxy(late=1.0)
    begin = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        Storage(silent.uri("set"), Patience().within(3.0)).open("x")
    assert 2 < caught.value.for_s <= time.monotonic() - begin < 6


# ---- disks


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ECONNRESET])
def test_a_network_disk_that_is_away_is_a_store_that_is_away(tmp_path, code) -> None:
    with pytest.raises(StoreUnavailable, match=f"{tmp_path}: the disk does not answer"), away_is_unavailable(tmp_path):
        raise OSError(code, os.strerror(code))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT])
def test_a_full_forbidden_or_missing_place_is_not(tmp_path, code) -> None:
    with pytest.raises(OSError) as caught, away_is_unavailable(tmp_path, writing=True):
        raise OSError(code, os.strerror(code))
    assert caught.value.errno == code


def test_an_error_of_the_disk_itself_is_a_bad_sector_where_it_is_this_machines(tmp_path, monkeypatch) -> None:
    error = OSError(errno.EIO, "I/O")
    assert not is_on_network(tmp_path) and not is_away(error, tmp_path) and is_away(error, tmp_path, writing=True)
    table = f"30 1 0:30 / / rw - ext4 /dev/sda1 rw\n31 30 0:31 / {tmp_path}\\040a rw - nfs4 host:/a rw\n"
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p: table if str(p) == "/proc/self/mountinfo" else real(p))
    assert is_on_network(Path(f"{tmp_path} a/b")) and is_on_network(Path(f"{tmp_path} a"))
    assert not is_on_network(Path(f"{tmp_path} ab")) and is_away(error, Path(f"{tmp_path} a/b"))


@pytest.mark.parametrize("network", [True, False])
def test_a_shard_that_the_disk_does_not_give_is_damaged_only_where_the_disk_is_this_machines(
    tmp_path, monkeypatch, network
) -> None:
    """A real EIO: the open file is put in place of one that cannot be read."""
    manifest = write_dataset(tmp_path)
    monkeypatch.setattr("fvlm.files.is_on_network", lambda path: network)
    real = row_groups_module._parquet

    def opened_badly(file: pa.NativeFile, where: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
        parquet = real(file, where, metadata)
        bad = os.open("/proc/self/mem", os.O_RDONLY)
        os.dup2(bad, file.fileno())
        os.close(bad)
        return parquet

    monkeypatch.setattr(row_groups_module, "_parquet", opened_badly)
    with pytest.raises(StoreUnavailable if network else Damaged, match=r"shard-00000.parquet: .*[Ii]nput/output"):
        RowGroups.of(manifest).read("shard-00000.parquet", 0, ["clip_id"])


def test_a_dataset_whose_disk_was_unmounted_is_not_taken_for_missing_shards(tmp_path) -> None:
    manifest = write_dataset(tmp_path / "data")
    (tmp_path / "data" / "shard-00001.parquet").rename(tmp_path / "one")
    with pytest.raises(Damaged, match=r"shard-00001.parquet"):
        RowGroups.of(manifest).read("shard-00001.parquet", 0, ["clip_id"])
    (tmp_path / "data").rename(tmp_path / "away")
    (tmp_path / "data").mkdir()
    with pytest.raises(StoreUnavailable, match=f"{tmp_path}/data: the dataset has gone"):
        RowGroups.of(manifest).read("shard-00000.parquet", 0, ["clip_id"])


def test_a_large_file_reaches_the_disk_bit_by_bit(tmp_path, monkeypatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("fvlm.files.SYNC_BYTES", 1000)
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size))
    write_synced(tmp_path / "f", [b"x" * 600] * 5)
    assert synced == [1200, 2400] and (tmp_path / "f").stat().st_size == 3000


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_network_disk_that_is_away_makes_no_reject_of_a_good_video(tmp_path, monkeypatch, code) -> None:
    """FFmpeg says EIO of damage, too: then the file is read through."""
    write_videos(tmp_path, 1)
    video = next(tmp_path.rglob("*.mp4"))
    monkeypatch.setattr("fvlm.files.is_on_network", lambda path: True)
    real = Path.open

    def away(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    def broken(then: object) -> None:
        monkeypatch.setattr(Path, "open", then)
        av.error.err_check(-errno.EIO)  # raises what a read that failed does

    monkeypatch.setattr("fvlm.data.video.open_video", lambda path: broken(real))
    with pytest.raises(RejectedVideo, match="damaged: FFmpeg cannot decode it"):
        read_clip(video, 4, 56, "short-side")
    monkeypatch.setattr("fvlm.data.video.open_video", lambda path: broken(away))
    for _ in range(2):  # the second time it cannot even be opened
        with pytest.raises(StoreUnavailable, match=f"{video}: the disk does not answer"):
            read_clip(video, 4, 56, "short-side")


# ---- waiting


def test_a_store_is_waited_for_with_lines_that_say_how_long_and_an_end() -> None:
    lines: list[str] = []
    answers = iter([StoreUnavailable("s: gone", 30.0), StoreUnavailable("s: gone"), StoreUnavailable("s: gone"), None])

    def ask() -> str:
        if error := next(answers):
            raise error
        return "there"

    assert wait_out(ask, "the run waits", Outage(lines.append, 100.0)) == "there"
    assert [line.partition(": s: ")[0] for line in lines] == [
        "WARNING: store away for 30 s",
        "the store answers again; it was away for 30 s",
    ]
    assert "for 100 s at most; the run waits" in lines[0]


def test_waiting_ends_at_the_limit_and_when_the_run_is_to_stop() -> None:
    def ask() -> None:
        raise StoreUnavailable("s: gone")

    begin = time.monotonic()
    with pytest.raises(StoreUnavailable):
        wait_out(ask, "", Outage(print, 0.5))
    assert time.monotonic() - begin > 0.5
    with pytest.raises(StoreUnavailable):
        wait_out(ask, "", Outage(print, 0), lambda: True)


def test_the_line_comes_again_every_so_often(monkeypatch) -> None:
    monkeypatch.setattr(outage_module, "SAY_EVERY_S", 0.3)
    lines: list[str] = []
    with pytest.raises(StoreUnavailable):
        wait_out(raising(StoreUnavailable("s: gone")), "", Outage(lines.append, 1.0))
    assert 2 <= len(lines) <= 5


def raising(error: Exception) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


# ---- the ingest


def test_the_ingest_says_that_the_store_is_away_after_the_steps_that_it_has(store, proxy, tmp_path) -> None:
    write_dataset(tmp_path, clips=120)
    store.upload(tmp_path, "ingest")
    through: Proxy = proxy()
    manifest = read_manifest(through.uri("ingest"))
    clips = ClipReader(manifest, plan_of(manifest, 4, 4, 1), 2, patience=QUICK)
    padded = BlockReader(clips, block_steps=1, pad=True).steps(0, 30)
    blocks = ({key: np.asarray(column) for key, column in block.items()} for block in padded)  # as Ray makes them
    got = []
    with pytest.raises(StoreUnavailable, match="could not be reached") as caught:
        for step in steps_of(blocks, 4):
            got.append(list(step["clip_id"]))
            through.outage = "hang up"
    assert 1 <= len(got) < 30 and 0 < caught.value.for_s < 60
    through.outage = ""
    assert got == [b["clip_id"] for b in BlockReader(ClipReader(manifest, clips.plan, 2)).steps(0, len(got))]


# ---- a place that is empty


def test_a_run_that_has_saved_elsewhere_never_starts_over_because_that_place_is_empty(tmp_path) -> None:
    run_dir, store = tmp_path / "run", LocalStore(tmp_path / "disk" / "run")
    run_dir.mkdir()
    require_known(store, run_dir, [])  # a new run
    remember_place(store, run_dir, "step-00000002")
    require_known(store, run_dir, ["step-00000002"])
    with pytest.raises(StoreUnavailable, match=f"saved step-00000002 in {store.root}.* Mount the disk"):
        require_known(store, run_dir, [])
    store.root.mkdir(parents=True)
    with pytest.raises(UserError, match=r"saved step-00000002 in .* Bring them back"):
        require_known(store, run_dir, [])
