"""The model of the design, section 2, written as plainly as possible: the independent check of `fvlm.model`.

Nothing here is fast or shared with the product. The query is one more token of the patch sequence with an explicit
attention mask, DINOv2's layers are Hugging Face's own and run whole, frames are taken one after the other, every
language-model sequence is run on its own, logits are made for every position, and each loss is written out.
It was checked against numbers of the trainer that came before (`test_legacy.py`) before it served to check anything.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fvlm.batch import Batch

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
VISUAL_STD = 0.14
MASKED = "sdpa with the reference's mask"


class ReferenceModel(nn.Module):
    """The parameters of the design under its names, and nothing else: what `reference_losses` reads."""

    def __init__(
        self, vision: Dinov2Model, language: LlamaForCausalLM, query_width: int, latent_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        d, e, channels = vision.config.hidden_size, language.config.hidden_size, latent_shape[0]
        self.q_static = nn.Parameter(torch.randn(1, query_width))
        self.q_init = nn.Parameter(torch.randn(1, query_width))
        self.z_vae_init = nn.Parameter(torch.zeros(1, *latent_shape))
        self.coarse_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.fine_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.no_text_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.video_end_token = nn.Parameter(torch.randn(1, 1, e) * VISUAL_STD)
        self.encoder = nn.Module()
        self.encoder.dino = vision
        self.encoder.query_input_proj = nn.Linear(query_width, d, bias=False)
        self.encoder.query_output_proj = nn.Linear(d, d)
        self.llm = language
        self.dino_to_llm = nn.Linear(d, e)
        self.llm_to_query = nn.Linear(e, query_width)
        self.pred_head = nn.Module()
        self.pred_head.h_to_film = nn.Sequential(nn.Linear(e, 512), nn.GELU(), nn.Linear(512, 512))
        self.pred_head.encoder = _convolutions(channels, 64, 128, 256)
        self.pred_head.decoder = _convolutions(256, 128, 64, channels)


def _convolutions(*widths: int) -> nn.Sequential:
    one, two, three = (nn.Conv2d(a, b, kernel_size=3, padding=1) for a, b in pairwise(widths))
    return nn.Sequential(one, nn.GELU(), two, nn.GELU(), three)


@dataclass(frozen=True)
class ReferenceLosses:
    """`caption` and `recon` hold one loss for each fine iteration, the last one being the one that is trained on."""

    loss: torch.Tensor
    caption: list[torch.Tensor]
    recon: list[torch.Tensor]
    caption_coarse: torch.Tensor
    recon_coarse: torch.Tensor


def see_frame(model: nn.Module, pixels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Normalised pixels [B, 3, H, W] of one frame and its query [B, Q] -> what the query saw [B, D]."""
    dino = model.encoder.dino
    patches = dino.embeddings(pixels)  # [B, N, D]: CLS first
    token = model.encoder.query_input_proj(query).unsqueeze(1)  # [B, 1, D], at no position
    hidden = torch.cat([patches, token], dim=1)  # [B, N + 1, D]
    n = patches.shape[1]
    # Patches see patches, the query sees patches: nobody sees the query, itself included. So one column is closed.
    mask = torch.zeros(1, 1, n + 1, n + 1, dtype=hidden.dtype, device=hidden.device)
    mask[..., n] = float("-inf")
    for layer in dino.encoder.layer:
        hidden = masked_layer(layer, hidden, mask)
    return model.encoder.query_output_proj(dino.layernorm(hidden)[:, n])


def masked_layer(layer: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One whole DINOv2 layer with an additive attention mask [1, 1, S, S]: hidden states [B, S, D] -> [B, S, D]."""
    if "attention_mask" in inspect.signature(layer.forward).parameters:
        return layer(hidden, attention_mask=mask)
    # transformers 5.17 hands its attention function no mask: one that has ours stands in for the length of the call.
    config = layer.attention.attention.config
    before = config._attn_implementation

    def with_mask(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: None, **options: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    ALL_ATTENTION_FUNCTIONS[MASKED] = with_mask
    config._attn_implementation = MASKED
    try:
        return layer(hidden)
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[MASKED]


def normalise_frame(frame: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] with ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, dtype=dtype, device=frame.device)
    std = torch.tensor(IMAGENET_STD, dtype=dtype, device=frame.device)
    return ((frame.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


def visual_tokens(model: nn.Module, frames: torch.Tensor, queries: torch.Tensor, visual_norm: str) -> torch.Tensor:
    """uint8 frames [B, T, H, W, 3] and a query for each [B, T, Q] -> visual tokens [B, T, E]."""
    dtype = model.q_static.dtype
    seen = [
        see_frame(model, normalise_frame(frames[:, t], dtype), queries[:, t]) for t in range(frames.shape[1])
    ]  # T of [B, D]
    z = model.dino_to_llm(torch.stack(seen, dim=1))
    if visual_norm == "batch":
        return z / (torch.std(z) + 1e-6) * VISUAL_STD
    if visual_norm == "token":
        return z / (torch.std(z, dim=-1, keepdim=True) + 1e-6) * VISUAL_STD
    assert visual_norm == "none"
    return z


def hidden_states(model: nn.Module, parts: list[torch.Tensor], batch_size: int) -> torch.Tensor:
    """The language model's final hidden states over the joined `parts`, of which [1, 1, E] ones serve every clip."""
    sequence = torch.cat([part.expand(batch_size, -1, -1) for part in parts], dim=1)
    return model.llm.model(inputs_embeds=sequence, use_cache=False).last_hidden_state


def next_queries(model: nn.Module, z: torch.Tensor, mode_token: torch.Tensor) -> torch.Tensor:
    """Visual tokens [B, T, E] -> queries [B, T, Q]: frame 1 takes q_init, frame t+1 what came out at z_t."""
    hidden = hidden_states(model, [model.no_text_token, mode_token, z], len(z))
    asked = model.llm_to_query(hidden[:, 2:])  # position 0 is no_text, 1 the mode token, 2 the first frame
    return torch.cat([model.q_init.expand(len(z), 1, -1), asked[:, :-1]], dim=1)


def caption_loss(
    model: nn.Module, z: torch.Tensor, mode_token: torch.Tensor, batch: Batch, caption_start: bool
) -> torch.Tensor:
    words = model.llm.get_input_embeddings()(batch.caption_ids)
    start = [model.video_end_token] if caption_start else []
    hidden = hidden_states(model, [mode_token, z, *start, words], len(z))
    logits = model.llm.lm_head(hidden)  # every position
    first = logits.shape[1] - words.shape[1]  # where caption token 1 stands
    log_p = torch.log_softmax(logits, dim=-1)
    total, count = 0.0, 0
    for b in range(len(z)):
        for i in range(0 if caption_start else 1, words.shape[1]):
            if batch.labels[b, i] != -100:
                total = total - log_p[b, first + i - 1, batch.labels[b, i]]  # predicted one position before it
                count += 1
    return total / count


def recon_loss(model: nn.Module, z: torch.Tensor, mode_token: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each frame's latent [B, T, *Z], predicted before the frame is seen."""
    hidden = hidden_states(model, [model.no_text_token, mode_token, z], len(z))
    latents = latents.to(z.dtype)
    squares = []
    for t in range(z.shape[1]):
        film = model.pred_head.h_to_film(hidden[:, 1 + t])  # the mode token for frame 1, z_(t-1) for frame t
        gamma, beta = film[:, :256, None, None], film[:, 256:, None, None]
        before = latents[:, t - 1] if t > 0 else model.z_vae_init.expand(len(z), -1, -1, -1)
        predicted = model.pred_head.decoder(gamma * model.pred_head.encoder(before) + beta)
        squares.append((predicted - latents[:, t]) ** 2)
    return torch.stack(squares).mean()


def reference_losses(
    model: nn.Module,
    batch: Batch,
    fine_iterations: int = 2,
    lambda_recon: float = 0.5,
    caption_start: bool = True,
    visual_norm: str = "batch",
) -> ReferenceLosses:
    """Every loss of one training step; `loss` is the one whose gradient is taken."""
    b, t = batch.frames.shape[:2]

    def losses(z: torch.Tensor, mode_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            caption_loss(model, z, mode_token, batch, caption_start),
            recon_loss(model, z, mode_token, batch.latents),
        )

    z = visual_tokens(model, batch.frames, model.q_static.expand(b, t, -1), visual_norm)
    caption_coarse, recon_coarse = losses(z, model.coarse_token)
    queries = next_queries(model, z, model.coarse_token)
    caption, recon = [], []
    for _ in range(fine_iterations):
        z = visual_tokens(model, batch.frames, queries, visual_norm)
        for part, value in zip((caption, recon), losses(z, model.fine_token), strict=True):
            part.append(value)
        queries = next_queries(model, z, model.fine_token)  # after the last iteration, for nobody
    return ReferenceLosses(
        loss=caption[-1] + lambda_recon * recon[-1],
        caption=caption,
        recon=recon,
        caption_coarse=caption_coarse,
        recon_coarse=recon_coarse,
    )


def tiny_vision(layers: int = 3) -> Dinov2Model:
    """A random DINOv2 whose position grid (3x3) must be interpolated for frames of any other size."""
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=layers, num_attention_heads=3, mlp_ratio=2, image_size=42, patch_size=14
    )
    return _enlarge(Dinov2Model(config))


def tiny_language(layers: int = 2) -> LlamaForCausalLM:
    """A random Llama with two query heads to each key and value head and tied embeddings."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=29,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _enlarge(LlamaForCausalLM(config))


def _enlarge(module: nn.Module) -> nn.Module:
    """Widen a fresh transformer's weights (std 0.02, biases 0): with those attention is uniform and errors hide.

    Not further than this: beyond about twice 0.12 the tiny networks turn chaotic and float32 itself is off by 1e-5.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.12 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return module
