"""GPU memory that spills into system memory: what is left free under WSL2, and what is said of steps that are slow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from doctor_cases import WSL2_VERSION, copied_root, require
from tiny_run import LATENT, make_config, make_run

from fvlm.checks.software import look_at_gpus
from fvlm.train.flops import FlopMeter
from fvlm.train.memory import mock_step_seconds
from fvlm.train.spill import FIRST_LINES, GpuMemory, SlowdownWatch, slow_mock_step, usable
from fvlm.wsl2 import is_wsl2
from ray_jobs.training import look_at_speed

GB = 10**9
FULL = GpuMemory(reserved=22 * GB, used=23 * GB, total=24 * GB)
HALF = GpuMemory(reserved=11 * GB, used=12 * GB, total=24 * GB)
POLICY = "Prefer No Sysmem Fallback"


def test_under_wsl2_more_is_left_free():
    assert usable(10 * GB, wsl2=False) == 9 * GB
    assert usable(10 * GB, wsl2=True) == 7_500_000_000
    assert usable(GB, wsl2=True) == 0
    assert usable(10 * GB) == usable(10 * GB, is_wsl2())


def mock(seconds: float, memory: GpuMemory = FULL, peak: float | None = 100.0, wsl2: bool = True) -> str | None:
    """Of a step of 5 TFLOP: 0.05 s at a peak of 100 TFLOP/s, 1 s at 5 % of it."""
    return slow_mock_step(seconds, 5e12, peak, memory, wsl2)


def test_a_mock_step_far_below_the_chip_s_peak_on_a_full_gpu_is_said_with_cause_and_cure():
    said = mock(2.5)
    for part in ("a mock step took 2.50 s", "5% of the chip's peak would be 1.00 s", "23.0 GB of the GPU's 24.0 GB",
                 "probably spilled into system memory", POLICY, "--train.memory small"):  # fmt: skip
        assert part in said, part
    assert mock(0.99) is None
    assert mock(2.5, HALF) is None  # small steps are slow for other reasons
    assert mock(2.5, peak=None) is None


def test_elsewhere_than_under_windows_nothing_is_said_to_have_spilled():
    said = mock(2.5, wsl2=False)
    assert "nvidia-smi" in said and POLICY not in said and "probably" not in said


def test_more_memory_than_the_gpu_has_is_said_however_fast_the_step_was():
    beyond = GpuMemory(reserved=25 * GB, used=23 * GB, total=24 * GB)
    assert "25.0 GB of the GPU's 24.0 GB" in mock(0.01, beyond, peak=None)


def test_what_other_processes_hold_makes_a_gpu_full_too():
    assert dataclasses.replace(HALF, used=22 * GB).is_nearly_full
    assert dataclasses.replace(HALF, reserved=22 * GB).is_nearly_full
    assert not dataclasses.replace(HALF, used=21 * GB).is_nearly_full


def slow_lines(steps: list[tuple[float, float]], memory: GpuMemory) -> list[str]:
    """What is said after lines of these times a step and shares of waiting for data."""
    said: list[str] = []
    watch = SlowdownWatch(said.append, lambda: memory, wsl2=True)
    for step_time, wait in steps:
        watch.write([], {"train/step_time": step_time, "train/data_wait": wait})
    return said


FIRST = [(30.0, 0.0), *[(1.0, 0.0)] * (FIRST_LINES - 1)]
"""With a first step that compiled."""


def test_steps_that_become_many_times_slower_on_a_full_gpu_are_said_once():
    (said,) = slow_lines([*FIRST, (3.9, 0.0), (4.5, 0.0), (9.0, 0.0)], FULL)
    assert "steps take 4.50 s without waiting for data, where the first ones took 1.00 s" in said and POLICY in said


@pytest.mark.parametrize(
    "later, memory",
    [
        ([(3.9, 0.0)] * 3, FULL),
        ([(9.0, 0.0)] * 3, HALF),
        ([(9.0, 0.9)] * 3, FULL),  # they wait for data
    ],
)
def test_steps_that_are_slow_for_another_reason_are_not(later, memory):
    assert slow_lines([*FIRST, *later], memory) == []


def test_a_timed_mock_step_takes_time_and_changes_no_bit(tmp_path):
    run = make_run(make_config(tmp_path))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    assert mock_step_seconds(run.take_step, LATENT, torch.float16) > 0
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def test_a_start_says_it_of_the_rank_that_has_a_meter(tmp_path, monkeypatch):
    step = make_run(make_config(tmp_path)).take_step
    monkeypatch.setattr(GpuMemory, "now", lambda device: FULL)
    meter = FlopMeter({64: 1e12}, peak_tflops=1e-3)  # two clips need 40 000 s at 5 % of that
    assert look_at_speed(step, LATENT, torch.float16, meter) == []
    meter = FlopMeter({64: 1e3}, peak_tflops=1e3)
    (said,) = look_at_speed(step, LATENT, torch.float16, meter)
    assert "a mock step took" in said and "nvidia-smi" in said
    assert look_at_speed(step, LATENT, torch.float16, None) == []


def test_the_doctor_tells_of_the_driver_s_policy_under_wsl2_with_a_gpu_alone(tmp_path, monkeypatch):
    about = type("About", (), {"name": "RTX", "major": 8, "minor": 9})
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (23 * GB, 24 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    wsl2, linux = copied_root(tmp_path / "a", proc__version=WSL2_VERSION), copied_root(tmp_path / "b")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require(look_at_gpus(wsl2)[-1], "note", "goes on in system memory", POLICY)
    assert len(look_at_gpus(linux)) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert POLICY not in "".join(map(str, look_at_gpus(wsl2)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_s_memory_is_what_torch_and_the_driver_say():
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    now = GpuMemory.now(held.device)
    assert held.nbytes <= now.reserved <= now.used <= now.total
    assert now.total == torch.cuda.get_device_properties(held.device).total_memory
