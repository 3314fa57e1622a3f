"""The steps that are compared, built from the same weights, and the batches that they get."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/, where the present-style step is tested
from present_step import make_present_step, present_model

from fvlm import presets
from fvlm.batch import IGNORE, Batch
from fvlm.config import Config, validate
from fvlm.data.text import CaptionTokenizer, train_tokenizer
from fvlm.errors import UserError
from fvlm.model.blocks import VisionLayer, query_block
from fvlm.model.encoder import PatchCache
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.hub import ARCHITECTURES, build_model, vocabulary_size
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.step import Step

OURS: dict[str, dict[str, Any]] = {
    "eager": {"train.compile": "off", "train.cuda_graphs": "off"},
    "compiled": {"train.compile": "layers", "train.cuda_graphs": "off"},
    "whole": {"train.compile": "whole", "train.cuda_graphs": "off"},
    "graphs": {"train.compile": "layers", "train.cuda_graphs": "on"},
    "convolution": {"train.compile": "layers", "train.cuda_graphs": "on"},
    "channels-first": {"train.compile": "layers", "train.cuda_graphs": "on"},
    "one-query-program": {"train.compile": "layers", "train.cuda_graphs": "on"},
}
"""Our variants, and what makes them; the last three undo or add one thing (`rearrange`)."""
PRESENT = ("present",)
VARIANTS = (*PRESENT, *OURS)
SHORTEST = 5
"""Tokens of the shortest caption."""
CONCEPTS = 8
"""Things that the learnable batches show and tell."""


def make_config(preset: str, layers: int | None = None, **changes: Any) -> Config:
    """The preset with random weights and `changes` by dotted key; None changes nothing.

    layers: of both transformers, for a quick look, as architectures of their own
    """
    if preset not in presets.PRESETS:
        raise UserError(f"--preset: no preset {preset!r}; there are {', '.join(presets.PRESETS)}.")
    config = with_changes(
        presets.get(preset), {"model.init": "random"} | {k: v for k, v in changes.items() if v is not None}
    )
    if layers is not None:
        short = {}
        for part in ("vision", "language"):
            whole = getattr(config.model, part)
            short[f"model.{part}"] = f"{whole} of {layers} layers"
            ARCHITECTURES[short[f"model.{part}"]] = ARCHITECTURES[whole] | {"num_hidden_layers": layers}
        config = with_changes(config, short)
    return validate(config)


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with values by dotted key. Lanes follow the batch, which they have to divide."""
    if "data.global_batch" in changes:
        changes = {"data.lanes": changes["data.global_batch"]} | changes
    for key, value in changes.items():
        section, name = key.split(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


@dataclasses.dataclass
class Variant:
    """One step function with a model of its own. `step(batch, number)` -> scalars on the device."""

    name: str
    precision: str
    step: Callable[[Batch, int], dict[str, torch.Tensor]]
    coarse_every: int
    device: torch.device

    def plain(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A step without readings."""
        return self._run(batch, 1 if self.coarse_every > 1 else 0)

    def reading(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A step that reads the coarse losses too."""
        return self._run(batch, self.coarse_every)

    def number(self, batch: Batch, number: int) -> dict[str, torch.Tensor]:
        return self._run(batch, number)

    def _run(self, batch: Batch, number: int) -> dict[str, torch.Tensor]:
        if self.device.type == "cuda":  # as training sets it; float32 stays float32
            tf32 = self.precision == "bf16"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        return self.step(batch, number)


def latent_shape(config: Config) -> tuple[int, int, int]:
    return 4, config.data.frame_size // 8, config.data.frame_size // 8


def base_model(config: Config) -> FoveatedVLM:
    """On the CPU, always with the same random weights."""
    model = build_model(config.model, latent_shape(config), seed=0, pretrained=False)
    freeze_unreached(model, config)
    return model


def build(
    name: str, precision: str, config: Config, base: FoveatedVLM, device: torch.device, attention: str = "sdpa"
) -> Variant:
    """attention: of the present-style step's transformers; ours have one way only"""
    config = with_changes(config, {"train.precision": precision})
    if name in PRESENT:
        step = make_present_step(config, present_model(base, attention).to(device))
    else:
        config = with_changes(config, OURS[name])
        model = copy.deepcopy(base).to(device)
        step = Step(config, model, make_optimizer(model, config.optim))
        rearrange(name, model)
    return Variant(name, precision, step, config.objective.coarse_every, device)


def rearrange(name: str, model: FoveatedVLM) -> None:
    """What a variant computes in another way than the product."""
    encoder = model.encoder
    if name == "convolution":
        encoder.blocks = dataclasses.replace(encoder.blocks, embed=torch.compile(embed_by_convolution, fullgraph=True))
    if name == "channels-first":
        encoder.blocks = dataclasses.replace(encoder.blocks, predict=predict_channels_first)
    if name == "one-query-program":
        program = torch.compile(all_query_blocks, fullgraph=True)

        def forward(query: torch.Tensor, patches: PatchCache) -> torch.Tensor:
            x = program(patches.layers, patches.keys_values, encoder.query_input_proj(query)[:, None])
            return encoder.query_output_proj(encoder.dino.layernorm(x))[:, 0]

        encoder.forward = forward


def embed_by_convolution(
    frames: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """What `fvlm.model.blocks.embed_patches` does as a product, by DINOv2's own convolution."""
    pixels = ((frames.float() - mean) / std).permute(0, 3, 1, 2)
    return F.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def predict_channels_first(head: Any, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """The prediction head as torch lays out images by default, not compiled (compiling would change the format)."""
    gamma, beta = head.h_to_film(hidden)[:, :, None, None].chunk(2, dim=1)
    return head.decoder(gamma * head.encoder(previous) + beta)


def all_query_blocks(layers: list[VisionLayer], keys_values: list[Any], x: torch.Tensor) -> torch.Tensor:
    for layer, (k, v) in zip(layers, keys_values, strict=True):
        x = query_block(layer, x, k, v)
    return x


def random_batch(config: Config, device: torch.device, seed: int = 0) -> Batch:
    """A batch of random clips whose longest caption has `max_caption_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    b, length = config.data.global_batch, config.data.max_caption_tokens
    lengths = torch.randint(min(SHORTEST, length), length + 1, (b,), generator=generator)
    lengths[0] = length
    ids = torch.randint(3, vocabulary_size(config.model), (b, length), generator=generator)
    return _batch(config, device, generator, ids, ids.where(torch.arange(length) < lengths[:, None], IGNORE))


def caption_batches(config: Config, device: torch.device, count: int, seed: int = 0) -> list[Batch]:
    """Batches with captions as people write them, through the product's own tokenizing: most are short, few are cut."""
    rng = np.random.default_rng(seed)
    b, longest = config.data.global_batch, config.data.max_caption_tokens
    words = np.array(["a", "the", "red", "car", "moves", "left", "while", "dog", "runs", "over", "green", "hill"])
    lengths = np.clip(rng.lognormal(np.log(longest / 4), 0.6, (count, b)).astype(int), SHORTEST, longest + 16)
    captions = [[" ".join(rng.choice(words, n)) for n in row] for row in lengths]
    size = vocabulary_size(config.model)
    tokenizer = CaptionTokenizer(
        train_tokenizer((text for row in captions for text in row), min(size, 512)), longest, config.data.train_eos
    )
    generator = torch.Generator().manual_seed(seed)
    return [_batch(config, device, generator, *tokenizer(row)[:2]) for row in captions]


def learnable_batches(config: Config, device: torch.device, seed: int = 0) -> Iterator[Batch]:
    """Endless: every clip shows one of a few colours drifting by, its caption and its latents say which."""
    generator = torch.Generator().manual_seed(seed)
    b, t, side = config.data.global_batch, config.data.num_frames, config.data.frame_size
    longest = config.data.max_caption_tokens
    ids = torch.randint(3, vocabulary_size(config.model), (CONCEPTS, longest), generator=generator)
    lengths = torch.linspace(min(SHORTEST, longest), longest, CONCEPTS).long()
    labels = ids.where(torch.arange(longest) < lengths[:, None], IGNORE)
    colours = torch.randint(40, 216, (CONCEPTS, 1, 1, 1, 3), generator=generator)
    latents = torch.randn(CONCEPTS, 1, *latent_shape(config), generator=generator)
    phase = torch.linspace(0.5, 1.5, t)
    while True:
        concept = torch.randint(CONCEPTS, (b,), generator=generator)
        noise = torch.randint(-40, 40, (b, t, side, side, 3), generator=generator)
        frames = colours[concept] * phase[:, None, None, None] + noise
        noise = 0.3 * torch.randn(b, t, *latent_shape(config), generator=generator)
        yield Batch(
            frames=frames.clamp(0, 255).byte(),
            latents=(latents[concept] * phase[:, None, None, None] + noise).half(),
            caption_ids=ids[concept],
            labels=labels[concept],
            clip_ids=tuple(map(str, range(b))),
        ).to(device)


def _batch(
    config: Config, device: torch.device, generator: torch.Generator, ids: torch.Tensor, labels: torch.Tensor
) -> Batch:
    b, t, side = config.data.global_batch, config.data.num_frames, config.data.frame_size
    return Batch(
        frames=torch.randint(0, 256, (b, t, side, side, 3), generator=generator, dtype=torch.uint8),
        latents=torch.randn(b, t, *latent_shape(config), generator=generator).half(),
        caption_ids=ids,
        labels=labels,
        clip_ids=tuple(map(str, range(b))),
    ).to(device)
