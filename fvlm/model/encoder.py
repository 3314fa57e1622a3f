"""The vision encoder that can be asked where to look.

Patches pass through DINOv2 once per frame and leave their keys and values behind at every layer. A query is one more
token that attends to them and is attended to by nobody, so any number of queries costs one token each.

Shapes: F = B*T frames, N patches + CLS, D vision width, h heads, d = D / h, Q query width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from fvlm.model.blocks import (
    Blocks,
    VisionLayer,
    block_query,
    last_keys_values,
    query_block,
)
from fvlm.model.families import require_computed

# Statistics of ImageNet, with which DINOv2 was trained (facebook/dinov2-small, preprocessor_config.json).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PatchCache:
    """What a frame's patches leave for queries.

    keys_values: for every layer the patches' (K, V), each [F, h, N, d]; one pair, of width D, for `deep_query=False`
    grid: (rows, columns) of the patches; N = rows * columns + 1, the CLS token first
    layers: the weights that the patches passed through, which queries pass through too; none for `deep_query=False`
    """

    keys_values: list[tuple[torch.Tensor, torch.Tensor]]
    grid: tuple[int, int]
    layers: list[VisionLayer]


class FoveatedEncoder(nn.Module):
    """DINOv2 with a query path. Parameters: `dino.*`, `query_input_proj.weight`, `query_output_proj.{weight,bias}`."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, dino: Dinov2Model, query_width: int, deep_query: bool = True):
        super().__init__()
        config = dino.config
        require_computed("vision", config)
        self.dino: Any = dino  # to a type checker every child of a module is Tensor | Module
        self.deep_query = deep_query
        self.blocks = Blocks()
        # No bias: added to every query alike it outweighs what tells them apart, and every ratio becomes exactly 1.
        self.query_input_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.query_output_proj = nn.Linear(config.hidden_size, config.hidden_size)
        # Not in the checkpoint: constants.
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255, persistent=False)

    def encode_patches(self, frames_FHW3: torch.Tensor) -> PatchCache:
        """Run the patches through the encoder once. frames: [F, H, W, 3] uint8, H and W at least one patch."""
        x_FND, grid = self.embed(frames_FHW3)
        if not self.deep_query:
            features = self.dino.layernorm(self.dino.encoder(x_FND).last_hidden_state)[:, None]  # [F, 1, N, D]
            return PatchCache([(features, features)], grid, [])
        layers = self.blocks.vision_layers(self.dino.encoder.layer)
        cached = []
        for layer in layers[:-1]:
            x_FND, k, v = self.blocks.patch(layer, x_FND)
            cached.append((k, v))
        cached.append(last_keys_values(layers[-1], x_FND))
        return PatchCache(cached, grid, layers)

    def embed(self, frames_FHW3: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """CLS and patch embeddings with their positions, [F, N, D] float32, and the patches' grid."""
        embeddings = self.dino.embeddings
        projection = embeddings.patch_embeddings.projection
        side = projection.kernel_size[0]
        grid = (frames_FHW3.shape[1] // side, frames_FHW3.shape[2] // side)
        patches = self.blocks.embed(
            frames_FHW3, self.mean.flatten(), self.std.flatten(), projection.weight, projection.bias
        )
        cls = embeddings.cls_token.expand(patches.shape[0], -1, -1)
        positions = position_embeddings(embeddings.position_embeddings, grid)
        return torch.cat([cls, patches.to(cls.dtype)], dim=1) + positions, grid

    def forward(self, query_FQ: torch.Tensor, patches: PatchCache) -> torch.Tensor:
        """One query a frame, [F, Q] -> what it saw, [F, D]."""
        x_F1D = self.query_input_proj(query_FQ)[:, None]
        if not self.deep_query:
            ((k, v),) = patches.keys_values
            seen = F.scaled_dot_product_attention(x_F1D[:, None], k, v)[:, 0]  # [F, 1, D]
            return self.query_output_proj(seen)[:, 0]
        for layer, (k, v) in zip(patches.layers, patches.keys_values, strict=True):
            x_F1D = self.blocks.query(layer, x_F1D, k, v)
        return self.query_output_proj(self.dino.layernorm(x_F1D))[:, 0]

    @torch.no_grad()
    def attention(self, query_FQ: torch.Tensor, patches: PatchCache) -> torch.Tensor:
        """Where queries look: [layers, F, rows, columns], softmax weights averaged over heads, CLS left out.

        For pictures, not for training: it runs the query path again and keeps the weights.
        """
        x_F1D = self.query_input_proj(query_FQ)[:, None]
        maps = []
        if not self.deep_query:
            maps.append(_weights(x_F1D[:, None], patches.keys_values[0][0]))
        else:
            for layer, (k, v) in zip(patches.layers, patches.keys_values, strict=True):
                maps.append(_weights(block_query(layer, x_F1D), k))
                x_F1D = query_block(layer, x_F1D, k, v)
        return torch.stack([weights[:, 1:].unflatten(1, patches.grid) for weights in maps])


def _weights(q_Fh1d: torch.Tensor, k_FhNd: torch.Tensor) -> torch.Tensor:
    """Attention weights of one query a frame, mean over heads: [F, N]."""
    scores = (q_Fh1d @ k_FhNd.transpose(-1, -2)) / q_Fh1d.shape[-1] ** 0.5
    return scores.float().softmax(-1).mean(1)[:, 0]


def position_embeddings(learned_1ND: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """DINOv2's position embeddings [1, 1 + side * side, D] for another grid of patches: [1, 1 + rows * columns, D].

    What `F.interpolate(mode="bicubic")` does, as two products with fixed matrices: its backward pass adds with atomics
    on a GPU, so that no two runs would be alike, and its forward pass takes a millisecond.
    """
    side = round((learned_1ND.shape[1] - 1) ** 0.5)
    if grid == (side, side):
        return learned_1ND
    over_rows, over_columns = (_bicubic(side, length, learned_1ND.device) for length in grid)
    # In float64, which neither autocast nor TF32 touches: rounded to fewer bits, positions would shift.
    table = learned_1ND[0, 1:].double().unflatten(0, (side, side))  # [side, side, D]
    table = torch.matmul(over_columns, table).transpose(0, 1)  # [columns, side, D]
    table = torch.matmul(over_rows, table).transpose(0, 1)  # [rows, columns, D]
    return torch.cat([learned_1ND[:, :1], table.flatten(0, 1)[None].to(learned_1ND.dtype)], dim=1)


def _bicubic(source: int, target: int, device: torch.device) -> torch.Tensor:
    """[target, source]: how much each source point counts in each target point, torch's bicubic along one axis."""
    points = torch.eye(source, device=device)[None, :, :, None]  # each source point alone, as a channel: [1, S, S, 1]
    with torch.no_grad():
        spread = F.interpolate(points, size=(target, 1), mode="bicubic", align_corners=False)  # [1, S, target, 1]
    return spread[0, :, :, 0].t().double()
