"""Training that goes on after a reboot: the remembered command, `ray_jobs.resume`, and all of it after a real one."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from datasets import write_dataset
from jobs import LOCAL, Cluster, Command, joined, members, settings, submit, until
from units import Home, Unit

from fvlm import presets
from fvlm.data.schema import Manifest
from fvlm.errors import StoreUnavailable, UserError
from fvlm.train.run_folder import exclusive, finished_steps, open_run
from ray_jobs import resume
from ray_jobs.command import hold, remember, remembered
from ray_jobs.options import parse
from ray_jobs.submit import entrypoint

OPTIONS = """
    --run again --runs-dir runs --import-checkpoint old/latest.pt --ingest-memory 3GB
    --model.init random --model.no-deep-query --model.visual-norm token
    --objective.lambda-recon 0.25 --objective.caption-start
    --data.path clips --data.lanes 4 --data.no-train-eos --data.cache-dir cache --data.max-corrupt 1e-2
    --train.max-steps 77 --train.milestones 10 20 --scale.workers 2 --log.wandb off
""".split()  # noqa: SIM905


# ---- the remembered command


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_a_run_remembers_its_options_exactly_and_independently_of_the_folder(preset, tmp_path, monkeypatch):
    (tmp_path / "here" / "runs" / "again").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    args = [preset, *OPTIONS]
    wanted = parse(args)
    remember(wanted, args)

    monkeypatch.chdir(tmp_path)
    back = remembered(tmp_path / "here" / "runs" / "again")
    assert parse(back) == wanted
    assert (wanted.runs_dir, wanted.data.path) == (f"{tmp_path}/here/runs", f"{tmp_path}/here/clips")
    assert wanted.import_checkpoint == f"{tmp_path}/here/old/latest.pt"
    # What a job is given by it is what the job remembers: it does not grow with every restart.
    assert shlex.split(entrypoint(wanted, back))[3:] == back


def test_the_last_start_wins(tmp_path):
    for steps in ("5", "9"):
        args = ["demo", "--data.path", "clips", "--runs-dir", str(tmp_path), "--train.max-steps", steps]
        (tmp_path / "demo").mkdir(exist_ok=True)
        remember(parse(args), args)
    assert parse(remembered(tmp_path / "demo")).train.max_steps == 9


# ---- which runs go on, decided without a cluster


def begin(root: Path, name: str, manifest: Manifest) -> Path:
    """A run of which there is no checkpoint yet, as `ray_jobs.train` leaves it when it is killed."""
    data = ["--data.path", str(manifest.where), "--data.frame-size", "56"]
    args = ["demo", "--run", name, *data, "--runs-dir", str(root)]
    config = parse(args)
    open_run(config, manifest)
    remember(config, args)
    return config.run_dir


@pytest.fixture
def runs(tmp_path):
    """`runs(name)` adds a run that has begun to a folder of runs, and returns its folder."""
    manifest = write_dataset(tmp_path / "data", clips=8, shards=1)
    root = tmp_path / "runs"
    root.mkdir()

    return lambda name: begin(root, name, manifest)


def call(monkeypatch, capsys, *args: str | Path) -> tuple[int, str]:
    """-> exit code and output of `python -m ray_jobs.resume ARGS`, without a cluster."""
    monkeypatch.setattr(sys, "argv", ["resume", *map(str, args), "--address", "http://127.0.0.1:9"])
    with pytest.raises(SystemExit) as end:
        resume.run_command(resume.main)
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


def test_a_held_run_is_left_alone_until_it_is_released_or_started(runs, monkeypatch, capsys):
    folder = runs("mine")
    root = folder.parent
    assert call(monkeypatch, capsys, root, "--hold", "mine")[0] == 0
    assert call(monkeypatch, capsys, root) == (0, "mine: held at step 0 of 160; --release mine ends that\n")
    assert call(monkeypatch, capsys, root, "--release", "mine")[0] == 0
    code, said = call(monkeypatch, capsys, root)
    assert (code, "no Ray cluster answers" in said) == (2, True)  # it would have been submitted

    call(monkeypatch, capsys, root, "--hold", "mine")
    remember(parse(remembered(folder)), remembered(folder))
    assert "was held" in capsys.readouterr().out
    assert "no Ray cluster answers" in call(monkeypatch, capsys, root)[1]

    code, said = call(monkeypatch, capsys, root, "--hold", "min")
    assert (code, said) == (2, f"error: {root} holds no run 'min'. Runs there: mine.\n")


def test_a_run_whose_checkpoints_are_out_of_reach_is_submitted_all_the_same(runs, monkeypatch, capsys):
    """Its job waits for their store."""
    folder = runs("mine")

    def away(store: object) -> int:
        raise StoreUnavailable("s3://clips/mine: could not be reached")

    monkeypatch.setattr(resume, "newest_step", away)
    found = resume.examine(folder)
    assert isinstance(found, resume.Unfinished) and found.steps is None
    assert capsys.readouterr().out == "mine: s3://clips/mine: could not be reached\n"
    assert call(monkeypatch, capsys, folder.parent, "--hold", "mine")[0] == 0
    assert "held at step ? of 160" in call(monkeypatch, capsys, folder.parent)[1]


def test_a_run_that_a_process_trains_and_a_copied_or_unknown_one_are_left_alone(runs, monkeypatch, capsys):
    folder = runs("mine")
    shutil.copytree(folder, folder.with_name("mine-backup"))
    shutil.copytree(folder, folder.with_name("older"))
    (folder.with_name("older") / "command.json").unlink()
    (folder.parent / "notes").mkdir()
    with exclusive(folder):
        code, said = call(monkeypatch, capsys, folder.parent, "--dry-run")
    assert code == 0
    assert said.splitlines() == [
        "mine: running: a process trains it",
        f"mine-backup: left alone: its last start trained {folder}, so it was copied or moved; start it by hand",
        "older: left alone: it has no command.json; starting it once by hand writes one",
    ]


def test_a_command_that_cannot_be_used_is_an_error_with_its_file_and_the_others_are_still_looked_at(
    runs, monkeypatch, capsys
):
    damaged, foreign, fine = runs("damaged"), runs("foreign"), runs("fine")
    (damaged / "command.json").write_text('{"arguments": ["demo", ')
    (foreign / "command.json").write_text(json.dumps({"arguments": ["demo", "--data.lane", "8"]}))
    (fine / "held").touch()
    code, said = call(monkeypatch, capsys, fine.parent)
    assert code == 2
    assert f"damaged: error: {damaged}/command.json: damaged" in said
    assert f"foreign: error: {foreign}/command.json: its options are not valid now" in said
    assert "--data.lanes" in said
    assert "fine: held" in said
    with pytest.raises(UserError, match="not a list of strings"):
        (damaged / "command.json").write_text('{"arguments": ["demo", 3]}')
        remembered(damaged)


def test_a_folder_of_runs_that_is_mounted_later_is_waited_for(runs, tmp_path, monkeypatch, capsys):
    runs("mine")
    (tmp_path / "runs" / "mine" / "held").touch()
    (tmp_path / "runs").rename(tmp_path / "unmounted")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "mnt")  # a mount point, empty

    def mount() -> None:
        (tmp_path / "unmounted" / "mine").rename(tmp_path / "mnt" / "mine")

    threading.Timer(1.5, mount).start()
    code, said = call(monkeypatch, capsys, tmp_path / "runs", "--wait", "60")
    assert code == 0
    assert said.splitlines()[0] == f"waiting for {tmp_path}/runs"
    assert "mine: held" in said
    code, said = call(monkeypatch, capsys, tmp_path / "nowhere")
    assert (code, f"{tmp_path}/nowhere: no such folder" in said) == (2, True)


# ---- a reboot


def kill_all(cluster: Cluster) -> None:
    """What a power cut leaves of the cluster's processes: nothing, and files as they were."""
    session, deadline = cluster.pid, time.monotonic() + 20
    while left := members(cluster, session):
        assert time.monotonic() < deadline, left
        for process in left:
            if process.pid != os.getpid():
                process.send_signal(signal.SIGKILL)
        time.sleep(0.1)


@pytest.mark.long
def test_after_a_reboot_the_units_own_lines_finish_the_run_with_every_step_once():
    folder = Path(tempfile.mkdtemp(prefix="fvlm-"))  # pytest's own folders are too deep for Ray's sockets
    bare, start = settings(folder)
    steps = 120
    (folder / "runs").mkdir()
    begin(folder / "runs", "asleep", write_dataset(folder / "data"))
    hold(folder / "runs" / "asleep")
    home = Home(folder / "home", start)
    installed = home.run("install.sh", "--runs", folder / "runs")
    assert installed.returncode == 0, installed.stderr
    up, again = Unit(home.units / "fvlm-cluster.service"), Unit(home.units / "fvlm-resume.service")
    cluster = None
    try:
        first = up.execute("ExecStart", home.folder)
        assert first.returncode == 0, first.stderr
        cluster = joined(folder, bare, start, first.stdout)
        assert up.plain("PIDFile") == f"{folder}/pid"

        watched = submit(cluster, cluster.training("cut", steps))
        command = [sys.executable, "-m", "ray_jobs.resume", str(folder / "runs"), "--address", cluster.url]
        until(lambda: finished_steps(folder / "runs" / "cut"), watched)
        looked = Command(cluster, [*command, "--dry-run"])
        assert looked.wait() == 0, looked.output
        assert "cut: running: " in looked.output
        kill_all(cluster)
        cut_at = finished_steps(folder / "runs" / "cut")
        assert 0 < cut_at < steps

        assert up.execute("ExecStart", home.folder).returncode == 0
        done = again.execute("ExecStart", home.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"cut: submitted at step {cut_at} of {steps} as cut-a1: python -m ray_jobs.train demo " in done.stdout
        assert "asleep: held at step " in done.stdout
        once_more = again.execute("ExecStart", home.folder)
        assert "cut: running: " in once_more.stdout
        follow = Command(cluster, [str(Path(sys.executable).with_name("ray")), "job", "logs", "--follow", "cut-a1",
                                   "--address", cluster.url])  # fmt: skip
        assert follow.wait() == 0
        assert finished_steps(folder / "runs" / "cut") == steps, follow.output
        lines = (folder / "runs" / "cut" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))

        last = again.execute("ExecStart", home.folder)
        assert f"cut: finished: {steps} of {steps} steps" in last.stdout
        assert set(cluster.jobs()) == {"cut-a1"}
        stopped = up.execute("ExecStop", home.folder)
        assert stopped.returncode == 0, stopped.stderr
        assert "stopped the cluster" in stopped.stdout
    finally:
        subprocess.run([LOCAL / "stop.sh"], env=start, check=True)
        if cluster:
            for process in cluster.started:
                process.kill()
                process.wait()
        shutil.rmtree(folder)
