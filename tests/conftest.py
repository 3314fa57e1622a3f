"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from faulty_store import Proxy, Store
    from gloo_ranks import Ranks

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for the hub fails at once, and alike everywhere
# Small tensors on one thread: faster than waking a second, and the same sums on every machine.
torch.set_num_threads(1)

# Where a shell has started the tests in the background, SIGINT is ignored, and the commands that they interrupt would
# inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def proxy(store: Store) -> Iterator[Callable[..., Proxy]]:
    """Makes proxies with faults (`faulty_store`) to the S3 server that the test file has for its `store`."""
    from faulty_store import Proxy  # not above: moto takes seconds to import

    made: list[Proxy] = []

    def make(seed: int = 0, **shares: float) -> Proxy:
        made.append(Proxy(store, seed, **shares))
        return made[-1]

    yield make
    for one in made:
        one.go_away()


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Processes that can be joined to a process group."""
    from gloo_ranks import Ranks  # not above: it imports transformers

    made = Ranks()
    yield made
    made.close()
