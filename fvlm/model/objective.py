"""The training objective: coarse to fine, then a caption and a reconstruction loss on the last iteration only.

One step for T frames, I fine iterations (the design's symbols):

    z0 = look(q_static)                       queries 1 = watch(coarse, z0)
    z1 = look(queries 1)                      queries 2 = watch(fine, z1)
    ...
    zI = look(queries I)                      caption loss on [fine, zI, caption], reconstruction on watch(fine, zI)

The pass that asks the next queries and the one that reconstructs are the same sequence, so each is read once. All
earlier passes keep their graph, because the loss reaches them through the queries; their own losses are readings
without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from fvlm.batch import IGNORE, Batch
from fvlm.config import ObjectiveConfig
from fvlm.model.encoder import PatchCache
from fvlm.model.foveated import FoveatedVLM, cross_entropy_sum


@dataclass(frozen=True)
class Losses:
    """Scalars on the device. `caption[i]`, `recon[i]` belong to fine iteration i+1; None where not computed.

    loss:     what is minimised; the only field with a graph. With n ranks each rank's loss is its share of the global
              one times n, so that the average over ranks, which DDP takes of gradients, is the global gradient
    caption:  mean cross-entropy over the caption tokens of the global batch, nats
    recon:    mean squared error over the global batch, in units of the stored latents
    """

    loss: torch.Tensor
    caption: list[torch.Tensor | None]
    recon: list[torch.Tensor | None]
    caption_coarse: torch.Tensor | None
    recon_coarse: torch.Tensor | None


@dataclass(frozen=True)
class Pass:
    """One pass over the video: the coarse one, or one fine iteration."""

    token: torch.Tensor
    """The learned token that names the kind of pass, [1, 1, E]."""
    query_BTQ: torch.Tensor
    z_BTE: torch.Tensor
    """The visual tokens that the queries saw."""
    before_frames_BTE: torch.Tensor
    """Hidden states one position before each frame; they predict its latent."""


def passes(model: FoveatedVLM, patches: PatchCache, b: int, t: int, fine_iterations: int) -> Iterator[Pass]:
    """The coarse pass, then the fine iterations, each asking where the one before it told it to look."""
    query, token = model.static_queries(b, t), model.coarse_token
    for iteration in range(fine_iterations + 1):
        z = model.look(query, patches)
        at_frames, before_frames = model.watch(token, z)
        yield Pass(token, query, z, before_frames)
        if iteration < fine_iterations:
            query, token = model.next_queries(at_frames), model.fine_token


def compute_losses(model: FoveatedVLM, batch: Batch, config: ObjectiveConfig, readings: bool = False) -> Losses:
    """All losses of one batch. `readings` adds those of the coarse tokens and of the earlier fine iterations."""
    b, t = batch.frames.shape[:2]
    task = _Task(model, batch, config)
    caption: list[torch.Tensor | None] = [None] * (config.fine_iterations + 1)  # the coarse one first
    recon = list(caption)
    for i, last in enumerate(passes(model, model.encode(batch.frames), b, t, config.fine_iterations)):
        if readings and i < config.fine_iterations:
            caption[i], recon[i] = task.reading(last)
    caption_loss, recon_loss = task.caption_loss(last), task.recon_loss(last)
    caption[-1], recon[-1] = task.over_ranks(caption_loss.detach(), recon_loss.detach())
    loss = caption_loss + config.lambda_recon * recon_loss
    return Losses(loss, caption[1:], recon[1:], caption[0], recon[0])


class _Task:
    """The two losses of one batch, for any visual tokens."""

    def __init__(self, model: FoveatedVLM, batch: Batch, config: ObjectiveConfig):
        self.model, self.batch = model, batch
        self.ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        # Without a start token the first caption token has no position that predicts it.
        self.prefix = [model.video_end_token] if config.caption_start else []
        self.labels = batch.labels if config.caption_start else batch.labels[:, 1:]
        self.embedded = model.embed(batch.caption_ids)  # [B, L, E], shared by all readings
        self.tokens = (self.labels != IGNORE).sum()
        if self.ranks > 1:
            dist.all_reduce(self.tokens)

    def caption_loss(self, of: Pass) -> torch.Tensor:
        """Cross-entropy on [token, z, (video_end), caption]: this rank's sum over the global count, times ranks."""
        hidden = self.model.read(of.token, of.z_BTE, *self.prefix, self.embedded)
        predicting = hidden[:, -self.labels.shape[1] - 1 : -1]  # one position before each label
        total = cross_entropy_sum(self.model.logits(predicting), self.labels)
        return total / self.tokens.clamp(min=1) * self.ranks

    def recon_loss(self, of: Pass) -> torch.Tensor:
        """Mean squared error of the predicted latents. Ranks hold equally many, so their mean is the global mean."""
        predicted = self.model.predict_latents(of.before_frames_BTE, self.batch.latents)
        return F.mse_loss(predicted.float(), self.batch.latents.float())

    @torch.no_grad()
    def reading(self, of: Pass) -> tuple[torch.Tensor, torch.Tensor]:
        """Both losses of a pass that is not trained on, over the global batch."""
        return self.over_ranks(self.caption_loss(of), self.recon_loss(of))

    def over_ranks(self, caption: torch.Tensor, recon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The global values of two scalars of which every rank holds its own."""
        if self.ranks > 1:
            both = torch.stack([caption, recon])
            dist.all_reduce(both)
            caption, recon = (both / self.ranks).unbind()
        return caption, recon
