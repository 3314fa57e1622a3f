"""The present-style step is what it says: the reference's mathematics, made the slow way."""

from __future__ import annotations

import copy
from collections import Counter

import present_step
import pytest
import torch
from present_step import make_present_step, present_losses, present_model
from reference import ReferenceModel, reference_losses, tiny_language, tiny_vision
from torch import nn

from fvlm.batch import IGNORE, Batch
from fvlm.config import Config, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from fvlm.model.foveated import FoveatedVLM

TOLERANCE = 1e-5
B, T, L, SIDE, QUERY = 2, 4, 6, 56, 20
LATENT = (4, 4, 4)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 29, (B, L), generator=generator)
    labels = ids.clone()
    labels[1, 3:] = IGNORE
    return Batch(
        frames=torch.randint(0, 256, (B, T, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8),
        latents=torch.randn(B, T, *LATENT, generator=generator).bfloat16(),
        caption_ids=ids,
        labels=labels,
        clip_ids=("a", "b"),
    ).check()


def make_model(**config) -> FoveatedVLM:
    torch.manual_seed(0)
    model = FoveatedVLM(tiny_vision(), tiny_language(), ModelConfig(query_width=QUERY, **config), LATENT)
    nn.init.normal_(model.z_vae_init)  # zeros would hide a wrong place for it
    return model


def reference_of(model: FoveatedVLM) -> ReferenceModel:
    reference = ReferenceModel(tiny_vision(), tiny_language(), QUERY, LATENT)
    reference.load_state_dict(model.state_dict())
    return reference


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("fine_iterations", "caption_start", "visual_norm"), [(2, False, "batch"), (1, True, "token"), (3, True, "none")]
)
def test_every_loss_and_every_gradient_equals_the_reference(
    batch, fine_iterations, caption_start, visual_norm, attention
):
    model = make_model(visual_norm=visual_norm)
    config = ObjectiveConfig(fine_iterations=fine_iterations, lambda_recon=0.3, caption_start=caption_start)
    present, reference = present_model(model, attention), reference_of(model)
    got = present_losses(present, batch, config, readings=True)
    wanted = reference_losses(reference, batch, fine_iterations, 0.3, caption_start, visual_norm)
    for name in ("loss", "caption_coarse", "recon_coarse"):
        assert getattr(got, name).item() == pytest.approx(getattr(wanted, name).item(), rel=TOLERANCE), name
    for name in ("caption", "recon"):
        values = [value.item() for value in getattr(got, name)]
        assert values == pytest.approx([value.item() for value in getattr(wanted, name)], rel=TOLERANCE), name
    ours, theirs = gradients(present, got.loss), gradients(reference, wanted.loss)
    assert ours.keys() == theirs.keys()
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    for name, expected in theirs.items():
        # The gradient of DINOv2's key biases is zero but for rounding: they move all scores of a softmax alike.
        floor = 1e-7 * norm if name.endswith(("k_proj.bias", "key.bias")) else 0.0
        assert (ours[name] - expected).norm() <= TOLERANCE * expected.norm() + 2 * floor, name


def test_it_works_the_slow_way(batch):
    """Seven passes, each of them twice where there is a gradient; queries a frame at a time; K/V twice; all logits."""
    present = present_model(make_model())
    layer, calls = present.encoder.dino.encoder.layer[0], Counter()

    def count(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, _i, output: calls.update([name, (name, tuple(output.shape))]))

    count("keys", present_step.projections(layer)[1])
    count("last update", present.encoder.dino.encoder.layer[-1].mlp)
    count("logits", present.llm.lm_head)
    decoder, passes = present.llm.model.layers[-1].mlp, Counter()
    decoder.register_forward_pre_hook(lambda _m, inputs: passes.update([inputs[0].shape[1]]))
    losses = present_losses(present, batch, ObjectiveConfig(fine_iterations=2, caption_start=False))
    assert passes == {T + 2: 5, T + 1 + L: 2}  # coarse, fine and unused queries, two reconstructions; two captions
    assert calls["keys"] == 2
    n = (SIDE // 14) ** 2 + 1
    assert calls["last update", (B * T, n, 24)] == 1 and calls["last update", (B, 1, 24)] == 3 * T
    assert calls["logits", (B, T + 1 + L, 29)] == 2
    assert all(value.requires_grad for value in (*losses.caption, *losses.recon))
    losses.loss.backward()
    assert passes == {T + 2: 5 + 3, T + 1 + L: 2 + 1}  # what the loss depends on is computed again
    read = present_losses(present, batch, ObjectiveConfig(), readings=True)
    assert not read.caption_coarse.requires_grad and not read.recon_coarse.requires_grad


def test_a_step_is_adamw_with_clipping_on_the_reference(batch):
    optim = OptimConfig(lr=1e-2, warmup_steps=2, grad_clip=0.5)
    objective = ObjectiveConfig(coarse_every=2, caption_start=False)
    config = Config(objective=objective, optim=optim, train=TrainConfig(precision="fp32"))
    model = make_model()
    present, reference = present_model(model), reference_of(model)
    before = copy.deepcopy(dict(present.named_parameters()))
    step = make_present_step(config, present)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=optim.weight_decay, foreach=True)
    for number in range(2):
        scalars = step(batch, number)
        wanted = reference_losses(reference, batch, caption_start=False)
        optimizer.zero_grad()
        wanted.loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2 * (number + 1) / 2
        optimizer.step()
        assert scalars["train/loss"].item() == pytest.approx(wanted.loss.item(), rel=1e-4)
        assert scalars["train/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
    moved = [name for name, p in present.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 50 and "video_end_token" not in moved
    for name, p in reference.named_parameters():
        if not name.endswith(("k_proj.bias", "key.bias")):  # Adam makes full steps of a zero gradient's rounding
            assert (p - present.get_parameter(name)).abs().max() < 2e-4, name


def test_bf16_computes_in_bf16_and_stays_near(batch):
    model = make_model()
    losses = []
    for precision in ("fp32", "bf16"):
        present, dtypes = present_model(model), set()
        present.dino_to_llm.register_forward_hook(lambda _m, _i, output, seen=dtypes: seen.add(output.dtype))
        step = make_present_step(Config(train=TrainConfig(precision=precision)), present)
        losses.append(step(batch, 1)["train/loss"].item())
        assert dtypes == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
