"""A step whose loss or gradient is not finite: it changes nothing, is counted, listed and, too often, the end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import CLIPS, batches, bits, clip_id, make_batch, make_config, make_run
from torch.utils._python_dispatch import TorchDispatchMode

from fvlm.config import Config, OptimConfig, validate
from fvlm.errors import UserError
from fvlm.train.logger import Logger
from fvlm.train.loop import Run, train
from fvlm.train.metrics import Row
from fvlm.train.optim import make_optimizer, update
from fvlm.train.samples import Samples
from fvlm.train.sinks import METRICS, JsonLines, TrainLog
from fvlm.train.skipped import SKIPPED
from fvlm.train.step import train_step

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))


def steps(run: Run, numbers: list[int], broken: tuple[int, ...] = (), device: str = "cpu") -> list[Row]:
    rows = []
    for number in numbers:
        batch = make_batch(number, broken=number in broken, device=device)
        scalars = train_step(run.model, run.optimizer, batch, number - 1, run.config)
        rows.append({name: value.item() for name, value in scalars.items()})
    return rows


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_with_a_broken_clip_changes_no_bit_and_training_goes_on_as_if_it_had_not_been(
    tmp_path, device, precision
):
    disturbed, undisturbed = (make_run(make_config(tmp_path, precision=precision), device=device) for _ in range(2))
    before = bits(disturbed)
    (bad,) = steps(disturbed, [1], broken=(1,), device=device)
    assert bad["train/skipped"] == 1 and not math.isfinite(bad["train/loss"])
    assert {name: bits(disturbed)[name] for name in before} == before  # the very first one: no moments yet
    steps(disturbed, [2, 3], device=device)
    before = bits(disturbed)
    assert steps(disturbed, [4], broken=(4,), device=device)[0]["train/skipped"] == 1
    assert bits(disturbed) == before
    after = [steps(disturbed, [5], device=device), steps(undisturbed, [2, 3, 5], device=device)[-1:]]
    assert bits(disturbed) != before
    if device == "cpu":  # a GPU adds up in any order
        assert after[0] == after[1] and bits(disturbed) == bits(undisturbed)
    counters = {value["step"].item() for value in disturbed.optimizer.state.values()}
    assert counters == {3.0}


def test_a_gradient_that_is_not_finite_skips_the_step_though_its_loss_is(tmp_path):
    run = make_run(make_config(tmp_path))
    steps(run, [1])
    before = bits(run)
    hook = run.model.llm_to_query.weight.register_hook(lambda gradient: gradient * math.inf)
    (row,) = steps(run, [2])
    hook.remove()
    assert row["train/skipped"] == 1 and math.isfinite(row["train/loss"]) and not math.isfinite(row["train/grad_norm"])
    assert bits(run) == before
    assert steps(run, [3])[0]["train/skipped"] == 0 and bits(run) != before


class Waits(TorchDispatchMode):
    """Counts operators whose result the host has to see before it can go on: on a GPU each of them waits for it.

    Copies between devices do not show on a CPU; where there is a GPU, torch looks for those too (below).
    """

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.NAMES
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("broken", [False, True])
def test_the_host_waits_for_nothing_in_a_step(tmp_path, broken):
    run, batch = make_run(make_config(tmp_path)), make_batch(1, broken=broken)
    for number in range(2):  # with readings and without
        with Waits() as step:
            train_step(run.model, run.optimizer, batch, number, run.config)
        assert step.count == 0
    with Waits() as counted:
        assert torch.ones(()).item() == 1
    assert counted.count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_host_waits_for_no_gpu_in_a_step(tmp_path):
    run = make_run(make_config(tmp_path), device="cuda")
    steps(run, [1, 2], device="cuda")  # AdamW makes its state in the first
    batches = [make_batch(number, device="cuda") for number in (3, 4)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, batch in enumerate(batches, 2):
            train_step(run.model, run.optimizer, batch, number, run.config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def go_on(config: Config, step: int, stop: int, broken: tuple[int, ...]) -> tuple[Run, list[tuple[list[Row], Row]]]:
    """One start of a run: from `step` to `stop`, as rank 0 of 1 does. -> the run, and what its sinks were given."""

    class Seen:
        def __init__(self) -> None:
            self.given: list[tuple[list[Row], Row]] = []

        def write(self, rows: list[Row], latest: Row) -> None:
            self.given.append(([dict(row) for row in rows], dict(latest)))

        def note(self, text: str) -> None: ...

        def close(self) -> None: ...

    config = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=stop))
    run, seen = make_run(config, step), Seen()
    samples = Samples(config, step, rank=0, world=1)
    sinks = [TrainLog(config.run_dir, stop), JsonLines(config.run_dir, step), seen]
    try:
        train(run, samples.of(batches(step + 1, broken)), [Logger(run, sinks, samples)])
    finally:
        for sink in sinks:
            sink.close()
    return run, seen.given


def lines(path: Path) -> list[dict[str, Any]]:
    """Raises ValueError for NaN and infinity, which Python's parser takes and JSON does not know."""

    def refuse(name: str) -> None:
        raise ValueError(f"{path}: {name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().splitlines()]


def test_skipped_steps_are_counted_listed_with_their_clips_and_told(tmp_path):
    config = make_config(tmp_path, log_every=3)
    _, given = go_on(config, 0, 7, broken=(2, 5))
    listed = lines(config.run_dir / SKIPPED)
    assert [(line["step"], line["clips"]) for line in listed] == [
        (step, [clip_id(step, clip) for clip in range(CLIPS)]) for step in (2, 5)
    ]
    assert {line["loss"] for line in listed} <= {"inf", "nan"}
    rows = lines(config.run_dir / METRICS)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [row["train/skipped"] for row in rows] == [0, 1, 0, 0, 1, 0, 0]
    assert [row["train/loss"] is None for row in rows] == [False, True, False, False, True, False, False]
    assert [latest["train/skipped_total"] for _, latest in given] == [1, 2, 2]
    assert not math.isfinite(given[0][0][1]["train/loss"])  # W&B and the dashboard get it as it is
    told = [line for line in (config.run_dir / "train.log").read_text().splitlines() if " skipped: " in line]
    assert [line.split()[3] for line in told] == ["2", "5"]
    assert "1 in a row, 2 in all" in told[1] and str(config.run_dir / SKIPPED) in told[1]


def test_a_skipped_step_leaves_the_averages_of_the_ratios_alone(tmp_path):
    run, given = go_on(make_config(tmp_path, log_every=1), 0, 4, broken=(2, 3))
    ratios = [rows[0]["recon/ratio"] for rows, _ in given]
    assert [math.isfinite(ratio) for ratio in ratios] == [True, False, False, True]
    assert given[-1][1]["recon/ratio_avg"] == pytest.approx((ratios[0] + ratios[3]) / 2)
    assert run.optimizer.param_groups[0]["lr"] == 1e-3


def test_a_run_without_a_skipped_step_has_no_list(tmp_path):
    config = make_config(tmp_path, log_every=2)
    go_on(config, 0, 4, broken=())
    assert not (config.run_dir / SKIPPED).exists()


def test_so_many_in_a_row_end_the_run_with_the_reason_and_the_cures(tmp_path):
    config = make_config(tmp_path, log_every=4, max_skipped=3)
    broken = (1, 2, 4, 5, 7, 8, 9)  # twice two in a row, then three
    with pytest.raises(UserError) as caught:
        go_on(config, 0, 50, broken)
    message = str(caught.value)
    listed = config.run_dir / SKIPPED
    for part in ("step 9 was skipped, number 3 in a row", "train/loss is ", "train/grad_norm ", str(listed),
                 "--optim.lr", "--train.max-skipped above 3"):  # fmt: skip
        assert part in message
    assert [line["step"] for line in lines(listed)] == list(broken)
    assert [row["step"] for row in lines(config.run_dir / METRICS)] == list(range(1, 13))  # all of it is on the disk


def test_in_a_row_goes_on_over_a_restart_and_no_step_is_listed_twice(tmp_path):
    """Killed after step 6, with a checkpoint of step 4: steps 5 and 6 are done again."""
    config = make_config(tmp_path, log_every=2, max_skipped=4)
    go_on(config, 0, 6, broken=(3, 4, 6))
    assert [line["step"] for line in lines(config.run_dir / SKIPPED)] == [3, 4, 6]
    with (config.run_dir / SKIPPED).open("a") as file:
        file.write('{"step": 7, "lo')  # and it was killed while it wrote
    _, given = go_on(config, 4, 8, broken=(6, 7))
    assert [line["step"] for line in lines(config.run_dir / SKIPPED)] == [3, 4, 6, 7]
    assert given[-1][1]["train/skipped_total"] == 4
    with pytest.raises(UserError, match="step 6 was skipped, number 4 in a row"):
        go_on(config, 4, 20, broken=(5, 6))
    assert [line["step"] for line in lines(config.run_dir / SKIPPED)] == [3, 4, 5, 6]


@pytest.mark.parametrize(("key", "value"), [("max_skipped", 0), ("max_skipped", -1)])
def test_a_limit_that_cannot_be_is_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=r"--train.max-skipped is .* above 0"):
        validate(make_config(tmp_path, **{key: value}))


def test_the_optimiser_is_adamw_as_the_paper_has_it():
    """Fused, it is another code than the reference's; held to the textbook formula (Loshchilov & Hutter 2019)."""
    torch.manual_seed(0)
    net = torch.nn.Linear(7, 5)
    config = OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=0)
    optimizer = make_optimizer(net, config)
    w = net.weight.detach().double().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 6):
        net.weight.grad, net.bias.grad = torch.randn(5, 7), torch.randn(5)
        g = net.weight.grad.double()
        update(optimizer, torch.tensor(0.0))
        w *= 1 - config.lr * config.weight_decay
        m, v = config.beta1 * m + (1 - config.beta1) * g, config.beta2 * v + (1 - config.beta2) * g * g
        w -= config.lr * (m / (1 - config.beta1**t)) / ((v / (1 - config.beta2**t)).sqrt() + config.eps)
        assert torch.allclose(net.weight.double(), w, rtol=1e-6, atol=1e-7)
