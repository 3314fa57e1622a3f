"""The transformer blocks that a step is made of, as functions of tensors, and the ways to run them.

A block takes its weights as tensors (`VisionLayer`, `DecoderLayer`), which are read from transformers' modules once a
step. Under autocast that is when they are converted, and weights that are applied to the same input are joined into one
matrix: a language model that reads three sequences in a step converts once, and its gradients are summed once.

Shapes: F frames, N patches + CLS, M tokens a frame, D vision width, h heads, d = D / h; B clips, S positions, E width,
P trained positions, V vocabulary, K pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from fvlm.errors import UserError


class Linear(NamedTuple):
    """y = x @ weight.T + bias, as torch.nn.functional.linear takes it."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Norm(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


class VisionLayer(NamedTuple):
    """One DINOv2 layer. `qkv`, `kv` and `up` hold one joined matrix, or one for each part."""

    norm1: Norm
    qkv: tuple[Linear, ...]
    query: tuple[Linear, ...]
    """The queries' part of `qkv` again."""
    kv: tuple[Linear, ...]
    """The keys' and values' part of `qkv` again."""
    out: Linear
    scale1: torch.Tensor
    norm2: Norm
    up: tuple[Linear, ...]
    """The MLP's first matrix; gate and up for SwiGLU."""
    down: Linear
    scale2: torch.Tensor
    heads: int
    gated: bool


class DecoderLayer(NamedTuple):
    """One Llama layer. `qkv` and `up` (gate and up) hold one joined matrix, or one for each part."""

    norm1: Norm
    qkv: tuple[Linear, ...]
    out: Linear
    norm2: Norm
    up: tuple[Linear, ...]
    down: Linear
    heads: int
    kv_heads: int


def vision_layer(layer: Any) -> VisionLayer:
    """Read a transformers Dinov2Layer, under the names of transformers 5.17 or of later ones."""
    q, k, v, o = projections(layer)
    mlp = layer.mlp
    gated = not hasattr(mlp, "fc1")
    up: tuple[Any, ...]
    if not gated:
        up, down = (mlp.fc1,), mlp.fc2
    elif hasattr(mlp, "weights_in"):
        up, down = (mlp.weights_in,), mlp.weights_out
    else:
        up, down = (mlp.gate_proj, mlp.up_proj), mlp.down_proj
    return VisionLayer(
        norm1=_norm(layer.norm1, layer.norm1.eps),
        qkv=_joined(q, k, v),
        query=_joined(q),
        kv=_joined(k, v),
        out=_joined(o)[0],
        scale1=layer.layer_scale1.lambda1,
        norm2=_norm(layer.norm2, layer.norm2.eps),
        up=_joined(*up),
        down=_joined(down)[0],
        scale2=layer.layer_scale2.lambda1,
        heads=getattr(layer.attention, "attention", layer.attention).num_attention_heads,
        gated=gated,
    )


def decoder_layer(layer: Any) -> DecoderLayer:
    """Read a transformers LlamaDecoderLayer."""
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderLayer(
        norm1=_norm(layer.input_layernorm, layer.input_layernorm.variance_epsilon),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(attention.o_proj)[0],
        norm2=_norm(layer.post_attention_layernorm, layer.post_attention_layernorm.variance_epsilon),
        up=_joined(mlp.gate_proj, mlp.up_proj),
        down=_joined(mlp.down_proj)[0],
        heads=attention.config.num_attention_heads,
        kv_heads=attention.config.num_key_value_heads,
    )


def is_plain_llama(layer: nn.Module) -> bool:
    """Whether `decoder_layer` and `decoder_block` say all that this layer does. Others, and layers whose weights are in
    parts on several ranks, are called as the modules they are."""
    return type(layer) is LlamaDecoderLayer and layer.self_attn.config.hidden_act == "silu"


def projections(layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """Query, key, value and output projections of a Dinov2Layer."""
    attention = layer.attention
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    inner = attention.attention
    return inner.query, inner.key, inner.value, attention.output.dense


def _norm(module: Any, eps: float) -> Norm:
    return Norm(module.weight, getattr(module, "bias", None), eps)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast converts the factors of a product to on this device; None where it is off."""
    # Asking about tensors without contents is an error to torch.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _joined(*modules: Any) -> tuple[Linear, ...]:
    """The modules' weights as they are; under autocast, converted and joined into one matrix."""
    dtype = autocast_dtype(modules[0].weight.device)
    if dtype is None:
        return tuple(Linear(module.weight, module.bias) for module in modules)
    weight = _cat([module.weight.to(dtype) for module in modules])
    biases = [module.bias for module in modules if module.bias is not None]
    if len(biases) not in (0, len(modules)):
        raise UserError("model: a layer where only some of the joined projections have a bias is not known here.")
    return (Linear(weight, _cat([bias.to(dtype) for bias in biases]) if biases else None),)


def _cat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _project(x: torch.Tensor, linears: tuple[Linear, ...], sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """x through each part; `sizes` are the parts' output widths."""
    if len(linears) == len(sizes):
        return tuple(F.linear(x, *linear) for linear in linears)
    return F.linear(x, *linears[0]).split(sizes, dim=-1)


def patch_block(layer: VisionLayer, x_FND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> patches after one DINOv2 block, and their keys and values in it, each [F, h, N, d]."""
    d = x_FND.shape[-1]
    q, k, v = (_heads(part, layer.heads) for part in _project(_layer_norm(x_FND, layer.norm1), layer.qkv, (d, d, d)))
    return _update(layer, x_FND, q, k, v), k, v


def query_block(layer: VisionLayer, x_F1D: torch.Tensor, k_FhNd: torch.Tensor, v_FhNd: torch.Tensor) -> torch.Tensor:
    """-> queries after one DINOv2 block, in which they attend to the patches."""
    return _update(layer, x_F1D, block_query(layer, x_F1D), k_FhNd, v_FhNd)


def block_query(layer: VisionLayer, x_F1D: torch.Tensor) -> torch.Tensor:
    """What a query asks the patches with in this block: [F, h, 1, d]."""
    (q_F1D,) = _project(_layer_norm(x_F1D, layer.norm1), layer.query, (x_F1D.shape[-1],))
    return _heads(q_F1D, layer.heads)


def last_keys_values(layer: VisionLayer, x_FND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer after which nobody reads the patches themselves."""
    d = x_FND.shape[-1]
    k, v = _project(_layer_norm(x_FND, layer.norm1), layer.kv, (d, d))
    return _heads(k, layer.heads), _heads(v, layer.heads)


def _layer_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[F, M, D] -> [F, h, M, d]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _update(
    layer: VisionLayer, x_FMD: torch.Tensor, q_FhMd: torch.Tensor, k_FhNd: torch.Tensor, v_FhNd: torch.Tensor
) -> torch.Tensor:
    """The rest of a DINOv2 block for M tokens with the given queries; patches and queries both pass here."""
    attended = F.scaled_dot_product_attention(q_FhMd, k_FhNd, v_FhNd).transpose(1, 2).flatten(2)
    x_FMD = x_FMD + F.linear(attended, *layer.out) * layer.scale1
    normed = _layer_norm(x_FMD, layer.norm2)
    width = layer.down.weight.shape[1]
    if layer.gated:
        gate, up = _project(normed, layer.up, (width, width))
        inner = F.silu(gate) * up
    else:
        inner = F.gelu(F.linear(normed, *layer.up[0]))
    return x_FMD + F.linear(inner, *layer.down) * layer.scale2


def decoder_block(
    layer: DecoderLayer | nn.Module,
    x_BSE: torch.Tensor,
    mask: torch.Tensor | None,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """-> hidden states after one block of the language model. mask: [1, 1, S, S] bool; None: causal.

    The arithmetic is that of transformers' LlamaDecoderLayer.
    """
    if not isinstance(layer, DecoderLayer):
        out: torch.Tensor = layer(x_BSE, attention_mask=mask, position_embeddings=rotary)
        return out
    head = layer.out.weight.shape[1] // layer.heads
    sizes = (layer.heads * head, layer.kv_heads * head, layer.kv_heads * head)
    q, k, v = (
        part.unflatten(-1, (-1, head)).transpose(1, 2)
        for part in _project(_rms_norm(x_BSE, layer.norm1), layer.qkv, sizes)
    )
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    shared = layer.heads // layer.kv_heads
    if shared > 1:
        k, v = (t.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(1, 2) for t in (k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    x_BSE = x_BSE + F.linear(attended.transpose(1, 2).flatten(2), *layer.out)
    width = layer.down.weight.shape[1]
    gate, up = _project(_rms_norm(x_BSE, layer.norm2), layer.up, (width, width))
    return x_BSE + F.linear(F.silu(gate) * up, *layer.down)


def _rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps)
    return norm.weight * h.to(x.dtype)


def embed_patches(
    frames_FHW3: torch.Tensor, mean_3: torch.Tensor, std_3: torch.Tensor, weight_DK: torch.Tensor, bias_D: torch.Tensor
) -> torch.Tensor:
    """uint8 frames -> embedded patches [F, rows * columns, D]: DINOv2's convolution as one matrix product.

    mean, std:  of ImageNet, in units of 0..255
    weight:     the convolution's, [D, 3, p, p]. What a frame has beyond whole patches is left out, as by its stride
    """
    d, _, p, _ = weight_DK.shape
    f, h, w, _ = frames_FHW3.shape
    rows, columns = h // p, w // p
    pixels = (frames_FHW3[:, : rows * p, : columns * p].float() - mean_3) / std_3
    # [F, rows, p, columns, p, 3] -> [F, rows * columns, p * p * 3]
    patches = pixels.view(f, rows, p, columns, p, 3).transpose(2, 3).reshape(f, rows * columns, -1)
    weight = weight_DK.permute(0, 2, 3, 1).reshape(d, -1)
    dtype = autocast_dtype(frames_FHW3.device)
    if dtype is not None:
        # 14 * 14 * 3 = 588 is no multiple of 8, which half-precision products want: padded with zeros to 592.
        missing = -patches.shape[-1] % 8
        patches, weight = (F.pad(t.to(dtype), (0, missing)) for t in (patches, weight))
    return F.linear(patches, weight, bias_D)


def cross_entropy_chunk(
    hidden_PE: torch.Tensor, head_VE: torch.Tensor, labels_P: torch.Tensor, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """-> sum of cross-entropies over labels that are not negative, and its gradients for `hidden` and `head`."""
    trained, label = labels_P >= 0, labels_P.clamp(min=0)[:, None]
    logits = (hidden_PE @ head_VE.t()).float()
    log_sum = logits.logsumexp(1)
    total = ((log_sum - logits.gather(1, label)[:, 0]) * trained).sum()
    if not gradients:
        return total, None, None
    # Of the sum with respect to the logits. By comparison and not by scattering, which on a GPU uses atomics.
    is_label = torch.arange(head_VE.shape[0], device=label.device) == label
    gradient = ((logits - log_sum[:, None]).exp() - is_label.float()) * trained[:, None]
    return total, (gradient @ head_VE).to(hidden_PE.dtype), gradient.t() @ hidden_PE


def predict(head: nn.Module, hidden_ME: torch.Tensor, previous_MChw: torch.Tensor) -> torch.Tensor:
    """The prediction head, [M, E] and [M, C, h, w] -> [M, C, h, w]."""
    out: torch.Tensor = head(hidden_ME, previous_MChw)
    return out


@dataclass(frozen=True)
class Blocks:
    """How blocks are run: plainly, compiled, or with their inner results made again for the backward pass."""

    patch: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = patch_block
    query: Callable[..., torch.Tensor] = query_block
    decoder: Callable[..., torch.Tensor] = decoder_block
    vision_layer: Callable[[Any], VisionLayer] = vision_layer
    decoder_layer: Callable[[Any], DecoderLayer] = decoder_layer
    embed: Callable[..., torch.Tensor] = embed_patches
    cross_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = cross_entropy_chunk
    predict: Callable[..., torch.Tensor] = predict

    def compiled(self) -> Blocks:
        """One kernel program for each kind of block and shape: the blocks of a model share it."""
        return replace(
            self,
            **{f.name: torch.compile(getattr(self, f.name), fullgraph=True, dynamic=False) for f in fields(self)},
        )

    def recomputed(self, *kinds: str) -> Blocks:
        """Blocks of these kinds keep what goes into them, and compute the rest again when gradients are made."""
        # Nothing in them is random (models with dropout are refused), and a recording cannot ask for random states.
        again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
        return replace(self, **{kind: again(getattr(self, kind)) for kind in kinds})

    def vision_layers(self, layers: Any) -> list[VisionLayer]:
        """The layers' weights for one step; only converting them is worth a program."""
        read = vision_layer if autocast_dtype(layers[0].norm1.weight.device) is None else self.vision_layer
        return [read(layer) for layer in layers]

    def decoder_layers(self, layers: Any) -> list[DecoderLayer | nn.Module]:
        """Likewise; layers that are no plain Llama's, or are in parts on several ranks, as they are."""
        if not all(map(is_plain_llama, layers)) or any(hasattr(p, "full_tensor") for p in layers[0].parameters()):
            return list(layers)
        read = decoder_layer if autocast_dtype(layers[0].input_layernorm.weight.device) is None else self.decoder_layer
        return [read(layer) for layer in layers]
