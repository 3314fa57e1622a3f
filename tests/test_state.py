"""Checkpoints: what is in one, its round trip to the last bit, and every way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from runs import PLAN, Net, advance, bits, make, make_run, save, seal, train, vouch
from safetensors.torch import load_file, save_file
from torch import nn

from fvlm.data.plan import Plan
from fvlm.errors import UserError
from fvlm.train.loop import Run
from fvlm.train.state import (
    MODEL,
    OPTIMIZER,
    STATE,
    DamagedCheckpoint,
    checkpoints,
    load_checkpoint,
    step_of,
    verify,
)
from fvlm.train.tensor_file import PIECE, TensorFile

FILES = (MODEL, OPTIMIZER, STATE)


# ---- the round trip


@pytest.mark.parametrize("width", [6, 4])
def test_training_goes_on_to_the_last_bit_after_a_round_trip(tmp_path, width):
    net, optimizer = make(0, width)
    train(net, optimizer, 3)
    path = save(tmp_path, 3, net, optimizer, {"metrics": {"ratio": [1.5, 0.1]}})
    saved = bits(net, optimizer)
    train(net, optimizer, 4)

    other, other_optimizer = make(99, width)
    loaded = load_checkpoint(path, other, other_optimizer)
    assert loaded["step"] == step_of(path) == 3 and loaded["metrics"] == {"ratio": [1.5, 0.1]}
    assert bits(other, other_optimizer) == saved
    train(other, other_optimizer, 4)
    assert bits(other, other_optimizer) == bits(net, optimizer)


def test_no_file_of_a_checkpoint_needs_pickle(tmp_path):
    path = trained(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    json.loads((path / STATE).read_text())
    for name in (MODEL, OPTIMIZER):
        with safetensors.safe_open(path / name, "pt") as file:  # a format of raw numbers; it cannot hold code
            assert len(list(file.keys())) > 0


def test_our_tensor_file_is_the_librarys_format_for_every_kind_and_size_of_tensor(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "numbers": torch.arange(5),
        "view": torch.randn(6, 4).t()[1:, ::2],
        "large": torch.randn(PIECE // 4 + 999),
        "middling": torch.randn(50_000),
    }
    file = TensorFile(tensors)
    content = b"".join(bytes(piece) for piece in file.pieces())
    (tmp_path / "ours").write_bytes(content)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], theirs[name])
    assert file.size == len(content) and file.sha256() == hashlib.sha256(content).hexdigest()
    assert max(len(piece) for piece in file.pieces()) <= 2 * PIECE


# ---- damage


def trained(folder: Path, state: dict[str, Any] | None = None) -> Path:
    """A checkpoint of step 1."""
    net, optimizer = make(0)
    train(net, optimizer, 1)
    return save(folder, 1, net, optimizer, state or {})


def refuse(path: Path, error: type[UserError], *words: str, net: nn.Module | None = None) -> None:
    """Loading `path` raises `error` with these words and changes nothing of model, optimizer or generator."""
    other, optimizer = make(5)
    if net is not None:
        other, optimizer = net, torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    else:
        train(other, optimizer, 1)
    before = bits(other, optimizer)
    with pytest.raises(UserError) as raised:
        load_checkpoint(path, other, optimizer)
    assert type(raised.value) is error, raised.value
    for word in words:
        assert word in str(raised.value)
    assert bits(other, optimizer) == before


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_one_flipped_byte_anywhere_in_the_tensors_is_named_and_nothing_is_loaded(tmp_path, name):
    path = trained(tmp_path)
    good = (path / name).read_bytes()
    draw = random.Random(1)
    for position in sorted(draw.sample(range(len(good)), 80)):
        flipped = bytes([good[position] ^ draw.randrange(1, 256)])
        (path / name).write_bytes(good[:position] + flipped + good[position + 1 :])
        refuse(path, DamagedCheckpoint, str(path / name), "missing or damaged", "SHA-256", f"Delete {path}")


def test_one_flipped_byte_anywhere_in_the_state_is_named_and_nothing_is_loaded(tmp_path):
    path = trained(tmp_path, {"metrics": {"latest": {"train/loss": 0.125}}, "note": "x"})
    good = (path / STATE).read_bytes()
    draw = random.Random(2)
    for position in range(len(good)):
        flip = draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        (path / STATE).write_bytes(good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :])
        with pytest.raises(DamagedCheckpoint, match=r"state\.json: missing or damaged"):
            verify(path)
    refuse(path, DamagedCheckpoint, str(path / STATE), f"Delete {path}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_named(tmp_path, name):
    path = trained(tmp_path)
    good = (path / name).read_bytes()
    for length in (len(good) - 1, len(good) // 2, 1, 0):
        (path / name).write_bytes(good[:length])
        refuse(path, DamagedCheckpoint, str(path / name), "missing or damaged")
    (path / name).write_bytes(good + b"\n")
    refuse(path, DamagedCheckpoint, str(path / name), "missing or damaged")
    (path / name).unlink()
    refuse(path, DamagedCheckpoint, str(path / name), "missing or damaged")


def test_a_folder_without_state_is_no_checkpoint(tmp_path):
    (trained(tmp_path) / STATE).unlink()
    assert checkpoints(tmp_path) == []


def test_a_renamed_checkpoint_is_not_taken_for_one_of_another_step(tmp_path):
    path = trained(tmp_path).rename(tmp_path / "step-00000009")
    refuse(path, DamagedCheckpoint, "it is of step 1; the folder was renamed")


# ---- whole, but not for us


def test_a_newer_format_is_refused_with_the_cure(tmp_path):
    path = trained(tmp_path)
    seal(path, json.loads((path / STATE).read_text()) | {"format_version": 3})
    refuse(path, UserError, str(path), "checkpoint format 3; this release reads 1 to 2. Update fvlm")
    (path / STATE).write_text(json.dumps({"format_version": 3, "layout": "another"}))  # one that seals in its own way
    refuse(path, UserError, "checkpoint format 3; this release reads 1 to 2. Update fvlm")


def test_tensors_of_another_shape_are_named_and_nothing_is_loaded(tmp_path):
    torch.manual_seed(0)
    words = "another architecture", "first.bias: (6,) in the checkpoint, (8,) in this"
    refuse(trained(tmp_path), UserError, *words, net=Net(width=8))


def test_tensors_of_another_type_are_named_and_nothing_is_loaded(tmp_path):
    words = "another architecture", "first.bias: (6,) in the checkpoint, (6,) torch.float16 in this"
    refuse(trained(tmp_path), UserError, *words, net=Net().half())


def test_tensors_that_are_missing_or_left_over_are_named(tmp_path):
    other = Net()
    other.third = nn.Linear(2, 2)
    del other.frozen
    refuse(trained(tmp_path), UserError, "frozen: not in this model; third.bias: not in the checkpoint", net=other)


def test_another_set_of_trained_parameters_is_refused(tmp_path):
    path = trained(tmp_path)
    other, _ = make(0)
    before = bits(other)
    with pytest.raises(UserError, match=r"moments of 4 parameters, the model trains 2.*second\.bias"):
        load_checkpoint(path, other, torch.optim.AdamW(other.first.parameters()))
    assert bits(other) == before


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.update({"momentum/first.bias": torch.zeros(6)}), "momentum/first.bias (torch.float32) is none of"),
        (lambda t: t.update({"exp_avg/third.bias": torch.zeros(6)}), "exp_avg/third.bias (6,) belongs to no parameter"),
        (lambda t: t.update({"exp_avg/first.bias": torch.zeros(5)}), "exp_avg/first.bias (5,) belongs to no parameter"),
        (lambda t: t.update({"rng/numpy": torch.zeros(5)}), "rng/numpy (5,) belongs to no parameter"),
        (lambda t: t.update({"step/first.bias": torch.tensor(1)}), "step/first.bias (torch.int64) is none of"),
        (lambda t: t.pop("exp_avg_sq/first.bias"), "exp_avg_sq/first.bias is missing"),
        (lambda t: t.pop("rng/torch"), "rng/torch is missing"),
        (lambda t: [t.pop(f"{k}/second.bias") for k in ("step", "exp_avg", "exp_avg_sq")], "moments of 3 parameters"),
    ],
)  # fmt: skip
def test_a_foreign_or_missing_tensor_of_the_optimizer_is_named(tmp_path, spoil, message):
    path = trained(tmp_path)
    tensors = load_file(path / OPTIMIZER)
    spoil(tensors)
    save_file(tensors, path / OPTIMIZER)
    vouch(path)
    refuse(path, UserError, str(path / OPTIMIZER), message)


# ---- the state of a run


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Run, Path]:
    """A run of five steps, and its checkpoint."""
    run = make_run(tmp_path, ratio_window=3)
    advance(run, 5)
    (run.config.run_dir / "wandb_id").write_text("ab12\n")
    run.clock.trained_s = 12.5
    return run, run.save(tmp_path / "checkpoints")


def test_a_run_gets_back_everything_that_is_shown_or_decides_its_future(stored, tmp_path):
    run, path = stored
    saved, metrics = bits(run.model, run.optimizer), run.metrics.state_dict()
    advance(run, 3)
    other = make_run(tmp_path, seed=9)
    other.restore(path)
    assert other.step == 5 and other.clock.trained_s == 12.5 and other.plan == run.plan
    assert other.metrics.state_dict() == metrics
    assert bits(other.model, other.optimizer) == saved
    state = json.loads((path / STATE).read_text())
    assert state["wandb"] == {"id": "ab12", "step": 5} and state["world_size"] == 1
    assert state["metrics"]["best"]["caption/ratio"] == {"value": 1.5, "step": 5}  # (1.375 + 1.5 + 1.625) / 3
    advance(other, 3)
    assert other.metrics.state_dict() == run.metrics.state_dict()
    assert bits(other.model, other.optimizer) == bits(run.model, run.optimizer)


def refuse_run(path: Path, run: Run, *words: str) -> None:
    before, metrics = bits(run.model, run.optimizer), run.metrics.state_dict()
    with pytest.raises(UserError) as raised:
        run.restore(path)
    assert not isinstance(raised.value, DamagedCheckpoint)
    for word in (str(path), *words):
        assert word in str(raised.value)
    assert bits(run.model, run.optimizer) == before and run.metrics.state_dict() == metrics and run.step == 0


KEYS = ("plan", "origin", "dataset", "metrics", "trained_s", "wandb", "world_size", "config", "versions")
SPOILT: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    *[(lambda s, key=key: s.pop(key), f"missing keys ['{key}']") for key in KEYS],
    *[(lambda s, key=key: s.update({key: None}), f"{key} is None") for key in KEYS],
    (lambda s: s.update(ema=1), "foreign keys ['ema']"),
    (lambda s: s.update(trained_s="1"), "trained_s is '1', not a float"),
    (lambda s: s.update(origin=True), "origin is True, not a int"),
    (lambda s: s["wandb"].pop("id"), "wandb: missing keys ['id']"),
    (lambda s: s["wandb"].update(id=3), "id is a string or null"),
    (lambda s: s["metrics"].pop("windows"), "metrics: missing keys ['windows']"),
    (lambda s: s["metrics"].update(more={}), "metrics: missing keys [], foreign keys ['more']"),
    (lambda s: s["metrics"]["windows"].pop("recon/ratio"), "metrics.windows: missing keys ['recon/ratio']"),
    (lambda s: s["metrics"]["windows"].update({"recon/ratio": ["1"]}), "metrics.windows.recon/ratio is not a list of"),
    (lambda s: s["metrics"]["latest"].update(step="5"), "metrics.latest.step is '5', not a number"),
    (lambda s: s["metrics"]["best"].update({"x/ratio": {}}), "metrics.best: foreign keys ['x/ratio']"),
    (lambda s: s["metrics"]["best"]["recon/ratio"].pop("step"), "metrics.best.recon/ratio: missing keys ['step']"),
]


@pytest.mark.parametrize("spoil, message", SPOILT, ids=[message for _, message in SPOILT])
def test_a_missing_foreign_or_ill_typed_key_of_the_state_is_named_and_never_a_default(stored, tmp_path, spoil, message):
    _, path = stored
    state = json.loads((path / STATE).read_text())
    spoil(state)
    seal(path, state)
    refuse_run(path, make_run(tmp_path, seed=9), STATE, message, "another --run name")


def test_another_plan_config_or_dataset_is_refused_with_the_difference(stored, tmp_path):
    _, path = stored
    other = make_run(tmp_path, seed=9)
    other.config = dataclasses.replace(other.config, optim=dataclasses.replace(other.config.optim, lr=0.5))
    refuse_run(path, other, "optim.lr: 0.001 -> 0.5")
    other = make_run(tmp_path, seed=9)
    other.plan = Plan(PLAN.shard_rows, 4, 0, 8, 8, 8, "other clips")
    refuse_run(path, other, "dataset: another one")
    other = make_run(tmp_path, seed=9)
    other.plan = Plan(PLAN.shard_rows, 4, 0, 8, 4, 8, "clips")
    refuse_run(path, other, "plan: another order of the same clips")
    refuse_run(path, make_run(tmp_path, seed=9, width=8), "another architecture")


def test_what_may_change_within_a_run_may_change(stored, tmp_path):
    _, path = stored
    other = make_run(tmp_path, seed=9, max_steps=7, ratio_window=2, checkpoint_dir="/elsewhere", keep_last=1)
    other.restore(path)
    assert other.step == 5


def test_a_checkpoint_of_the_first_format_still_loads(stored, tmp_path):
    run, path = stored
    state = json.loads((path / STATE).read_text())
    for key in ("sha256", "wandb", "world_size"):
        del state[key]
    del state["metrics"]["best"]
    (path / STATE).write_text(json.dumps(state | {"format_version": 1}, indent=2) + "\n")
    other = make_run(tmp_path, seed=9)
    other.restore(path)
    assert other.step == 5 and bits(other.model, other.optimizer) == bits(run.model, run.optimizer)
    assert other.metrics.state_dict()["windows"] == run.metrics.state_dict()["windows"]


def test_scalars_that_nobody_has_read_yet_may_not_be_lost_in_a_checkpoint(tmp_path):
    run = make_run(tmp_path)
    advance(run)
    run.metrics.add(2, {"caption/ratio": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="drain"):
        run.save(tmp_path)
    assert checkpoints(tmp_path) == []
