"""Training on several ranks: gradients averaged while others are made, and a language model in shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fvlm.model.blocks import Blocks, decoder_block
from fvlm.model.foveated import FoveatedVLM
from fvlm.ranks import world_size
from fvlm.train.tensor_parts import is_shard

BUCKET_ELEMENTS = 8 << 20
"""Gradients are all-reduced in buckets of about 32 MiB."""


class GradientAverage:
    """Makes every gradient its mean over all ranks; those of shards are left out, FSDP does them.

    Buckets are cut in reverse parameter order, which is about the order in which gradients come, and always at the same
    places: DistributedDataParallel rebuilds its buckets after the first step, which changes the order of summation
    between a run and its resumption; here it never changes. For the same reason it makes no difference to any bit when
    a bucket's sum begins, and hence whether hooks were attached.

    Every rank begins the sums in the order of the buckets, whatever order its gradients come in. A parameter without a
    gradient is left out, so all ranks must lack the same ones (`freeze_unreached` sees to it that none does); its
    bucket and those behind it are then summed after the backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_elements: int = BUCKET_ELEMENTS):
        self._buckets = _cut([p for p in parameters if not is_shard(p)], bucket_elements)
        self._missing: list[set[nn.Parameter]] = []
        """Of each bucket, the parameters whose gradient the backward pass has not made yet; empty outside of one."""
        self._begun = 0
        """Buckets that need no attention any more: the first so many."""
        self._sums: list[tuple[torch.Tensor, dist.Work]] = []

    def attach(self) -> Self:
        """From now on begin a bucket's sum as soon as the backward pass has made its gradients. For good.

        Where one program makes all gradients (`train.compile` "whole") they come at the end, and nothing overlaps.
        With one rank nothing is attached.
        """
        if world_size() == 1:
            return self
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._made, index))
        return self

    def backward(self, loss: torch.Tensor) -> None:
        """`loss.backward()`, after which gradients are averaged. They must have been None. All ranks call it."""
        if world_size() == 1:
            loss.backward()
            return
        self._missing = [set(bucket) for bucket in self._buckets]
        self._begun, self._sums = 0, []
        loss.backward()
        self._missing = []
        while self._begun < len(self._buckets):
            self._begin()
        for flat, work in self._sums:
            work.wait()
            flat /= world_size()
        self._sums = []

    def _made(self, index: int, parameter: nn.Parameter) -> None:
        if not self._missing:
            return  # somebody else's backward pass
        if index < self._begun:
            raise RuntimeError("a gradient was added to after its average had begun; a graph must reach it once")
        self._missing[index].discard(parameter)
        while self._begun < len(self._buckets) and not self._missing[self._begun]:
            self._begin()

    def _begin(self) -> None:
        """Begin the sum of the next bucket, in which its gradients live from now on."""
        reached = [p for p in self._buckets[self._begun] if p.grad is not None]
        self._begun += 1
        if not reached:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in reached if p.grad is not None])
        for parameter, part in zip(reached, flat.split([p.numel() for p in reached]), strict=True):
            parameter.grad = part.view_as(parameter)
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None  # that is for processes outside of the group
        self._sums.append((flat, work))


def _cut(parameters: list[nn.Parameter], elements: int) -> list[list[nn.Parameter]]:
    """Buckets of at least `elements` elements but for the last, in reverse parameter order."""
    buckets: list[list[nn.Parameter]] = []
    size = elements
    for parameter in reversed(parameters):
        if size >= elements:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.numel()
    return buckets


def shard_decoder(model: FoveatedVLM, device: torch.device | None = None) -> None:
    """Give every rank its part of each layer of the language model, of its gradients and its moments (FSDP2).

    For a language model that is too large to be on every rank, `scale.strategy` "shard". A layer's weights are gathered
    while the layer before it runs (in the backward pass, the one behind it), and dropped when it has run. They are
    gathered in float32, so results are those of whole layers. Everything else stays on every rank. With one rank
    nothing is done.

    device: where the model will be, when it has no contents yet (`fvlm.train.sharded`); otherwise where it is

    A layer is reached by several passes, and autograd hands out its gradient when the backward pass has left the first
    of them. Till then its parts are kept whole on every rank, in bfloat16 under autocast; so are autocast's copies of
    the weights from the forward pass on. What is saved is the float32 weights, gradients and moments.
    """
    if world_size() == 1:
        return
    decoder = model.llm.model
    layers = list(decoder.layers)
    elsewhere = set(model.parameters()) - {p for layer in layers for p in layer.parameters()}
    mesh = init_device_mesh((device or model.q_static.device).type, (world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # One root, so that all layers have the same streams and the same order. It has no parameters of its own.
    root = fully_shard(decoder, mesh=mesh, ignored_params=elsewhere)
    _gather_ahead(layers)
    # Nobody calls the root itself, which is when FSDP would find its layers. The first of them sees to it instead.
    layers[0].register_forward_pre_hook(lambda *_: root._get_fsdp_state()._lazy_init(), prepend=True)


def _gather_ahead(layers: list[Any]) -> None:
    """Let each layer begin to gather the next one's weights before it runs, and the one's before in a backward pass.

    Not from the last layer to the first, though a further pass may follow: what is gathered and not used before the
    optimizer's step would be used after it, with the old weights. In the backward pass FSDP itself drops what was not
    used, and by itself goes from the first layer to the last one of the pass before.
    """
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])


def compiled_in_parts(model: FoveatedVLM, compiled: Blocks) -> Blocks:
    """`compiled`, or, for a model whose decoder is in shards, what does the same: hooks that gather a layer's weights
    cannot be inside of a program, so there each layer's own forward becomes one, which all layers share.
    """
    layers = list(model.llm.model.layers)
    if not any(is_shard(p) for layer in layers for p in layer.parameters()):
        return compiled
    program = torch.compile(_forward, fullgraph=True, dynamic=False)
    for layer in layers:
        layer.forward = partial(program, layer)
    return replace(compiled, decoder=decoder_block)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale all gradients down to a global norm of `limit`, if they exceed it. -> the norm, the same on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    if not shards:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    replicated = [g for g in gradients if not is_shard(g)]
    square = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square)
    norm = (torch.nn.utils.get_total_norm(replicated).square() + square).sqrt()
    torch._foreach_mul_(replicated + shards, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
