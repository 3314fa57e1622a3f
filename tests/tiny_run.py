"""A run of the product's loop on a model of a few thousand parameters, with clips that can be broken."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import tiny_language, tiny_vision

from fvlm.batch import Batch
from fvlm.config import Config, DataConfig, LogConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from fvlm.data.plan import Plan
from fvlm.model.foveated import FoveatedVLM
from fvlm.train.loop import Run
from fvlm.train.metrics import Clock, Metrics
from fvlm.train.optim import freeze_unreached, make_optimizer

CLIPS, T, L, SIDE, LATENT = 2, 4, 5, 28, (4, 4, 4)
"""Clips of a global batch; frames, caption tokens, pixels and latents of a clip."""


def make_config(folder: Path, samples: bool = False, **train: Any) -> Config:
    return Config(
        run="run",
        runs_dir=str(folder),
        model=ModelConfig(query_width=20),
        objective=ObjectiveConfig(coarse_every=1),
        data=DataConfig(global_batch=CLIPS, lanes=CLIPS, num_frames=T, frame_size=SIDE),
        optim=OptimConfig(lr=1e-3, warmup_steps=0),
        train=TrainConfig(**{"precision": "fp32", "max_steps": 1000, "save_every": 1000, **train}),
        log=LogConfig(samples=samples),
    )


def make_run(config: Config, step: int = 0, device: str = "cpu") -> Run:
    """Weights of a fixed seed, whatever the step."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = FoveatedVLM(tiny_vision(), tiny_language(), config.model, LATENT).to(device)
    freeze_unreached(model, config)
    plan = Plan(np.array([64]), 4, 0, CLIPS, CLIPS, 4, "made-up")
    optimizer = make_optimizer(model, config.optim)
    return Run(config, plan, model, optimizer, Metrics(config.train.ratio_window), Clock(), step)


def clip_id(step: int, clip: int) -> str:
    return f"step-{step}/clip-{clip}"


def make_batch(step: int, rank: int = 0, world: int = 1, broken: bool = False, device: str = "cpu") -> Batch:
    """One rank's share of a step, counted from 1. `broken`: its last clip has an infinite latent, as a file may."""
    clips = range(CLIPS)[rank * CLIPS // world : (rank + 1) * CLIPS // world]
    made = [torch.Generator().manual_seed(100 * step + clip) for clip in clips]
    latents = torch.stack([torch.randn(T, *LATENT, generator=g) for g in made]).half()
    if broken:
        latents[-1, 0, 0, 0, 0] = torch.inf
    ids = torch.stack([torch.randint(3, 29, (L,), generator=g) for g in made])
    return Batch(
        torch.stack([torch.randint(0, 256, (T, SIDE, SIDE, 3), generator=g, dtype=torch.uint8) for g in made]),
        latents,
        ids,
        ids.clone(),
        tuple(clip_id(step, clip) for clip in clips),
    ).check().to(device)  # fmt: skip


def batches(first: int, broken: Collection[int] = (), rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Of the steps from `first` on, counted from 1. In those of `broken` the last rank has a broken clip."""
    step = first
    while True:
        yield make_batch(step, rank, world, step in broken and rank == world - 1)
        step += 1


def bits(run: Run) -> dict[str, bytes]:
    """Every parameter, and AdamW's moments and counters."""
    tensors = {name: p.detach() for name, p in run.model.named_parameters()}
    for name, parameter in run.model.named_parameters():
        tensors |= {f"{key}/{name}": value for key, value in run.optimizer.state.get(parameter, {}).items()}
    return {name: tensor.cpu().numpy().tobytes() for name, tensor in tensors.items()}
