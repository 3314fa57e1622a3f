"""Floating-point operations of a step, counted as they are dispatched; two for a multiplication with an addition."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.data.text import padded_lengths
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.hub import build_model, kept_architecture
from fvlm.model.objective import Inputs, trained_losses
from fvlm.train.chips import table_peak
from fvlm.train.metrics import Row
from fvlm.train.optim import freeze_unreached


@dataclass(frozen=True)
class Flops:
    """Operations of whatever ran.

    products:           matrix products and convolutions, recomputed ones too
    attention:          attention without causality's half, recomputed ones too, and with the fifth product that fused
                        kernels make in the backward pass
    attention_backward: that part of `attention`
    """

    products: int
    attention: int
    attention_backward: int

    @property
    def useful(self) -> float:
        """Operations that the mathematics needs: an attention's backward pass is four products, not five."""
        return self.products + self.attention - self.attention_backward / 5


def flop_counter() -> FlopCounterMode:
    """A context that counts what eager code dispatches in it; `flops_of` reads it."""
    return FlopCounterMode(display=False, custom_mapping=_attention_formulas())


def flops_of(counter: FlopCounterMode) -> Flops:
    counted = {str(operator): value for operator, value in counter.get_flop_counts().get("Global", {}).items()}
    attention = {name: value for name, value in counted.items() if re.search("attention|bmm", name)}
    return Flops(
        products=sum(counted.values()) - sum(attention.values()),
        attention=sum(attention.values()),
        attention_backward=sum(value for name, value in attention.items() if "backward" in name),
    )


def _attention_formulas() -> dict[Any, Callable[..., int]]:
    """For every fused attention. torch's own table leaves out the CPU's kernel, and in 2.11 fails on grouped heads."""

    def forward(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        (b, h, m, d), n = q, k[2]
        return 2 * b * h * m * n * (d + v[3])

    def backward(_grad: Any, q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        (b, h, m, d), n = q, k[2]
        return 2 * b * h * m * n * (3 * d + 2 * v[3])

    kinds = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    formulas: dict[Any, Callable[..., int]] = {}
    for kind in kinds:
        for suffix, formula in (("", forward), ("_backward", backward)):
            if (operator := getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{suffix}", None)) is not None:
                formulas[operator] = formula
    return formulas


def clip_flops(config: Config, latent_shape: tuple[int, int, int], lengths: list[int]) -> list[float]:
    """Operations that training on one clip needs, for each of `lengths`: tokens of a caption with its padding.

    Forward and backward pass of the losses that are trained on, nothing recomputed. Left out are the losses that are
    only read (every `coarse_every` steps), and all that is no product: norms, activations, AdamW. What is frozen has no
    gradient of its weights. Attention counts without causality's half.

    Run on tensors without contents, with one and with two layers of each transformer, whose other layers are alike.
    Needs no GPU, speaks to no other rank, takes seconds. Seeds torch's generator, as building a model does.
    """
    # The std over all ranks is no product; without it nothing here is a collective, in which others would take part.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, visual_norm="token"))
    with torch.device("meta"):
        model = build_model(config.model, latent_shape, 0, False, kept_architecture(config))
        freeze_unreached(model, config)
        return [_of_all_layers(model, config, latent_shape, length) for length in lengths]


def _of_all_layers(model: FoveatedVLM, config: Config, latent_shape: tuple[int, int, int], length: int) -> float:
    """Call it with torch's default device "meta", on which the model is."""
    data = config.data
    ids = torch.zeros(1, length, dtype=torch.int64)
    frames = torch.empty(1, data.num_frames, data.frame_size, data.frame_size, 3, dtype=torch.uint8)
    inputs = Inputs(frames, torch.empty(1, data.num_frames, *latent_shape), ids, ids, torch.ones(()))
    vision, language = model.encoder.dino.encoder, model.llm.model
    whole = vision.layer, language.layers

    def count(vision_layers: int, language_layers: int) -> float:
        vision.layer, language.layers = whole[0][:vision_layers], whole[1][:language_layers]
        with flop_counter() as counter:
            trained_losses(model, inputs, config.objective).loss.backward()
        return flops_of(counter).useful

    try:
        one = count(1, 1)
        more = [(count(2, 1) - one) * (len(whole[0]) - 1), (count(1, 2) - one) * (len(whole[1]) - 1)]
    finally:
        vision.layer, language.layers = whole
    return one + sum(more)


def flops_by_length(config: Config, latent_shape: tuple[int, int, int]) -> dict[int, float]:
    """`clip_flops` for every length that a batch's captions can have.

    At most three are counted: operations are a polynomial of the second degree in the length.
    """
    lengths = padded_lengths(config.data.max_caption_tokens)
    counted = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    values = clip_flops(config, latent_shape, counted)
    fit = np.polynomial.Polynomial.fit(counted, values, len(counted) - 1)
    return {length: float(fit(length)) for length in lengths}


class FlopMeter:
    """Adds up the operations of this rank's steps, and says their speed: TFLOP/s, and MFU, which is its share of what
    the chip could do.

    by_length:   see `flops_by_length`
    peak_tflops: None where it is not known; then there is no MFU
    """

    def __init__(self, by_length: Mapping[int, float], peak_tflops: float | None):
        self.by_length, self.peak_tflops = by_length, peak_tflops
        self._flops, self._steps = 0.0, 0

    @classmethod
    def of_config(cls, config: Config, latent_shape: tuple[int, int, int], device: torch.device) -> FlopMeter:
        """The table of peaks is of bf16; float32 has no MFU. Seeds torch's generator; takes seconds."""
        peak = table_peak(device) if config.train.precision == "bf16" else None
        return cls(flops_by_length(config, latent_shape), peak)

    def of(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, counted when they are taken."""
        return map(self._add, batches)

    def _add(self, batch: Batch) -> Batch:
        clips, length = batch.caption_ids.shape
        self._flops += clips * self.by_length[length]
        self._steps += 1
        return batch

    def lap(self, step_time: float) -> Row:
        """Of the steps since the last call, which took `step_time` seconds each on the mean. {} where there are none.

        train/tflops  TFLOP/s of one GPU: operations that the mathematics needs, by all of the time
        train/mfu     the share of the chip's peak, 0 to 1
        """
        flops, self._flops, steps, self._steps = self._flops, 0.0, self._steps, 0
        if not steps or not step_time:
            return {}
        tflops = flops / steps / step_time / 1e12
        return {"train/tflops": tflops} | ({"train/mfu": tflops / self.peak_tflops} if self.peak_tflops else {})
