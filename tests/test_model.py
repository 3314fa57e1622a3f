"""What the parity tests leave out: the ablation, the presets' sizes, gaze and generation."""

import dataclasses

import pytest
import torch
from reference import normalise_frame
from torch.nn import functional as F

from fvlm import presets
from fvlm.batch import Batch
from fvlm.config import ModelConfig, ObjectiveConfig
from fvlm.errors import UserError
from fvlm.model.generate import gaze, generate_captions
from fvlm.model.hub import build_model
from fvlm.model.objective import caption_sequence, compute_losses, passes, target_labels

LATENT = (4, 7, 7)
TINY = presets.demo().model


def tiny_model(config: ModelConfig = TINY):
    return build_model(config, LATENT, seed=0)


def tiny_batch(b: int = 2, t: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 500, (b, 6), generator=generator)
    return Batch(
        torch.randint(0, 256, (b, t, 56, 56, 3), generator=generator, dtype=torch.uint8),
        torch.randn(b, t, *LATENT, generator=generator).half(),
        ids,
        ids.clone(),
        tuple(map(str, range(b))),
    ).check()


def test_shallow_query_is_one_softmax_attention_on_the_final_features():
    model = tiny_model(dataclasses.replace(TINY, deep_query=False))
    frames = tiny_batch().frames.flatten(0, 1)
    query = torch.randn(len(frames), TINY.query_width)
    seen = model.encoder(query, model.encode(frames[:, None]))
    features = model.encoder.dino(normalise_frame(frames, torch.float32)).last_hidden_state  # HF's own forward
    scores = torch.einsum("fd,fnd->fn", model.encoder.query_input_proj(query), features) / features.shape[-1] ** 0.5
    expected = model.encoder.query_output_proj(torch.einsum("fn,fnd->fd", F.softmax(scores, dim=-1), features))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    losses = compute_losses(model, tiny_batch(), ObjectiveConfig(), readings=True)
    losses.loss.backward()
    assert torch.isfinite(losses.loss)


def test_frozen_vision_gets_no_gradient_but_its_query_projections_do():
    model = tiny_model(dataclasses.replace(TINY, train_vision=False))
    compute_losses(model, tiny_batch(), ObjectiveConfig()).loss.backward()
    assert all(p.grad is None for p in model.encoder.dino.parameters())
    assert model.encoder.query_input_proj.weight.grad.abs().sum() > 0


def test_gaze_is_the_softmax_of_patches_without_the_cls_token():
    model, batch = tiny_model(), tiny_batch()
    coarse, fine = gaze(model, batch.frames, ObjectiveConfig())
    assert coarse.shape == fine.shape == (2, 4, 4, 4)
    total = coarse.flatten(2).sum(-1)
    assert (total < 1).all() and (total > 0.5).all()  # what is missing went to CLS
    assert not torch.equal(coarse[:, 1:], fine[:, 1:])


def test_a_caption_that_was_learnt_by_heart_is_generated_again():
    model, batch = tiny_model(), tiny_batch(b=1)
    objective = ObjectiveConfig(fine_iterations=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        compute_losses(model, batch, objective).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (said,) = generate_captions(model, batch.frames, objective, max_tokens=6, eos_id=0)
    assert said == batch.caption_ids[0].tolist()


def greedy(model, frames, start_11E, tokens: int) -> list[int]:
    """Token by token, the whole sequence anew each time, through transformers' own forward pass."""
    *_, last = passes(model, model.encode(frames), model.decoder_layers(), 1, frames.shape[1], 1)
    sequence, said = torch.cat([model.fine_token, last.z_BTE, start_11E], dim=1), []
    for _ in range(tokens):
        said.append(int(model.llm(inputs_embeds=sequence).logits[0, -1].argmax()))
        sequence = torch.cat([sequence, model.embed(torch.tensor([said[-1:]]))], dim=1)
    return said


@torch.no_grad()
def test_captions_are_prompted_as_they_were_trained():
    """With a start token from it; without one from the true first token, which no position was trained to predict."""
    model, batch = tiny_model().eval(), tiny_batch(b=1)
    first = batch.caption_ids[:, :1]
    wanted = greedy(model, batch.frames, model.video_end_token, 5)
    objective = ObjectiveConfig(fine_iterations=1)
    assert generate_captions(model, batch.frames, objective, 5, eos_id=-1) == [wanted]
    without = dataclasses.replace(objective, caption_start=False)
    wanted = [int(first), *greedy(model, batch.frames, model.embed(first), 4)]
    assert generate_captions(model, batch.frames, without, 5, -1, first) == [wanted]
    with pytest.raises(ValueError, match="has to be given the first token"):
        generate_captions(model, batch.frames, without, 5, eos_id=-1)


@pytest.mark.parametrize("caption_start", [True, False])
@torch.no_grad()
def test_every_token_of_a_caption_that_is_said_is_the_likeliest_where_training_would_predict_it(caption_start):
    model, batch = tiny_model().eval(), tiny_batch(b=1)
    objective = ObjectiveConfig(fine_iterations=1, caption_start=caption_start)
    (said,) = generate_captions(model, batch.frames, objective, 6, -1, batch.caption_ids[:, :1])
    ids = torch.tensor([said])
    *_, last = passes(model, model.encode(batch.frames), model.decoder_layers(), 1, batch.frames.shape[1], 1)
    sequence = caption_sequence(model, last, model.embed(ids), objective)
    (hidden,) = model.read(model.decoder_layers(), sequence)
    labels = target_labels(ids, objective)
    predicted = model.llm.lm_head(hidden[:, -labels.shape[1] - 1 : -1]).argmax(-1)
    assert torch.equal(predicted, labels)


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=presets.PRESETS)
def test_every_preset_builds_without_a_network(preset):
    config = dataclasses.replace(preset().model, init="random")
    with torch.device("meta"):
        model = build_model(config, (4, 32, 32), seed=0)
    assert model.encoder.query_input_proj.bias is None


def test_the_real_presets_parts_have_their_published_sizes():
    with torch.device("meta"):
        model = build_model(dataclasses.replace(presets.joint_multifine().model, init="random"), (4, 32, 32), seed=0)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["llm"] == 134_515_008  # SmolLM2-135M's model card
    assert sum(p.numel() for p in model.encoder.dino.parameters()) == 22_056_576  # facebook/dinov2-small's file


def test_names_that_lead_nowhere_are_told_with_the_ones_that_do():
    with pytest.raises(UserError, match=r"model\.vision 'no-such-model'.*facebook/dinov2-small"):
        build_model(ModelConfig(vision="no-such-model", init="random"), LATENT, seed=0)
    with pytest.raises(UserError, match=r"--model\.vision 'tiny-dinov2'.*--model\.init random"):
        build_model(ModelConfig(vision="tiny-dinov2", init="hub"), LATENT, seed=0)
