"""`python -m ray_jobs.train` as people run it: real processes, really killed.

The runs are tiny (56 px, 4 clips a step, 6 steps an epoch) and each one is shared by the tests that look at it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from datasets import write_dataset
from secrets_planted import SECRETS, leaks
from wandb_file import history, starts

from fvlm import presets
from fvlm.config import flatten
from fvlm.train.run_folder import CHECKPOINTS
from fvlm.train.sinks import TRAIN_LOG
from fvlm.train.state import checkpoints, step_of

STEPS, SAVE_EVERY, STEPS_PER_EPOCH = 14, 5, 6
ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {
    "data.frame-size": 56, "data.global-batch": 4, "data.lanes": 4, "data.window-steps": 4,
    "train.max-steps": STEPS, "train.save-every": SAVE_EVERY, "train.log-every": 1, "log.wandb": "off",
    "scale.device": "cpu",
}  # fmt: skip
LOSSES = ("caption/loss_fine", "recon/loss_fine", "caption/loss_coarse", "recon/loss_coarse", "train/grad_norm")
EVAL_EVERY = 6
SESSION = r"/\S*/fvlm-ray-\w+"
"""The folder of an own cluster, in the command lines of its processes."""
PATIENCE = 240.0
pytestmark = pytest.mark.timeout(600)  # the slowest test starts a cluster twice


@dataclass
class Training:
    """One run's command and its folder."""

    data: Path
    runs: Path
    name: str
    changes: dict[str, object]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.runs / self.name

    def command(self) -> list[str]:
        options = {"data.path": self.data, "runs-dir": self.runs, "run": self.name} | OPTIONS | self.changes
        given = [
            word for key, value in options.items() for word in (f"--{key}", *([] if value is True else [str(value)]))
        ]
        return [sys.executable, "-m", "ray_jobs.train", "demo", *given]

    def start(self, **more: str) -> subprocess.Popen[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))} | self.environment | more
        return subprocess.Popen(
            self.command(), cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self) -> tuple[int, str]:
        """-> exit code and everything that it printed."""
        process = self.start()
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            process.kill()  # its Ray processes notice
            output, _ = process.communicate()
            raise AssertionError(f"it did not end within {PATIENCE:.0f} s:\n{output}") from error
        return process.returncode, output

    def rows(self) -> list[dict[str, float]]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half-written just now

    def losses(self) -> dict[int, dict[str, float]]:
        return {int(row["step"]): {name: row[name] for name in LOSSES if name in row} for row in self.rows()}

    def saved_steps(self) -> list[int]:
        return [step_of(path) for path in checkpoints(self.folder / CHECKPOINTS)]

    def files(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.is_file()}


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:.0f} s for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert write_dataset(folder, clips=26).num_clips // 4 == STEPS_PER_EPOCH
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Training, str]:
    """One worker, from the first step to the last; and what it printed."""
    training = Training(data, tmp_path_factory.mktemp("runs"), "undisturbed", {})
    code, output = training.run()
    assert code == 0, output
    return training, output


def test_a_run_writes_every_step_once_and_its_losses_fall(undisturbed):
    training, output = undisturbed
    rows = training.rows()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["caption/loss_fine"] < 0.95 * rows[0]["caption/loss_fine"]
    assert rows[-1]["train/epoch"] == pytest.approx(STEPS / STEPS_PER_EPOCH)
    assert [row["step"] for row in rows if "caption/ratio" in row] == [1, 6, 11]  # every 5 steps, from the first
    assert training.saved_steps() == [5, 10, 14]
    assert f"step {STEPS}/{STEPS}" in output and "2 clips are left out" in output
    assert re.search(r"started in \d+\.\d s: \d+\.\d until the ranks ran", output)


def test_a_run_says_what_its_ingest_may_hold_and_what_it_did(undisturbed):
    training, output = undisturbed
    budget = output.index("ingest: at most ")
    assert budget < output.index("starting at step 0")
    logged = [line for line in output.splitlines() if f"step {STEPS}/{STEPS}" in line]
    assert re.search(r"ingest \d+\.\d clips/s, decode \d+\.\d ms, \d+ blocks \d+ MB waiting", logged[-1]), logged
    for row in training.rows():
        assert row["ingest/clips_per_s"] > 0 and row["ingest/decode_ms"] > 0 and row["ingest/read_ms"] >= 0
        assert row["ingest/blocks"] >= 0 and row["ingest/store_mb"] >= 0


def test_the_whole_config_is_printed_and_stored(undisturbed):
    training, output = undisturbed
    stored = flatten(json.loads((training.folder / "config.json").read_text())["config"])
    assert stored.keys() == flatten(presets.get("demo").to_dict()).keys()
    assert stored["data.frame_size"] == 56 and stored["train.max_steps"] == STEPS and stored["optim.lr"] == 1e-3
    for key, value in stored.items():
        name = key.split(".")[-1]
        printed = tuple(value) if isinstance(value, list) else value
        assert f"{name}={printed!r}" in output or f"{name}: {printed!r}" in output, key


def test_a_finished_run_says_so_and_touches_nothing(undisturbed):
    training, _ = undisturbed
    before = training.files()
    code, output = training.run()
    assert code == 0
    assert f"undisturbed is finished: {STEPS} of {STEPS} steps. Nothing to do." in output
    assert training.files() == before


@dataclass
class Killed:
    training: Training
    steps_before: int
    saved_before: list[int]
    family: list[psutil.Process]
    output: str
    leaks: list[str]
    """Secrets in what Ray's processes had written when they were killed."""


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """A run whose worker and driver were killed two steps past a checkpoint, in mid-epoch; then the same command."""
    held_out = tmp_path_factory.mktemp("held-out")
    write_dataset(held_out, clips=9, seed=1)
    more = {"log.wandb": "offline", "eval.path": held_out, "eval.every": EVAL_EVERY, "eval.pictures": 1}
    training = Training(data, tmp_path_factory.mktemp("runs"), "killed", more, SECRETS)
    driver = training.start()
    try:
        wait_for(lambda: len(training.rows()) >= 1 or driver.poll() is not None, "the first step")
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]
        assert len(workers) == 1
        (session,) = {place for process in family for place in re.findall(SESSION, " ".join(process.cmdline()))}
        wait_for(
            lambda: len(training.rows()) >= SAVE_EVERY + 2 or driver.poll() is not None, "a step past a checkpoint"
        )
        for process in (workers[0], psutil.Process(driver.pid)):
            process.kill()
    finally:
        driver.kill()
        driver.communicate()
    workers[0].wait(30)
    before = len(training.rows()), training.saved_steps()
    assert len(list(Path(session).glob("session_*/logs/worker-*"))) > 3
    leaked = leaks(Path(session))
    code, output = training.run()  # at once: what the killed cluster has left must not disturb
    assert code == 0, output
    return Killed(training, *before, family, output, leaked)


def test_the_same_command_resumes_a_killed_run_from_its_last_checkpoint(killed):
    assert max(killed.saved_before) < killed.steps_before < STEPS  # it was killed where steps were lost
    assert f"resumed at step {max(killed.saved_before)} from step-" in killed.output
    assert f"killed: finished {STEPS} steps" in killed.output


def test_a_resumed_run_has_every_step_once_and_the_losses_of_an_undisturbed_one_to_the_last_bit(killed, undisturbed):
    assert [row["step"] for row in killed.training.rows()] == list(range(1, STEPS + 1))
    assert killed.training.losses() == undisturbed[0].losses()
    averages = [[row.get("caption/ratio_avg") for row in run.rows()] for run in (killed.training, undisturbed[0])]
    assert averages[0] == averages[1]


def test_wandb_has_one_run_over_both_starts(killed):
    names = [path.name for path in starts(killed.training.folder)]
    assert len(names) == 2
    assert {name.rsplit("-", 1)[1] for name in names} == {(killed.training.folder / "wandb_id").read_text().strip()}


def test_a_killed_run_has_each_evaluation_once_with_its_picture(killed):
    """It was killed past the first, and went on before it. That its losses are those of a run without evaluation is
    shown above."""
    folder, wanted = killed.training.folder, [EVAL_EVERY, 2 * EVAL_EVERY, STEPS]
    rows = [json.loads(line) for line in (folder / "evals.jsonl").read_bytes().splitlines()]
    assert max(killed.saved_before) < EVAL_EVERY < killed.steps_before
    assert [row["step"] for row in rows] == wanted
    assert all(row["eval/clips"] == 8 and row["eval/caption/ratio"] > 0 for row in rows)
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == [f"step-{s:08d}-0.png" for s in wanted]
    assert f"evaluation every {EVAL_EVERY} steps and after the last: 8 of the 9 held-out clips" in killed.output
    assert re.search(r"evaluated at step 14: cap: \d\.\d{4} r=.* 8 held-out clips \| 1 pictures", killed.output)
    sent = [row for row in history(starts(folder)[1]) if "eval/pictures/filenames" in row]
    assert [(row["_step"], row["eval/step"]) for row in sent] == [(step, step) for step in wanted]


def test_secrets_of_the_environment_are_nowhere_in_what_a_run_writes(killed):
    assert killed.leaks == []
    assert leaks(killed.training.folder, killed.output) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 80 MB: room for two checkpoints of the demo's model (30 MB each), not for three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)], capture_output=True)
    if not done or done.returncode:
        pytest.skip("a full disk needs a small file system of its own, and mounting one is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_two_workers_on_a_disk_that_fills_up_stop_with_the_reason_then_resume_to_the_losses_of_one(
    small_disk, data, undisturbed
):
    """Two things at once, because a start costs a quarter of a minute.

    The disk: the checkpoint before stays good, the exit code is 2, and the same command goes on once there is room.
    The ranks: std of the visual tokens and token counts are global, so two workers have the losses of one.
    """
    two = Training(data, small_disk, "two", {"scale.workers": 2})
    filler = small_disk / "filler"
    filler.write_bytes(b"\0" * (25 << 20))  # now there is room for one
    code, output = two.run()
    assert code == 2, output
    message = next(line for line in output.splitlines() if line.startswith("error: "))
    assert f"checkpoints/step-{2 * SAVE_EVERY:08d}: no space left on the disk" in message
    assert "run the same command again" in message
    assert "Traceback" not in output
    assert f" failed: {message.removeprefix('error: ')}\n" in (two.folder / TRAIN_LOG).read_text()
    assert two.saved_steps() == [SAVE_EVERY]
    assert [path.name for path in (two.folder / CHECKPOINTS).iterdir()] == [f"step-{SAVE_EVERY:08d}"]

    filler.unlink()
    two.changes["train.keep-last"] = 1
    code, output = two.run()
    assert code == 0, output
    assert f"resumed at step {SAVE_EVERY}" in output and "parameters on 2 x cpu" in output
    assert [row["step"] for row in two.rows()] == list(range(1, STEPS + 1))
    for step, losses in undisturbed[0].losses().items():
        assert two.losses()[step] == pytest.approx(losses, rel=1e-5), step


def test_a_killed_driver_leaves_no_process_behind(killed):
    """Nobody tidies up after kill -9: the cluster's processes have to notice. Ray's two agents take a minute."""
    _, alive = psutil.wait_procs(killed.family, timeout=120)
    assert [" ".join(process.cmdline()) for process in alive] == []
    assert len(killed.family) > 5
