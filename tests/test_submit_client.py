"""The client side of jobs, without a cluster: variables, proxies, and systems that have no file locks."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import requests

from fvlm.errors import UserError
from fvlm.proxies import keep_loopback_direct, proxy_between
from fvlm.train.run_folder import CONFIG
from ray_jobs import submit
from ray_jobs.options import parse

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "no_proxy", "no_grpc_proxy")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in PROXIES:
        for spelling in (name, name.upper()):
            monkeypatch.setenv(spelling, "x")  # so that whatever a test does is undone
            monkeypatch.delenv(spelling)


# ---- --env


class Client:
    """Keeps what it is asked to submit."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def list_jobs(self) -> list:
        return []

    def submit_job(self, **request) -> str:
        self.asked.append(request)
        return request["submission_id"]


def test_variables_go_to_the_job_and_nowhere_else(tmp_path):
    words = ["demo", "--runs-dir", str(tmp_path), "--env", "NCCL_SOCKET_IFNAME=eth0", "--env", "A=b=c", "--env", "E="]
    own, training = submit.arguments(words)
    assert own.env == {"NCCL_SOCKET_IFNAME": "eth0", "A": "b=c", "E": ""}
    assert training == words[:3]
    client = Client()
    submit.submit(client, parse(training), training, own.env)
    (asked,) = client.asked
    variables = asked["runtime_env"].pop("env_vars")
    assert own.env.items() <= variables.items() and variables["FVLM_JOB"] == "demo-a1"
    assert "eth0" not in json.dumps(asked)  # which is what train.log and command.json are made of


@pytest.mark.parametrize(
    "pair",
    [
        "WANDB_API_KEY=planted-secret", "HF_TOKEN=planted-secret", "AWS_SECRET_ACCESS_KEY=planted-secret",
        "AWS_ACCESS_KEY_ID=planted-secret", "DB_PASSWORD=planted-secret", "wandb_api_key=planted-secret",
        "GH_PAT=planted-secret", "MY_CREDENTIALS=planted-secret", "URL=https://me:planted-secret@host/x",
        "COPY=prefix-planted-secret-suffix", "RAY_AUTH_TOKEN=planted-secret",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_refused_without_saying_it(monkeypatch, pair):
    monkeypatch.setenv("SOME_TOKEN", "planted-secret")
    with pytest.raises(UserError, match="looks like a secret, and Ray would keep it") as refusal:
        submit.arguments(["demo", "--env", pair])
    assert "planted" not in str(refusal.value) and pair.partition("=")[0] in str(refusal.value)


def test_names_that_only_resemble_secrets_are_taken(monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "a")
    given = ["TOKENIZERS_PARALLELISM=false", "MONKEY=banana", "PATH=/bin", "LD_LIBRARY_PATH=/x", "URL=https://host/a"]
    assert len(submit.variables(given)) == 5


@pytest.mark.parametrize("pair", ["NAME", "=x", "A B=c", "1A=b", "FVLM_JOB=x", "RAY_DATA_DISABLE_PROGRESS_BARS=0"])
def test_what_is_no_variable_is_refused(pair):
    with pytest.raises(UserError, match="--env"):
        submit.variables([pair])


# ---- proxies


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"I am a proxy\nand say much")

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def proxy():
    """A proxy that refuses everything. -> its address"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_loopback_addresses_go_past_every_proxy(monkeypatch, proxy, name):
    monkeypatch.setenv(name, f"http://{proxy}")
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    try:
        url = f"http://127.0.0.1:{other.server_address[1]}"
        assert proxy_between(url) == f"http://{proxy}"
        keep_loopback_direct()
        for host in ("127.0.0.1", "localhost", "127.0.0.2"):
            assert proxy_between(f"http://{host}:8265") == ""
        assert proxy_between("http://head.cluster:8265") == f"http://{proxy}"
        threading.Thread(target=other.handle_request, daemon=True).start()
        with pytest.raises(requests.RequestException):  # it does not answer HEAD with 503: it is reached itself
            requests.post(url, timeout=20).raise_for_status()
    finally:
        other.server_close()


def test_exceptions_that_are_there_stay_and_without_a_proxy_nothing_is_set(monkeypatch):
    keep_loopback_direct()
    assert not any(name in os.environ for name in ("no_proxy", "NO_PROXY"))
    monkeypatch.setenv("https_proxy", "http://p:1")
    monkeypatch.setenv("NO_PROXY", "intern, 10.0.0.0/8")
    keep_loopback_direct()
    keep_loopback_direct()
    wanted = "intern,10.0.0.0/8,localhost,127.0.0.1,127.0.0.0/8,::1"
    assert (os.environ["no_proxy"], os.environ["NO_PROXY"]) == (wanted, wanted)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    keep_loopback_direct()
    assert (os.environ["no_proxy"], os.environ["NO_PROXY"]) == ("*", "*")


def test_submit_names_the_proxy_in_between_without_its_password(monkeypatch, proxy):
    monkeypatch.setenv("http_proxy", f"http://user:planted@{proxy}")
    with pytest.raises(UserError) as refusal:
        submit.connect("http://head.invalid:8265")
    said = str(refusal.value)
    assert f"The proxy http://{proxy} of the environment stands in between" in said and "planted" not in said
    assert "NO_PROXY=head.invalid" in said and "\n" not in said
    with pytest.raises(UserError) as refusal:
        submit.connect("http://127.0.0.1:9")
    assert "no Ray cluster answers" in str(refusal.value) and "proxy" not in str(refusal.value)


# ---- a system without file locks

WITHOUT_LOCKS = """
import os, sys
import ray, ray.data  # Ray's own imports are Ray's affair
from ray.job_submission import JobSubmissionClient
sys.modules["fcntl"] = sys.modules["resource"] = None  # importing them raises, as on Windows
del os.getuid, os.sched_getaffinity
from ray_jobs import status, submit
from ray_jobs.cli import run_command
if sys.argv[1] == "submit":
    sys.argv[1:] = ["demo", "--data.path", "x", "--address", "http://127.0.0.1:9"]
    run_command(submit.main)
sys.argv[1:] = ["--runs-dir", sys.argv[2]]
run_command(status.main)
"""


def without_locks(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_LOCKS, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_submit_and_status_run_where_there_are_no_file_locks(tmp_path):
    sent = without_locks("submit")
    assert sent.returncode == 2 and sent.stderr.startswith("error: no Ray cluster answers at http://127.0.0.1:9"), sent
    (tmp_path / "demo").mkdir()
    began = {"config": parse(["demo"]).to_dict(), "dataset": "x", "dataset_path": "y"}
    (tmp_path / "demo" / CONFIG).write_text(json.dumps(began))
    (tmp_path / "demo" / "lock").touch()
    looked = without_locks("status", str(tmp_path))
    assert looked.returncode == 0, looked.stderr
    assert "demo: whether a process trains it cannot be seen" in looked.stdout and "no file locks" in looked.stdout
