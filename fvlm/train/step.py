"""One optimizer step."""

from __future__ import annotations

import torch

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.objective import Losses, compute_losses
from fvlm.train.optim import average_gradients, learning_rate

Scalars = dict[str, torch.Tensor]
"""Metrics of one step, still on the device: reading one would make the host wait for the step."""


def is_reading(step: int, config: Config) -> bool:
    """Whether the step with this number (from 0) reads the coarse losses too."""
    return step % config.objective.coarse_every == 0


def train_step(
    model: FoveatedVLM, optimizer: torch.optim.Optimizer, batch: Batch, step: int, config: Config
) -> Scalars:
    """Forward, backward, average over ranks, clip, update. Changes model and optimizer in place.

    `batch` is on the model's device. `step` counts from 0; it sets the learning rate and whether the losses of the
    coarse tokens are read.
    """
    device = model.q_static.device
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config.optim)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        losses = compute_losses(model, batch, config.objective, is_reading(step, config))
    losses.loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.optim.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return scalars(losses, config.objective.lambda_recon) | {"train/grad_norm": norm.detach()}


@torch.no_grad()
def scalars(losses: Losses, lambda_recon: float) -> Scalars:
    """Losses under the names that people's W&B pages know: caption/iter_1, ..., caption/loss_fine, caption/ratio."""
    out: Scalars = {}
    for name, iterations, coarse in (
        ("caption", losses.caption, losses.caption_coarse),
        ("recon", losses.recon, losses.recon_coarse),
    ):
        fine = iterations[-1]
        assert fine is not None  # the last iteration is always computed
        out |= {f"{name}/iter_{i + 1}": value for i, value in enumerate(iterations) if value is not None}
        out[f"{name}/loss_fine"] = fine
        if coarse is not None:
            out[f"{name}/loss_coarse"] = coarse
            out[f"{name}/ratio"] = coarse / fine
    out["train/loss"] = out["caption/loss_fine"] + lambda_recon * out["recon/loss_fine"]
    return out
