"""Gradients averaged while others are made: real processes joined by gloo, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import loss_of
from tiny_run import make_config, make_run
from torch import nn

from fvlm.train.optim import parameters_of
from fvlm.train.parallel import GradientAverage
from fvlm.train.step import make_losses

BUCKET = 3000
"""Elements: the model of these tests has about ten buckets of them."""


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


def test_one_rank_has_nothing_attached_to_its_gradients(tmp_path):
    run = make_run(make_config(tmp_path))
    assert run.take_step.average
    assert [name for name, p in run.model.named_parameters() if p._post_accumulate_grad_hooks] == []
