"""Two workstations and a third place, each with an address of its own, by the commands of cluster/README.md.

Whoever has the token trains on the worker from the third place; whoever has none or another is refused at every port.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import write_dataset
from knock import grpc_methods, http_requests
from nodes import Nodes, namespaces

from fvlm.train.run_folder import finished_steps

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(sys.executable).parent
HEAD, WORKER, THIRD = range(3)
SIZES = {HEAD: {"FVLM_NUM_CPUS": "0", "FVLM_OBJECT_STORE_MB": "150"},
         WORKER: {"FVLM_NUM_CPUS": "4", "FVLM_OBJECT_STORE_MB": "400"}}  # fmt: skip
"""A head that only directs: so whatever runs, runs on the worker."""
TINY = (
    "--data.frame-size 56 --data.lanes 4 --data.global-batch 4 --data.window-steps 2 --log.wandb off "
    "--train.save-every 5 --train.log-every 1 --scale.workers 2"
)
STEPS = 12
WRONG = "0" * 64
TOKENS = {"no token": None, "a wrong token": WRONG}
REFUSED = {None: (401, "UNAUTHENTICATED"), WRONG: (403, "UNAUTHENTICATED")}

# What Ray answers without a token, by its design. Nothing here tells or changes anything of a run.
PAGES = {"GET /", "GET /favicon.ico", "GET /static/js/main.js", "GET /api/authentication_mode"}
HEALTH = {"GET /api/healthz", "GET /api/gcs_healthz", "GET /api/local_raylet_healthz"}
OPEN_PAGES = {8265: PAGES | HEALTH, 6384: HEALTH}
OPEN_METHODS = {"/grpc.health.v1.Health/Check", "/grpc.channelz.v1.Channelz/GetServers"}
METRICS = {8080, 44217, 44227}
"""Of every node, of the head's autoscaler, of the dashboard."""
KINDS = {6379: "grpc", 6380: "grpc", 6381: "grpc", 6382: "grpc", 6383: "grpc", 6384: "http", 6385: "http", 8265: "http"}
"""GCS, raylet, object manager, Ray client, agent twice, runtime environments, dashboard."""

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


@dataclass
class Desk:
    """Two workstations, and the third place that reaches them over the network alone."""

    nodes: Nodes

    @property
    def shared(self) -> Path:
        return self.nodes.folder / "shared"

    @property
    def url(self) -> str:
        return f"http://{self.nodes.address(HEAD)}:8265"

    @property
    def token(self) -> str:
        return (self.home(HEAD) / ".fvlm-cluster" / "token").read_text().strip()

    def home(self, node: int) -> Path:
        return self.nodes.folder / f"h{node}"

    def command(self, node: int, script: str, **env: str) -> dict[str, Any]:
        """A person's shell there, in the project's folder, as arguments of `subprocess`. `scp` copies from a home."""
        mine = f'scp() {{ cp "{self.home(HEAD)}/${{1#*:}}" "$2"; }}\n'
        if node == THIRD:  # it mounts no shared folder; this mount is seen by this shell alone
            mine += f"mount -t tmpfs none {self.shared}\n"
        bare = {"HOME": str(self.home(node)), "PATH": f"{PROGRAMS}:{os.environ['PATH']}", "LANG": "C.UTF-8"}
        return {
            "args": self.nodes.command(node, "bash", "-ec", mine + script),
            "env": bare | SIZES.get(node, {}) | env,
            "cwd": self.home(THIRD) / "fvlm" if node == THIRD else ROOT,
            "text": True,
            "stdin": subprocess.DEVNULL,
        }

    def run(self, node: int, script: str, seconds: float = 90, **env: str) -> subprocess.CompletedProcess[str]:
        command = self.command(node, script, **env)
        return subprocess.run(**command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False)

    def documented(self, holds: str) -> str:
        """The block of commands in cluster/README.md that has these words, with our addresses and folder."""
        (chapter,) = re.findall(
            r"^## Two workstations\n(.*?)^#", (ROOT / "cluster" / "README.md").read_text(), re.M | re.S
        )
        (block,) = [block for block in re.findall(r"(?:^    .*\n)+", chapter, re.M) if holds in block]
        for theirs, ours in {"192.168.1.10": HEAD, "192.168.1.11": WORKER}.items():
            block = block.replace(theirs, self.nodes.address(ours))
        return block.replace("/shared", str(self.shared))

    def submit(self, options: str) -> str:
        return f"{self.documented('ray_jobs.submit').strip()} {TINY} {options}"

    def ports(self, node: int, owners: str = "") -> list[int]:
        """At which something listens there for the network. owners: only processes of such names."""
        listing = self.nodes.command(node, "ss", "-Htlnp")
        found = set()
        for line in subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines():
            address, port = line.split()[3].rsplit(":", 1)
            mine = [Path(f"/proc/{pid}/cmdline").read_text() for pid in re.findall(r"pid=(\d+)", line)]
            if not address.startswith(("127.", "[::ffff:127.", "[::1]")) and re.search(owners, "".join(mine)):
                found.add(int(port))
        return sorted(found)

    def knock(self, targets: list[tuple[str, int]], token: str | None, **narrow: list[str]) -> list[dict[str, Any]]:
        asked = json.dumps({"targets": targets, "token": token, **narrow})
        command = self.command(THIRD, f"exec python {ROOT}/tests/knock.py")
        command.pop("stdin")
        done = subprocess.run(**command, input=asked, capture_output=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def ask(self, path: str) -> Any:
        """The dashboard, with the token."""
        done = self.run(HEAD, f"curl -sf -m 20 -H 'Authorization: Bearer {self.token}' '{self.url}{path}'")
        assert done.returncode == 0, f"{path}: {done.stdout}"
        return json.loads(done.stdout)

    def state(self) -> dict[str, Any]:
        """What a stranger must not be able to change."""
        nodes = self.ask("/nodes?view=summary")["data"]["summary"]
        actors = self.ask("/api/v0/actors?limit=1000")["data"]["result"]["result"]
        jobs = self.ask("/api/jobs/")
        return {
            "nodes": {node["raylet"]["nodeId"]: (node["ip"], node["raylet"]["state"]) for node in nodes},
            "actors": {actor["actor_id"]: (actor["class_name"], actor["state"], actor["node_id"]) for actor in actors},
            "jobs": {job["submission_id"]: job["status"] for job in jobs if job["submission_id"]},
            "homes": sorted(path.name for path in (self.home(HEAD), self.home(WORKER)) for path in path.iterdir()),
        }


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with namespaces() as nodes:
        desk = Desk(nodes)
        for node in (HEAD, WORKER, THIRD):
            nodes.plug(node)
            desk.home(node).mkdir()
        for name in ("fvlm", "ray_jobs"):
            shutil.copytree(ROOT / name, desk.home(THIRD) / "fvlm" / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / ".rayignore", desk.home(THIRD) / "fvlm")
        write_dataset(desk.shared / "clips")
        (desk.shared / "runs").mkdir()
        try:
            for node, words in ((HEAD, "FVLM_HOST=192.168.1.10 "), (WORKER, "FVLM_HEAD=")):
                started = desk.run(node, desk.documented(words), seconds=150)
                assert started.returncode == 0, started.stdout
            yield desk
        finally:
            for node in (WORKER, HEAD):
                stopped = desk.run(node, "cluster/local/stop.sh")
                assert stopped.returncode == 0, stopped.stdout


@contextlib.contextmanager
def unchanged(desk: Desk) -> Iterator[None]:
    before = desk.state()
    yield
    assert desk.state() == before


def test_a_run_submitted_from_a_third_place_with_the_token_alone_trains_on_the_worker(desk):
    done = desk.run(THIRD, desk.submit(f"--run first --train.max-steps {STEPS}"), seconds=240)
    assert done.returncode == 0, done.stdout
    assert f"step {STEPS}/{STEPS}" in done.stdout
    assert done.stdout.splitlines()[-1] == "first-a1: SUCCEEDED"

    run = desk.shared / "runs" / "first"
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()] == list(
        range(1, STEPS + 1)
    )
    assert finished_steps(run) == STEPS
    assert stat.S_IMODE((desk.home(THIRD) / ".fvlm-token").stat().st_mode) == 0o600

    state = desk.state()
    where = {name: node for node, (address, _) in state["nodes"].items() for name in [address]}
    assert where.keys() == {desk.nodes.address(HEAD), desk.nodes.address(WORKER)}
    on_worker = [kind for kind, _, node in state["actors"].values() if node == where[desk.nodes.address(WORKER)]]
    assert sum(kind == "RayTrainWorker" for kind in on_worker) == 2, state["actors"]
    assert [kind for kind in on_worker if "ingest decode" in kind], state["actors"]
    elsewhere = [kind for kind, _, node in state["actors"].values() if node == where[desk.nodes.address(HEAD)]]
    assert not [kind for kind in elsewhere if kind == "RayTrainWorker" or "decode" in kind]


@pytest.fixture(scope="module")
def training(desk: Desk) -> Iterator[Path]:
    """A run that goes on while strangers knock. -> its folder"""
    submitted = desk.run(THIRD, desk.submit("--run long --train.max-steps 100000 --no-wait"))
    assert submitted.returncode == 0, submitted.stdout
    run = desk.shared / "runs" / "long"
    wait_for_step(desk, run, 2)
    yield run
    stop = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.fvlm-token; ray job stop --address {desk.url} long-a1"
    stopped = desk.run(THIRD, stop)
    assert stopped.returncode == 0, stopped.stdout


def wait_for_step(desk: Desk, run: Path, step: int) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert time.monotonic() < deadline and desk.ask("/api/jobs/long-a1")["status"] in ("PENDING", "RUNNING")
        time.sleep(0.5)


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_every_port_of_both_nodes_refuses_every_request(desk, training, token):
    """The exceptions are listed at the top of this file. The run goes on."""
    addresses = [desk.nodes.address(node) for node in (HEAD, WORKER)]
    targets = [(addresses[node], port) for node in (HEAD, WORKER) for port in desk.ports(node)]
    assert {(addresses[HEAD], port) for port in (*KINDS, *METRICS)} <= set(targets)
    assert len(http_requests()) > 60 and len(grpc_methods()) > 120
    step = training.joinpath("metrics.jsonl").read_text().count("\n")
    with unchanged(desk):
        found = desk.knock(targets, token)
        page, method = REFUSED[token]
        let_in, ranks = [], []
        for (address, port), heard in zip(targets, found, strict=True):
            if port in KINDS:
                assert heard["protocol"] == KINDS[port], (address, port, heard)
            if port in METRICS:
                assert heard["protocol"] == "http", (address, port, heard)
            elif heard["protocol"] == "http":
                open_pages = OPEN_PAGES.get(port, set())
                let_in += [(address, port, asked, said) for asked, said in heard["answers"].items()
                           if said != page and asked not in open_pages]  # fmt: skip
            elif heard["protocol"] == "grpc":
                assert method in heard["answers"].values(), (address, port, heard)
                let_in += [(address, port, asked, said) for asked, said in heard["answers"].items()
                           if said not in (method, "UNIMPLEMENTED") and asked not in OPEN_METHODS]  # fmt: skip
            else:
                ranks.append((address, port))
        assert let_in == []
        # torch's store and gloo, by which the ranks find each other, know no tokens: cluster/README.md says so.
        assert ranks and {address for address, _ in ranks} == {addresses[WORKER]}
        assert {port for _, port in ranks} <= set(desk.ports(WORKER, "ray::(RayTrainWorker|train rank)"))
    wait_for_step(desk, training, step + 2)


def test_the_same_requests_get_in_with_the_token(desk, training):
    """So what refuses strangers is the token, and not a wrong question."""
    head, worker = (desk.nodes.address(node) for node in (HEAD, WORKER))
    pages = ["GET /nodes?view=summary", "GET /api/jobs/", "GET /api/v0/actors", "GET /api/cluster_status"]
    (dashboard,) = desk.knock([(head, 8265)], desk.token, http=pages)
    assert set(dashboard["answers"].values()) == {200}
    methods = ["/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
               "/ray.rpc.NodeManagerService/GetNodeStats", "/ray.rpc.ReporterService/HealthCheck",
               "/ray.rpc.RayletDriver/ClusterInfo"]  # fmt: skip
    ports = [(head, 6379), (head, 6382), (worker, 6380), (worker, 6383)]
    found = desk.knock(ports, desk.token, grpc=methods)
    answers = {(port, asked): said for (_, port), heard in zip(ports, found, strict=True)
               for asked, said in heard["answers"].items()}  # fmt: skip
    assert "UNAUTHENTICATED" not in answers.values()
    assert answers[6379, methods[0]] == answers[6379, methods[1]] == answers[6380, methods[2]] == "OK"


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_rays_own_commands_and_ours_are_refused_and_none_hangs(desk, training, token):
    """On an idle machine each takes 1 to 3 s; `join` and `GCS` 20 s and `client` 30 s, since Ray tries them again."""
    head = desk.nodes.address(HEAD)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    submit = desk.submit("--run stranger --train.max-steps 1").splitlines()[-1].strip()
    join = f"ray start --address {head}:6379 --node-ip-address {desk.nodes.address(THIRD)} --num-cpus 1"
    drain = f"ray drain-node --address {head}:6379 --node-id {next(iter(desk.state()['nodes']))} --reason "
    drain += "DRAIN_NODE_REASON_PREEMPTION --reason-message x --deadline-remaining-seconds 10"
    init = "import ray; ray.init(address={!r}); print('nodes:', ray.nodes())"
    commands = {
        "submit": submit,
        "job list": f"ray job list --address {desk.url}",
        "job submit": f"ray job submit --address {desk.url} -- touch ~/stranger",
        "job logs": f"ray job logs --address {desk.url} long-a1",
        "job stop": f"ray job stop --address {desk.url} long-a1",
        "list actors": f"ray list actors --address {desk.url}",
        "state API": f"ray list nodes --address {head}:6379",
        "status": f"ray status --address {head}:6379",
        "drain": drain,
        "GCS": f"python -c {shlex.quote(init.format(f'{head}:6379'))}",
        "client": f"python -c {shlex.quote(init.format(f'ray://{head}:6382'))}",
        "join": f"{join} --temp-dir {desk.home(THIRD)}/ray --object-store-memory 100000000",
    }  # fmt: skip
    with unchanged(desk):
        with ThreadPoolExecutor(4) as pool:
            said = pool.map(lambda command: desk.run(THIRD, command, 120, **env), commands.values())
            done = dict(zip(commands, said, strict=True))
        assert desk.nodes.members(THIRD) == []  # the would-be worker has left nothing running
    for name, command in done.items():
        assert command.returncode != 0, f"{name}: {command.stdout}"
        assert "nodes: [" not in command.stdout and "long-a1" not in command.stdout, f"{name}: {command.stdout}"
        if name != "client":  # Ray's client hears the refusal and tries on, for 30 s
            assert re.search("AuthenticationError|asks for a token|RAY_AUTH_TOKEN", command.stdout), (
                f"{name}: {command.stdout}"
            )
    assert done["submit"].returncode == 2
    cure = "RAY_AUTH_TOKEN does not hold its token" if token else "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
    assert cure in done["submit"].stdout and "Traceback" not in done["submit"].stdout
    assert not (desk.shared / "runs" / "stranger").exists()


def test_start_refuses_to_join_without_the_heads_token_and_says_what_is_wrong(desk, tmp_path):
    head, mine = desk.nodes.address(HEAD), desk.nodes.address(THIRD)
    start = f"{ROOT}/cluster/local/start.sh"
    join = {"FVLM_HEAD": f"{head}:6379", "FVLM_HOST": mine, "FVLM_OBJECT_STORE_MB": "100"}
    cases = [
        ({"FVLM_HEAD": f"{head}:6379"}, "FVLM_HEAD needs FVLM_HOST"),
        (join | {"FVLM_HOST": head}, f"FVLM_HOST={head} is not an IPv4 address of this machine"),
        (join, "token is missing: copy the head's there"),
        (join | {"FVLM_HEAD": f"{head}:6999"}, "nothing answers at FVLM_HEAD"),
        (join, "refuses the token in"),
    ]
    token = desk.home(THIRD) / ".fvlm-cluster" / "token"
    with unchanged(desk):
        for env, reason in cases:
            refused = desk.run(THIRD, start, **env)
            assert refused.returncode == 2 and reason in refused.stdout, refused.stdout
            if "is missing" in reason:
                assert not token.exists()
                token.write_text(WRONG)
        assert desk.run(THIRD, f"{ROOT}/cluster/local/stop.sh").returncode == 0
        assert desk.nodes.members(THIRD) == []
