"""How the embedded cluster and the command on it end: by a signal to everybody, a closed terminal, without a reader.

One run, started three times by one command and ended from outside in another way each time; its losses are those of a
run that nothing happened to. It trains in a network of its own, whose address goes away in the middle.
"""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from datasets import write_dataset
from test_train import ROOT, Training, wait_for

from fvlm.train.sinks import TRAIN_LOG

STEPS = 40
CHANGES = {"train.max-steps": STEPS, "train.save-every": 30}
pytestmark = pytest.mark.timeout(600)
HOSTILE = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": "/of/a/cluster/that/is/no/more",
    "RAY_AUTH_TOKEN": "0" * 64,
    "RAY_TRAIN_V2_ENABLED": "0",
}
"""What a shell may still hold of another cluster."""
OWN_NETWORK = os.geteuid() == 0 and all(map(shutil.which, ("unshare", "nsenter", "ip")))


class Command(Training):
    """Optimized Python, whose asserts do nothing, in a network that ends: only a root may make one."""

    def command(self) -> list[str]:
        python, *words = super().command()
        command = [python, "-O", *words]
        if not OWN_NETWORK:
            return command
        setup = "ip link set lo up && ip link add outside type veth peer name other && ip link set other up && " \
                "ip addr add 192.0.2.77/24 dev outside && ip link set outside up && " \
                "ip route add default dev outside"  # fmt: skip
        return ["unshare", "--net", "sh", "-c", f'{setup} && exec "$@"', "sh", *command]


@dataclass
class Story:
    training: Command
    listening: set[str]
    """Addresses at which processes of the first start listened, this machine's or any."""
    codes: list[int]
    outputs: list[str]
    steps: list[int]
    """Finished ones after each start."""
    moved: str
    """The log that was moved away while the third start wrote it."""
    survivors: list[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, clips=26)
    return folder


@pytest.fixture(scope="module")
def story(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    training = Command(data, tmp_path_factory.mktemp("runs"), "ended", CHANGES, HOSTILE)
    log = training.folder / TRAIN_LOG
    codes, outputs, steps = [], [], []

    first = training.start()
    wait_for(lambda: len(training.rows()) >= 3 or first.poll() is not None, "step 3")
    family = psutil.Process(first.pid).children(recursive=True)
    if OWN_NETWORK:
        network = ["nsenter", "--net", "--target", str(first.pid)]
        subprocess.run([*network, "ip", "addr", "del", "192.0.2.77/24", "dev", "outside"], check=True)
    listening = listening_addresses([first.pid, *(one.pid for one in family)])
    before = len(training.rows())
    wait_for(lambda: len(training.rows()) >= before + 3 or first.poll() is not None, "steps without the address")
    for one in [psutil.Process(first.pid), *family]:  # as `scancel` and systemd do, and `timeout` to the group
        if one.is_running():
            one.send_signal(signal.SIGTERM)
    outputs.append(first.communicate(timeout=120)[0])
    codes.append(first.returncode)
    steps.append(len(training.rows()))

    second, terminal = in_a_terminal(training)
    wait_for(lambda: len(training.rows()) >= steps[0] + 3 or not running(second), "three more steps")
    os.close(terminal)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
    outputs.append("")
    steps.append(len(training.rows()))

    third = training.start()
    assert third.stdout
    third.stdout.close()  # `| head`, which has seen enough
    wait_for(lambda: len(training.rows()) >= steps[1] + 3 or third.poll() is not None, "three more steps")
    moved = log.rename(log.with_name("old.log"))
    codes.append(third.wait(timeout=240))
    outputs.append(log.read_text() if log.exists() else "")
    steps.append(len(training.rows()))
    survivors = [one.name() for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    return Story(training, listening, codes, outputs, steps, moved.read_text(), survivors)


def listening_addresses(processes: list[int]) -> set[str]:
    """Local addresses of their listening TCP sockets, as /proc of the first one's network has them."""
    inodes = {
        str(link.readlink())
        for process in processes
        for link in Path(f"/proc/{process}/fd").glob("*")
        if os.path.lexists(link)
    }
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{processes[0]}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                found.add(words[1].split(":")[0])
    return found


def in_a_terminal(training: Command) -> tuple[int, int]:
    """-> process id and the terminal's other end."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_"))} | training.environment
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execvpe(training.command()[0], training.command(), clean)
    threading.Thread(target=read_all, args=(terminal,), daemon=True).start()  # or the command waits until it is read
    return pid, terminal


def read_all(terminal: int) -> None:
    with contextlib.suppress(OSError):  # it is closed
        while os.read(terminal, 4096):
            pass


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_sigterm_to_every_process_of_the_embedded_cluster_saves_first(story):
    assert story.codes[0] == 128 + signal.SIGTERM, story.outputs[0]
    assert f"stopped at step {story.steps[0]} of {STEPS}; the same command goes on there" in story.outputs[0]
    assert 6 <= story.steps[0] < 30 and story.survivors == []


def test_a_closed_terminal_saves_first(story):
    assert story.codes[1] == 128 + signal.SIGHUP
    assert story.steps[0] + 3 <= story.steps[1] < STEPS
    assert f"resumed at step {story.steps[0]} from" in story.moved


def test_without_a_reader_and_with_its_log_moved_away_the_run_is_finished(story):
    assert story.codes[2] == 0 and story.steps[2] == STEPS
    assert f"resumed at step {story.steps[1]} from" in story.moved
    assert f"finished {STEPS} steps" in story.outputs[2] and "resumed" not in story.outputs[2]


def test_nothing_of_the_embedded_cluster_listens_outside_of_loopback(story):
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert story.listening and story.listening <= loopback


def test_every_step_is_there_once_with_the_losses_of_an_undisturbed_run(story, data, tmp_path):
    undisturbed = Training(data, tmp_path, "undisturbed", CHANGES)
    code, output = undisturbed.run()
    assert code == 0, output
    assert [row["step"] for row in story.training.rows()] == list(range(1, STEPS + 1))
    assert story.training.losses() == undisturbed.losses()


@pytest.mark.parametrize("module", ["ray_jobs.train", "ray_jobs.status"])
def test_ctrl_c_while_a_command_is_being_imported_is_no_traceback(module):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr
    printed = []
    for line in process.stderr:  # a line each time that something is imported
        printed.append(line)
        if line.rstrip().endswith("| ray._private.ray_constants") or line.rstrip().endswith(" fvlm.errors"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "Traceback" not in "".join(printed) + rest
