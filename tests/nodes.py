"""Several Ray nodes on one machine, each in a network namespace with an address of its own, whose cable can be cut."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

RAY = Path(sys.executable).with_name("ray")
PORT = 6379
NETWORK = "10.213.77"
STORE_BYTES = 120_000_000
QUICK = {
    # A lost node is noticed after a few seconds and not after half a minute.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


class Nodes:
    """A hub with a bridge, and on it a namespace for every node. Node 0 is the head."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = f"fvlm{os.getpid()}"
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "WANDB_"))}
        self.env = clean | QUICK | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")

    @property
    def hub(self) -> str:
        return f"{self.name}-hub"

    def space(self, node: int) -> str:
        return f"{self.name}-{node}"

    def address(self, node: int) -> str:
        return f"{NETWORK}.{node + 1}"

    @property
    def head(self) -> str:
        return f"{self.address(0)}:{PORT}"

    def plug(self, node: int) -> None:
        """Make the node's namespace and a cable to the hub; the hub's end is called `port<node>`."""
        space = self.space(node)
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", self.hub, "link", "add", f"port{node}", "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", self.hub, "link", "set", f"port{node}", "master", "bridge", "up")
        ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")

    def command(self, node: int, *command: str) -> list[str]:
        """`command`, to be run on the node."""
        return ["ip", "netns", "exec", self.space(node), *command]

    def start(self, node: int, cpus: int, hide: Path | None = None) -> None:
        """Start Ray on the node: a new cluster on node 0, or one more node of it.

        hide: a folder that the node does not share: an empty disk of its own lies there
        """
        if not Path(f"/var/run/netns/{self.space(node)}").exists():
            self.plug(node)
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"] if node == 0 else [f"--address={self.head}"]
        temp = self.folder / f"n{node}-{len(self.processes)}-{time.monotonic_ns() % 10_000}"
        log = (self.folder / f"node-{node}.log").open("ab")
        self.processes[node] = subprocess.Popen(
            self.command(node, *own_disk(hide), str(RAY), "start", "--block", *where, f"--temp-dir={temp}",
                         f"--node-ip-address={self.address(node)}", f"--num-cpus={cpus}",
                         f"--object-store-memory={STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"),
            env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in self.log(node):
            assert self.processes[node].poll() is None and time.monotonic() < deadline, self.log(node)
            time.sleep(0.2)

    def log(self, node: int) -> str:
        return (self.folder / f"node-{node}.log").read_text()[-3000:]

    def kill(self, node: int) -> None:
        """As if the power went: every process of the node, at once."""
        for process in self.members(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.processes.pop(node).wait(30)
        (self.folder / f"node-{node}.log").unlink()  # what the next start says is to be read there

    def members(self, node: int) -> list[int]:
        """Processes in the node's namespace."""
        done = subprocess.run(["ip", "netns", "pids", self.space(node)], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]

    def runs(self, node: int, title: str) -> bool:
        """Whether a process of that title is on the node."""
        return any(title in Path(f"/proc/{pid}/cmdline").read_text() for pid in self.members(node))

    def drain(self, node: int, seconds: int = 120) -> None:
        """Announce, as a cloud does of a spot machine, that the node will be taken away."""
        find = f"import ray; ray.init(address={self.head!r}, log_to_driver=False); print(*["
        find += f"node['NodeID'] for node in ray.nodes() if node['NodeManagerAddress'] == {self.address(node)!r}])"
        command = self.command(0, sys.executable, "-c", find)
        name = subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout.split()[-1]
        drain = [str(RAY), "drain-node", "--address", self.head, "--node-id", name]
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command = self.command(0, *drain, *why, "--deadline-remaining-seconds", str(seconds))
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def cut(self, node: int) -> None:
        """Pull the cable."""
        ip("-n", self.hub, "link", "set", f"port{node}", "down")

    def join(self, node: int) -> None:
        """Plug it in again."""
        ip("-n", self.hub, "link", "set", f"port{node}", "up")

    def close(self) -> None:
        for node in range(16):
            if Path(f"/var/run/netns/{self.space(node)}").exists():
                for pid in self.members(node):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                ip("netns", "del", self.space(node))
        ip("netns", "del", self.hub)


def own_disk(folder: Path | None) -> list[str]:
    """The beginning of a command to which an empty disk lies at `folder`. `ip netns exec` has given it its mounts."""
    return ["sh", "-c", 'mount -t tmpfs tmpfs "$0" && exec "$@"', str(folder)] if folder else []


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def namespaces() -> Iterator[Nodes]:
    """Skips the test, with the reason, where network namespaces are not permitted."""
    folder = Path(tempfile.mkdtemp(prefix="fvlm-n-", dir="/tmp"))  # short: Ray puts unix sockets into it
    try:
        if not shutil.which("ip"):
            pytest.skip("nodes with addresses of their own need iproute2's `ip`, which is not installed")
        try:
            nodes = Nodes(folder)
        except RuntimeError as error:
            pytest.skip(f"nodes with addresses of their own need network namespaces: {error}")
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
