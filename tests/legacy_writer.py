"""A second writer of the earlier trainer's files, from the design's section 4 alone: no code of the product is in it.

It trains a small `ReferenceModel` for a few steps as that trainer did, writes `latest.pt` and its shards, and goes on
for six steps. `expected.json` beside them says what came out, in the layout of the miniature that the earlier trainer
itself wrote (`shared/legacy`): so a test reads both in one way. Sizes, number of iterations, widths and the state of
the warm-up are others than there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reference import ReferenceModel, reference_losses, tiny_language, tiny_vision
from torch import nn

from fvlm.batch import IGNORE, Batch

LATENT = (4, 16, 16)
STORED, USED = 24, np.linspace(0, 23, 8, dtype=int)
FRAME_SIZE, CLIPS, BATCH, PAD, QUERY_WIDTH = 56, 10, 2, 2, 20
DONE, GO_ON, WARMUP = 4, 6, 7
FINE_ITERATIONS, LAMBDA_RECON, GRAD_CLIP, WEIGHT_DECAY, LR = 3, 0.5, 1.0, 0.01, 5e-4

# DINOv2's attention as transformers 4 named it; the model in memory has the names of transformers 5.
OLD_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
NEVER_TRAINED = ("video_end_token", "encoder.dino.embeddings.mask_token")


def write_legacy_run(folder: Path) -> None:
    """Into `folder`: latest.pt after DONE steps, two shards, and expected.json for the GO_ON steps that follow."""
    torch.manual_seed(7)
    vision, language = tiny_vision(layers=4), tiny_language(layers=3)
    samples = [_sample(number) for number in range(CLIPS)]
    _write_shards(folder, samples)
    model = ReferenceModel(vision, language, QUERY_WIDTH, LATENT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    rows = list(_train(model, optimizer, scheduler, samples, 0, DONE))
    checkpoint = legacy_checkpoint(model, optimizer.state_dict(), scheduler.state_dict(), rows)
    torch.save(checkpoint, folder / "latest.pt")
    expected = _architecture(model) | {
        "frame_size": FRAME_SIZE, "pad_id": PAD, "vocab": _vocabulary(), "query_width": QUERY_WIDTH,
        "resume_step": DONE, "fine_iterations": FINE_ITERATIONS, "lambda_recon": LAMBDA_RECON,
        "grad_clip": GRAD_CLIP, "weight_decay": WEIGHT_DECAY, "warmup_steps": WARMUP, "lr": LR,
        "steps": list(_train(model, optimizer, scheduler, samples, DONE, DONE + GO_ON)),
        "final_param_sums": {name: p.detach().double().sum().item() for name, p in model.named_parameters()},
    }  # fmt: skip
    (folder / "expected.json").write_text(json.dumps(expected))


def legacy_checkpoint(
    model: nn.Module, optimizer: dict[str, Any], scheduler: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The dict that `latest.pt` holds. The averages are NumPy's own numbers, as `np.mean` leaves them."""
    averages = {
        key: np.mean([row[f"{name}_coarse"] / row[f"{name}_iters"][-1] for row in rows])
        for key, name in (("cap_ratio", "caption"), ("rec_ratio", "recon"))
    }
    assert all(type(value) is np.float64 for value in averages.values())
    return {
        "step": scheduler["last_epoch"],
        "epoch": 1,
        "model_state_dict": _old_state(model),
        "optimizer_state_dict": optimizer,
        "scaler_state_dict": {},
        "scheduler_state_dict": scheduler,
        "metrics": averages | {"seen": np.int64(DONE * BATCH), "step_time": np.float32(1.25), "best": np.bool_(True)},
        "config": {
            "data_dir": "/mnt/data/features", "num_frames": 8, "batch_size": BATCH, "grad_accum": 1,
            "learning_rate": LR, "weight_decay": WEIGHT_DECAY, "warmup_steps": WARMUP, "max_steps": 100_000,
            "grad_clip": GRAD_CLIP, "lambda_recon": LAMBDA_RECON, "lambda_coarse": 0.0,
            "fine_iterations": FINE_ITERATIONS, "deep_query": True, "freeze_dino": False, "resume_checkpoint": None,
        },
        "timestamp": "2026-01-02T03:04:05.678901",
    }  # fmt: skip


def blank_checkpoint(model: nn.Module, step: int) -> dict[str, Any]:
    """Like `legacy_checkpoint`, for a model that nobody trained: every moment is zero."""
    state = {
        index: {"step": torch.tensor(float(step)), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for index, (name, p) in enumerate(model.named_parameters())
        if name not in NEVER_TRAINED
    }
    group = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": WEIGHT_DECAY}
    groups = [group | {"params": list(range(len(list(model.parameters()))))}]
    row = {"caption_coarse": 1.0, "caption_iters": [1.0], "recon_coarse": 1.0, "recon_iters": [1.0]}
    return legacy_checkpoint(model, {"state": state, "param_groups": groups}, {"last_epoch": step}, [row])


def _old_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under the old names, in the old order; tied ones share their memory, as they did."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder.") and "encoder._dummy" not in state:
            state["encoder._dummy"] = torch.zeros(1)
        if name.startswith("encoder.dino."):
            for new, old in OLD_NAMES.items():
                name = name.replace(new, old)
        state[name] = tensor
    embeddings, head = state["llm.model.embed_tokens.weight"], state["llm.lm_head.weight"]
    assert embeddings.data_ptr() == head.data_ptr()
    return state


def _architecture(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What configs of transformers need to make this model again."""
    dino = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "image_size", "patch_size")
    llm = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    vision, language = model.encoder.dino.config, model.llm.config
    return {
        "dino": {key: getattr(vision, key) for key in dino},
        "llm": {key: getattr(language, key) for key in llm}
        | {"rope_theta": language.rope_parameters["rope_theta"]},
    }  # fmt: skip


def _vocabulary() -> dict[str, int]:
    return {f"word{number}": number for number in range(PAD + 1, 29)}


def _sample(number: int) -> dict[str, Any]:
    """One clip, of which every frame differs from every other one."""
    random = np.random.default_rng((11, number))
    words = random.choice(list(_vocabulary()), size=random.integers(4, 9))
    coarse = random.integers(0, 256, (STORED, 3, FRAME_SIZE // 14, FRAME_SIZE // 14), np.uint8)
    return {
        "frames": torch.from_numpy(coarse).repeat_interleave(14, 2).repeat_interleave(14, 3),
        "latents": torch.from_numpy(random.standard_normal((STORED, *LATENT), np.float32)).bfloat16(),
        "caption": " ".join(words),
        "video_id": f"video_{number}",
    }


def _write_shards(folder: Path, samples: list[dict[str, Any]]) -> None:
    half = len(samples) // 2
    for index, part in enumerate((samples[:half], samples[half:])):
        torch.save({"samples": part, "count": len(part)}, folder / f"shard_{index:04d}.pt")


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    samples: list[dict[str, Any]],
    start: int,
    stop: int,
) -> Iterator[dict[str, Any]]:
    """The earlier trainer's loop; yields a row of expected.json a step."""
    for step in range(start, stop):
        clips = [(3 * step + 2 * b) % CLIPS for b in range(BATCH)]
        batch = _batch([samples[number] for number in clips])
        losses = reference_losses(model, batch, FINE_ITERATIONS, LAMBDA_RECON, caption_start=False)
        losses.loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield {
            "step": step, "clips": clips, "caption_ids": batch.caption_ids.tolist(), "lr": rate,
            "loss": losses.loss.item(), "grad_norm": norm.item(),
            "caption_coarse": losses.caption_coarse.item(), "caption_iters": [x.item() for x in losses.caption],
            "recon_coarse": losses.recon_coarse.item(), "recon_iters": [x.item() for x in losses.recon],
        }  # fmt: skip


def _batch(samples: list[dict[str, Any]]) -> Batch:
    """Captions are padded to the longest, and padding is ignored by its id."""
    words = _vocabulary()
    captions = [torch.tensor([words[word] for word in sample["caption"].split()]) for sample in samples]
    ids = nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=PAD)
    return Batch(
        frames=torch.stack([sample["frames"][USED].permute(0, 2, 3, 1) for sample in samples]),
        latents=torch.stack([sample["latents"][USED] for sample in samples]),
        caption_ids=ids,
        labels=ids.masked_fill(ids == PAD, IGNORE),
        clip_ids=tuple(sample["video_id"] for sample in samples),
    )
