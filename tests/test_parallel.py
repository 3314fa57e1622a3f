"""Gradients averaged while others are made, and a model in parts: real processes joined by gloo, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_run import LATENT, batches, make_batch, make_config, make_run
from torch import nn
from torch.distributed.tensor import DTensor

from fvlm import presets
from fvlm.config import Config, ScaleConfig, validate
from fvlm.errors import UserError
from fvlm.model.hub import build_model
from fvlm.model.objective import compute_losses
from fvlm.train.loop import Run
from fvlm.train.loop import train as train_on
from fvlm.train.memory import LiveBytes, estimate, mock_batch
from fvlm.train.optim import freeze_unreached, make_optimizer, parameters_of
from fvlm.train.parallel import GradientAverage, clip_gradients, shard_decoder
from fvlm.train.saver import Saver, ShardGiver
from fvlm.train.state import contents_of, verify
from fvlm.train.step import Step, make_losses, train_step
from fvlm.train.store import LocalStore
from fvlm.train.tensor_parts import gathered, is_shard

STEPS, BROKEN = 5, 3
BUCKET = 3000
"""Elements: the model of these tests has about ten buckets of them."""
NO_GRADIENT = "attention.k_proj.bias"
"""Softmax does not see the keys' bias: its true gradient is zero, and Adam makes steps of full length of the noise."""


# ---- ranks


class Ranks:
    """Processes that form a process group and do what they are told, all the same at the same time."""

    def __init__(self) -> None:
        self._ranks = [ProcessPoolExecutor(1, mp.get_context("spawn")) for _ in range(4)]
        self._world = 0

    def all(self, world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        """-> what `work` returned on every one of `world` ranks"""
        if self._world != world:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            self._each(self._world, leave_group)
            for rank, joined in enumerate([r.submit(join_group, i, world, port) for i, r in self._first(world)]):
                assert joined.result(250) == rank
            self._world = world
        return self._each(world, work, *args)

    def _first(self, count: int) -> list[tuple[int, ProcessPoolExecutor]]:
        return list(enumerate(self._ranks[:count]))

    def _each(self, count: int, work: Callable[..., Any], *args: Any) -> list[Any]:
        return [future.result(250) for future in [rank.submit(work, *args) for _, rank in self._first(count)]]

    def close(self) -> None:
        for rank in self._ranks:
            rank.shutdown(wait=False)


def join_group(rank: int, world: int, port: int) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    return dist.get_rank()


def leave_group() -> None:
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    made.close()


# ---- the sums


def loss_of(run: Run) -> torch.Tensor:
    """Of other clips on every rank."""
    return compute_losses(run.model, make_batch(1 + dist.get_rank()), run.config.objective).loss


def unequal_gradients(folder: Path, memory: str) -> list[str]:
    """Parameters whose gradient, averaged while others are made, has other bits than the plain formula gives."""
    run = make_run(make_config(folder, memory=memory))
    make_losses(run.config, run.model)
    run.model.encoder.dino.embeddings.mask_token.requires_grad_(True)  # one that never has a gradient
    named = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    loss_of(run).backward()
    plain = {name: p.grad for name, p in named.items() if p.grad is not None}
    for bucket in cut_by_hand(plain):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))
    run.optimizer.zero_grad()
    GradientAverage(named.values(), BUCKET).attach().backward(loss_of(run))
    assert named["encoder.dino.embeddings.mask_token"].grad is None
    return [name for name in plain if not torch.equal(plain[name], named[name].grad)]


def cut_by_hand(gradients: dict[str, torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for gradient in list(gradients.values())[::-1]:
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@pytest.mark.parametrize("world, memory", [(4, "speed"), (2, "speed"), (2, "small")])
def test_a_gradient_averaged_while_others_are_made_has_the_bits_of_one_averaged_afterwards(
    ranks, tmp_path, world, memory
):
    for unequal in ranks.all(world, unequal_gradients, tmp_path, memory):
        assert unequal == []


def events(folder: Path) -> list[str]:
    """What happens in a backward pass, in order: sums that begin, and the gradients of the layer that comes last."""
    run, seen = make_run(make_config(folder)), []
    all_reduce = dist.all_reduce

    def recorded(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("async_op"):
            seen.append(f"sum of {tensor.numel()}")
        return all_reduce(tensor, *args, **kwargs)

    first = run.model.encoder.dino.embeddings.patch_embeddings.projection.weight
    first.register_post_accumulate_grad_hook(lambda p: seen.append("the last gradient"))
    average = GradientAverage(parameters_of(run.optimizer), BUCKET).attach()
    loss = loss_of(run)
    dist.all_reduce = recorded
    try:
        average.backward(loss)
    finally:
        dist.all_reduce = all_reduce
    return seen


def test_sums_begin_before_the_backward_pass_ends_in_the_same_order_everywhere(ranks, tmp_path):
    mine, theirs = ranks.all(2, events, tmp_path)
    assert mine == theirs
    sums = [event for event in mine if event != "the last gradient"]
    assert len(sums) > 6 and mine.index("the last gradient") >= len(sums) // 2


def cross_over() -> list[list[float]]:
    """Two parameters, whose gradients come in another order on every rank."""
    rank = dist.get_rank()
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))
    early, late = (p, q) if rank else (q, p)  # the graph's later part has its gradients earlier
    x = (early * 2).sum()
    loss = (rank + 1) * (x + (late * x.detach().add(3)).sum())
    order: list[int] = []
    for parameter in (p, q):
        parameter.register_post_accumulate_grad_hook(lambda made: order.append(made.numel()))
    GradientAverage([p, q], 1).attach().backward(loss)
    assert order == ([5, 3] if rank else [3, 5])
    return [p.grad.tolist(), q.grad.tolist()]


def test_ranks_whose_gradients_come_in_another_order_sum_the_same_ones(ranks):
    """Rank 0: d/dp = 3, d/dq = 2. Rank 1, times 2: d/dp = 4, d/dq = 6."""
    assert ranks.all(2, cross_over) == [[[3.5] * 3, [4.0] * 5]] * 2


def add_late() -> str:
    """The message of the error when a gradient is added to while its sum is on the way."""
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(5))
    average = GradientAverage([q, p], 1).attach()
    (2 * p.sum()).backward()  # another backward pass, which averages nothing
    assert p.grad.tolist() == [2.0] * 3
    p.grad = None
    more, x = p.sum(), q.sum()
    q.register_post_accumulate_grad_hook(lambda _: more.backward())
    try:
        average.backward(x + (p * x.detach()).sum())
    except RuntimeError as error:
        return str(error)
    return "none"


def test_a_gradient_that_is_added_to_after_its_sum_began_is_an_error(ranks):
    for error in ranks.all(2, add_late):
        assert "a graph must reach it once" in error


# ---- whole steps


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
    work = functools.partial(train, precision=precision, memory=memory)
    mine, theirs = ranks.all(2, work, tmp_path, "shard")
    assert unequal(mine[1], theirs[1]) == []
    assert_same_run(mine, ranks.all(2, work, tmp_path)[0])


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
