"""Checkpoints on a real S3 server behind a network that fails, and in other places than the run folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
import torch
from faulty_store import Proxy, Store
from runs import advance, bits, make_run

from fvlm import presets
from fvlm.config import identity, validate
from fvlm.data.counts import counted
from fvlm.data.retries import Patience
from fvlm.data.storage import Storage
from fvlm.errors import StoreUnavailable, UserError
from fvlm.train.loop import Run
from fvlm.train.resume import choose_checkpoint
from fvlm.train.saver import Saver
from fvlm.train.state import MODEL, OPTIMIZER, STATE, Contents, contents_of
from fvlm.train.store import LocalStore, RemoteStore, checkpoint_store, newest_step, prune

QUICK = Patience(attempts=10, first_wait_s=0.001, longest_wait_s=0.01, timeout_s=1.0)
FILES = (MODEL, OPTIMIZER, STATE)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.stop()


def remote(proxy: Proxy, folder: Path, patience: Patience = QUICK) -> RemoteStore:
    return RemoteStore(Storage(proxy.uri(f"{folder.name}/run"), patience))


def keys(store: Store, folder: Path) -> set[str]:
    selector = pyarrow.fs.FileSelector(f"clips/{folder.name}/run", recursive=True, allow_not_found=True)
    found = store.files.get_file_info(selector)
    return {info.path.split("/run/")[1] for info in found if info.is_file}


def files_of(*steps: int) -> set[str]:
    return {f"step-{step:08d}/{name}" for step in steps for name in FILES}


def contents(run: Run) -> Contents:
    return contents_of(run.step, run.model, run.optimizer, run.state_dict())


def test_a_run_saves_prunes_and_resumes_to_the_last_bit_over_a_network_that_fails(store, proxy, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    bad = proxy(seed=3, s500=0.1, s503=0.1, lost=0.05, cut=0.1, short=0.1, garbled=0.15)
    place = remote(bad, tmp_path, dataclasses.replace(QUICK, timeout_s=10.0))
    run, before = make_run(tmp_path, save_every=2, keep_last=2), counted()["retries"]
    notes: list[str] = []
    with Saver(run, place, notes.append) as saver:
        for _ in range(7):
            advance(run)
            saver.after_step(run.step, {})
        saver.save_now()
    wanted = bits(run.model, run.optimizer)
    assert keys(store, tmp_path) == files_of(6, 7) and place.names() == ["step-00000006", "step-00000007"]
    assert len(notes) == 4 and newest_step(place) == 7
    other = make_run(tmp_path, seed=9)
    choice = choose_checkpoint(place, other.config.run_dir)
    assert choice == type(choice)("step-00000007", 7, 0, ())
    with place.open("step-00000007") as path:
        other.restore(path)
    assert not path.exists()
    assert bits(other.model, other.optimizer) == wanted and other.step == 7
    assert counted()["retries"] - before > 10 and min(bad.faults[fault] for fault in ("s500", "s503", "lost")) > 0
    assert "secret" not in caplog.text and " of 10 failed (" in caplog.text


def test_an_upload_of_several_pieces_arrives_whole(store, proxy, tmp_path):
    run = make_run(tmp_path)
    advance(run)
    run.model.second.big = torch.nn.Parameter(torch.randn(2_500_000), requires_grad=False)
    place = remote(proxy(seed=5, s500=0.2), tmp_path, dataclasses.replace(QUICK, timeout_s=10.0))
    place.write(contents(run))
    LocalStore(tmp_path / "c").write(contents(run))
    for name in FILES:
        local = (tmp_path / "c" / "step-00000001" / name).read_bytes()
        assert store.read(f"{tmp_path.name}/run/step-00000001/{name}") == local


def test_an_upload_that_dies_leaves_no_checkpoint_and_the_next_start_sweeps_it_up(store, proxy, tmp_path):
    """The store goes away for good after each number of requests in turn."""
    run = make_run(tmp_path)
    advance(run)
    good = remote(proxy(), tmp_path)
    good.write(contents(run))
    advance(run)
    few = dataclasses.replace(QUICK, attempts=2, timeout_s=5.0)
    number, failed = 0, True
    while failed:
        dying = proxy()
        dying.shares = {}
        real = dying.fault_for
        dying.fault_for = lambda request, real=real, n=number, dying=dying: (
            real(request) if len(dying.requests) < n else "s500"
        )
        try:
            remote(dying, tmp_path, few).write(contents(run))
            failed = False
        except StoreUnavailable as error:
            assert "could not be reached" in str(error) and "secret" not in str(error)
        listed = [1, 2] if f"step-00000002/{STATE}" in keys(store, tmp_path) else [1]
        assert good.names() == [f"step-{step:08d}" for step in listed]
        good.clean()
        assert keys(store, tmp_path) == files_of(*listed)
        choice = choose_checkpoint(good, run.config.run_dir)
        assert choice.name == f"step-{listed[-1]:08d}" and not choice.notes
        if 2 in listed:
            good.delete("step-00000002")
        number += 1
    assert number > 8


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_checkpoint_on_a_store_is_passed_over_and_no_more_taken_for_one(store, proxy, tmp_path, name):
    run, place = make_run(tmp_path), remote(proxy(), tmp_path)
    for _ in range(2):
        advance(run)
        place.write(contents(run))
    key = f"{tmp_path.name}/run/step-00000002/{name}"
    content = bytearray(store.read(key))
    content[len(content) // 2] ^= 1
    store.write(key, bytes(content))
    choice = choose_checkpoint(place, run.config.run_dir)
    assert choice.name == "step-00000001"
    (note,) = choice.notes
    assert "run/step-00000002 is damaged and passed over: " in note and f"step-00000002/{name}: missing or" in note
    assert place.names() == ["step-00000001"] and place.damaged() == ["step-00000002"]
    place.clean()
    assert f"step-00000002/{MODEL}" in keys(store, tmp_path)  # kept for a look
    prune(place, 2, 1, ())
    assert place.names() == ["step-00000001"]
    place.write(contents(run))  # the same step again
    assert keys(store, tmp_path) == files_of(1, 2) and place.damaged() == []


def test_what_is_refused_is_told_at_once_without_the_secret(proxy, tmp_path):
    run = make_run(tmp_path)
    advance(run)
    with pytest.raises(UserError, match="was refused") as raised:
        remote(proxy(s403=1.0), tmp_path).write(contents(run))
    assert "secret" not in str(raised.value)


def test_the_place_of_the_checkpoints_is_the_configs_and_no_part_of_a_runs_identity(tmp_path):
    def placed(where: str) -> presets.Config:
        config = presets.get("demo", runs_dir=str(tmp_path), run="story")
        return dataclasses.replace(config, train=dataclasses.replace(config.train, checkpoint_dir=where))

    for where, wanted in {
        "": f"{tmp_path}/story/checkpoints/step-00000001",
        "/kept": "/kept/story/step-00000001",
        "file:///kept/there": "/kept/there/story/step-00000001",
        "s3://bucket/kept/?region=eu-north-1": "s3://bucket/kept/story/step-00000001",
        "gs://bucket": "gs://bucket/story/step-00000001",
    }.items():
        config = validate(placed(where))
        assert checkpoint_store(config).locate("step-00000001") == wanted
        assert identity(config.to_dict()) == identity(placed("").to_dict())
    with pytest.raises(UserError, match=r"--train.checkpoint-dir holds a secret"):
        validate(placed("s3://key:secret@bucket/kept"))
