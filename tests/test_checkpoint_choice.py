"""A start takes the newest whole checkpoint, and says which it passed over; it never starts over by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import advance, make_run, require_whole, seal

from fvlm.errors import UserError
from fvlm.train.loop import Run
from fvlm.train.resume import choose_checkpoint
from fvlm.train.run_folder import CHECKPOINTS, finished_steps, latest_checkpoint
from fvlm.train.state import MODEL, OPTIMIZER, STATE
from fvlm.train.store import LocalStore, is_milestone, newest_step, prune


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Ten steps, checkpoints of the steps 4, 7 and 10."""
    run = make_run(tmp_path)
    for _ in range(10):
        advance(run)
        if run.step in (4, 7, 10):
            run.save(run.config.run_dir / CHECKPOINTS)
    return run


def choose(run: Run) -> tuple[str | None, str]:
    choice = choose_checkpoint(LocalStore(run.config.run_dir / CHECKPOINTS), run.config.run_dir)
    return choice.name, "\n".join(choice.notes)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_loudly(run, damage, name):
    root = run.config.run_dir / CHECKPOINTS
    DAMAGES[damage](root / "step-00000010" / name)
    chosen, notes = choose(run)
    assert chosen == "step-00000007"
    if (damage, name) == ("missing", STATE):  # then it is none by its names
        assert notes == ""
        return
    assert f"WARNING: {root / 'step-00000010'} is damaged" in notes and str(root / "step-00000010" / name) in notes
    assert f"kept in {root / 'damaged-step-00000010'}" in notes and "going on from step-00000007" in notes
    assert (root / "damaged-step-00000010").is_dir()
    assert require_whole(root) == [4, 7] and finished_steps(run.config.run_dir) == 7
    # Trained on to that step, it is saved under its name again, and may be damaged again.
    run.save(root)
    DAMAGES[damage](root / "step-00000010" / name)
    assert choose(run)[0] == "step-00000007" and (root / "damaged-step-00000010.2").is_dir()


def test_two_damaged_ones_give_way_to_the_third(run):
    root = run.config.run_dir / CHECKPOINTS
    flip(root / "step-00000010" / MODEL)
    flip(root / "step-00000007" / STATE)
    chosen, notes = choose(run)
    assert chosen == "step-00000004"
    assert notes.count("WARNING") == 2 and f"step-00000010/{MODEL}" in notes and f"step-00000007/{STATE}" in notes


def test_when_all_are_damaged_the_run_stops_each_time_and_nothing_is_moved(run):
    root = run.config.run_dir / CHECKPOINTS
    before = sorted(root.iterdir())
    for path in before:
        flip(path / OPTIMIZER)
    for _ in range(2):
        with pytest.raises(UserError, match="all 3 checkpoints are damaged") as raised:
            choose(run)
        for path in before:
            assert str(path / OPTIMIZER) in str(raised.value)
        assert sorted(root.iterdir()) == before
    assert latest_checkpoint(run.config.run_dir) == root / "step-00000010"


def test_when_only_those_set_aside_are_left_the_run_does_not_start_over(run):
    root = run.config.run_dir / CHECKPOINTS
    for path in list(root.iterdir()):
        path.rename(root / f"damaged-{path.name}")
    with pytest.raises(UserError, match=r"only checkpoints left are damaged ones.*step-00000004"):
        choose(run)


def test_a_newer_format_or_a_foreign_key_is_an_error_and_no_reason_to_fall_back(run):
    path = run.config.run_dir / CHECKPOINTS / "step-00000010"
    state = json.loads((path / STATE).read_text())
    for change, words in (({"format_version": 3}, "Update fvlm"), ({"ema": 1}, r"foreign keys \['ema'\]")):
        seal(path, state | change)
        with pytest.raises(UserError, match=words):
            choose(run)
        assert path.is_dir()


def test_without_checkpoints_a_run_begins(tmp_path):
    run = make_run(tmp_path)
    assert choose(run) == (None, "")
    assert latest_checkpoint(run.config.run_dir) is None and finished_steps(run.config.run_dir) == 0


def test_the_wandb_id_comes_back_from_the_checkpoint_and_two_ids_are_an_error(tmp_path):
    run = make_run(tmp_path)
    advance(run)
    wandb_id = run.config.run_dir / "wandb_id"
    wandb_id.write_text("ab12\n")
    run.save(run.config.run_dir / CHECKPOINTS)
    wandb_id.unlink()
    choose(run)
    assert wandb_id.read_text() == "ab12\n"
    wandb_id.write_text("cd34\n")
    with pytest.raises(UserError, match=r"'cd34', but .*state.json belongs to 'ab12'. Delete"):
        choose(run)


def test_pruning_keeps_the_last_ones_and_every_milestone_and_leaves_newer_ones_alone(tmp_path):
    run = make_run(tmp_path)
    advance(run)
    store = LocalStore(tmp_path / "kept")
    milestones = (2, 10, 20)
    for step in range(1, 46):
        run.step = step
        run.save(store.root)
        prune(store, step, 3, milestones)
    assert require_whole(store.root) == [2, 10, 20, 40, 43, 44, 45] and newest_step(store) == 45
    assert not is_milestone(30, milestones) and is_milestone(60, milestones) and not is_milestone(5, ())
    prune(store, 43, 1, ())
    assert require_whole(store.root) == [43, 44, 45]
