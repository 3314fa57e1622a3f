"""AdamW and its schedule."""

from __future__ import annotations

import torch
from torch import nn

from fvlm.config import Config, OptimConfig
from fvlm.model.foveated import FoveatedVLM
from fvlm.train.tensor_parts import is_shard


def freeze_unreached(model: FoveatedVLM, config: Config) -> None:
    """Switch off gradients of parameters that no loss reaches, so that none is expected, reduced or decayed."""
    embeddings = model.encoder.dino.embeddings
    if embeddings.mask_token is not None:
        embeddings.mask_token.requires_grad_(False)
    if not config.objective.caption_start:
        model.video_end_token.requires_grad_(False)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on everything, as the experiment has always run (biases and norms included).

    Shards are a group of their own, for no other reason than that a fused kernel takes tensors of one kind.

    Fused on a CPU too: only that kind can leave a step out without asking the host (`update`).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    kinds = ([p for p in parameters if is_shard(p) == sharded] for sharded in (False, True))
    return torch.optim.AdamW(
        [{"params": kind} for kind in kinds if kind],
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


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's moments and counters now, zeros as its first step would make them. Nothing where they are there.

    No bit of a later step changes. There must be no gradients; for a moment there are some of zeros.
    """
    parameters = parameters_of(optimizer)
    if all(parameter in optimizer.state for parameter in parameters):
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    update(optimizer, torch.ones((), device=parameters[0].device))  # left out, so only the state is made
    optimizer.zero_grad(set_to_none=True)


def learning_rate(step: int, config: OptimConfig) -> float:
    """Of step number `step`, from 0: linear warm-up that ends at step `warmup_steps` - 1, then constant."""
    if config.warmup_steps == 0:
        return config.lr
    return config.lr * min(1.0, (step + 1) / config.warmup_steps)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
