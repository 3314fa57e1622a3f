"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for the hub fails at once, and alike everywhere
# Small tensors on one thread: faster than waking a second, and the same sums on every machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Files that belong to the project and are too large for the repository: a folder beside it. It may be absent."""
    return Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_videos(shared_dir: Path) -> Path:
    """The folder of real test videos; tests that need it are skipped where it is absent."""
    folder = shared_dir / "videos"
    if not (folder / "captions.csv").is_file():
        pytest.skip(f"no real test videos: {folder} is absent")
    return folder
