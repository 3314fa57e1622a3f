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
    """Return this rank's part of `tensor` on the device of `like`, where that is a shard; all of `tensor` otherwise.

    Of a tensor that is mapped from a file only the part is read, and only the part goes to the device.
    """
    if not is_shard(like):
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    mesh, local = like.device_mesh, like.to_local()
    assert like.placements == (Shard(0),)  # what `shard_decoder` makes
    begin = min(mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()), tensor.shape[0])
    part = tensor.narrow(0, begin, local.shape[0]).to(local.device, copy=True)
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=tensor.shape, stride=like.stride())
