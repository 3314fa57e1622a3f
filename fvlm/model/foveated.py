"""The foveated vision-language model: one token a frame, and the language model decides what that token sees.

Shapes: B clips, T frames, L caption tokens, D vision width, E language width, Q query width (see fvlm.batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce  # differentiable, and can be compiled
from transformers import PreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from fvlm.config import ModelConfig
from fvlm.model.blocks import DecoderLayer
from fvlm.model.encoder import FoveatedEncoder, PatchCache
from fvlm.model.families import require_computed
from fvlm.model.language import read_sequences
from fvlm.model.prediction import PredictionHead
from fvlm.ranks import world_size

VISUAL_STD = 0.14
"""Std of visual tokens and of the learned special tokens; about that of SmolLM2's token embeddings."""


class FoveatedVLM(nn.Module):
    """Encoder, language model and prediction head, joined by queries one way and visual tokens the other.

    The order in which parameters are registered is part of the checkpoint format of the earlier trainer, whose
    optimiser state is keyed by position: root vectors, encoder, llm, dino_to_llm, llm_to_query, pred_head.

    vision:       a transformers DINOv2
    language:     a transformers causal language model with `.model` and `.lm_head` (Llama family)
    latent_shape: (C, h, w) of one frame's latent
    """

    def __init__(
        self,
        vision: Dinov2Model,
        language: PreTrainedModel,
        config: ModelConfig,
        latent_shape: tuple[int, int, int] = (4, 32, 32),
    ):
        super().__init__()
        require_computed("language", language.config)
        q, e = config.query_width, language.config.hidden_size
        self.config = config
        # Std 1: with 0.02 all queries look alike, attention is uniform, and coarse equals fine.
        self.q_static = nn.Parameter(torch.randn(1, q))
        self.q_init = nn.Parameter(torch.randn(1, q))
        self.z_vae_init = nn.Parameter(torch.zeros(1, *latent_shape))
        self.coarse_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.fine_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.no_text_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.video_end_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.encoder = FoveatedEncoder(vision, q, config.deep_query)
        self.llm: Any = language
        self.dino_to_llm = nn.Linear(vision.config.hidden_size, e)
        self.llm_to_query = nn.Linear(e, q)
        self.pred_head = PredictionHead(e, latent_shape[0])
        vision.requires_grad_(config.train_vision)
        self.train()  # transformers hands out models in eval mode

    def encode(self, frames_BTHW3: torch.Tensor) -> PatchCache:
        """uint8 frames -> what queries can look at."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_vision):
            return self.encoder.encode_patches(frames_BTHW3.flatten(0, 1))

    def look(self, query_BTQ: torch.Tensor, patches: PatchCache) -> torch.Tensor:
        """One query a frame -> one visual token a frame, [B, T, E], scaled as `visual_norm` says."""
        z = self.dino_to_llm(self.encoder(query_BTQ.flatten(0, 1), patches)).unflatten(0, query_BTQ.shape[:2])
        if self.config.visual_norm == "none":
            return z
        # Out of bf16 autocast's reach: a std of a few thousand numbers wants float32.
        std = global_std(z.float()) if self.config.visual_norm == "batch" else z.float().std(-1, keepdim=True)
        return (z / (std + 1e-6) * VISUAL_STD).to(z.dtype)

    def static_queries(self, b: int, t: int) -> torch.Tensor:
        """[B, T, Q]: the coarse query for every frame."""
        return self.q_static.expand(b, t, -1)

    def next_queries(self, hidden_BTE: torch.Tensor) -> torch.Tensor:
        """Hidden states at the T visual tokens -> queries [B, T, Q]: frame t asks for t+1, `q_init` for the first."""
        first = self.q_init.expand(hidden_BTE.shape[0], 1, -1)
        return torch.cat([first, self.llm_to_query(hidden_BTE[:, :-1])], dim=1)

    def sequence(self, *parts_BxE: torch.Tensor) -> torch.Tensor:
        """The parts joined in time, [B, S, E]. Parts of batch 1 (the learned tokens) are repeated for every clip."""
        b = max(part.shape[0] for part in parts_BxE)
        return torch.cat([part.expand(b, -1, -1) for part in parts_BxE], dim=1)

    def decoder_layers(self) -> list[DecoderLayer | nn.Module]:
        """The language model's layers for one step: under autocast their weights are converted now, once."""
        return self.encoder.blocks.decoder_layers(self.llm.model.layers)

    def read(self, layers: Sequence[DecoderLayer | nn.Module], *sequences_BSE: torch.Tensor) -> list[torch.Tensor]:
        """Run the language model over sequences of the same clips in one pass: the hidden states of each.

        layers: as `decoder_layers` gives them
        """
        return read_sequences(self.llm.model, layers, list(sequences_BSE), self.encoder.blocks)

    def video(self, token: torch.Tensor, z_BTE: torch.Tensor) -> torch.Tensor:
        """[no_text, token, z_1..z_T]. Hidden state 1 + t asks for frame t + 1's query and predicts its latent."""
        return self.sequence(self.no_text_token, token, z_BTE)

    def embed(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.llm.model.embed_tokens(ids_BL)

    def predict_latents(self, hidden_BTE: torch.Tensor, latents_BTChw: torch.Tensor) -> torch.Tensor:
        """Each frame's latent from the one before it (`z_vae_init` before the first): [B, T, C, h, w]."""
        b, t = hidden_BTE.shape[:2]
        first = self.z_vae_init.expand(b, 1, -1, -1, -1)
        previous = torch.cat([first, latents_BTChw[:, :-1].to(first.dtype)], dim=1)
        predicted = self.encoder.blocks.predict(self.pred_head, hidden_BTE.flatten(0, 1), previous.flatten(0, 1))
        return predicted.unflatten(0, (b, t))


def global_std(x: torch.Tensor) -> torch.Tensor:
    """Unbiased std over all elements of `x` on all ranks, which hold equally many; differentiable through all.

    With one rank this is `torch.std`. With more, sums are all-reduced, and gradients too, so that a rank's tokens feel
    the losses of the others as they would in one large batch.
    """
    if world_size() == 1:
        return x.std()
    group, n = dist.group.WORLD, x.numel() * world_size()
    assert group is not None  # there are several ranks
    mean = all_reduce(x.sum(), "sum", group) / n
    return torch.sqrt(all_reduce((x - mean).square().sum(), "sum", group) / (n - 1))
