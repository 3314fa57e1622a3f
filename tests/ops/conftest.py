"""Fixtures of the validations."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from jobs import Cluster, Command, submit, until, workstation

from ops.prometheus import Prometheus
from ops.tools import CLUSTER

RUN, STEPS = "watched", 2000


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops: validations of `cluster/`; `make test-ops` runs them")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of `cluster/` that may be broken."""
    return Path(shutil.copytree(CLUSTER, tmp_path / "cluster"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A workstation's cluster, with token authentication."""
    with workstation() as cluster:
        (cluster.folder / "runs").mkdir()
        yield cluster


@pytest.fixture(scope="module")
def training(cluster: Cluster) -> Command:
    """A run that goes on for as long as the cluster."""
    return submit(cluster, cluster.training(RUN, STEPS))


@pytest.fixture(scope="module")
def watched(cluster: Cluster, training: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, once it knows of a checkpoint of the run: by then everything has been told once."""
    until(lambda: "ray_fvlm_checkpoint_step" in requests.get(cluster.metrics_url, timeout=10).text, training, 240)
    found = Prometheus(tmp_path_factory.mktemp("prometheus"), cluster)
    try:
        until(lambda: settled(found), training)
        yield found
    finally:
        found.close()


def settled(found: Prometheus) -> bool:
    try:
        return bool(found.query("count_over_time(ray_fvlm_checkpoint_step[1m]) > 5"))
    except requests.RequestException:  # it is starting
        return False
