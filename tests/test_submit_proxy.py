"""A job on a real cluster of this machine where the shell names proxies that answer nothing; with own variables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jobs import Cluster, submit, workstation

DEAD = "http://user:planted-password@127.0.0.1:9"
PROXIES = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "ALL_PROXY"), DEAD)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with workstation(PROXIES) as cluster:
        yield cluster


def test_a_job_is_submitted_followed_and_finished_past_the_proxies_with_its_variables(cluster):
    run = cluster.training("past", 2)
    options = [word for word in run if word not in ("--log.wandb", "off")]
    job = submit(cluster, [*options, "--env", "WANDB_MODE=disabled", "--env", "NOT_STORED=some-value"])
    assert job.wait() == 0, job.output
    assert "step 2/2" in job.output and "past-a1: SUCCEEDED" in job.output
    assert "W&B: off (WANDB_MODE=disabled)" in job.output  # the ranks have it
    stored = b"".join(path.read_bytes() for path in (cluster.folder / "runs" / "past").rglob("*") if path.is_file())
    assert b"some-value" not in stored and b"planted-password" not in stored
    assert "some-value" not in job.output and "planted-password" not in job.output
