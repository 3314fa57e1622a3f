"""A store that is away for minutes, under the whole command: of the data, of the checkpoints, at the start.

All runs at the same time: they mostly wait.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import write_dataset
from faulty_store import Proxy, Store
from test_remote_ingest import KEYS
from test_train import Training

from fvlm.train.run_folder import CHECKPOINTS
from fvlm.train.state import MODEL, checkpoints

AWAY_S, STAGGER_S = 310.0, 15.0
"""Beyond the half a minute or more that one request is made again; and between two starts."""
AT_STEP = 13
STEPS, SAVE_EVERY = 120, 10
"""More than the ingest reads ahead."""
CHANGES = {"train.max-steps": STEPS, "train.save-every": SAVE_EVERY}
LINE = re.compile(r"store away for (\d+) s: .*\n")
BACK = re.compile(r"the store answers again; it was away for (\d+) s")
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@dataclass
class Ended:
    training: Training
    code: int
    output: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, clips=402, shards=6)  # so many that the ingest does not hold them all
    return folder


@pytest.fixture(scope="module")
def store(data: Path) -> Iterator[Store]:
    store = Store()
    store.upload(data, "set")
    yield store
    store.stop()


def uri(proxy: Proxy, path: str) -> str:
    return f"s3://clips/{path}?endpoint_override={proxy.address}&scheme=http"


@pytest.fixture(scope="module")
def ended(data: Path, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    runs, proxies = tmp_path_factory.mktemp("runs"), {name: Proxy(store) for name in ("data", "checkpoints", "start")}
    cases = {
        "undisturbed": Training(data, runs, "undisturbed", CHANGES),
        "data": Training(uri(proxies["data"], "set"), runs, "data", CHANGES),
        "checkpoints": Training(
            data, runs, "checkpoints", CHANGES | {"train.checkpoint-dir": uri(proxies["checkpoints"], "kept")}
        ),
        "start": Training(uri(proxies["start"], "set"), runs, "start", CHANGES),
    }
    for case in cases.values():
        case.environment = KEYS
    result: dict[str, Ended] = {}
    threads = [
        threading.Thread(target=lambda n=name: result.update({n: disturbed(cases[n], proxies.get(n), n)}))
        for name in cases
    ]
    for thread in threads:
        thread.start()
        time.sleep(STAGGER_S)
    for thread in threads:
        thread.join()
    yield result
    for proxy in proxies.values():
        proxy.go_away()


def disturbed(training: Training, proxy: Proxy | None, name: str) -> Ended:
    """The run, whose store goes away at step AT_STEP or at the start, for AWAY_S after the first line about it."""
    if name == "start":
        proxy.outage = "silent"
    process = training.start()
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    if proxy:
        until(process, lambda: name == "start" or len(training.rows()) >= AT_STEP)
        proxy.outage = "hang up" if name == "data" else "silent"
        until(process, lambda: any(LINE.search(line) for line in lines))
        ends = time.monotonic() + AWAY_S
        until(process, lambda: time.monotonic() > ends)
        proxy.outage = ""
    try:
        code = process.wait(400)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    reader.join(60)
    return Ended(training, code, "".join(lines))


def until(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + AWAY_S + 500
    while process.poll() is None and not true() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.parametrize("name", ["data", "checkpoints", "start"])
def test_the_run_goes_on_when_the_store_is_back_and_its_weights_are_those_of_an_undisturbed_one(
    ended: dict[str, Ended], name: str
) -> None:
    one = ended[name]
    assert one.code == 0, one.output[-3000:]
    assert LINE.search(one.output), one.output[-3000:]
    assert max(int(seconds) for seconds in BACK.findall(one.output)) >= AWAY_S
    assert f"finished {STEPS} steps" in one.output
    assert [row["step"] for row in one.training.rows()] == list(range(1, STEPS + 1))
    assert one.training.losses() == ended["undisturbed"].training.losses()
    if name != "checkpoints":
        assert weights(one.training) == weights(ended["undisturbed"].training)


def weights(training: Training) -> bytes:
    return (checkpoints(training.folder / CHECKPOINTS)[-1] / MODEL).read_bytes()


def test_the_last_checkpoint_arrives_in_the_store_to_the_last_byte(ended: dict[str, Ended], store: Store) -> None:
    assert store.read(f"kept/checkpoints/step-{STEPS:08d}/{MODEL}") == weights(ended["undisturbed"].training)


def test_no_failure_of_training_is_counted_and_the_ranks_start_again_at_the_last_checkpoint(
    ended: dict[str, Ended],
) -> None:
    assert "failure 1" not in ended["data"].output
    assert re.search(r"resumed at step [1-9]\d*0 from", ended["data"].output)
    for name in ("checkpoints", "start"):  # training went on, and the last checkpoint was waited for; it began late
        assert "resumed at" not in ended[name].output and "starting again" not in ended[name].output
