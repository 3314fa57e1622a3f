"""Training on several ranks: the averaging of gradients, begun while the backward pass still makes them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Self

import torch
import torch.distributed as dist
from torch import nn

from fvlm.model.objective import world_size

BUCKET_ELEMENTS = 8 << 20
"""Gradients are all-reduced in buckets of about 32 MiB."""


class GradientAverage:
    """Makes every gradient its mean over all ranks.

    Buckets are cut in reverse parameter order, which is about the order in which gradients come, and always at the same
    places: DistributedDataParallel rebuilds its buckets after the first step, which changes the order of summation
    between a run and its resumption; here it never changes. For the same reason it makes no difference to any bit when
    a bucket's sum begins, and hence whether hooks were attached.

    Every rank begins the sums in the order of the buckets, whatever order its gradients come in. A parameter without a
    gradient is left out, so all ranks must lack the same ones (`freeze_unreached` sees to it that none does); its
    bucket and those behind it are then summed after the backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_elements: int = BUCKET_ELEMENTS):
        self._buckets = _cut(list(parameters), bucket_elements)
        self._missing: list[set[nn.Parameter]] = []
        """Of each bucket, the parameters whose gradient the backward pass has not made yet; empty outside of one."""
        self._begun = 0
        """Buckets that need no attention any more: the first so many."""
        self._sums: list[tuple[torch.Tensor, dist.Work]] = []

    def attach(self) -> Self:
        """From now on begin a bucket's sum as soon as the backward pass has made its gradients. For good.

        Where one program makes all gradients (`train.compile` "whole") they come at the end, and nothing overlaps.
        """
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
