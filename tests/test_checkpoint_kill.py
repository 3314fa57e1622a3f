"""The writer killed at every single change of the disk: always a whole checkpoint, and the next start goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import advance, killed_at, make_run, require_whole

from fvlm.files import TEMPORARY, write_atomic
from fvlm.train.resume import choose_checkpoint
from fvlm.train.run_folder import CHECKPOINTS
from fvlm.train.saver import Saver
from fvlm.train.state import checkpoint_name, contents_of
from fvlm.train.store import LocalStore, prune

HOWS = ("before", "middle", "after")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "there, step, keep_last, wanted",
    [
        ([], 1, 3, [1]),
        ([1], 2, 1, [2]),
        ([1, 2, 3], 4, 1, [4]),
        ([1], 1, 1, [1]),
    ],
    ids=["first", "next-keep-1", "three-go", "same-step-keep-1"],
)
def test_a_save_killed_anywhere_leaves_whole_checkpoints_and_the_next_start_goes_on(
    tmp_path, there, step, keep_last, wanted, how
):
    """The write in the background, its commit and the pruning after it."""
    run = make_run(tmp_path, keep_last=keep_last)
    advance(run, 1)
    template = tmp_path / "template"
    for earlier in there:
        LocalStore(template).write(contents_of(earlier, run.model, run.optimizer, run.state_dict()))
    root = run.config.run_dir / CHECKPOINTS
    number, died = 0, True
    while died:
        number += 1
        shutil.rmtree(root, ignore_errors=True)
        if there:
            shutil.copytree(template, root)
        store = LocalStore(root)

        def work(store: LocalStore = store) -> None:
            run.step = 0
            saver = Saver(run, store, lambda text: None)
            run.step = step
            saver.save_now()

        died = killed_at(number, work, how)
        # What was there before may go only when what replaces it is whole.
        seen = set(require_whole(root))
        assert seen >= set(there) - {step} or step in seen, number
        assert seen or not there, number
        # The next start takes the newest of them, sweeps up, and saves.
        choice = choose_checkpoint(store, run.config.run_dir)
        assert choice.notes == () and choice.name == (checkpoint_name(max(seen)) if seen else None)
        assert not list(root.glob(f"{TEMPORARY}*")) and not list(root.glob("*-old"))
        store.write(contents_of(step, run.model, run.optimizer, run.state_dict()))
        prune(store, step, keep_last, ())
        assert require_whole(root) == wanted
        assert sorted(path.name for path in root.iterdir()) == [checkpoint_name(kept) for kept in wanted]
    assert number > 15  # every one of them was met


@pytest.mark.parametrize("how", HOWS)
def test_clean_up_after_a_kill_may_be_killed_too(tmp_path, how):
    """A process that died while it replaced the only checkpoint, and the next that dies while it sweeps up."""
    run = make_run(tmp_path)
    advance(run, 1)
    root = tmp_path / "checkpoints"
    contents = contents_of(1, run.model, run.optimizer, run.state_dict())
    for number in range(1, 12):
        shutil.rmtree(root, ignore_errors=True)
        LocalStore(root).write(contents)
        (root / "step-00000001").rename(root / "step-00000001-old")
        if number % 2:
            LocalStore(root).write(contents)
        (root / f"{TEMPORARY}77-step-00000001").mkdir()
        (root / f"{TEMPORARY}77-step-00000001" / "model.safetensors").write_bytes(b"half")
        killed_at(number // 2 + 1, LocalStore(root).clean, how)
        assert require_whole(root) == [1]
        LocalStore(root).clean()
        assert require_whole(root) == [1] and [path.name for path in root.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("how", HOWS)
def test_a_small_file_replaced_by_a_killed_process_is_the_old_or_the_new_one(tmp_path: Path, how: str):
    path = tmp_path / "config.json"
    number, died = 0, True
    while died:
        number += 1
        path.write_text("old")
        died = killed_at(number, lambda: write_atomic(path, "new, and longer"), how)
        assert path.read_text() in ("old", "new, and longer")
    assert path.read_text() == "new, and longer" and number > 2
