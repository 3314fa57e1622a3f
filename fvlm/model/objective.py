"""The training objective: coarse to fine, then a caption and a reconstruction loss on the last iteration only.

One step for T frames, I fine iterations (the design's symbols):

    z0 = look(q_static)                       queries 1 = watch(coarse, z0)
    z1 = look(queries 1)                      queries 2 = watch(fine, z1)
    ...
    zI = look(queries I)                      caption loss on [fine, zI, caption], reconstruction on watch(fine, zI)

The pass that asks the next queries and the one that reconstructs are the same sequence, so each is read once; the last
one shares a pass with the caption. All earlier passes keep their graph, because the loss reaches them through the
queries; their own losses are readings without one, made afterwards from the tokens they left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from fvlm.batch import IGNORE, Batch
from fvlm.config import ObjectiveConfig
from fvlm.model.blocks import DecoderLayer
from fvlm.model.encoder import PatchCache
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.language import cross_entropy_sum
from fvlm.ranks import world_size


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


class Inputs(NamedTuple):
    """What the losses are made from: tensors alone, so that a compiled step never depends on anything else.

    tokens: trained caption tokens of the global batch, a scalar; the others as in Batch
    """

    frames_BTHW3: torch.Tensor
    latents_BTChw: torch.Tensor
    ids_BL: torch.Tensor
    labels_BL: torch.Tensor
    tokens: torch.Tensor


class Pass(NamedTuple):
    """One pass over the video: the coarse one, or one fine iteration."""

    token: torch.Tensor
    """The learned token that names the kind of pass, [1, 1, E]."""
    query_BTQ: torch.Tensor
    z_BTE: torch.Tensor
    """The visual tokens that the queries saw."""
    hidden_BSE: torch.Tensor | None
    """What the language model made of [no_text, token, z_1..z_T]; None for the last pass, which asks no queries."""

    def detach(self) -> Pass:
        hidden = None if self.hidden_BSE is None else self.hidden_BSE.detach()
        return Pass(self.token.detach(), self.query_BTQ.detach(), self.z_BTE.detach(), hidden)


def passes(
    model: FoveatedVLM, patches: PatchCache, layers: Sequence[DecoderLayer | nn.Module], b: int, t: int, fine: int
) -> Iterator[Pass]:
    """The coarse pass, then `fine` iterations, each asking where the one before it told it to look.

    layers: the language model's (`FoveatedVLM.decoder_layers`)
    """
    query, token = model.static_queries(b, t), model.coarse_token
    for _ in range(fine):
        z = model.look(query, patches)
        (hidden,) = model.read(layers, model.video(token, z))
        yield Pass(token, query, z, hidden)
        query, token = model.next_queries(hidden[:, 2:]), model.fine_token
    yield Pass(token, query, model.look(query, patches), None)


def make_inputs(batch: Batch, config: ObjectiveConfig) -> Inputs:
    """A collective where there are several ranks: all of them call it."""
    tokens = (target_labels(batch.labels, config) != IGNORE).sum()
    if world_size() > 1:
        dist.all_reduce(tokens)
    return Inputs(batch.frames, batch.latents, batch.caption_ids, batch.labels, tokens)


class Trained(NamedTuple):
    """What the losses that are trained on give. `loss` alone has a graph; see Losses."""

    loss: torch.Tensor
    caption: torch.Tensor
    """This rank's share times the number of ranks; so is `recon`."""
    recon: torch.Tensor
    earlier: tuple[Pass, ...]
    """The passes before the last, to read from."""


def trained_losses(model: FoveatedVLM, inputs: Inputs, config: ObjectiveConfig) -> Trained:
    """The losses of the last iteration."""
    b, t = inputs.frames_BTHW3.shape[:2]
    patches, layers = model.encode(inputs.frames_BTHW3), model.decoder_layers()
    *earlier, last = passes(model, patches, layers, b, t, config.fine_iterations)
    captions = caption_sequence(model, last, model.embed(inputs.ids_BL), config)
    hidden, video = model.read(layers, captions, model.video(last.token, last.z_BTE))
    caption = caption_loss(model, hidden, inputs, config)
    recon = recon_loss(model, video, inputs)
    kept = tuple(p.detach() for p in earlier)
    return Trained(caption + config.lambda_recon * recon, caption.detach(), recon.detach(), kept)


@torch.no_grad()
def read_losses(
    model: FoveatedVLM, inputs: Inputs, earlier: tuple[Pass, ...], config: ObjectiveConfig
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Caption and reconstruction losses of passes that are not trained on, this rank's share times the ranks."""
    embedded = model.embed(inputs.ids_BL)
    # All in one pass, as if they were so many times the clips.
    (hidden,) = model.read(
        model.decoder_layers(), torch.cat([caption_sequence(model, p, embedded, config) for p in earlier])
    )
    caption = [caption_loss(model, h, inputs, config) for h in hidden.chunk(len(earlier))]
    recon = [recon_loss(model, p.hidden_BSE, inputs) for p in earlier if p.hidden_BSE is not None]
    return caption, recon


def caption_sequence(model: FoveatedVLM, of: Pass, embedded_BLE: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    """[token, z_1..z_T, (video_end), caption]. Without a start token no position predicts the first caption token."""
    start = [model.video_end_token] if config.caption_start else []
    return model.sequence(of.token, of.z_BTE, *start, embedded_BLE)


def target_labels(labels_BL: torch.Tensor, config: ObjectiveConfig) -> torch.Tensor:
    return labels_BL if config.caption_start else labels_BL[:, 1:]


def caption_loss(model: FoveatedVLM, hidden_BSE: torch.Tensor, inputs: Inputs, config: ObjectiveConfig) -> torch.Tensor:
    """Cross-entropy of the caption tokens: this rank's sum over the global count, times ranks."""
    labels = target_labels(inputs.labels_BL, config)
    predicting = hidden_BSE[:, -labels.shape[1] - 1 : -1]  # one position before each label
    chunk = model.encoder.blocks.cross_entropy
    total = cross_entropy_sum(predicting.flatten(0, 1), model.llm.lm_head.weight, labels.flatten(), chunk)
    return total / inputs.tokens.clamp(min=1) * world_size()


def recon_loss(model: FoveatedVLM, hidden_BSE: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Mean squared error of the predicted latents, each from the hidden state one position before its frame.

    Ranks hold equally many, so their mean is the global mean.
    """
    predicted = model.predict_latents(hidden_BSE[:, 1:-1], inputs.latents_BTChw)
    return F.mse_loss(predicted.float(), inputs.latents_BTChw.float())


def over_ranks(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """The global values of scalars of which every rank holds its own."""
    if world_size() == 1:
        return values
    together = torch.stack(values)
    dist.all_reduce(together)
    return list((together / world_size()).unbind())


def compute_losses(
    model: FoveatedVLM,
    batch: Batch,
    config: ObjectiveConfig,
    readings: bool = False,
    trained: Callable[..., Trained] = trained_losses,
    read: Callable[..., tuple[list[torch.Tensor], list[torch.Tensor]]] = read_losses,
) -> Losses:
    """All losses of one batch. `readings` adds those of the coarse tokens and of the earlier fine iterations.

    trained, read: these two functions, or what a compiler made of them
    """
    inputs = make_inputs(batch, config)
    done = trained(model, inputs, config)
    missing: list[torch.Tensor | None] = [None] * config.fine_iterations
    if not readings:
        caption, recon = over_ranks([done.caption, done.recon])
        return Losses(done.loss, [*missing[1:], caption], [*missing[1:], recon], None, None)
    captions, recons = read(model, inputs, done.earlier, config)
    values = over_ranks([*captions, done.caption, *recons, done.recon])
    n = config.fine_iterations + 1
    return Losses(done.loss, list(values[1:n]), list(values[n + 1 :]), values[0], values[n])
