"""Presets: functions that return a full config. `python -m ray_jobs.train NAME` starts one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fvlm.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
)


def joint_multifine() -> Config:
    """The 135M experiment as it has run so far: two fine iterations, 256 px, batch 16, labels as they were."""
    return Config(
        preset="joint_multifine",
        objective=ObjectiveConfig(caption_start=False),
        data=DataConfig(train_eos=False),
    )


def optimized_224() -> Config:
    """224 px frames and one fine iteration: about half the work a clip. A new experiment, so captions end in EOS."""
    return Config(preset="optimized_224", objective=ObjectiveConfig(fine_iterations=1), data=DataConfig(frame_size=224))


def smollm2_360m() -> Config:
    """joint_multifine's geometry with the 360M language model and the corrected labels."""
    return Config(preset="smollm2_360m", model=ModelConfig(language="HuggingFaceTB/SmolLM2-360M-Instruct"))


def smollm2_1p7b() -> Config:
    """joint_multifine's geometry with the 1.7B language model and the corrected labels.

    Weights, gradients and AdamW's moments take 28 GB. Where a GPU has less, several can share the language model's:
    `--scale.workers 4 --scale.strategy shard`.
    """
    return Config(preset="smollm2_1p7b", model=ModelConfig(language="HuggingFaceTB/SmolLM2-1.7B-Instruct"))


def demo() -> Config:
    """A tiny model on small frames: minutes on two CPU cores, every part of the real run.

    No evaluation but where it is asked for, as `ray_jobs.demo` does: it takes as long as many of these steps.
    """
    return Config(
        preset="demo",
        model=ModelConfig(vision="tiny-dinov2", language="tiny-llama", init="random", query_width=96),
        objective=ObjectiveConfig(coarse_every=5),
        data=DataConfig(frame_size=112, global_batch=8, lanes=8, window_steps=8, max_caption_tokens=24),
        optim=OptimConfig(lr=1e-3, warmup_steps=20),
        train=TrainConfig(max_steps=160, precision="fp32", log_every=5, save_every=50, milestones=(), ratio_window=20),
        eval=EvalConfig(every=0),
        log=LogConfig(wandb_project="fvlm-demo"),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__: preset for preset in (demo, joint_multifine, optimized_224, smollm2_360m, smollm2_1p7b)
}


def get(name: str, **changes: object) -> Config:
    """The preset `name` with top-level fields replaced."""
    return dataclasses.replace(PRESETS[name](), **changes)  # type: ignore[arg-type]
