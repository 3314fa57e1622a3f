"""What a trained model says, where it looks and what it foresees: for pictures and for people.

With several ranks all of them call these together, each with equally many clips.
"""

from __future__ import annotations

import torch

from fvlm.config import ObjectiveConfig
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.objective import passes
from fvlm.ranks import world_size


@torch.no_grad()
def generate_captions(
    model: FoveatedVLM,
    frames_BTHW3: torch.Tensor,
    config: ObjectiveConfig,
    max_tokens: int,
    eos_id: int,
    first_B1: torch.Tensor | None = None,
) -> list[list[int]]:
    """Greedy captions from the last fine tokens: at most `max_tokens` ids a clip, without the end token.

    frames: uint8
    first:  ids of the true captions' first tokens, wanted where `config.caption_start` is false: such a model was never
            trained to say one, so it is given, and what is said begins with it
    """
    b, t = frames_BTHW3.shape[:2]
    layers = model.decoder_layers()
    *_, last = passes(model, model.encode(frames_BTHW3), layers, b, t, config.fine_iterations)
    start: torch.Tensor = model.video_end_token
    given: list[list[int]] = [[] for _ in range(b)]
    if not config.caption_start:
        if first_B1 is None:
            raise ValueError("a model that was trained without caption_start has to be given the first token")
        start, given = model.embed(first_B1), first_B1.tolist()
    prefix = model.sequence(model.fine_token, last.z_BTE, start)
    ids = model.llm.generate(
        inputs_embeds=prefix,
        attention_mask=torch.ones(prefix.shape[:2], dtype=torch.long, device=prefix.device),
        max_new_tokens=max_tokens - len(given[0]),
        do_sample=False,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        synced_gpus=world_size() > 1,  # where ranks share the layers, none may be done before the others
    )
    rows = [before + row for before, row in zip(given, ids.tolist(), strict=True)]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


@torch.no_grad()
def predict_latents(
    model: FoveatedVLM, frames_BTHW3: torch.Tensor, latents_BTChw: torch.Tensor, config: ObjectiveConfig
) -> torch.Tensor:
    """Each frame's latent as the last fine pass foresees it from the true ones before it: [B, T, C, h, w] float32."""
    b, t = frames_BTHW3.shape[:2]
    layers = model.decoder_layers()
    *_, last = passes(model, model.encode(frames_BTHW3), layers, b, t, config.fine_iterations)
    (hidden,) = model.read(layers, model.video(last.token, last.z_BTE))
    return model.predict_latents(hidden[:, 1:-1], latents_BTChw).float()


@torch.no_grad()
def gaze(model: FoveatedVLM, frames_BTHW3: torch.Tensor, config: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the coarse and the last fine queries look: two maps [B, T, rows, columns], each summing to at most 1.

    The mean over layers and heads of the attention on patches; the CLS token's share is what is missing to 1.
    """
    b, t = frames_BTHW3.shape[:2]
    layers = model.decoder_layers()
    patches = model.encode(frames_BTHW3)
    coarse, *_, fine = passes(model, patches, layers, b, t, config.fine_iterations)
    maps = [
        model.encoder.attention(p.query_BTQ.flatten(0, 1), patches).mean(0).unflatten(0, (b, t)) for p in (coarse, fine)
    ]
    return maps[0], maps[1]
