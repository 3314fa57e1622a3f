"""The training step as the experiment's present script does it: what the product's step is compared with.

The same mathematics as `reference.py`, with every habit that makes it slow: a Python loop over frames in each query
pass, keys and values projected a second time beside each layer's own attention, a last layer that nobody reads,
gradient checkpointing on the language model, one pass of it for every sequence although two are the same, losses of the
earlier iteration with a graph although nothing trains on them, logits for every position, clipping and AdamW as torch's
defaults have them.

A plain step with two fine iterations makes seven passes of the language model: the queries after the coarse pass and
after each iteration (the last ones for nobody), and a caption and a reconstruction pass for each iteration. Every
`coarse_every` steps the two losses of the coarse tokens are read too, without gradient.

The parameters are those of `reference.ReferenceModel` under the same names, so a FoveatedVLM's weights fit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from reference import IMAGENET_MEAN, IMAGENET_STD, VISUAL_STD, ReferenceModel
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from fvlm.batch import IGNORE, Batch
from fvlm.config import Config, ObjectiveConfig
from fvlm.train.optim import learning_rate

KeysValues = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""(K, V), for every encoder layer [B, T, heads, N, head width]."""
Scalars = dict[str, torch.Tensor]


@dataclass(frozen=True)
class PresentLosses:
    """Scalars, all but the coarse ones with a graph; `caption[i]` and `recon[i]` belong to fine iteration i + 1."""

    loss: torch.Tensor
    caption: list[torch.Tensor]
    recon: list[torch.Tensor]
    caption_coarse: torch.Tensor | None
    recon_coarse: torch.Tensor | None


def present_model(model: nn.Module, attention: str = "sdpa") -> ReferenceModel:
    """Modules of its own with the weights, and the frozen parts, of a FoveatedVLM, on its device and in training mode.

    attention: implementation in transformers' words for both transformers, "sdpa" or "eager"
    """
    if not model.config.deep_query or model.encoder.dino.config.use_swiglu_ffn:
        raise ValueError("the present script has deep queries and DINOv2's plain MLP only")
    vision = AutoModel.from_config(copy.deepcopy(model.encoder.dino.config), attn_implementation=attention)
    language = AutoModelForCausalLM.from_config(copy.deepcopy(model.llm.config), attn_implementation=attention)
    present = ReferenceModel(vision, language, model.config.query_width, tuple(model.z_vae_init.shape[1:]))
    present.load_state_dict(model.state_dict())
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in present.named_parameters():
        parameter.requires_grad_(trained[name])
    present.visual_norm = model.config.visual_norm
    # The name changed within transformers 5.
    getattr(language, "activation_checkpointing_enable", language.gradient_checkpointing_enable)()
    return present.to(model.q_static.device).train()


def encode_frames(model: nn.Module, frames: torch.Tensor) -> KeysValues:
    """uint8 [B, T, H, W, 3] -> the patches' keys and values. Every layer has made them already, once."""
    b, t = frames.shape[:2]
    mean = torch.tensor(IMAGENET_MEAN, device=frames.device)
    std = torch.tensor(IMAGENET_STD, device=frames.device)
    pixels = ((frames.float() / 255 - mean) / std).flatten(0, 1).permute(0, 3, 1, 2)
    hidden = model.encoder.dino.embeddings(pixels)  # [B * T, N, D]
    inputs = []
    for layer in model.encoder.dino.encoder.layer:
        inputs.append(hidden)
        hidden = layer(hidden)
    heads = model.encoder.dino.config.num_attention_heads
    keys, values = [], []
    for layer, x in zip(model.encoder.dino.encoder.layer, inputs, strict=True):
        _, k_proj, v_proj, _ = projections(layer)
        normed = layer.norm1(x)
        for kept, projection in ((keys, k_proj), (values, v_proj)):
            kept.append(_heads(projection(normed), heads).unflatten(0, (b, t)))
    return keys, values


def projections(layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """A DINOv2 layer's query, key, value and output projections, whose names changed within transformers 5."""
    attention = layer.attention
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    inner = attention.attention
    return inner.query, inner.key, inner.value, attention.output.dense


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[F, M, D] -> [F, heads, M, head width]"""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def query_frame(model: nn.Module, query: torch.Tensor, keys_values: KeysValues, t: int) -> torch.Tensor:
    """Queries [B, Q] for frame t of every clip -> what they saw [B, D]."""
    x = model.encoder.query_input_proj(query).unsqueeze(1)  # [B, 1, D]
    heads = model.encoder.dino.config.num_attention_heads
    keys, values = keys_values
    for i, layer in enumerate(model.encoder.dino.encoder.layer):
        q_proj, _, _, o_proj = projections(layer)
        q = _heads(q_proj(layer.norm1(x)), heads)
        seen = F.scaled_dot_product_attention(q, keys[i][:, t], values[i][:, t]).transpose(1, 2).reshape(x.shape)
        x = x + layer.layer_scale1(o_proj(seen))
        x = x + layer.layer_scale2(layer.mlp(layer.norm2(x)))
    return model.encoder.query_output_proj(model.encoder.dino.layernorm(x)).squeeze(1)


def visual_tokens(model: nn.Module, queries: torch.Tensor, keys_values: KeysValues) -> torch.Tensor:
    """Queries [B, T, Q] -> visual tokens [B, T, E], a frame at a time."""
    seen = [query_frame(model, queries[:, t], keys_values, t) for t in range(queries.shape[1])]
    z = model.dino_to_llm(torch.stack(seen, dim=1))
    if model.visual_norm == "none":
        return z
    std = z.std() if model.visual_norm == "batch" else z.std(-1, keepdim=True)
    return z / (std + 1e-6) * VISUAL_STD


def hidden_states(model: nn.Module, parts: list[torch.Tensor], b: int) -> torch.Tensor:
    """One pass of the language model over the joined parts: [B, S, E]."""
    sequence = torch.cat([part.expand(b, -1, -1) for part in parts], dim=1)
    return model.llm.model(inputs_embeds=sequence, use_cache=False).last_hidden_state


def next_queries(model: nn.Module, z: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    hidden = hidden_states(model, [model.no_text_token, token, z], len(z))
    asked = model.llm_to_query(hidden[:, 2:])
    return torch.cat([model.q_init.expand(len(z), 1, -1), asked[:, :-1]], dim=1)


def caption_loss(
    model: nn.Module, z: torch.Tensor, token: torch.Tensor, batch: Batch, caption_start: bool
) -> torch.Tensor:
    words = model.llm.get_input_embeddings()(batch.caption_ids)
    prefix = [token, z, model.video_end_token] if caption_start else [token, z]
    hidden = hidden_states(model, [*prefix, words], len(z))
    logits = model.llm.lm_head(hidden)  # every position
    labels = batch.labels if caption_start else batch.labels[:, 1:]
    predicting = logits[:, -labels.shape[1] - 1 : -1]
    return F.cross_entropy(predicting.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE)


def recon_loss(model: nn.Module, z: torch.Tensor, token: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    b, t = z.shape[:2]
    hidden = hidden_states(model, [model.no_text_token, token, z], b)[:, 1:-1]  # one position before each frame
    latents = latents.float()
    previous = torch.cat([model.z_vae_init.expand(b, 1, -1, -1, -1), latents[:, :-1]], dim=1)
    gamma, beta = model.pred_head.h_to_film(hidden.flatten(0, 1))[:, :, None, None].chunk(2, dim=1)
    predicted = model.pred_head.decoder(gamma * model.pred_head.encoder(previous.flatten(0, 1)) + beta)
    return F.mse_loss(predicted.unflatten(0, (b, t)).float(), latents)


def present_losses(model: nn.Module, batch: Batch, config: ObjectiveConfig, readings: bool = False) -> PresentLosses:
    """The losses of one step; `readings` adds those of the coarse tokens, without gradient."""
    b, t = batch.frames.shape[:2]

    def losses(z: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            caption_loss(model, z, token, batch, config.caption_start),
            recon_loss(model, z, token, batch.latents),
        )

    keys_values = encode_frames(model, batch.frames)
    z = visual_tokens(model, model.q_static.expand(b, t, -1), keys_values)
    caption_coarse = recon_coarse = None
    if readings:
        with torch.no_grad():
            caption_coarse, recon_coarse = losses(z, model.coarse_token)
    queries = next_queries(model, z, model.coarse_token)
    caption, recon = [], []
    for _ in range(config.fine_iterations):
        z = visual_tokens(model, queries, keys_values)
        for part, value in zip((caption, recon), losses(z, model.fine_token), strict=True):
            part.append(value)
        queries = next_queries(model, z, model.fine_token)  # after the last iteration, for nobody
    loss = caption[-1] + config.lambda_recon * recon[-1]
    return PresentLosses(loss, caption, recon, caption_coarse, recon_coarse)


def make_present_step(config: Config, model: ReferenceModel) -> Callable[[Batch, int], Scalars]:
    """step(batch, number) -> scalars on the device: a whole optimiser step, with an optimiser as torch makes it."""
    optim = config.optim
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    device = model.q_static.device

    def step(batch: Batch, number: int) -> Scalars:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, optim)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            readings = number % config.objective.coarse_every == 0
            losses = present_losses(model, batch, config.objective, readings)
        losses.loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, optim.grad_clip)
        optimizer.step()
        return {
            "train/loss": losses.loss.detach(),
            "caption/loss_fine": losses.caption[-1].detach(),
            "recon/loss_fine": losses.recon[-1].detach(),
            "train/grad_norm": norm.detach(),
        }

    return step
