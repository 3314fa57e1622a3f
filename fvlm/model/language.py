"""Passes through a language model of the Llama family, and the loss at its end.

Shapes: B clips, S positions, E width, V vocabulary, P trained positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fvlm.model.blocks import Blocks, DecoderLayer, autocast_dtype, cross_entropy_chunk

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at the same time, at most: 128 MiB of float32."""


def read_sequences(
    decoder: Any, layers: Sequence[DecoderLayer | nn.Module], sequences_BSE: list[torch.Tensor], blocks: Blocks
) -> list[torch.Tensor]:
    """Hidden states of several sequences of every clip, in one pass: each sees itself alone, positions from 0.

    decoder: a transformers Llama without its head
    layers:  of the decoder, as `Blocks.decoder_layers` gives them. They are called one by one: the decoder's `forward`
             builds its mask by asking whether positions are packed, for which the host waits on every pass
    """
    lengths = [sequence.shape[1] for sequence in sequences_BSE]
    x_BSE = torch.cat(sequences_BSE, dim=1)
    position = torch.cat([torch.arange(n, device=x_BSE.device) for n in lengths])
    rotary = decoder.rotary_emb(x_BSE, position_ids=position[None])
    mask = None  # causal, which attention kernels know by themselves
    if len(lengths) > 1:
        owner = torch.cat([torch.full_like(position[:n], i) for i, n in enumerate(lengths)])
        mask = ((owner[:, None] == owner) & (position[:, None] >= position))[None, None]

    for layer in layers:
        x_BSE = blocks.decoder(layer, x_BSE, mask, rotary)
    return list(decoder.norm(x_BSE).split(lengths, dim=1))


def cross_entropy_sum(
    hidden_PE: torch.Tensor,
    head_VE: torch.Tensor,
    labels_P: torch.Tensor,
    chunk: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = cross_entropy_chunk,
) -> torch.Tensor:
    """Sum of the cross-entropies of `hidden @ head.T` over trained positions, nats, float32. Logits are never whole.

    head: the weight of a language-model head without a bias
    labels: int64; negative ones are not trained on
    chunk: `cross_entropy_chunk`, or what a compiler made of it
    """
    if not torch.is_grad_enabled():
        head_VE = head_VE.detach()  # or its gradient would be made all the same
    total: torch.Tensor = _CrossEntropySum.apply(hidden_PE, head_VE, labels_P, chunk)
    return total


class _CrossEntropySum(torch.autograd.Function):
    """Gradients are made in the forward pass, from the logits of one chunk at a time: nothing is computed twice.

    With autocast on, products are in its dtype and all else in float32, as in `F.cross_entropy(linear(x).float())`.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_PE: torch.Tensor, head_VE: torch.Tensor, labels_P: torch.Tensor, chunk: Callable[..., Any]
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        chunks = -(-labels_P.shape[0] * head_VE.shape[0] // LOGITS_AT_ONCE)
        # Converted here and not by autocast: it would keep a copy without a graph, which another user would then get.
        head = head_VE.to(autocast_dtype(hidden_PE.device) or head_VE.dtype)
        total = torch.zeros((), device=hidden_PE.device)
        hidden_gradients, head_gradient = [], torch.zeros_like(head_VE) if wanted else None
        for hidden, labels in zip(hidden_PE.chunk(chunks), labels_P.chunk(chunks), strict=True):
            part, of_hidden, of_head = chunk(hidden, head, labels, wanted)
            total = total + part
            if head_gradient is not None:
                hidden_gradients.append(of_hidden)
                head_gradient = head_gradient + of_head.to(head_VE.dtype)
        if head_gradient is not None:
            ctx.save_for_backward(torch.cat(hidden_gradients), head_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * outputs[0], head_gradient * outputs[0], None, None
