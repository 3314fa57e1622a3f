"""Tensors of which every rank has a part (DTensor, `scale.strategy` "shard"), and tensors that are whole."""

from __future__ import annotations

from typing import Any

import torch


def is_shard(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; its module takes a second to import


def gathered(tensor: Any) -> torch.Tensor:
    """All of it. Of a shard, all ranks must ask together."""
    whole: torch.Tensor = tensor.full_tensor() if is_shard(tensor) else tensor
    return whole


def part_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """This rank's part of `tensor`, which every rank has whole, where `like` is a shard; all of it otherwise."""
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
