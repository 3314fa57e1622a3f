"""One optimizer step."""

from __future__ import annotations

import torch

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.objective import Losses, compute_losses
from fvlm.train.metrics import Scalars
from fvlm.train.optim import average_gradients, learning_rate, update


def is_reading(step: int, config: Config) -> bool:
    """Whether the step with this number (from 0) reads the coarse losses too."""
    return step % config.objective.coarse_every == 0


def train_step(
    model: FoveatedVLM, optimizer: torch.optim.Optimizer, batch: Batch, step: int, config: Config
) -> Scalars:
    """Forward, backward, average over ranks, clip, update. Changes model and optimizer in place.

    `batch` is on the model's device. `step` counts from 0; it sets the learning rate and whether the losses of the
    coarse tokens are read.

    A step whose loss or gradient norm is not finite changes nothing and has `train/skipped` 1. Both are global values,
    so all ranks decide alike, each on its device.
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
    out = scalars(losses, config.objective.lambda_recon) | {"train/grad_norm": norm.detach()}
    out["train/skipped"] = 1 - (out["train/loss"].isfinite() & out["train/grad_norm"].isfinite()).float()
    update(optimizer, out["train/skipped"])
    optimizer.zero_grad(set_to_none=True)
    return out


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
