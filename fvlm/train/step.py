"""One optimizer step."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.model.blocks import Blocks
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.objective import Losses, Trained, compute_losses, read_losses, trained_losses
from fvlm.ranks import world_size
from fvlm.resources import missing_for_compiling
from fvlm.train.cuda_graphs import RecordedLosses
from fvlm.train.metrics import Scalars
from fvlm.train.optim import learning_rate, parameters_of, update
from fvlm.train.parallel import GradientAverage, clip_gradients, compiled_in_parts

RECOMPUTED: dict[str, tuple[str, ...]] = {
    "speed": (),
    "balanced": ("patch",),
    "small": ("patch", "query", "decoder"),
}
"""Kinds of blocks whose inner results are not kept, for each `train.memory`."""


MOST_PROGRAMS = 64
"""Of one kind of block."""


def is_reading(step: int, config: Config) -> bool:
    """Whether the step with this number (from 0) reads the coarse losses too."""
    return step % config.objective.coarse_every == 0


class Step:
    """The step as `train.compile` and `train.memory` want it: `step(batch, number)`; numbers count from 0."""

    def __init__(self, config: Config, model: FoveatedVLM, optimizer: torch.optim.Optimizer):
        self.config, self.model, self.optimizer = config, model, optimizer
        self.losses_of = make_losses(config, model)
        self.average = GradientAverage(parameters_of(optimizer)).attach()

    @property
    def refusal(self) -> str:
        """Why the step is not recorded as CUDA graphs although it was to be; "" otherwise."""
        return str(getattr(self.losses_of.keywords["trained"], "refusal", ""))

    def __call__(self, batch: Batch, number: int) -> Scalars:
        return train_step(self.model, self.optimizer, batch, number, self.config, self.losses_of, self.average)


def make_losses(config: Config, model: FoveatedVLM) -> functools.partial[Losses]:
    """`compute_losses`, or the same with compiled or recorded parts. Sets how the model runs its blocks."""
    device = model.q_static.device
    recorded = is_recorded(config, device)
    kind = compile_kind(config, device)
    if kind != "off":
        require_compiler(config, device.type)
        # Read by torch whenever it compiles; what lies there already is keyed by code, shapes, torch and chip.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(config.train.compile_cache).expanduser()))
        # Lengths of captions times steps with readings and without: more than the eight that torch allows by default.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_PROGRAMS)
    blocks = compiled_in_parts(model, Blocks().compiled()) if kind == "layers" else Blocks()
    model.encoder.blocks = blocks.recomputed(*RECOMPUTED.get(config.train.memory, ()))
    trained: Callable[..., Trained] = trained_losses
    read: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]] = read_losses
    if kind == "whole":
        trained = torch.compile(trained_losses, fullgraph=True, dynamic=False)
        read = torch.compile(read_losses, fullgraph=True, dynamic=False)
    if recorded:
        trained = RecordedLosses(trained, required=config.train.cuda_graphs == "on")
    return functools.partial(compute_losses, trained=trained, read=read)


def compile_kind(config: Config, device: torch.device) -> str:
    """ "off", "layers" or "whole"."""
    if config.train.compile == "auto":
        return "layers" if device.type == "cuda" else "off"
    return config.train.compile


def require_compiler(config: Config, device: str) -> None:
    """Raises UserError where compilation would fail for want of a compiler. What was compiled before needs none."""
    cache = Path(config.train.compile_cache).expanduser()
    missing = missing_for_compiling(device)
    if missing and not (cache.is_dir() and any(cache.iterdir())):
        raise UserError(
            f"--train.compile {config.train.compile} needs {missing} on every node that trains, and {platform.node()} "
            "has none. Install it (Debian: apt install g++ python3-dev), or use --train.compile off."
        )


def is_recorded(config: Config, device: torch.device) -> bool:
    """Whether forward and backward pass are CUDA graphs. Raises UserError where that was asked for in vain."""
    wanted = config.train.cuda_graphs
    if wanted == "on" and device.type != "cuda":
        raise UserError("--train.cuda-graphs on: this run is not on a CUDA GPU. Leave it out.")
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and world_size() == 1)


def train_step(
    model: FoveatedVLM,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    step: int,
    config: Config,
    losses_of: Callable[..., Losses] = compute_losses,
    average: GradientAverage | None = None,
) -> Scalars:
    """Forward, backward, average over ranks, clip, update. Changes model and optimizer in place.

    `batch` is on the model's device. `step` counts from 0; it sets the learning rate and whether the losses of the
    coarse tokens are read. `losses_of`: compute_losses, or the same with compiled parts. `average`: attached to the
    model, it averages gradients while others are still made; the result is the same.

    A step whose loss or gradient norm is not finite changes nothing and has `train/skipped` 1. Both are global values,
    so all ranks decide alike, each on its device.
    """
    device = model.q_static.device
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config.optim)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        losses = losses_of(model, batch, config.objective, is_reading(step, config))
    parameters = parameters_of(optimizer)
    (average or GradientAverage(parameters)).backward(losses.loss)
    norm = clip_gradients(parameters, config.optim.grad_clip)
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
