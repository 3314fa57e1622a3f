"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


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
