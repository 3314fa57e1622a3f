"""Checkpoints: whole or not there, whatever kills the writer."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from torch import nn

from fvlm.errors import UserError
from fvlm.files import TEMPORARY, write_atomic
from fvlm.train import state
from fvlm.train.state import (
    MODEL,
    OPTIMIZER,
    STATE,
    checkpoints,
    is_milestone,
    load_checkpoint,
    prune,
    remove_leftovers,
    save_checkpoint,
    step_of,
)

DIED = 9


class Net(nn.Module):
    """Two layers, one parameter that is never trained, and two tied ones, as the product's model has them."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.second.bias = self.first.bias if width == 4 else self.second.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def make(seed: int, width: int = 6) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net(width)
    return net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)


def train(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The data come from the global generator: losses repeat only where its state was restored as well."""
    for _ in range(steps):
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(net: Net) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in net.named_parameters()}


@pytest.mark.parametrize("width", [6, 4])
def test_training_goes_on_to_the_last_bit_after_a_round_trip(tmp_path, width):
    net, optimizer = make(0, width)
    train(net, optimizer, 3)
    path = save_checkpoint(tmp_path, 3, net, optimizer, {"metrics": {"ratio": [1.5, 0.1]}})
    saved = bits(net)
    train(net, optimizer, 4)

    other, other_optimizer = make(99, width)
    loaded = load_checkpoint(path, other, other_optimizer)
    assert loaded["step"] == step_of(path) == 3 and loaded["metrics"] == {"ratio": [1.5, 0.1]}
    assert bits(other) == saved
    train(other, other_optimizer, 4)
    assert bits(other) == bits(net)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        for key in ("step", "exp_avg", "exp_avg_sq") if mine.requires_grad else ():
            assert torch.equal(other_optimizer.state[mine][key], optimizer.state[theirs][key])


def test_no_file_of_a_checkpoint_needs_pickle(tmp_path):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {"a": 1})
    assert sorted(file.name for file in path.iterdir()) == sorted([MODEL, OPTIMIZER, STATE])
    json.loads((path / STATE).read_text())
    for name in (MODEL, OPTIMIZER):
        with safetensors.safe_open(path / name, "pt") as file:  # a format of raw numbers; it cannot hold code
            assert len(list(file.keys())) > 0


def killed_at(number: int, work: Callable[[], None], die_after: bool) -> bool:
    """Run `work` in a forked process that dies, as by SIGKILL, at the `number`-th change of the disk. Whether it died.

    Nothing of the child's runs after that: no `finally`, no `with`. A tensor file is left half-written.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED
    try:
        calls = 0

        def watched(real: Callable) -> Callable:
            @functools.wraps(real)
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == number and not die_after:
                    if real is real_save:
                        Path(args[1]).write_bytes(b"\x20\0\0\0\0\0\0\0{half")
                    os._exit(DIED)
                mine = calls
                try:
                    return real(*args, **kwargs)
                finally:
                    if mine == number:
                        os._exit(DIED)

            return call

        real_save = state.save_file
        state.save_file = watched(real_save)
        Path.write_text = watched(Path.write_text)
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, watched(getattr(os, name)))
        work()
        os._exit(0)
    finally:
        os._exit(1)


def require_whole(root: Path) -> list[int]:
    """Load everything that bears a checkpoint's name. Returns the steps that a reader would see."""
    for path in root.glob("step-*"):
        load_checkpoint(path, *make(7))
    return [step_of(path) for path in checkpoints(root)]


@pytest.mark.parametrize("die_after", [False, True])
@pytest.mark.parametrize("step", [2, 3], ids=["same-step-again", "next-step"])
def test_a_writer_killed_anywhere_leaves_whole_checkpoints_only(tmp_path, step, die_after):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    number = 0
    died = True
    while died:
        number += 1
        root = tmp_path / str(number)
        save_checkpoint(root, 1, net, optimizer, {})
        save_checkpoint(root, 2, net, optimizer, {})
        died = killed_at(number, lambda root=root: save_checkpoint(root, step, net, optimizer, {}), die_after)
        # The one that is written may be missing; the ones before it may not, and none may be broken.
        assert set(require_whole(root)) >= {1, 2} - {step}
        # The next start sweeps up and goes on.
        remove_leftovers(root)
        save_checkpoint(root, step, net, optimizer, {})
        assert set(require_whole(root)) == {1, 2, step}
        assert not list(root.glob(f"{TEMPORARY}*"))
    assert number > 8  # every one of them was met


@pytest.mark.parametrize("die_after", [False, True])
def test_pruning_killed_anywhere_leaves_whole_checkpoints_only(tmp_path, die_after):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    number, died = 0, True
    while died:
        number += 1
        root = tmp_path / str(number)
        for step in (1, 2, 3):
            save_checkpoint(root, step, net, optimizer, {})
        died = killed_at(number, lambda root=root: prune(root, 1, ()), die_after)
        assert 3 in require_whole(root)
        remove_leftovers(root)
        prune(root, 1, ())
        assert require_whole(root) == [3] and len(list(root.iterdir())) == 1
    assert number > 5


@pytest.mark.parametrize("die_after", [False, True])
def test_a_small_file_replaced_by_a_killed_process_is_the_old_or_the_new_one(tmp_path, die_after):
    path = tmp_path / "config.json"
    number, died = 0, True
    while died:
        number += 1
        path.write_text("old")
        died = killed_at(number, lambda: write_atomic(path, "new, and longer"), die_after)
        assert path.read_text() in ("old", "new, and longer")
    assert path.read_text() == "new, and longer" and number > 2


def test_pruning_keeps_the_last_ones_and_every_milestone(tmp_path):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    milestones = (2, 10, 20)
    for step in range(1, 46):
        save_checkpoint(tmp_path, step, net, optimizer, {})
        prune(tmp_path, 3, milestones)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 10, 20, 40, 43, 44, 45]
    assert not is_milestone(30, milestones) and is_milestone(60, milestones) and not is_milestone(5, ())


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_one_flipped_byte_anywhere_is_named_and_nothing_is_loaded(tmp_path, name):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {})
    good = (path / name).read_bytes()
    other, other_optimizer = make(5)
    before = bits(other)
    for position in range(0, len(good), max(1, len(good) // 60)):
        (path / name).write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        with pytest.raises(UserError, match=f"{name}: missing or damaged.*Delete.*step-00000001"):
            load_checkpoint(path, other, other_optimizer)
    assert bits(other) == before and not other_optimizer.state


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_missing_or_cut_tensor_file_is_named(tmp_path, name):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {})
    good = (path / name).read_bytes()
    (path / name).write_bytes(good[:-1])
    with pytest.raises(UserError, match=f"{name}: missing or damaged"):
        load_checkpoint(path, *make(1))
    (path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing or damaged"):
        load_checkpoint(path, *make(1))


def test_a_folder_without_state_is_no_checkpoint_and_a_damaged_state_is_an_error(tmp_path):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {})
    text = (path / STATE).read_text()
    for broken in (text[: len(text) // 2], "", "{}"):
        (path / STATE).write_text(broken)
        with pytest.raises(UserError, match=r"state\.json: damaged.*Delete"):
            load_checkpoint(path, *make(1))
    (path / STATE).unlink()
    assert checkpoints(tmp_path) == []


def test_a_newer_format_is_refused_with_the_cure(tmp_path):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {})
    raw = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(raw | {"format_version": raw["format_version"] + 1}))
    with pytest.raises(UserError, match=r"checkpoint format 2; this release reads 1\. Update fvlm"):
        load_checkpoint(path, *make(1))


def test_tensors_of_another_shape_are_named_and_nothing_is_loaded(tmp_path):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {})
    wider, wider_optimizer = make(0, width=8)
    before = bits(wider)
    with pytest.raises(UserError, match=r"another architecture.*first\.bias: \(6,\) in the checkpoint, \(8,\) in this"):
        load_checkpoint(path, wider, wider_optimizer)
    assert bits(wider) == before and not wider_optimizer.state


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {})
    other, other_optimizer = make(0)
    other.third = nn.Linear(2, 2)
    del other.frozen
    with pytest.raises(UserError, match=r"frozen: not in this model; third\.bias: not in the checkpoint"):
        load_checkpoint(path, other, other_optimizer)


def test_another_set_of_trained_parameters_is_refused(tmp_path):
    net, optimizer = make(0)
    train(net, optimizer, 1)
    path = save_checkpoint(tmp_path, 1, net, optimizer, {})
    other, _ = make(0)
    only_first = torch.optim.AdamW(other.first.parameters())
    with pytest.raises(UserError, match=r"moments of 4 parameters, the model trains 2.*second\.bias"):
        load_checkpoint(path, other, only_first)
