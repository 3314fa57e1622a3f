"""The compiled step: losses and gradients of the reference, no break in its graphs, and nothing compiled twice."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from reference import reference_losses
from test_parity import assert_same_gradients, assert_same_losses, gradients, make_batch, make_model, reference_of
from torch._dynamo.utils import counters

from fvlm.batch import IGNORE, Batch
from fvlm.config import Config, DataConfig, ObjectiveConfig, OptimConfig, TrainConfig
from fvlm.train.memory import warm_up
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.step import Step, make_losses

OBJECTIVE = ObjectiveConfig(lambda_recon=0.3, coarse_every=2)
KINDS = pytest.mark.parametrize("kind", ["layers", "whole"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def config_of(kind: str, memory: str = "speed") -> Config:
    return Config(
        objective=OBJECTIVE,
        optim=OptimConfig(lr=1e-3, warmup_steps=0),
        train=TrainConfig(precision="fp32", compile=kind, memory=memory),
    )


def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, differentiated and run as they are: all but the C++ compiler, which takes minutes."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_with(f, backend="aot_eager", **kw))


def assert_equals_the_reference(kind: str, memory: str = "speed") -> None:
    model, batch = make_model(), make_batch()
    reference = reference_of(model)
    config = config_of(kind, memory)
    freeze_unreached(model, config)
    got = make_losses(config, model)(model, batch, OBJECTIVE, readings=True)
    wanted = reference_losses(reference, batch, 2, 0.3, True, "batch")
    assert_same_losses(got, wanted)
    assert_same_gradients(gradients(model, got.loss), gradients(reference, wanted.loss))


@KINDS
def test_graphs_have_the_losses_and_gradients_of_the_reference(kind, monkeypatch):
    without_code_generation(monkeypatch)
    assert_equals_the_reference(kind)
    assert not counters["graph_break"]
    # Patch embedding, patches, queries, the language model with three shapes; losses and prediction, with gradients and
    # without.
    assert counters["stats"]["unique_graphs"] == {"layers": 10, "whole": 2}[kind]


def test_in_bf16_reading_the_weights_is_a_program_too_and_nothing_breaks(monkeypatch):
    without_code_generation(monkeypatch)
    model, batch = make_model(), make_batch()
    wanted = reference_losses(reference_of(model), batch, 2, 0.3, True, "batch")
    config = config_of("layers")
    freeze_unreached(model, config)
    losses_of = make_losses(config, model)
    with torch.autocast("cpu", torch.bfloat16):
        got = losses_of(model, batch, OBJECTIVE, readings=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses_of(model, make_batch(2), OBJECTIVE, readings=True)
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=0.02)
    got.loss.backward()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] > 10


@pytest.mark.parametrize("kind", ["off", "layers"])
@pytest.mark.parametrize("memory", ["balanced", "small"])
def test_what_is_computed_again_for_the_backward_pass_changes_nothing(kind, memory, monkeypatch):
    without_code_generation(monkeypatch)
    assert_equals_the_reference(kind, memory)


@pytest.mark.long
@KINDS
def test_compiled_code_has_the_losses_and_gradients_of_the_reference(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert_equals_the_reference(kind)


@pytest.mark.parametrize("kind", ["layers", pytest.param("whole", marks=pytest.mark.long)])
def test_captions_of_all_lengths_compile_nothing_after_the_first_of_each(kind, monkeypatch):
    """Two lengths, steps with readings and without: what these four need is compiled, and then nothing more."""
    without_code_generation(monkeypatch)
    model, batch = make_model(), make_batch()
    config = config_of(kind)
    freeze_unreached(model, config)
    step = Step(config, model, make_optimizer(model, config.optim))
    for number in range(4):
        step(with_caption(batch, 3 + number // 2 * 2, number), number)
    compiled = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(4, 24):
            step(with_caption(batch, 3 + number // 2 % 2 * 2, number), number)
    assert counters["stats"]["unique_graphs"] == compiled


@pytest.mark.parametrize(
    "kind, dtype, lengths", [("layers", torch.float16, (32, 40)), ("whole", torch.bfloat16, (32,))]
)
def test_after_a_warm_up_captions_of_no_length_compile_anything(kind, dtype, lengths, monkeypatch):
    """`lengths`: those that the tokenizer pads to."""
    without_code_generation(monkeypatch)
    model, batch = make_model(), make_batch()
    batch = dataclasses.replace(batch, latents=batch.latents.to(dtype))
    clips, t, side = batch.frames.shape[:3]
    data = DataConfig(num_frames=t, frame_size=side, global_batch=clips, lanes=clips, max_caption_tokens=max(lengths))
    config = dataclasses.replace(config_of(kind), data=data)
    freeze_unreached(model, config)
    step = Step(config, model, make_optimizer(model, config.optim))
    warm_up(step, tuple(batch.latents.shape[2:]), dtype)
    compiled = counters["stats"]["unique_graphs"]
    for number, length in enumerate(length for length in lengths for _ in (True, False)):
        step(with_caption(batch, length, number), number)
    assert counters["stats"]["unique_graphs"] == compiled > 0


def with_caption(batch: Batch, length: int, seed: int) -> Batch:
    """Other words, as many as `length`, some of them not trained on; other clips' names."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 29, (len(batch.clip_ids), length), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, IGNORE, ids)
    names = tuple(f"{seed}-{i}" for i in range(len(ids)))
    return dataclasses.replace(batch, caption_ids=ids, labels=labels, clip_ids=names)
