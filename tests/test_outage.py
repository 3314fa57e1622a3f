"""A store that is away: an error of its own, no end of the training, no damage; with lines that say for how long."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import write_dataset
from faulty_store import Proxy, Store
from runs import advance, make_run, require_whole
from test_order import plan_of

from fvlm.data import outage as outage_module
from fvlm.data import row_groups as row_groups_module
from fvlm.data.outage import Outage, wait_out
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.retries import Patience
from fvlm.data.row_groups import RowGroups
from fvlm.data.shards import read_manifest
from fvlm.data.storage import Storage
from fvlm.errors import Damaged, StoreUnavailable, Unavailable, UserError
from fvlm.files import away_is_unavailable, is_away, is_on_network, write_synced
from fvlm.train.saver import Saver
from fvlm.train.state import Contents
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


@pytest.mark.parametrize("status", [301, 400, 401, 403, 407])
def test_a_wrong_address_or_a_refusal_is_the_users_at_once(proxy, status, monkeypatch) -> None:
    monkeypatch.setitem(__import__("faulty_store").ERRORS, status, "Odd")
    strict = proxy(**{f"s{status}": 1.0})
    for ask in (lambda s: s.tree(), lambda s: s.open("x"), lambda s: s.write("x", lambda: [b"1"], 1)):
        with pytest.raises(UserError, match="was refused"):
            ask(Storage(strict.uri("set"), QUICK))


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_a_store_says_that_is_busy_or_broken_may_pass(proxy, status, monkeypatch) -> None:
    monkeypatch.setitem(__import__("faulty_store").ERRORS, status, "Odd")
    bad = proxy(**{f"s{status}": 1.0})
    for ask in (lambda s: s.tree(), lambda s: s.open("x"), lambda s: s.write("x", lambda: [b"1"], 1)):
        with pytest.raises(StoreUnavailable, match="could not be reached"):
            ask(Storage(bad.uri("set"), QUICK))


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
    with pytest.raises(StoreUnavailable, match="could not be reached"):
        for step in steps_of(blocks, 4):
            got.append(list(step["clip_id"]))
            through.outage = "hang up"
    assert 1 <= len(got) < 30
    through.outage = ""
    assert got == [b["clip_id"] for b in BlockReader(ClipReader(manifest, clips.plan, 2)).steps(0, len(got))]


# ---- saving


class AwayStore(LocalStore):
    """Writes fail while it is `away`; `busy` is held while one does."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.away, self.tries = False, 0
        self.may_fail = threading.Event()
        self.may_fail.set()

    def write(self, contents: Contents) -> None:
        self.tries += 1
        if self.away:
            assert self.may_fail.wait(20)
        if self.away:
            raise StoreUnavailable(f"{self.locate(contents.name)}: could not be reached", 0.0)
        super().write(contents)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def saving(tmp_path: Path):
    run, store, notes = make_run(tmp_path, save_every=2), AwayStore(tmp_path / "c"), []
    return run, store, notes, Saver(run, store, notes.append)


def step(run, saver) -> None:
    advance(run)
    saver.after_step(run.step, {})


def test_training_goes_on_while_the_store_is_away_and_the_same_checkpoint_is_safe_once_it_is_back(saving) -> None:
    run, store, notes, saver = saving
    store.away = True
    for _ in range(3):
        step(run, saver)
    until(lambda: store.tries >= 3)
    assert store.names() == []
    store.away = False
    until(lambda: store.names() == ["step-00000002"])
    step(run, saver)  # the next save is as ever
    saver.close()
    assert require_whole(store.root) == [2, 4]
    assert notes[0].startswith("WARNING: store away for ") and "training goes on without a checkpoint" in notes[0]
    assert notes[1].startswith("the store answers again; it was away for ")
    assert [note.split(" in ")[0] for note in notes[2:]] == ["saved step-00000002", "saved step-00000004"]


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits_for_its_store(saving) -> None:
    run, store, notes, saver = saving
    store.away = True
    for _ in range(6):
        step(run, saver)
        if run.step % 2 == 0:
            until(lambda: saver._writing.writer.pauses)
    store.away = False
    saver.close()
    assert require_whole(store.root) == [6]
    assert "; 2 before it were left out, their store was away" in notes[-1]


def test_a_save_in_the_midst_of_a_try_is_left_out_and_training_is_not_held(saving) -> None:
    run, store, notes, saver = saving
    store.away = True
    for _ in range(2):
        step(run, saver)
    until(lambda: store.tries >= 2)
    store.may_fail.clear()
    until(lambda: not saver._writing.writer.pauses)
    begin = time.monotonic()
    for _ in range(2):
        step(run, saver)
    assert time.monotonic() - begin < 5 and saver._writing.snapshot.step == 2
    store.away = False
    store.may_fail.set()
    saver.close()
    assert require_whole(store.root) == [2] and "; 1 before it were left out" in notes[-1]
    saver.save_now()  # the step that was left out can still be had
    assert require_whole(store.root) == [2, 4]


def test_the_last_checkpoint_is_waited_for_and_the_rank_does_not_look_hung(tmp_path) -> None:
    run, store, notes, alive = make_run(tmp_path, max_steps=2, save_every=2), AwayStore(tmp_path / "c"), [], []
    saver = Saver(run, store, notes.append, lambda: alive.append(time.monotonic()))
    store.away = True
    threading.Timer(1.5, lambda: setattr(store, "away", False)).start()
    for _ in range(2):
        step(run, saver)
    assert require_whole(store.root) == [2] and len(alive) >= 2


def test_a_store_that_stays_away_ends_the_wait_for_the_last_checkpoint_as_such(tmp_path) -> None:
    run = make_run(tmp_path, save_every=2)
    object.__setattr__(run.config.scale, "store_wait_s", 0.5)
    store = AwayStore(tmp_path / "c")
    store.away = True
    saver = Saver(run, store, lambda text: None)
    advance(run)
    with pytest.raises(StoreUnavailable, match=r"longer than --scale.store-wait-s; the checkpoint of step 1 is not"):
        saver.save_now()


def test_an_error_does_not_wait_for_a_store_that_is_away_and_hides_nothing(saving) -> None:
    run, store, _, saver = saving
    store.away = True
    begin = time.monotonic()
    with pytest.raises(ZeroDivisionError) as raised, saver:
        for _ in range(2):
            step(run, saver)
        raise ZeroDivisionError
    assert time.monotonic() - begin < 10 and "its store is away" in raised.value.__notes__[0]


def test_what_is_too_old_is_left_for_the_next_time_when_the_store_goes_away_after_the_write(saving) -> None:
    run, store, notes, saver = saving
    gone = raising(StoreUnavailable("s: gone"))
    store.delete = lambda name: gone()  # type: ignore[method-assign]
    object.__setattr__(run.config.train, "keep_last", 1)
    for _ in range(4):
        step(run, saver)
    saver.close()
    assert require_whole(store.root) == [2, 4] and len(notes) == 2


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
