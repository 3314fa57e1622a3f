"""Training over several Ray nodes, each with an address of its own: one is cut off, one dies, the head dies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch
from datasets import write_dataset
from nodes import Nodes, namespaces

from fvlm.train.run_folder import CHECKPOINTS
from fvlm.train.state import MODEL, checkpoints

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, PATIENCE_S = 100, 9, 150
OPTIONS = {
    "data.frame-size": 56, "data.global-batch": 4, "data.lanes": 4, "data.window-steps": 2, "log.wandb": "off",
    "train.max-steps": STEPS, "train.save-every": SAVE_EVERY, "train.log-every": 1, "scale.workers": 2,
    "scale.cpus-per-worker": 1.6,
}  # fmt: skip
CPUS = 3
"""Of a node: room for one rank and its decoding, not for two ranks."""
pytestmark = [pytest.mark.timeout(420), pytest.mark.long]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with namespaces() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, clips=26)
    return folder


@dataclass
class Training:
    """`ray_jobs.train`, started on the head's node."""

    nodes: Nodes
    data: Path
    runs: Path
    name: str
    changes: dict[str, object] = field(default_factory=dict)

    def start(self) -> None:
        options = {"data.path": self.data, "runs-dir": self.runs, "run": self.name} | OPTIONS | self.changes
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = self.nodes.command(0, sys.executable, "-m", "ray_jobs.train", "demo", *words)
        self._log = (self.runs / f"{self.name}.txt").open("ab")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.nodes.env | {"RAY_ADDRESS": self.nodes.head}, stdout=self._log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    @property
    def output(self) -> str:
        return (self.runs / f"{self.name}.txt").read_text()

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def rows(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step(self) -> int:
        rows = self.rows()
        return int(rows[-1]["step"]) if rows else 0

    def until(self, true: Callable[[], bool]) -> float:
        """-> seconds"""
        begin = time.monotonic()
        while not true():
            assert self.process.poll() is None, self.output
            assert time.monotonic() - begin < PATIENCE_S, self.output
            time.sleep(0.05)
        return time.monotonic() - begin

    def finish(self) -> None:
        assert self.process.wait(PATIENCE_S) == 0, self.output
        assert [row["step"] for row in self.rows()] == list(range(1, STEPS + 1))

    def losses(self) -> list[tuple[float, float]]:
        return [(row["caption/loss_fine"], row["recon/loss_fine"]) for row in self.rows()]

    def weights(self) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(checkpoints(self.folder / CHECKPOINTS)[-1] / MODEL)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Two ranks on two nodes."""
    with namespaces() as nodes:
        nodes.start(0, CPUS)
        nodes.start(1, CPUS)
        training = Training(nodes, data, tmp_path_factory.mktemp("runs"), "undisturbed")
        training.start()
        training.finish()
        return training


def assert_close(one: Training, other: Training) -> None:
    """The same samples and, up to the order in which float32 numbers are added, the same losses and weights."""
    for a, b in zip(one.rows(), other.rows(), strict=True):
        assert a["caption/loss_fine"] == pytest.approx(b["caption/loss_fine"], rel=1e-4), a["step"]
    for name, weight in one.weights().items():
        torch.testing.assert_close(weight, other.weights()[name], rtol=0, atol=1e-3)


def starts(output: str) -> list[tuple[int, int]]:
    """(step, ranks) of every start."""
    found = re.findall(r"parameters on (\d+) x cpu.*\n.* (?:starting at step 0|resumed at step (\d+))", output)
    return [(int(step or 0), int(ranks)) for ranks, step in found]


def test_a_node_that_is_cut_off_in_mid_step_is_done_without_and_taken_back_when_it_returns(
    nodes, data, undisturbed, tmp_path
):
    nodes.start(0, CPUS)
    nodes.start(1, CPUS)
    training = Training(nodes, data, tmp_path, "cut", {"scale.min-workers": 1})
    training.start()
    training.until(lambda: training.step() >= 12)
    nodes.cut(1)
    at = training.step()
    seconds = training.until(lambda: training.step() > at and "1 x cpu" in training.output)
    print(f"{seconds:.1f} s from the cut to the next step")
    assert seconds < 60
    nodes.kill(1)  # Ray has given it up
    nodes.join(1)
    nodes.start(1, CPUS)
    training.finish()
    assert "the cluster has room for 2 ranks: saving after this step" in training.output
    (first, ranks_first), (_, ranks_then), (back, ranks_last) = starts(training.output)
    assert (first, ranks_first, ranks_then, ranks_last) == (0, 2, 1, 2)
    assert back % SAVE_EVERY  # not a step at which it would have saved anyway: nothing was repeated
    assert_close(training, undisturbed)


def test_a_lost_node_is_replaced_by_another_and_a_lost_head_by_the_same_command(nodes, data, undisturbed, tmp_path):
    """Two ranks on three nodes: the same number all the time, so the bits are the same."""
    for node in range(3):
        nodes.start(node, CPUS)
    training = Training(nodes, data, tmp_path, "lost")
    training.start()
    training.until(lambda: training.step() >= 12)
    away = next(node for node in (1, 2) if nodes.runs(node, "RayTrainWorker"))
    nodes.kill(away)
    at = training.step()
    seconds = training.until(lambda: training.step() > at)
    print(f"{seconds:.1f} s from a node's death to the next step")
    assert seconds < 60
    for node in {0, 1, 2} - {away}:
        nodes.kill(node)
    training.process.wait(60)
    for node in (0, 1):
        nodes.start(node, CPUS)
    training.start()
    training.finish()
    assert [ranks for _, ranks in starts(training.output)] == [2, 2, 2]
    assert training.losses() == undisturbed.losses()
    assert all(torch.equal(weight, undisturbed.weights()[name]) for name, weight in training.weights().items())


def test_ranks_leave_a_node_that_is_drained_without_repeating_a_step(nodes, data, undisturbed, tmp_path):
    nodes.start(0, CPUS)
    nodes.start(1, CPUS)
    training = Training(nodes, data, tmp_path, "drained", {"scale.min-workers": 1})
    training.start()
    training.until(lambda: training.step() >= 12)
    nodes.drain(1)
    training.until(lambda: "1 x cpu" in training.output)
    training.finish()
    assert "a node is to be taken away: saving after this step" in training.output
    (_, two), (then, one) = starts(training.output)
    assert (two, one) == (2, 1) and then % SAVE_EVERY
    assert_close(training, undisturbed)
