"""What a step needs of the device's memory: the estimate against what lives in a real step, and what is said when
there is too little."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fvlm import presets
from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.model.hub import build_model
from fvlm.train.gpu_memory import free_gpu_memory
from fvlm.train.memory import (
    LiveBytes,
    estimate,
    largest_batch,
    mock_batch,
    out_of_memory,
    settle_batch,
    settle_memory,
    warm_up,
    with_memory,
)
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.state import random_generators, state_tensors
from fvlm.train.step import Step

LATENT = (4, 8, 8)
ASKED = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.50 GiB of which ..."


def small() -> Config:
    config = presets.demo()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, frame_size=56, num_frames=3))


def real_step(config: Config) -> Step:
    model = build_model(config.model, LATENT, seed=0)
    freeze_unreached(model, config)
    return Step(config, model, make_optimizer(model, config.optim))


@pytest.mark.parametrize("memory", ["speed", pytest.param("balanced", marks=pytest.mark.long), "small"])
def test_the_estimate_is_what_lives_in_a_real_step(memory):
    config = with_memory(small(), memory)
    need = estimate(config, LATENT, clips=2)
    assert memory == "speed" or need.peak < estimate(with_memory(config, "speed"), LATENT, clips=2).peak
    step = real_step(config)
    batch = mock_batch(config, LATENT, 2, 512)
    step(batch, 0)
    live = LiveBytes()
    parameters = list(step.model.parameters())
    weights = sum(p.nbytes for p in parameters)
    moments = sum(t.nbytes for state in step.optimizer.state.values() for t in state.values())
    for tensor in [*step.model.buffers(), *parameters, *(t for s in step.optimizer.state.values() for t in s.values())]:
        live.add(tensor)
    with live:
        step(batch, 0)
    assert need.weights == pytest.approx(weights, rel=0.01)  # and a few buffers
    assert need.optimizer == pytest.approx(moments, rel=0.01)
    assert need.peak == pytest.approx(live.peak, rel=0.02)


@pytest.mark.long
def test_the_largest_batch_fits_and_one_clip_more_does_not():
    config, free = with_memory(small(), "balanced"), 100_000_000
    clips = largest_batch(config, LATENT, free)
    assert clips > 2
    assert estimate(config, LATENT, clips).peak <= free < estimate(config, LATENT, clips + 1).peak
    assert largest_batch(config, LATENT, 10_000_000) == 0


def test_a_mock_step_changes_no_bit_and_draws_no_random_number():
    step = real_step(dataclasses.replace(small(), scale=dataclasses.replace(small().scale, workers=4)))
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    drawn = torch.get_rng_state()
    assert "a mock step has passed" in warm_up(step, LATENT)
    assert torch.equal(drawn, torch.get_rng_state())
    assert not any(moment.any() for state in step.optimizer.state.values() for moment in state.values())
    for name, p in step.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def trained(step: Step, broken: int | None) -> dict[str, torch.Tensor]:
    """Weights, moments and counters after three steps, of which number `broken` has a latent that is not finite."""
    config = step.config
    for number in range(3):
        batch = mock_batch(config, LATENT, 2, 512)
        batch.latents[:] = number / 4 if number != broken else torch.inf
        step(batch, number)
    parameters, moments = state_tensors(step.model, step.optimizer)
    return {name: tensor.clone() for name, tensor in (parameters | moments).items()}


@pytest.mark.parametrize("broken", [None, 0])
def test_steps_after_a_mock_step_are_bit_for_bit_those_without_one(broken):
    config = small()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch=2, lanes=2))
    warm, cold = real_step(config), real_step(config)
    warm_up(warm, LATENT)
    got, wanted = trained(warm, broken), trained(cold, broken)
    assert got.keys() == wanted.keys()
    assert [name for name in got if not torch.equal(got[name], wanted[name])] == []


def test_the_mock_step_has_the_moments_beside_it_and_a_resumed_run_keeps_its_own():
    step = real_step(small())
    real, seen = step.losses_of, []

    def watched(*args: object) -> object:
        seen.append({name: len(step.optimizer.state.get(p, ())) for name, p in step.model.named_parameters()})
        return real(*args)

    step.losses_of = watched
    warm_up(step, LATENT)
    wanted = {name: 3 if p.requires_grad else 0 for name, p in step.model.named_parameters()}
    assert seen and all(had == wanted for had in seen)
    trained(step, None)
    before = {p: dict(moments) for p, moments in step.optimizer.state.items()}
    copies = [moment.clone() for moments in before.values() for moment in moments.values()]
    warm_up(step, LATENT)
    after = [moment for moments in step.optimizer.state.values() for moment in moments.values()]
    assert all(a is b for a, b in zip(after, (m for moments in before.values() for m in moments.values()), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, copies, strict=True))


def test_too_little_memory_shows_in_the_mock_step_with_what_was_asked_for_and_what_to_do():
    step = real_step(small())

    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError(ASKED)

    step.losses_of = too_much
    with pytest.raises(UserError) as error:
        warm_up(step, LATENT)
    said = str(error.value)
    for part in ("mock step", "8 clips a rank", "Tried to allocate 2.50 GiB", "--train.memory small", "--scale.workers",
                 "--data.global-batch", "checkpoint is whole"):  # fmt: skip
        assert part in said, part


def test_the_phase_is_told():
    said = str(out_of_memory(torch.OutOfMemoryError(ASKED), "step 17", small(), LATENT))
    assert said.startswith("out of GPU memory in step 17, with 8 clips a rank: Tried to allocate 2.50 GiB. ")


@pytest.mark.parametrize(("free", "memory"), [(1 << 40, "speed"), (10_000_000, "small")])
def test_auto_takes_the_first_way_that_fits(free, memory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert settle_memory(small(), LATENT, torch.device("cuda")).train.memory == memory
    assert settle_memory(small(), LATENT, torch.device("cpu")).train.memory == "speed"
    assert settle_memory(with_memory(small(), "balanced"), LATENT, torch.device("cpu")).train.memory == "balanced"


def any_batch(tmp_path: Path, **scale: int) -> Config:
    config = with_memory(small(), "balanced")
    return dataclasses.replace(
        config,
        runs_dir=str(tmp_path),
        data=dataclasses.replace(config.data, global_batch=0, lanes=4),
        scale=dataclasses.replace(config.scale, **scale),
    )


def test_a_batch_of_0_is_the_most_in_whole_lanes_and_what_the_run_began_with_from_then_on(tmp_path, monkeypatch):
    config = any_batch(tmp_path, workers=2)
    monkeypatch.setattr("fvlm.train.memory.free_gpu_memory", lambda: 10**9)
    monkeypatch.setattr("fvlm.train.memory.largest_batch", lambda config, latent, free: 11 if free == 9e8 else 0)
    settled = settle_batch(config, LATENT)
    assert settled.data.global_batch == 20  # 22 clips on two ranks, 4 lanes
    settled.run_dir.mkdir()
    began = {"config": settled.to_dict(), "dataset": "", "dataset_path": ""}
    (settled.run_dir / "config.json").write_text(json.dumps(began))
    monkeypatch.setattr("fvlm.train.memory.free_gpu_memory", lambda: None)
    assert settle_batch(config, LATENT) == settled


def test_a_batch_of_0_without_room_or_without_a_gpu_is_an_error_that_says_so(tmp_path, monkeypatch):
    config = any_batch(tmp_path)
    monkeypatch.setattr("fvlm.train.memory.free_gpu_memory", lambda: None)
    with pytest.raises(UserError, match=r"--data.global-batch 0 .* this machine has none"):
        settle_batch(config, LATENT)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # AdamW asks; there is no driver
    monkeypatch.setattr("fvlm.train.memory.free_gpu_memory", lambda: 10**7)
    with pytest.raises(UserError, match=r"do not hold 4 clips a rank.*--train.memory small.*--data.lanes"):
        settle_batch(config, LATENT)


def other_torch(folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
    """Processes that are started from now on import, for torch, one whose `torch.cuda` is this class body."""
    (folder / "torch.py").write_text(f"class cuda:\n    {cuda}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_process_that_starts_a_run_leaves_cuda_to_another_when_it_asks_for_what_fits(tmp_path, monkeypatch):
    class Untouched:
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"this process asked for torch.cuda.{name}")

    other_torch(tmp_path, monkeypatch, "is_available = lambda: True; mem_get_info = lambda: (2 * 10**9, 3 * 10**9)")
    seen: list[int] = []
    monkeypatch.setattr("fvlm.train.memory.largest_batch", lambda config, latent, free: seen.append(free) or 12)
    with monkeypatch.context() as untouched:
        untouched.setattr(torch, "cuda", Untouched())
        settled = settle_batch(any_batch(tmp_path), LATENT)
    assert seen == [int(2e9 * 0.9)] and settled.data.global_batch == 12
    assert not torch.cuda.is_initialized()


def test_a_gpu_that_does_not_answer_is_an_error_and_none_is_none(tmp_path, monkeypatch):
    other_torch(tmp_path, monkeypatch, "is_available = lambda: False")
    assert free_gpu_memory() is None
    other_torch(tmp_path, monkeypatch, "is_available = lambda: 1 / 0")
    with pytest.raises(UserError, match=r"cannot be had: ZeroDivisionError.*--data.global-batch a number"):
        free_gpu_memory()


def test_a_checkpoint_that_is_only_written_here_does_not_start_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: pytest.fail("CUDA was started"))
    assert list(random_generators()) == ["rng/torch"]


def test_a_recorded_step_is_estimated_with_gradients_for_every_caption_length():
    config = presets.demo()
    data = dataclasses.replace(config.data, max_caption_tokens=96)  # padded to 96, 64 or 32
    peaks = {}
    for graphs, workers in (("off", 1), ("auto", 1), ("auto", 2)):
        train = dataclasses.replace(config.train, cuda_graphs=graphs)
        scale = dataclasses.replace(config.scale, workers=workers)
        peaks[graphs, workers] = estimate(dataclasses.replace(config, data=data, train=train, scale=scale), LATENT, 2)
    plain, recorded = peaks["off", 1], peaks["auto", 1]
    assert recorded.peak - plain.peak == 2 * plain.gradients > 0
    assert peaks["auto", 2].peak < recorded.peak  # several ranks do not record
