"""Each block is its transformers layer, however its weights are laid out, and weights are converted once a step."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from reference import reference_losses, tiny_language, tiny_vision
from test_parity import make_batch, make_model, reference_of
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from fvlm.config import ModelConfig, ObjectiveConfig
from fvlm.errors import UserError
from fvlm.model.blocks import (
    Blocks,
    DecoderLayer,
    decoder_block,
    decoder_layer,
    embed_patches,
    last_keys_values,
    patch_block,
    vision_layer,
)
from fvlm.model.encoder import position_embeddings
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.objective import compute_losses

BF16 = 2e-2
"""Relative error of a whole block in bf16."""


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def spread(module: nn.Module) -> nn.Module:
    """Weights and biases that all matter."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_vision_block_is_the_layer_of_transformers(swiglu, bf16):
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=42, use_swiglu_ffn=swiglu
    )
    layer = spread(Dinov2Model(config).encoder.layer[0])
    x = torch.randn(2, 5, 24)
    with autocast(bf16):
        read = vision_layer(layer)
        got, k, v = patch_block(read, x)
        last = last_keys_values(read, x)
    assert len(read.qkv) == (1 if bf16 else 3) and read.qkv[0].weight.dtype == (torch.bfloat16 if bf16 else x.dtype)
    tolerance = BF16 if bf16 else 1e-5
    out = layer(x)
    assert relative(got, out[0] if isinstance(out, tuple) else out) < tolerance
    for mine, again in zip((k, v), last, strict=True):
        assert torch.equal(mine, again) or relative(again, mine) < tolerance


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_decoder_block_is_the_layer_of_transformers(masked, biases, bf16):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=9, attention_bias=biases, mlp_bias=biases,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).model
    layer, x = spread(llama.layers[0]), torch.randn(2, 6, 32)
    rotary = llama.rotary_emb(x, position_ids=torch.arange(6)[None])
    mask = torch.ones(6, 6).tril().bool()
    mask[3:, :3] = False  # two sequences in one
    mask = mask[None, None] if masked else None
    wanted = layer(x, attention_mask=mask, position_embeddings=rotary)
    with autocast(bf16):
        (read,) = Blocks().decoder_layers([layer])
        got = decoder_block(read, x, mask, rotary)
    assert isinstance(read, DecoderLayer) and len(read.up) == (1 if bf16 else 2)
    assert relative(got, wanted) < (BF16 if bf16 else 1e-5)


def test_layers_that_are_no_plain_llama_s_are_called_as_they_are():
    other = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=9,
            hidden_act="gelu",
        )
    ).model  # fmt: skip
    assert Blocks().decoder_layers(other.layers) == list(other.layers)
    x = torch.randn(1, 3, 32)
    rotary = other.rotary_emb(x, position_ids=torch.arange(3)[None])
    wanted = other.layers[0](x, attention_mask=None, position_embeddings=rotary)
    assert torch.equal(decoder_block(other.layers[0], x, None, rotary), wanted)


def test_a_vision_model_with_another_activation_is_refused_by_name():
    vision = Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, hidden_act="relu"))
    with pytest.raises(UserError, match=r"model\.vision: this DINOv2's hidden_act is 'relu'.*gelu and SwiGLU"):
        FoveatedVLM(vision, tiny_language(), ModelConfig(query_width=20))


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (7, 3), (3, 3)])
def test_positions_for_another_grid_are_torch_s_bicubic_ones_with_their_gradients(grid):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(1, 10, 6, generator=generator.manual_seed(0)).requires_grad_() for _ in range(2))
    got = position_embeddings(ours, grid)
    table = theirs[:, 1:].view(1, 3, 3, 6).permute(0, 3, 1, 2)
    patches = F.interpolate(table, size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    wanted = torch.cat([theirs[:, :1], patches], dim=1)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    outer = torch.randn(got.shape, generator=generator)
    torch.testing.assert_close(
        torch.autograd.grad(got, ours, outer)[0], torch.autograd.grad(wanted, theirs, outer)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [(28, 28), (33, 45)])
def test_patches_are_embedded_as_by_the_convolution(size):
    frames = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8)
    mean, std = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([60.0, 50.0, 40.0])
    convolution = spread(nn.Conv2d(3, 8, 14, stride=14))
    wanted = convolution(((frames - mean) / std).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    arguments = frames, mean, std, convolution.weight, convolution.bias
    torch.testing.assert_close(embed_patches(*arguments), wanted, rtol=1e-4, atol=1e-4)
    with autocast():
        assert relative(embed_patches(*arguments), wanted) < BF16


class Conversions(TorchDispatchMode):
    """How often each float32 tensor was converted to bf16, by its address."""

    def __init__(self) -> None:
        super().__init__()
        self.of: collections.Counter[int] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.of[args[0].data_ptr()] += 1
        return out


def test_every_layer_s_weight_is_converted_once_a_step_and_nothing_else_is_lost():
    model, batch = make_model(), make_batch()
    with Conversions() as conversions, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        losses = compute_losses(model, batch, ObjectiveConfig(fine_iterations=2))
    for name, parameter in model.named_parameters():
        if not name.endswith("proj.weight") or not name.startswith(("encoder.dino", "llm")):
            continue
        # DINOv2's queries have a matrix of their own besides the joined one, and so have the last layer's keys.
        most = 3 if "attention" in name and name.startswith("encoder.dino") else 1
        assert 1 <= conversions.of[parameter.data_ptr()] <= most, name
    losses.loss.backward()
    wanted = reference_losses(reference_of(model), batch, 2, 0.5, True, "batch")
    assert losses.loss.item() == pytest.approx(wanted.loss.item(), rel=BF16)
    wanted.loss.backward()


@pytest.mark.parametrize("cached", [False, True])
def test_gradients_in_bf16_are_the_reference_s_within_its_rounding(cached):
    model, batch = make_model(), make_batch()
    reference = reference_of(model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        losses = compute_losses(model, batch, ObjectiveConfig(fine_iterations=2))
    losses.loss.backward()
    reference_losses(reference, batch, 2, 0.5, True, "batch").loss.backward()
    wanted = dict(reference.named_parameters())
    got = torch.cat([p.grad.flatten() for _, p in model.named_parameters() if p.grad is not None])
    exact = torch.cat([wanted[n].grad.flatten() for n, p in model.named_parameters() if p.grad is not None]).float()
    assert relative(got, exact) < 0.05
    assert [n for n, p in model.named_parameters() if p.grad is None] == [n for n in wanted if wanted[n].grad is None]


def test_a_read_layer_holds_the_parameters_themselves_in_float32():
    layer = tiny_vision().encoder.layer[0]
    assert vision_layer(layer).up[0].weight is layer.mlp.fc1.weight
    llama = tiny_language().model.layers[0]
    assert decoder_layer(llama).down.weight is llama.mlp.down_proj.weight
