"""Fixtures of the validations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ops.tools import CLUSTER


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops: validations of `cluster/`; `make test-ops` runs them")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of `cluster/` that may be broken."""
    return Path(shutil.copytree(CLUSTER, tmp_path / "cluster"))
