"""The trainer that came before, continued: its checkpoint, its shards, and the numbers that it went on to compute.

The files are a run in miniature of that trainer (see its README): too large to copy into this repository, and the only
thing here that neither the product nor `reference.py` had a hand in. Both are held to it, so that the reference is
checked before it checks anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import ReferenceModel, reference_losses
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from fvlm.batch import IGNORE, Batch
from fvlm.config import Config, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.objective import compute_losses
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.step import train_step

LATENT = (4, 32, 32)
NOT_PARAMETERS = ("encoder._dummy", "llm.lm_head.weight")
"""A buffer without use, and the tied embedding under its second name."""


@dataclass(frozen=True)
class Legacy:
    expected: dict[str, Any]
    checkpoint: dict[str, Any]
    samples: list[dict[str, Any]]
    """Of all shards, in their order: a clip number is an index into them."""

    def vision_and_language(self) -> tuple[Dinov2Model, LlamaForCausalLM]:
        sizes = dict(self.expected["llm"])
        rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
        pad = self.expected["pad_id"]
        language = LlamaConfig(
            **sizes, rope_parameters=rope, tie_word_embeddings=True, pad_token_id=pad, eos_token_id=pad
        )
        return Dinov2Model(Dinov2Config(**self.expected["dino"])), LlamaForCausalLM(language)

    def model_state(self) -> dict[str, torch.Tensor]:
        state = self.checkpoint["model_state_dict"]
        return {present_name(key): value for key, value in state.items() if key != "encoder._dummy"}

    def parameter_names(self) -> list[str]:
        """In the order of the optimiser's indices."""
        return [present_name(key) for key in self.checkpoint["model_state_dict"] if key not in NOT_PARAMETERS]

    def batch(self, step: dict[str, Any]) -> Batch:
        taken = np.linspace(0, 23, 8, dtype=int)
        clips = [self.samples[number] for number in step["clips"]]
        ids = torch.tensor(step["caption_ids"])
        return Batch(
            frames=torch.stack([clip["frames"][taken].permute(0, 2, 3, 1) for clip in clips]),
            latents=torch.stack([clip["latents"][taken] for clip in clips]),
            caption_ids=ids,
            labels=ids.masked_fill(ids == self.expected["pad_id"], IGNORE),
            clip_ids=tuple(clip["video_id"] for clip in clips),
        ).check()


def present_name(key: str) -> str:
    """transformers 4 -> 5, DINOv2's attention."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        key = key.replace(old, new)
    return key


@pytest.fixture(scope="module")
def legacy(shared_dir: Path) -> Iterator[Legacy]:
    folder = shared_dir / "legacy"
    if not (folder / "latest.pt").is_file():
        pytest.skip(f"{folder} is absent: it holds a run of the trainer that came before, too large for the repository")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the numbers were made
    yield Legacy(
        expected=json.loads((folder / "expected.json").read_text()),
        checkpoint=torch.load(folder / "latest.pt", weights_only=True),
        samples=[
            sample
            for shard in sorted(folder.glob("shard_*.pt"))
            for sample in torch.load(shard, weights_only=True)["samples"]
        ],
    )
    torch.set_num_threads(threads)


def present_config(expected: dict[str, Any]) -> Config:
    return Config(
        model=ModelConfig(query_width=expected["dino"]["hidden_size"], visual_norm="batch"),
        objective=ObjectiveConfig(
            fine_iterations=expected["fine_iterations"],
            lambda_recon=expected["lambda_recon"],
            coarse_every=1,
            caption_start=False,
        ),
        optim=OptimConfig(
            lr=expected["lr"],
            weight_decay=expected["weight_decay"],
            warmup_steps=expected["warmup_steps"],
            grad_clip=expected["grad_clip"],
        ),
        train=TrainConfig(precision="fp32"),
    )


def product_model(legacy: Legacy) -> FoveatedVLM:
    model = FoveatedVLM(*legacy.vision_and_language(), present_config(legacy.expected).model, LATENT)
    model.load_state_dict(legacy.model_state())
    return model


@dataclass(frozen=True)
class Run:
    rows: list[dict[str, float]]
    sums: dict[str, float]


@pytest.fixture(scope="module")
def product_run(legacy: Legacy) -> Run:
    """Six steps of the product's own optimiser and step function from the old checkpoint."""
    config = present_config(legacy.expected)
    model = product_model(legacy)
    freeze_unreached(model, config)
    optimizer = make_optimizer(model, config.optim)
    parameters = dict(model.named_parameters())
    old = legacy.checkpoint["optimizer_state_dict"]["state"]
    for index, name in enumerate(legacy.parameter_names()):
        if index in old:
            assert parameters[name].requires_grad, f"{name} was trained and is frozen now"
            optimizer.state[parameters[name]] = {key: value.clone() for key, value in old[index].items()}
    rows = []
    for step in legacy.expected["steps"]:
        scalars = train_step(model, optimizer, legacy.batch(step), step["step"], config)
        rows.append({name: value.item() for name, value in scalars.items()} | {"lr": optimizer.param_groups[0]["lr"]})
    sums = {name: parameter.detach().double().sum().item() for name, parameter in model.named_parameters()}
    return Run(rows, sums)


def expected_row(step: dict[str, Any]) -> dict[str, float]:
    """A step of expected.json under the names of the product's metrics."""
    row = {"lr": step["lr"], "train/loss": step["loss"], "train/grad_norm": step["grad_norm"]}
    for name in ("caption", "recon"):
        row[f"{name}/loss_coarse"] = step[f"{name}_coarse"]
        row[f"{name}/loss_fine"] = step[f"{name}_iters"][-1]
        row |= {f"{name}/iter_{i + 1}": value for i, value in enumerate(step[f"{name}_iters"])}
    return row


def test_the_reference_reproduces_the_old_trainers_first_step(legacy):
    model = ReferenceModel(*legacy.vision_and_language(), legacy.expected["dino"]["hidden_size"], LATENT)
    model.load_state_dict(legacy.model_state())
    step = legacy.expected["steps"][0]
    losses = reference_losses(model, legacy.batch(step), caption_start=False)
    losses.loss.backward()
    got = {
        "lr": step["lr"],
        "train/loss": losses.loss.item(),
        "train/grad_norm": nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(),
        "caption/loss_coarse": losses.caption_coarse.item(),
        "recon/loss_coarse": losses.recon_coarse.item(),
        "caption/loss_fine": losses.caption[-1].item(),
        "recon/loss_fine": losses.recon[-1].item(),
        **{f"caption/iter_{i + 1}": value.item() for i, value in enumerate(losses.caption)},
        **{f"recon/iter_{i + 1}": value.item() for i, value in enumerate(losses.recon)},
    }
    # Tighter than the product's: this is what tells an unbiased std from a biased one (3e-6 in the gradient norm).
    assert got == pytest.approx(expected_row(step), rel=5e-7)


def test_parameters_are_registered_in_the_order_of_the_old_optimisers_indices(legacy):
    model = product_model(legacy)
    assert [name for name, _ in model.named_parameters()] == legacy.parameter_names()


def test_the_product_reproduces_the_old_trainers_first_step(legacy, product_run):
    wanted = expected_row(legacy.expected["steps"][0])
    assert {name: product_run.rows[0][name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_the_product_reproduces_six_steps_of_the_old_trainer(legacy, product_run):
    for step, row in zip(legacy.expected["steps"], product_run.rows, strict=True):
        wanted = expected_row(step)
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-4), f"step {step['step']}"


def test_after_six_steps_every_parameter_sums_to_what_the_old_trainer_had(legacy, product_run):
    assert product_run.sums == pytest.approx(legacy.expected["final_param_sums"], rel=1e-4)


def test_parameters_that_never_had_a_gradient_are_not_decayed(legacy, product_run):
    before = legacy.model_state()["video_end_token"].double().sum().item()
    assert product_run.sums["video_end_token"] == before


def test_training_on_the_end_token_is_another_loss(legacy):
    """The old run ignores padding by id, which is also the end token's: one label more must show in the loss."""
    model, step = product_model(legacy), legacy.expected["steps"][0]
    batch = legacy.batch(step)
    batch.labels[0, 8] = legacy.expected["pad_id"]
    with torch.no_grad():
        losses = compute_losses(model, batch, present_config(legacy.expected).objective)
    assert losses.loss.item() != pytest.approx(step["loss"], rel=1e-3)
