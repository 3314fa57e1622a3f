"""What a running training survives, and how: signals, a dead controller, a rank that hangs, damaged records.

Every test is `python -m ray_jobs.train` itself; each ends with the losses of a run that nothing happened to.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from datasets import write_dataset
from test_train import STEPS_PER_EPOCH, Training, wait_for

from fvlm.train.run_folder import CHECKPOINTS
from fvlm.train.sinks import TRAIN_LOG
from fvlm.train.state import MODEL, checkpoints
from ray_jobs.cluster import connect

STEPS, SAVE_EVERY = 36, 10
CHANGES = {"train.max-steps": STEPS, "train.save-every": SAVE_EVERY, "log.samples": True}
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert write_dataset(folder, clips=26).num_clips // 4 == STEPS_PER_EPOCH
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = Training(data, tmp_path_factory.mktemp("runs"), "undisturbed", CHANGES)
    code, output = training.run()
    assert code == 0, output
    return training


def started(training: Training, step: int) -> tuple:
    """The command, and its process, `step` steps on."""
    driver = training.start()
    wait_for(lambda: len(training.rows()) >= step or driver.poll() is not None, f"step {step}")
    assert driver.poll() is None, driver.communicate()[0]
    return driver


def process(driver, name: str, number: int = 0) -> psutil.Process:
    """A process of the driver's cluster, by its title."""
    family = psutil.Process(driver.pid).children(recursive=True)
    return [one for one in family if name in " ".join(one.cmdline())][number]


def assert_same(training: Training, undisturbed: Training) -> None:
    """Every step once, and the losses and weights of the undisturbed run to the last bit."""
    assert [row["step"] for row in training.rows()] == list(range(1, STEPS + 1))
    assert training.losses() == undisturbed.losses()
    assert weights(training) == weights(undisturbed)


def weights(training: Training) -> bytes:
    return (checkpoints(training.folder / CHECKPOINTS)[-1] / MODEL).read_bytes()


@pytest.mark.long
def test_sigterm_saves_at_that_very_step_and_the_same_command_goes_on_there(data, undisturbed, tmp_path):
    training = Training(data, tmp_path, "stopped", CHANGES)
    driver = started(training, SAVE_EVERY + 3)
    driver.send_signal(signal.SIGTERM)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == 128 + signal.SIGTERM, output
    (last,) = {training.saved_steps()[-1], len(training.rows())}
    assert last > SAVE_EVERY and last % SAVE_EVERY
    assert f"stopped at step {last} of {STEPS}; the same command goes on there" in output
    # What Ray keeps for itself plays no part, whatever has become of it.
    ray_folder = training.folder / "ray" / "start-1"
    ray_folder.mkdir(parents=True)
    (ray_folder / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_resul')
    code, output = training.run()
    assert code == 0 and f"resumed at step {last} from" in output, output
    assert_same(training, undisturbed)


@pytest.mark.long
def test_a_dead_controller_costs_the_steps_since_the_last_checkpoint_and_nothing_else(data, undisturbed, tmp_path):
    training = Training(data, tmp_path, "controller", CHANGES)
    driver = started(training, SAVE_EVERY + 2)
    process(driver, "TrainController").kill()
    output, _ = driver.communicate(timeout=150)
    assert driver.returncode == 0, output
    assert "Ray Train's controller died" in output and f"resumed at step {SAVE_EVERY} from" in output
    assert_same(training, undisturbed)


@pytest.mark.long
def test_a_rank_that_hangs_leaves_the_stacks_of_all_and_the_run_goes_on(data, undisturbed, tmp_path):
    """One of two ranks is stopped, as a dead disk or driver would stop it, so the other waits for it."""
    training = Training(data, tmp_path, "hung", CHANGES | {"scale.workers": 2, "scale.hang-s": 8})
    driver = started(training, SAVE_EVERY + 2)
    ranks = [process(driver, "RayTrainWorker", number) for number in (0, 1)]
    log = training.folder / "train.log"
    ranks[1].suspend()
    begin = time.monotonic()
    wait_for(lambda: "hung: rank" in log.read_text() or driver.poll() is not None, "the stacks")
    assert time.monotonic() - begin < 60
    output, _ = driver.communicate(timeout=150)
    assert driver.returncode == 0, output
    assert "no step for 8 s since step" in output and "all_reduce" in output
    assert "starting again from step" in output
    assert [row["step"] for row in training.rows()] == list(range(1, STEPS + 1))
    for step, losses in undisturbed.losses().items():
        assert training.losses()[step] == pytest.approx(losses, rel=1e-4), step


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(data, undisturbed, tmp_path):
    training = Training(data, tmp_path, "damaged", CHANGES)
    driver = started(training, 2 * SAVE_EVERY + 2)
    driver.kill()
    driver.communicate()
    newest = checkpoints(training.folder / CHECKPOINTS)[-1]
    assert newest.name.endswith("20")
    with (newest / MODEL).open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"!")
    code, output = training.run()
    assert code == 0, output
    assert "WARNING" in output and MODEL in output and f"resumed at step {SAVE_EVERY} from" in output
    assert_same(training, undisturbed)


@pytest.mark.long
def test_failures_without_progress_end_the_run_with_the_last_reason(data, tmp_path):
    """Ray's memory monitor, told that any use is too much, kills every rank that starts."""
    training = Training(data, tmp_path, "no-memory", CHANGES | {"scale.max-failures": 1})
    driver = training.start(RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100")
    output, _ = driver.communicate(timeout=200)
    assert driver.returncode == 1, output
    assert output.count("starting again from step 0, failure 1 without a new checkpoint, of 1") == 1, output
    assert "memory" in output
    assert " failed: " in (training.folder / TRAIN_LOG).read_text().splitlines()[-1]


def test_a_run_that_waits_for_a_place_in_the_cluster_says_so_and_ends_at_once_when_asked_to(data, tmp_path):
    with connect(num_cpus=1, object_store_bytes=200 << 20):
        training = Training(data, tmp_path, "waits", CHANGES | {"scale.cpus-per-worker": 3})
        driver = training.start(
            RAY_ADDRESS=ray.get_runtime_context().gcs_address,
            RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"],
            RAY_AUTH_MODE="token",
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3",
        )
        log = training.folder / "train.log"
        wait_for(lambda: log.exists() and "waiting for" in log.read_text(), "the line")
        time.sleep(4)  # it tries again, and does not say so again
        driver.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        output, _ = driver.communicate(timeout=30)
        assert driver.returncode == 128 + signal.SIGTERM and time.monotonic() - begin < 10, output
    assert "1 workers need 4 CPUs, and the cluster has 1" in output
    assert log.read_text().count("waiting for") == 1 and training.rows() == []
