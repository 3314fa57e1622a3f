"""Shards behind a network that fails: the same rows in the same order, every retry seen, nobody waits for ever."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import random
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import write_dataset
from faulty_store import Proxy, Store

from fvlm.data.cache import RowGroupCache
from fvlm.data.counts import counted
from fvlm.data.retries import Patience, persist
from fvlm.data.row_groups import HOLE_BYTES, READS, RowGroups
from fvlm.data.schema import Manifest, frame_column, latent_column
from fvlm.data.storage import Storage
from fvlm.errors import Damaged, StoreUnavailable, UserError

QUICK = Patience(attempts=10, first_wait_s=0.001, longest_wait_s=0.01, timeout_s=1.0)
SHARDS, GROUPS = 10, 3
FRAMES = (0, 3, 7)
COLUMNS = ["clip_id", "caption", *map(frame_column, FRAMES), *map(latent_column, FRAMES)]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("local"), clips=SHARDS * GROUPS * 4, shards=SHARDS)


@pytest.fixture(scope="module")
def store(local: Manifest) -> Iterator[Store]:
    store = Store()
    store.upload(Path(local.root), "set")
    yield store
    store.stop()


def over(proxy: Proxy, local: Manifest, patience: Patience = QUICK, cache: RowGroupCache | None = None) -> RowGroups:
    return RowGroups(Storage(proxy.uri("set"), patience), local.spec, local.fingerprint, cache)


def epoch(row_groups: RowGroups) -> list[dict[str, object]]:
    """Every clip of the dataset, row groups in one shuffled order."""
    places = [(f"shard-{number:05d}.parquet", group) for number in range(SHARDS) for group in range(GROUPS)]
    random.Random(7).shuffle(places)
    return [row for name, group in places for row in row_groups.read(name, group, COLUMNS).to_pylist()]


@pytest.fixture(scope="module")
def expected(local: Manifest) -> list[dict[str, object]]:
    rows = epoch(RowGroups(Storage(local.root), local.spec, local.fingerprint))
    assert len({row["clip_id"] for row in rows}) == len(rows) == SHARDS * GROUPS * 4
    return rows


def retry_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if " of 10 failed (" in r.getMessage()]


def test_a_cold_start_with_5_percent_failing_requests_delivers_the_same_order(
    tmp_path, proxy, local, expected, caplog
) -> None:
    flaky = proxy(seed=1, s500=0.02, s503=0.02, cut=0.01)
    patient = dataclasses.replace(QUICK, timeout_s=10.0)  # a busy machine must not look like a fault
    cache = RowGroupCache(str(tmp_path / "cache"), 1 << 30)
    assert epoch(over(flaky, local, patient, cache)) == expected
    assert sum(flaky.faults.values()) >= 3 and len(retry_lines(caplog)) == sum(flaky.faults.values())
    before = len(flaky.requests)
    assert epoch(over(flaky, local, patient, cache)) == expected
    assert len(flaky.requests) == before, "a second epoch comes from the cache alone"


def test_30_percent_errors_timeouts_and_short_reads_give_the_same_order_and_bounded_retries(
    proxy, local, expected, caplog
) -> None:
    shares = {"s500": 0.05, "s503": 0.08, "cut": 0.06, "short": 0.05, "empty": 0.05, "late": 0.03}
    bad = proxy(seed=2, **shares)
    before = counted()
    quick = dataclasses.replace(QUICK, timeout_s=0.3)
    assert epoch(over(bad, local, quick)) == expected
    faults = sum(bad.faults.values())
    assert bad.faults.keys() == shares.keys() and 0.15 < faults / len(bad.requests) < 0.4
    lines = retry_lines(caplog)
    # Every fault is one retry, logged once, and none of them was answered by a row group's being read once more.
    # (A busy machine may be late by itself, so there may be more retries than faults, but none unseen.)
    assert faults <= len(lines) == (counted() - before)["retries"]
    assert (counted() - before)["rereads"] == 0
    assert all(
        re.search(r"s3://clips/set/shard-\d+\.parquet: .*attempt [1-9] of 10 failed \(.+\)", line) for line in lines
    )
    assert "secret" not in caplog.text


def test_a_file_without_checksums_is_never_delivered_short(proxy, store, caplog) -> None:
    content = random.Random(3).randbytes(9 << 20)  # two requests
    store.write("plain/blob", content)
    for fault in ("short", "empty", "cut"):
        bad = proxy(seed=5, **{fault: 0.6})
        storage = Storage(bad.uri("plain"), QUICK)
        for _ in range(3):  # freed memory that held the right bytes is there to be handed out again
            assert storage.read_bytes("blob") == content
        assert bad.faults[fault] > 0


def test_a_byte_flipped_on_the_way_is_read_anew_and_counted(proxy, local, expected, caplog) -> None:
    bad = proxy(seed=4, garbled=0.05)
    before = counted()
    assert epoch(over(bad, local)) == expected
    assert bad.faults["garbled"] > 0
    assert 0 < (counted() - before)["rereads"] <= bad.faults["garbled"]
    assert "fetching it again, 2 of 3" in caplog.text


def test_wrong_bytes_in_the_store_are_damaged_after_a_bounded_number_of_reads(proxy, store, local) -> None:
    name = "shard-00000.parquet"
    good = store.read(f"set/{name}")
    chunk = pq.ParquetFile(Path(local.root) / name).metadata.row_group(1).column(0)
    flipped = bytearray(good)
    flipped[chunk.data_page_offset + chunk.total_compressed_size - 2] ^= 1
    cases = [("rows", flipped), ("footer", good[:1000]), ("footer", good[:-1]), ("footer", b""), ("footer", b"PAR1")]
    honest = proxy()
    for number, (reason, content) in enumerate(cases):
        store.write(f"bad{number}/{name}", bytes(content))
        row_groups = dataclasses.replace(over(honest, local), storage=Storage(honest.uri(f"bad{number}"), QUICK))
        honest.requests.clear()
        with pytest.raises(Damaged, match=f"s3://clips/bad{number}/{name}: ") as caught:
            row_groups.read(name, 1, COLUMNS)
        assert caught.value.reason == reason
        assert sum(method == "HEAD" for method, *_ in honest.requests) == READS


def test_a_shard_that_is_missing_is_damaged_at_once(proxy, store, local) -> None:
    honest = proxy()
    with pytest.raises(Damaged, match=r"s3://clips/set/shard-77.parquet: .*not there") as caught:
        over(honest, local).read("shard-77.parquet", 0, COLUMNS)
    assert caught.value.reason == "missing" and len(honest.requests) == 1
    store.write("gone/shard-00000.parquet", store.read("set/shard-00000.parquet"))
    patient = dataclasses.replace(QUICK, timeout_s=30)  # or a busy machine's slow reply would be asked for again
    row_groups = dataclasses.replace(over(honest, local), storage=Storage(honest.uri("gone"), patient))
    row_groups.read("shard-00000.parquet", 0, COLUMNS)
    store.files.delete_file("clips/gone/shard-00000.parquet")  # while it is open
    honest.requests.clear()
    with pytest.raises(Damaged) as caught:
        row_groups.read("shard-00000.parquet", 1, COLUMNS)
    assert caught.value.reason == "missing"
    assert len(honest.requests) == len(set(honest.requests)), "nothing was asked for twice"


def test_what_is_forbidden_is_not_retried_and_the_message_says_what_to_check(proxy, local) -> None:
    strict = proxy(s403=1.0)
    with pytest.raises(UserError, match=r"shard-00000.parquet: .*refused .*credentials") as caught:
        over(strict, local).read("shard-00000.parquet", 0, COLUMNS)
    assert not isinstance(caught.value, Damaged) and len(strict.requests) == 1
    with pytest.raises(UserError, match=r"s3://absent/set: .*refused .*bucket"):
        Storage(f"s3://k:s@absent/set?endpoint_override={proxy().address}&scheme=http", QUICK).sizes()


@pytest.mark.parametrize("fault", ["late", "s503"])
def test_a_server_that_fails_for_good_is_not_taken_for_damage_and_is_given_up(proxy, local, fault, caplog) -> None:
    patience = dataclasses.replace(QUICK, attempts=3, timeout_s=0.3)
    dead = proxy(**{fault: 1.0})
    row_groups = over(dead, local, patience)
    begun = time.monotonic()
    with pytest.raises(
        StoreUnavailable, match=r"shard-00001.parquet: could not be reached: .*failed 3 times, at last"
    ) as caught:
        row_groups.read("shard-00001.parquet", 0, COLUMNS)
    assert time.monotonic() - begun < 10
    assert not isinstance(caught.value, UserError) and len(dead.requests) == 3
    assert sum(" of 3 failed (" in r.getMessage() for r in caplog.records) == 2


def test_a_server_that_goes_away_after_the_shard_was_opened_is_not_taken_for_damage(proxy, local) -> None:
    first = proxy()
    row_groups = over(first, local, dataclasses.replace(QUICK, attempts=3))
    row_groups.read("shard-00001.parquet", 0, COLUMNS)
    first.go_away()
    with pytest.raises(StoreUnavailable, match="could not be reached") as caught:
        row_groups.read("shard-00001.parquet", 1, COLUMNS)
    assert not isinstance(caught.value, UserError)


def test_a_server_that_drips_bytes_cannot_hold_a_run(proxy, local) -> None:
    dripping = proxy(drip=1.0)
    patience = Patience(attempts=2, first_wait_s=0.001, timeout_s=0.5, slowest_bytes_s=1e6)
    begun = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"no whole answer within 0\.[5-9] s"):
        over(dripping, local, patience).read("shard-00000.parquet", 0, COLUMNS)
    assert time.monotonic() - begun < 5


def test_sizes_come_from_one_request_that_survives_errors(proxy, local, caplog) -> None:
    honest = proxy()
    sizes = {path.name: path.stat().st_size for path in Path(local.root).iterdir()}
    assert Storage(honest.uri("set"), QUICK).sizes() == sizes == Storage(local.root).sizes()
    assert len(honest.requests) == 1
    flaky = proxy(seed=8, s503=0.58)
    assert Storage(flaky.uri("set"), QUICK).sizes() == sizes
    assert flaky.faults["s503"] == 3 and not retry_lines(caplog), "pages are retried one by one"
    with pytest.raises(UserError, match=r"s3://clips/void: there is no such folder"):
        Storage(honest.uri("void"), QUICK).sizes()


def test_a_row_group_is_few_requests_in_parallel_and_never_more_bytes_than_it_has(tmp_path, proxy, store) -> None:
    wide = write_dataset(tmp_path, clips=8, stored_frames=16, frame_size=448, shards=1, rows_per_row_group=8)
    store.upload(tmp_path, "wide")
    honest = proxy()
    row_groups = RowGroups(Storage(honest.uri("wide"), QUICK), wide.spec, wide.fingerprint)
    assert row_groups.rows("shard-00000.parquet") == [8]
    group = pq.ParquetFile(tmp_path / "shard-00000.parquet").metadata.row_group(0)
    for frames in ([0, 15], range(16)):
        columns = ["clip_id", "caption", *map(frame_column, frames), *map(latent_column, frames)]
        honest.requests.clear()
        honest.sent = honest.most_at_once = 0
        row_groups.read("shard-00000.parquet", 0, columns)
        chunks = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema in columns]
        wanted = sum(chunk.total_compressed_size for chunk in chunks)
        assert (
            wanted <= honest.sent <= min(wanted + HOLE_BYTES * len(honest.requests), group.total_byte_size + HOLE_BYTES)
        )
        assert len(honest.requests) == (3 if len(frames) == 2 else 1)
        if len(frames) == 2:
            assert honest.most_at_once > 1 and honest.sent < group.total_byte_size / 2


def test_threads_may_share_one_reader_remote_or_local(proxy, local, expected) -> None:
    for row_groups in (over(proxy(), local), RowGroups(Storage(local.root), local.spec, local.fingerprint)):
        with ThreadPoolExecutor(3) as pool:
            for rows in pool.map(lambda _, r=row_groups: epoch(r), range(3)):
                assert rows == expected


def test_a_reader_and_its_errors_can_be_sent_to_another_process(proxy, local) -> None:
    row_groups = over(proxy(), local)
    table = row_groups.read("shard-00002.parquet", 1, COLUMNS)
    again = pickle.loads(pickle.dumps(row_groups))
    assert again == row_groups and again.read("shard-00002.parquet", 1, COLUMNS) == table
    error = pickle.loads(pickle.dumps(Damaged("s: gone", "missing")))
    assert (str(error), error.reason) == ("s: gone", "missing") and isinstance(error, UserError)


@pytest.mark.parametrize("root", ["{}", "file://{}"])
def test_local_roots_are_read_where_they_lie(tmp_path: Path, root: str) -> None:
    folder = tmp_path / "a b"
    manifest = write_dataset(folder)
    storage = Storage(root.format(str(folder) if root == "{}" else str(folder).replace(" ", "%20")))
    assert storage.is_local and storage.folder == folder
    assert storage.read_bytes("manifest.json") == (folder / "manifest.json").read_bytes()
    assert storage.sizes() == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert storage.locate("x") == str(folder / "x")
    row_groups = RowGroups(storage, manifest.spec, manifest.fingerprint)
    assert row_groups.rows("shard-00001.parquet") == [4, 4]
    assert row_groups.read("shard-00001.parquet", 1, ["clip_id"])["clip_id"].to_pylist()[0] == "clip-00012"
    with pytest.raises(ValueError, match="frame_99"):
        row_groups.read("shard-00001.parquet", 0, ["clip_id", "frame_99"])
    for name, content, reason in (
        ("absent.parquet", None, "missing"),
        ("empty.parquet", b"", "footer"),
        ("cut.parquet", (folder / "shard-00000.parquet").read_bytes()[:-7], "footer"),
    ):
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(Damaged, match=re.escape(str(folder / name))) as caught:
            row_groups.read(name, 0, ["clip_id"])
        assert caught.value.reason == reason
    with pytest.raises(Damaged, match="has 2 row groups, and number 2 is asked"):
        row_groups.read("shard-00001.parquet", 2, ["clip_id"])


def test_a_shard_of_another_dataset_is_foreign(local) -> None:
    other = dataclasses.replace(local.spec, frame_size=64)
    with pytest.raises(Damaged, match="manifest against shard: frame_size 64 != 56") as caught:
        RowGroups(Storage(local.root), other, "x").read("shard-00000.parquet", 0, ["clip_id"])
    assert caught.value.reason == "foreign"


def test_a_flipped_byte_in_a_local_shard_is_damaged_and_a_restored_shard_is_read(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    path = tmp_path / "shard-00000.parquet"
    good = path.read_bytes()
    row_groups = RowGroups(Storage(str(tmp_path)), manifest.spec, manifest.fingerprint)
    table = row_groups.read(path.name, 0, COLUMNS)
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(3)
    bad = bytearray(good)
    bad[chunk.data_page_offset + chunk.total_compressed_size - 5] ^= 1
    path.write_bytes(bad)
    with pytest.raises(Damaged, match=r"shard-00000.parquet: row group 0 ") as caught:
        row_groups.read(path.name, 0, COLUMNS)
    assert caught.value.reason == "rows"
    path.with_suffix(".new").write_bytes(good)
    path.with_suffix(".new").replace(path)  # a new file: who has the old one open does not see it
    assert row_groups.read(path.name, 0, COLUMNS) == table


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_google_storage_out_of_reach_is_given_up_after_a_bounded_time() -> None:
    root = f"gs://anonymous@clips/set?endpoint_override=127.0.0.1:{closed_port()}&scheme=http"
    storage = Storage(root, Patience(attempts=2, first_wait_s=0.01, timeout_s=5.0))
    assert storage.locate("x") == "gs://clips/set/x" and not storage.is_local
    with pytest.raises(
        StoreUnavailable, match=r"gs://clips/set/x: could not be reached: .* failed 2 times.*UNAVAILABLE"
    ):
        storage.open("x")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("foo://clips/set", r"foo://clips/set: not a place .*s3://bucket/path"),
        ("s3://k:secret@clips/set?regoin=x", r"^s3://clips/set: unknown options \['regoin'\]; there are region, "),
        ("gs://anonymous@clips/set?zone=x", r"gs://clips/set: not a place .*zone"),
    ],
)
def test_a_root_that_cannot_be_used_says_so_without_the_credentials(root: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Storage(root).sizes()
    assert "secret" not in str(caught.value)


def test_the_endpoint_may_come_from_the_environment(proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = proxy()
    for key, value in {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{honest.address}")
    assert b"files_sha256" in Storage("s3://clips/set", dataclasses.replace(QUICK, attempts=4)).read_bytes(
        "manifest.json"
    )
    assert honest.requests


def test_a_programming_error_is_not_retried() -> None:
    calls = []

    def broken() -> None:
        calls.append(1)
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        persist(broken, "x", "y", QUICK, 1.0)
    assert len(calls) == 1


def test_waits_double_up_to_a_bound_and_differ() -> None:
    patience = Patience(first_wait_s=0.1, longest_wait_s=1.0)
    waits = [[patience.wait_s(attempt) for _ in range(200)] for attempt in (1, 2, 3, 9)]
    for low, high, drawn in zip((0.05, 0.1, 0.2, 0.5), (0.1, 0.2, 0.4, 1.0), waits, strict=True):
        assert low <= min(drawn) < max(drawn) <= high and max(drawn) - min(drawn) > 0.3 * high


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="fvlm")
