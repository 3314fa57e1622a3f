"""The three kinds of transformer blocks that a step is made of, and the ways to run them.

Shapes: F frames, N patches + CLS, M tokens a frame, D vision width, h heads, d = D / h; B clips, S positions, E width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def patch_block(layer: Any, x_FND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> patches after one DINOv2 block, and their keys and values in it."""
    normed = layer.norm1(x_FND)
    k, v = keys_values(layer, normed)
    return _update(layer, x_FND, normed, k, v), k, v


def query_block(layer: Any, x_F1D: torch.Tensor, k_FhNd: torch.Tensor, v_FhNd: torch.Tensor) -> torch.Tensor:
    """-> queries after one DINOv2 block, in which they attend to the patches."""
    return _update(layer, x_F1D, layer.norm1(x_F1D), k_FhNd, v_FhNd)


def decoder_block(
    layer: Any, x_BSE: torch.Tensor, mask: torch.Tensor | None, rotary: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """-> hidden states after one block of the language model. mask: [1, 1, S, S] bool; None: causal."""
    out: torch.Tensor = layer(x_BSE, attention_mask=mask, position_embeddings=rotary)
    return out


@dataclass(frozen=True)
class Blocks:
    """How blocks are run: plainly, compiled, or with their inner results made again for the backward pass."""

    patch: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = patch_block
    query: Callable[..., torch.Tensor] = query_block
    decoder: Callable[..., torch.Tensor] = decoder_block

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


class Projections:
    """The four linear maps of a layer's attention, under the names of transformers 5.17 and of later ones."""

    def __init__(self, layer: Any):
        attention = layer.attention
        if hasattr(attention, "q_proj"):
            self.q, self.k, self.v, self.o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        else:
            inner = attention.attention
            self.q, self.k, self.v, self.o = inner.query, inner.key, inner.value, attention.output.dense


def heads(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """[F, M, D] -> [F, h, M, d]"""
    attention = getattr(layer.attention, "attention", layer.attention)
    return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


def keys_values(layer: Any, normed_FND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    projections = Projections(layer)
    return heads(layer, projections.k(normed_FND)), heads(layer, projections.v(normed_FND))


def _update(
    layer: Any, x_FMD: torch.Tensor, normed_FMD: torch.Tensor, k_FhNd: torch.Tensor, v_FhNd: torch.Tensor
) -> torch.Tensor:
    """One DINOv2 block for M tokens that attend to the given keys and values; patches and queries both pass here."""
    projections = Projections(layer)
    q = heads(layer, projections.q(normed_FMD))
    attended = F.scaled_dot_product_attention(q, k_FhNd, v_FhNd).transpose(1, 2).flatten(2)
    x_FMD = x_FMD + layer.layer_scale1(projections.o(attended))
    return x_FMD + layer.layer_scale2(layer.mlp(layer.norm2(x_FMD)))
