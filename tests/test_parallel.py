"""Whole steps of several ranks, and a model in parts: real processes joined by gloo, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import torch.distributed as dist
from gloo_ranks import Ranks, loss_of
from reference import tiny_language
from tiny_run import LATENT, batches, make_batch, make_config, make_run
from torch.distributed.tensor import DTensor

from fvlm import presets
from fvlm.config import Config, ScaleConfig, validate
from fvlm.errors import UserError
from fvlm.model import blocks
from fvlm.model.hub import build_model
from fvlm.train.loop import Run
from fvlm.train.loop import train as train_on
from fvlm.train.memory import LiveBytes, Need, estimate, mock_batch
from fvlm.train.optim import freeze_unreached, make_optimizer, parameters_of
from fvlm.train.parallel import clip_gradients, shard_decoder
from fvlm.train.saver import Saver, ShardGiver
from fvlm.train.state import contents_of, verify
from fvlm.train.step import Step, train_step
from fvlm.train.store import LocalStore
from fvlm.train.tensor_parts import gathered, is_shard

STEPS, BROKEN = 5, 3
NO_GRADIENT = "attention.k_proj.bias"
"""Softmax does not see the keys' bias: its true gradient is zero, and Adam makes steps of full length of the noise."""
Tensors = dict[str, torch.Tensor]


def make(folder: Path, strategy: str = "replicate", **changes: Any) -> Run:
    """As `ray_jobs.training` makes it."""
    run = make_run(make_config(folder, **changes))
    if strategy == "replicate":
        return run
    shard_decoder(run.model)
    return Run(run.config, run.plan, run.model, make_optimizer(run.model, run.config.optim), run.metrics, run.clock)


def everything(run: Run) -> Tensors:
    """All that a step changes: weights, moments and counters; of parts, the whole."""
    contents = contents_of(run.step, run.model, run.optimizer, {})
    return {name: tensor.clone() for name, tensor in {**contents.model, **contents.optimizer}.items()}


def unequal(got: Tensors, wanted: Tensors) -> list[str]:
    assert got.keys() == wanted.keys()
    return [name for name in got if not torch.equal(got[name], wanted[name])]


def place() -> tuple[int, int]:
    """Rank and world size."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


Trained = tuple[list[dict[str, float]], Tensors]
"""What every step read, and what they led to."""


def train_by_modules(folder: Path, strategy: str = "replicate", **changes: Any) -> Trained:
    """`train`, with whole layers called as the modules that layers in parts are: then both round alike in bf16, where
    joined weights round otherwise (tests/test_blocks.py)."""
    plain = blocks.is_plain_llama
    blocks.is_plain_llama = lambda layer: False
    try:
        return train(folder, strategy, **changes)
    finally:
        blocks.is_plain_llama = plain


def train(folder: Path, strategy: str = "replicate", attached: bool = True, **changes: Any) -> Trained:
    """STEPS steps, of which number BROKEN has a clip with an infinite latent.

    attached: averaged while gradients are made, as in training; otherwise after the backward pass
    """
    rank, world = place()
    run = make(folder, strategy, **changes)
    rows = []
    for number in range(STEPS):
        before, batch = everything(run), make_batch(number + 1, rank, world, number == BROKEN and rank == world - 1)
        if attached:
            scalars = run.take_step(batch, number)
        else:
            scalars = train_step(run.model, run.optimizer, batch, number, run.config)
        assert number == 0 or (not unequal(everything(run), before)) == (number == BROKEN)
        rows.append({name: value.item() for name, value in scalars.items()})
    return rows, everything(run)


def assert_same_run(got: Trained, wanted: Trained) -> None:
    (rows, tensors), (wanted_rows, wanted_tensors) = got, wanted
    assert [row["train/skipped"] for row in rows] == [float(number == BROKEN) for number in range(STEPS)]
    for row, wanted_row in zip(rows, wanted_rows, strict=True):
        assert row == pytest.approx(wanted_row, rel=1e-5, nan_ok=True)
    for name, tensor in tensors.items():
        if not name.endswith(NO_GRADIENT) and not name.startswith("rng"):
            torch.testing.assert_close(tensor, wanted_tensors[name], rtol=0, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def two(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """What two ranks train that both have the whole model."""
    mine, theirs = ranks.all(2, train, tmp_path_factory.mktemp("two"))
    assert unequal(mine[1], theirs[1]) == []
    return mine


def test_two_ranks_train_as_one_does(two, tmp_path):
    assert_same_run(two, train(tmp_path))


def test_when_gradients_are_averaged_changes_no_bit_of_a_run(two, ranks, tmp_path):
    after, _ = ranks.all(2, train, tmp_path, "replicate", False)
    assert unequal(two[1], after[1]) == []


def train_compiled(folder: Path, strategy: str, **changes: Any) -> Trained:
    """With graphs captured, differentiated and run as they are: all but the C++ compiler, which takes minutes."""
    compile_with = torch.compile
    torch.compile = lambda f, **kw: compile_with(f, backend="aot_eager", **kw)
    try:
        return train(folder, strategy, **changes)
    finally:
        torch.compile = compile_with
        torch._dynamo.reset()


@pytest.mark.parametrize(("strategy", "kind"), [("replicate", "layers"), ("shard", "layers"), ("replicate", "whole")])
def test_two_ranks_train_the_same_when_compiled(two, ranks, tmp_path, strategy, kind):
    mine, _ = ranks.all(2, functools.partial(train_compiled, compile=kind), tmp_path, strategy)
    assert_same_run(mine, two)


# ---- a model in parts


def clipped(folder: Path, strategy: str, memory: str) -> tuple[float, Tensors, int]:
    """-> norm of the gradients before they were clipped, the gradients after it, and elements of this rank's weights"""
    run = make(folder, strategy, memory=memory)
    run.take_step.average.backward(loss_of(run))
    norm = clip_gradients(parameters_of(run.optimizer), 0.5)
    named = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    held = sum(getattr(p, "_local_tensor", p).numel() for p in named.values())
    return norm.item(), {name: gathered(p.grad) for name, p in named.items()}, held


@pytest.mark.parametrize("world, memory", [(2, "speed"), (2, "small"), (3, "speed")])
def test_parts_of_gradients_are_averaged_and_clipped_as_whole_ones_are(ranks, tmp_path, world, memory):
    """Three ranks: their parts are not of equal size."""
    wholes = ranks.all(world, clipped, tmp_path, "replicate", memory)
    parts = ranks.all(world, clipped, tmp_path, "shard", memory)
    assert {norm for norm, _, _ in parts} == {parts[0][0]} and parts[0][0] > 0.5
    for (norm, gradients, held), (wanted_norm, wanted, all_of_it) in zip(parts, wholes, strict=True):
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
        assert held < all_of_it
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision, memory", [("fp32", "speed"), ("fp32", "small"), ("bf16", "speed")])
def test_ranks_that_hold_parts_train_as_those_that_hold_all(ranks, tmp_path, precision, memory):
    work = functools.partial(train_by_modules, precision=precision, memory=memory)
    mine, theirs = ranks.all(2, work, tmp_path, "shard")
    assert unequal(mine[1], theirs[1]) == []
    assert_same_run(mine, ranks.all(2, work, tmp_path)[0])


def gathers_and_layers(folder: Path, memory: str) -> list[list[str]]:
    """Of two steps of a model with three layers, in order: layers whose weights begin to be gathered ("gather 1"), that
    run ("run 1"), and whose backward pass begins ("back 1").
    """
    tiny_run.tiny_language = functools.partial(tiny_language, 3)
    try:
        run = make(folder, "shard", memory=memory)
    finally:
        tiny_run.tiny_language = tiny_language
    layers, seen, steps = list(run.model.llm.model.layers), [], []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # before torch 2.13
    gather = getattr(dist, name)

    def recorded(output: torch.Tensor, part: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        firsts = [local(layer.self_attn.q_proj.weight).flatten() for layer in layers]  # each layer's first weights
        seen.extend(f"gather {i}" for i, w in enumerate(firsts) if torch.equal(w, part[: len(w)]))
        return gather(output, part, *args, **kwargs)

    for i, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, i=i: seen.append(f"run {i}"))
        layer.mlp.register_full_backward_pre_hook(lambda *_, i=i: seen.append(f"back {i}"))
    setattr(dist, name, recorded)
    try:
        for number in range(2):
            seen.clear()
            run.take_step(make_batch(number + 1, *place()), number)
            steps.append(list(seen))
    finally:
        setattr(dist, name, gather)
    return steps


@pytest.mark.parametrize("memory", ["speed", "small"])
def test_a_layer_is_gathered_before_its_neighbour_runs_and_never_across_the_optimizers_step(ranks, tmp_path, memory):
    """Three passes with gradients and one with none; the first layer to run has nobody to gather it ahead."""
    forward = ["gather 0", "gather 1", "run 0", "gather 2", "run 1", "run 2"]
    backward = ["gather 1", "back 2", "gather 0", "back 1", "gather 2", "back 0"]
    for steps in ranks.all(2, gathers_and_layers, tmp_path, memory):
        for seen in steps:
            assert seen[:24] == 4 * forward
            assert [event for event in seen[24:] if "run" not in event] == ["gather 2", *(3 * backward)]


def small_demo(ranks: int, strategy: str) -> Config:
    demo = presets.get("demo")
    data = dataclasses.replace(demo.data, frame_size=56, num_frames=3, global_batch=2 * ranks)
    return dataclasses.replace(demo, data=data, scale=ScaleConfig(workers=ranks, strategy=strategy))  # type: ignore[arg-type]


def held(config: Config) -> tuple[int, int, int]:
    """Bytes of this rank's weights, of its moments, and the most that lives in a step."""
    model = build_model(config.model, LATENT, seed=0)
    freeze_unreached(model, config)
    if config.scale.strategy == "shard":
        shard_decoder(model)
    step = Step(config, model, make_optimizer(model, config.optim))
    batch = mock_batch(config, LATENT, 2, model.llm.config.vocab_size)
    step(batch, 0)
    parameters = [local(p) for p in model.parameters()]
    moments = [local(t) for state in step.optimizer.state.values() for t in state.values()]
    live = LiveBytes()
    for tensor in (*parameters, *model.buffers(), *moments):
        live.add(tensor)
    with live:
        step(batch, 0)
    return sum(p.nbytes for p in parameters), sum(t.nbytes for t in moments), live.peak


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_the_estimate_for_one_of_several_ranks_is_what_it_holds(ranks, strategy):
    config = small_demo(2, strategy)
    need = estimate(config, LATENT, clips=2)
    for weights, moments, peak in ranks.all(2, held, config):
        assert need.weights == pytest.approx(weights, rel=0.01)  # and a few buffers
        assert need.optimizer == pytest.approx(moments, rel=0.01)
        assert peak <= need.peak <= 1.1 * peak


def estimated_by_rank_0(config: Config) -> Need | None:
    """The other rank does not take part, and would not notice a sum that it is asked for."""
    return estimate(config, LATENT, 2) if dist.get_rank() == 0 else None


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_a_rank_estimates_alone_and_what_a_process_without_ranks_does(ranks, strategy):
    config = small_demo(2, strategy)
    assert ranks.all(2, estimated_by_rank_0, config) == [estimate(config, LATENT, 2), None]


def save_as_a_run_does(folder: Path, strategy: str, stop: int, start: str | None = None) -> Tensors:
    """Steps up to `stop`, with the hooks that save. -> what there is in the end"""
    rank, world = place()
    run = make(folder, strategy, max_steps=STEPS, save_every=2)
    store = LocalStore(folder / "checkpoints")
    if start:
        run.restore(folder / "checkpoints" / start)
    with contextlib.ExitStack() as cleanup:
        hook = ShardGiver(run) if rank else cleanup.enter_context(Saver(run, store, lambda text: None))
        train_on(run, batches(run.step + 1, rank=rank, world=world), [hook], lambda: run.step == stop)
        hook.save_now()
    return everything(run)


def loaded(folder: Path, strategy: str, name: str) -> Tensors:
    run = make(folder, strategy, max_steps=STEPS, save_every=2)
    run.restore(folder / "checkpoints" / name)
    return everything(run)


def test_a_checkpoint_of_parts_is_one_of_the_whole_and_the_other_way_round(ranks, tmp_path):
    (saved, _) = ranks.all(2, save_as_a_run_does, tmp_path, "shard", 3)
    assert LocalStore(tmp_path / "checkpoints").names() == ["step-00000002", "step-00000003"]
    verify(tmp_path / "checkpoints" / "step-00000003")
    assert unequal(loaded(tmp_path, "replicate", "step-00000003"), saved) == []
    alone = save_as_a_run_does(tmp_path, "replicate", 4, "step-00000003")
    assert unequal(alone, saved)
    for again in ranks.all(2, loaded, tmp_path, "shard", "step-00000004"):
        assert unequal(again, alone) == []


def test_one_rank_holds_everything_whatever_the_strategy(tmp_path):
    assert not any(is_shard(p) for p in make(tmp_path, "shard").model.parameters())


def test_parts_cannot_be_compiled_into_one_program():
    config = presets.get("smollm2_1p7b")
    config = dataclasses.replace(config, scale=dataclasses.replace(config.scale, strategy="shard"))
    assert validate(config)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, compile="whole"))
    with pytest.raises(UserError, match=r"Use --train\.compile layers"):
        validate(config)
