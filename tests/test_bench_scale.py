"""The law by which `make bench-scale` predicts: what it must say in cases that can be worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks" / "scale"))
from law import Cluster, Parts, forecast, seconds_a_step

SCALE = Path(__file__).resolve().parent / "benchmarks" / "scale"
PARTS = Parts(fixed_s=0.1, clip_s=0.2, crowded=1.5, ingest_s=0.01)
GPU = Cluster(
    step_s=0.1, clips_a_gpu=16, backward=0.5, gradient_bytes=1e9, network=1e10, hop_s=0.0, buckets=10, ingest_s=0.004,
    bytes_a_clip=2e5,
)  # fmt: skip


def test_one_rank_on_two_cores_leaves_one_to_the_ingest():
    assert seconds_a_step(PARTS, ranks=1, global_batch=8, cores=2) == pytest.approx(0.1 + 8 * 0.2)


def test_ranks_that_have_all_cores_share_them_with_the_ingest():
    work = 2 * 0.1 + 8 * 0.2 + 8 * 0.01
    assert seconds_a_step(PARTS, ranks=2, global_batch=8, cores=2) == pytest.approx(1.5 * work / 2)
    work += 2 * 0.1  # four optimizers instead of two
    assert seconds_a_step(PARTS, ranks=4, global_batch=8, cores=2) == pytest.approx(1.5 * work / 2)


def test_one_gpu_waits_for_nobody():
    alone = forecast(GPU, 1)
    assert (alone.step_s, alone.exposed_s, alone.efficiency) == (0.1, 0.0, 1.0)
    assert alone.clips_per_s == pytest.approx(160)
    assert alone.cores_a_gpu == pytest.approx(160 * 0.004)


def test_what_does_not_fit_beside_the_backward_pass_is_waited_for():
    """A ring of two sends each gradient byte once each way: 1 GB in 0.1 s, of which the backward pass hides 0.05."""
    assert forecast(GPU, 2).exposed_s == pytest.approx(0.05)
    assert forecast(GPU, 2).efficiency == pytest.approx(2 / 3)


def test_a_thousand_gpus_do_not_wait_for_a_thousand_hops():
    far = Cluster(**(GPU.__dict__ | {"hop_s": 1e-4, "network": 1e12}))
    assert 10 * 2 * 9.9 * 1e-4 - 0.05 < forecast(far, 1000).exposed_s < 0.1  # trees; a ring's hops alone take 2 s


def test_the_forecast_runs_as_the_readme_says():
    done = subprocess.run([sys.executable, SCALE, "--paper"], capture_output=True, text=True, check=True, timeout=120)
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8, 64, 1000]
    assert "a forecast, not a measurement" in done.stdout
