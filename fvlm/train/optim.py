"""AdamW, its schedule, and the averaging of gradients over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from fvlm.config import Config, OptimConfig
from fvlm.model.foveated import FoveatedVLM

BUCKET_ELEMENTS = 8 << 20
"""Gradients are all-reduced in buckets of about 32 MiB."""


def freeze_unreached(model: FoveatedVLM, config: Config) -> None:
    """Switch off gradients of parameters that no loss reaches, so that none is expected, reduced or decayed."""
    embeddings = model.encoder.dino.embeddings
    if embeddings.mask_token is not None:
        embeddings.mask_token.requires_grad_(False)
    if not config.objective.caption_start:
        model.video_end_token.requires_grad_(False)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """One group: weight decay on everything, as the experiment has always run (biases and norms included).

    Fused on a CPU too: only that kind can leave a step out without asking the host (`update`).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate(0, config),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def update(optimizer: torch.optim.Optimizer, skip: torch.Tensor) -> None:
    """One step of the optimizer, or none at all where `skip` is 1: parameters, moments and counters stay, bit for bit.

    skip: float32 scalar on the device of the parameters, 0 or 1. Nobody reads it on the host: a fused AdamW looks at
    `found_inf` in its kernels, which is how torch's own GradScaler leaves a step out.
    """
    optimizer.found_inf = skip  # type: ignore[attr-defined]  # an attribute that torch's classes look for
    optimizer.step()


def learning_rate(step: int, config: OptimConfig) -> float:
    """Of step number `step`, from 0: linear warm-up that ends at step `warmup_steps` - 1, then constant."""
    if config.warmup_steps == 0:
        return config.lr
    return config.lr * min(1.0, (step + 1) / config.warmup_steps)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all ranks.

    Buckets are cut in parameter order, always at the same places: DistributedDataParallel rebuilds its buckets after
    the first step, which changes the order of summation between a run and its resumption; here it never changes.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    bucket: list[torch.Tensor] = []
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        if i == len(gradients) - 1 or sum(g.numel() for g in bucket) >= BUCKET_ELEMENTS:
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for g, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(mean.view_as(g))
            bucket = []
