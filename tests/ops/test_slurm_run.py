"""slurm.sbatch at work: a real cluster and a real run under it; Slurm's two commands are stood in for."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from datasets import write_dataset
from jobs import ROOT, free_ports

from fvlm.train.run_folder import finished_steps
from ops.tools import CLUSTER

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]

STEPS = 60
STANDS_IN = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '[[ $1 == show ]] && hostname || echo "$@" >> "$SLURM_SUBMIT_DIR/scontrol.txt"\n',
}
TRAINING = f"""
    demo --run queued --data.frame-size 56 --data.lanes 4 --data.global-batch 4 --data.window-steps 2 --log.wandb off
    --train.max-steps {STEPS} --train.save-every 1000 --train.log-every 1
""".split()


@pytest.fixture
def submitted() -> Iterator[Path]:
    """The folder in which `sbatch` was called, with a dataset and Slurm's commands."""
    folder = Path(tempfile.mkdtemp(prefix="fvlm-"))
    write_dataset(folder / "data")
    for name, script in STANDS_IN.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{script}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    yield folder
    shutil.rmtree(folder)


def start(folder: Path, number: int) -> subprocess.Popen[bytes]:
    """As slurmd starts the script on the allocation's first node."""
    port = free_ports(2)
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FVLM_", "WANDB_"))}
    env = bare | {
        "PATH": f"{folder / 'bin'}:{bare['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "FVLM_VENV": str(Path(sys.executable).parents[1]),
        "FVLM_BASE_PORT": str(port),
        "FVLM_METRICS_PORT": str(port + 1),
        "FVLM_OBJECT_STORE_MB": "512",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_CPUS_PER_TASK": "4",
    }
    paths = ["--data.path", str(folder / "data"), "--runs-dir", str(folder / "runs")]
    with (folder / f"{number}.txt").open("wb") as log:
        return subprocess.Popen(
            ["bash", CLUSTER / "slurm.sbatch", *TRAINING, *paths],
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def of_session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def ended(job: subprocess.Popen[bytes]) -> int:
    """-> its exit code; what it left behind is an error."""
    try:
        code = job.wait(timeout=240)
        deadline = time.monotonic() + 15
        while of_session(job.pid) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert of_session(job.pid) == []
        return code
    finally:
        for process in of_session(job.pid):
            process.kill()


def steps(folder: Path) -> int:
    log = folder / "runs" / "queued" / "train.log"
    return log.read_text().count("| cap: ") if log.exists() else 0


def test_near_its_end_the_job_saves_and_queues_itself_again_and_the_same_command_finishes_the_run(submitted):
    job, requeued = start(submitted, 1), submitted / "scontrol.txt"
    try:
        deadline = time.monotonic() + 200
        while steps(submitted) < 5:
            assert job.poll() is None, (submitted / "1.txt").read_text()
            assert time.monotonic() < deadline, (submitted / "1.txt").read_text()
            time.sleep(0.5)
        job.send_signal(signal.SIGUSR1)
    finally:
        code = ended(job)
    saved = finished_steps(submitted / "runs" / "queued")
    assert code == 143, (submitted / "1.txt").read_text()
    assert 5 <= saved < STEPS
    assert requeued.read_text().split() == ["requeue", str(os.getpid())]

    requeued.unlink()
    again = start(submitted, 2)
    assert ended(again) == 0, (submitted / "2.txt").read_text()
    log = (submitted / "runs" / "queued" / "train.log").read_text()
    assert finished_steps(submitted / "runs" / "queued") == STEPS
    assert f"resumed at step {saved} " in log
    assert not requeued.exists()


def test_a_job_without_a_preset_says_what_is_missing(submitted):
    env = os.environ | {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(submitted)}
    done = subprocess.run(["bash", CLUSTER / "slurm.sbatch"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "give the preset" in done.stderr
