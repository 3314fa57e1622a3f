"""Jobs on a real cluster with token authentication: submitted, followed, refused, stopped, continued, watched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
import requests
from jobs import LOCAL, RAY, ROOT, STEPS, Cluster, Command, members, submit, until, workstation
from secrets_planted import SECRETS, leaks

from fvlm.train.run_folder import finished_steps
from fvlm.train.state import checkpoint_name
from ray_jobs.options import parse
from ray_jobs.submit import metadata

PLANTED = {name: secret for name, secret in SECRETS.items() if not name.startswith("RAY_")}
"""In the shell that submits and on every node, where they belong."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with workstation(PLANTED) as cluster:
        yield cluster


def test_the_cluster_listens_on_loopback_only_and_its_token_is_private(cluster):
    mode = stat.S_IMODE((cluster.folder / "token").stat().st_mode)
    addresses = {
        connection.laddr.ip
        for process in members(cluster, cluster.pid)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert mode == 0o600
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_who_has_no_token_or_a_wrong_one_is_refused_and_told_the_variable(cluster):
    nothing = {name: value for name, value in cluster.env.items() if not name.startswith("RAY_")}
    wrong = nothing | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    run = cluster.training("refused", 1)
    listing = Command(cluster, [str(RAY), "job", "list", "--address", cluster.url], nothing)
    without, mistaken = submit(cluster, run, nothing), submit(cluster, run, wrong)

    assert requests.get(f"{cluster.url}/api/jobs/", timeout=30).status_code == 401
    header = {"Authorization": "Bearer " + "0" * 64}
    assert requests.get(f"{cluster.url}/api/jobs/", headers=header, timeout=30).status_code == 403
    assert listing.wait() != 0
    assert "Authentication required" in listing.output
    assert without.wait() == 2
    assert "asks for a token. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in without.output
    assert mistaken.wait() == 2
    assert "RAY_AUTH_TOKEN does not hold its token" in mistaken.output
    assert "Traceback" not in without.output + mistaken.output
    assert cluster.jobs() == {}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the run folder", "in train.checkpoint-dir"])
def test_a_job_is_given_the_step_it_goes_on_from_as_far_as_this_machine_can_see(tmp_path, elsewhere):
    runs, kept = tmp_path / "runs", tmp_path / "kept"
    more = ["--train.checkpoint-dir", str(kept)] if elsewhere else []
    config = parse(["demo", "--run", "r", "--data.path", "x", "--runs-dir", str(runs), *more])
    checkpoints = (kept if elsewhere else runs) / "r" / ("" if elsewhere else "checkpoints")
    assert "step" not in metadata(config)  # perhaps the folder is the cluster's
    checkpoints.parent.mkdir(parents=True)
    assert metadata(config)["step"] == "0"
    for step in (20, 120):
        (checkpoints / checkpoint_name(step)).mkdir(parents=True)
        (checkpoints / checkpoint_name(step) / "state.json").touch()
    assert metadata(config)["step"] == "120"
    in_a_bucket = dataclasses.replace(config.train, checkpoint_dir="s3://bucket/checkpoints")
    assert "step" not in metadata(dataclasses.replace(config, train=in_a_bucket))  # its keys are the nodes'


def test_what_is_wrong_on_this_side_ends_with_code_2_and_submits_nothing(cluster):
    run = cluster.training("wrong", 1)
    typo = submit(cluster, [*run, "--train.max-step", "3"])
    value = submit(cluster, [*run, "--data.lanes", "3"])
    nowhere = submit(cluster, run, address="http://127.0.0.1:9")

    assert typo.wait() == 2
    assert "--train.max-steps" in typo.output
    assert value.wait() == 2
    assert "--data.lanes 3 does not divide" in value.output
    assert nowhere.wait() == 2
    assert "no Ray cluster answers at http://127.0.0.1:9" in nowhere.output
    assert "cluster/local/start.sh" in nowhere.output
    assert cluster.jobs() == {}


class Proxy(socketserver.ThreadingTCPServer):
    """A way to the cluster that can be cut."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self._port, self._open = port, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def finish_request(self, request: socket.socket, client_address: object) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as beyond:
            self._open += [request, beyond]
            back = threading.Thread(target=self._copy, args=(beyond, request), daemon=True)
            back.start()
            self._copy(request, beyond)
            back.join()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # cut
            return

    def cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):  # it has ended already
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()


SUBMIT_THINKING_THE_CODE_IS_THERE = """
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray_jobs import cli, submit
really, asked = SubmissionClient._package_exists, []
def exists(self, uri):
    asked.append(uri)
    return len(asked) == 1 or really(self, uri)
SubmissionClient._package_exists = exists
submit.SILENT_S = 0.5  # every pause of the job is taken for a dead connection
cli.run_command(submit.main)
"""


def test_a_job_is_followed_across_a_lost_connection_until_it_is_stopped(cluster):
    """One long job, and what can be done meanwhile: its metrics are scraped, a second start of the run is refused, and
    a job with bad input fails beside it."""
    proxy = Proxy(int(cluster.url.rpartition(":")[2]))
    job = submit(cluster, cluster.training("story", 100_000), address=proxy.url)
    until(lambda: "story-a1" in cluster.jobs(), job)
    second = submit(cluster, cluster.training("story", 100_000))
    shutil.copytree(ROOT / "ray_jobs", cluster.folder / "copy" / "ray_jobs")
    shutil.copytree(ROOT / "fvlm", cluster.folder / "copy" / "fvlm")
    shutil.copy(ROOT / ".rayignore", cluster.folder / "copy")
    (cluster.folder / "copy" / "fvlm" / "new.py").write_text("")  # other code, which the cluster does not have
    script = [sys.executable, "-c", SUBMIT_THINKING_THE_CODE_IS_THERE, "demo", "--run", "bad", "--data.path", "nowhere"]
    bad = Command(cluster, [*script, "--address", cluster.url], cwd=cluster.folder / "copy")

    until(lambda: "step 3/" in job.output, job)
    proxy.cut()
    until(lambda: "connection lost" in job.output, job)
    until(lambda: re.search(r"connection lost.*step \d+/", job.output, re.DOTALL), job)
    until(lambda: "ray_fvlm_caption_loss_fine{" in requests.get(cluster.metrics_url, timeout=30).text, job)
    metrics = requests.get(cluster.metrics_url, timeout=30).text
    assert second.wait() == 2
    assert "run story is under way: job story-a1 is " in second.output
    assert "ray job stop" in second.output
    assert bad.wait() == 2
    until(lambda: finished_steps(cluster.folder / "runs" / "story"), job)
    cluster.stop("story-a1")
    assert job.wait() == 143

    assert re.search(r'^ray_fvlm_caption_loss_fine\{.*run="story".*\} \d', metrics, re.MULTILINE)
    steps = [int(step) for step in STEPS.findall(job.output)]
    assert steps == list(range(1, len(steps) + 1)), "a line was lost or repeated"
    assert job.output.rstrip().endswith("story-a1: STOPPED")
    assert "bad-a1: FAILED: the cluster could not set up its code; submitting it again" in bad.output
    assert f"error: {cluster.folder}/copy/nowhere: not a dataset" in bad.output
    assert bad.output.count("Running entrypoint for job bad-a2") == 1
    assert cluster.jobs()["bad-a2"]["driver_exit_code"] == 2


def test_the_same_command_continues_the_run_and_then_finds_it_finished(cluster):
    before = finished_steps(cluster.folder / "runs" / "story")
    run = cluster.training("story", before + 4)
    job = submit(cluster, run)
    assert job.wait() == 0, job.output
    # What the README shows: Ray's own command, from the project's folder.
    plain = [str(RAY), "job", "submit", "--address", cluster.url, "--working-dir", ".", "--", "python", "-m"]
    ray_job = Command(cluster, [*plain, "ray_jobs.train", *run])
    again = submit(cluster, run)

    assert before > 0
    assert f"resumed at step {before} from " in job.output
    assert [int(step) for step in STEPS.findall(job.output)] == list(range(before + 1, before + 5))
    record = cluster.jobs()["story-a2"]
    assert record["status"] == "SUCCEEDED"
    assert record["metadata"]["run"] == "story"
    assert record["metadata"]["preset"] == "demo"
    assert record["metadata"]["step"] == str(before) and record["metadata"]["steps"] == str(before + 4)
    assert "step" not in cluster.jobs()["story-a1"]["metadata"]  # there was no folder of runs yet
    assert re.fullmatch("[0-9a-f]{12}", record["metadata"]["config"])
    assert again.wait() == 0, again.output
    assert f"story is finished: {before + 4} of {before + 4} steps" in again.output
    assert cluster.jobs()["story-a3"]["status"] == "SUCCEEDED"
    assert ray_job.wait() == 0, ray_job.output
    assert "story is finished" in ray_job.output


def test_only_the_two_packages_travel_and_no_secret(cluster):
    copies = list((cluster.folder / "ray" / "session_latest").glob("runtime_resources/working_dir_files/_ray_pkg_*"))
    copies = [copy for copy in copies if copy.is_dir()]
    environment = cluster.jobs()["story-a2"]["runtime_env"]["env_vars"]
    assert copies
    assert all({path.name for path in copy.iterdir()} == {"fvlm", "ray_jobs"} for copy in copies)
    ours = {"FVLM_JOB", "FVLM_COMMIT"}
    assert environment.keys() == {"RAY_DATA_DISABLE_PROGRESS_BARS", "RAY_TRAIN_ENABLE_STATE_TRACKING"} | ours
    token = (cluster.folder / "token").read_text().strip()
    jobs = json.dumps(cluster.jobs())
    assert "story-a2" in jobs
    assert token not in jobs
    assert leaks(jobs, cluster.folder / "ray", cluster.folder / "runs") == []


def test_a_second_start_is_refused_for_the_same_folder_and_for_taken_ports(cluster):
    other = cluster.start_env | {"FVLM_CLUSTER_DIR": str(cluster.folder / "b")}
    same = Command(cluster, [str(LOCAL / "start.sh")], cluster.start_env)
    taken = Command(cluster, [str(LOCAL / "start.sh")], other)
    assert same.wait() == 2
    assert "is running already" in same.output
    assert taken.wait() == 2
    assert "is taken. Choose others with FVLM_DASHBOARD_PORT" in taken.output


def test_who_stops_watching_leaves_the_job_running(cluster):
    watched = submit(cluster, cluster.training("watched", 100_000))
    unwatched = submit(cluster, [*cluster.training("unwatched", 100_000), "--no-wait"])
    assert unwatched.wait() == 0, unwatched.output
    until(lambda: "Running entrypoint" in watched.output, watched)
    watched.interrupt()
    assert watched.wait() == 130
    assert "watched-a1 goes on" in watched.output
    assert "Traceback" not in watched.output
    states = {name: job["status"] for name, job in cluster.jobs().items()}
    assert states["watched-a1"] == "RUNNING"
    assert states["unwatched-a1"] in ("PENDING", "RUNNING")


def test_stop_ends_every_process_of_this_cluster_and_no_other(cluster):
    session = cluster.pid
    assert any("ray_jobs.train" in process.cmdline() for process in members(cluster, session)), "no job is running"
    # Looks like a process of this cluster, but start.sh did not start it.
    looks = ["raylet", "gcs_server", f"--temp-dir={cluster.folder}/ray"]
    decoy = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(200)", *looks], start_new_session=True)
    subprocess.run([LOCAL / "stop.sh"], env=cluster.start_env, check=True)

    deadline = time.monotonic() + 10  # Ray's guard of the job's driver looks once a second
    while time.monotonic() < deadline and [process.pid for process in members(cluster, session)] != [decoy.pid]:
        time.sleep(0.2)
    assert [process.cmdline() for process in members(cluster, session) if process.pid != decoy.pid] == []
    assert decoy.poll() is None
    decoy.kill()
    decoy.wait()
    with pytest.raises(requests.ConnectionError):
        requests.get(cluster.url, timeout=5)
