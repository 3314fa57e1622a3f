"""A real run, a real Prometheus that scrapes it, and the query of every panel of the dashboard."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from datasets import write_dataset
from jobs import LOCAL, Cluster, Command, free_ports, joined, members, settings, submit, until

from ops.monitoring import dashboard, queries
from ops.tools import CLUSTER, prometheus

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]

RUN, STEPS = "watched", 2000
WITHOUT_GPU = {
    "max by (ip, GpuIndex) (ray_node_gram_used) * 1e6",
    "max by (ip, GpuIndex) (ray_node_gpus_utilization) / 100",
}
"""Queries that return nothing where there is no GPU, and must where there is one."""


class Prometheus:
    """The one of `cluster/monitoring`, at free ports, in a folder of its own."""

    def __init__(self, folder: Path, cluster: Cluster):
        self._url = f"http://127.0.0.1:{free_ports(1)}"
        config = folder / "monitoring" / "prometheus.yml"
        shutil.copytree(CLUSTER / "monitoring", config.parent)
        text = config.read_text()
        for ours, here in {
            "127.0.0.1:8080": f"127.0.0.1:{cluster.start_env['FVLM_METRICS_PORT']}",
            "/tmp/ray/": f"{cluster.folder}/ray/",
            "scrape_interval: 15s": "scrape_interval: 2s",  # so as not to wait
        }.items():
            assert ours in text
            text = text.replace(ours, here)
        config.write_text(text)
        self.log = folder / "prometheus.txt"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [
                    prometheus() / "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={self._url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, path: str, **parameters: str) -> dict:
        answer = requests.get(f"{self._url}/api/v1/{path}", params=parameters, timeout=10)
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict]:
        return self.ask("query", query=expression)["result"]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="fvlm-"))  # pytest's own folders are too deep for Ray's sockets
    bare, start = settings(folder)
    write_dataset(folder / "data")
    try:
        started = subprocess.run([LOCAL / "start.sh"], env=start, capture_output=True, text=True, check=False)
        assert started.returncode == 0, started.stderr
        cluster = joined(folder, bare, start, started.stdout)
        try:
            yield cluster
        finally:
            for process in cluster.started:
                process.kill()
                process.wait()
    finally:
        subprocess.run([LOCAL / "stop.sh"], env=start, check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def training(cluster: Cluster) -> Command:
    return submit(cluster, cluster.training(RUN, STEPS))


@pytest.fixture(scope="module")
def watched(cluster: Cluster, training: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, once it knows of a checkpoint of the run: by then everything has been told once."""
    until(lambda: "ray_fvlm_checkpoint_step" in requests.get(cluster.metrics_url, timeout=10).text, training, 240)
    found = Prometheus(tmp_path_factory.mktemp("prometheus"), cluster)
    try:
        until(lambda: settled(found), training)
        yield found
    finally:
        found.close()


def settled(found: Prometheus) -> bool:
    try:
        return bool(found.query("count_over_time(ray_fvlm_checkpoint_step[1m]) > 5"))
    except requests.RequestException:  # it is starting
        return False


QUERIES = queries(dashboard())


@pytest.mark.parametrize(
    ("title", "expression"), QUERIES, ids=[f"{title} {number}" for number, (title, _) in enumerate(QUERIES)]
)
def test_every_query_of_every_panel_returns_the_run_s_or_the_node_s_numbers(watched, title, expression):
    result = watched.query(expression)
    if expression in WITHOUT_GPU and not watched.query("ray_node_gpus_available > 0"):
        pytest.skip("no GPU here")
    assert result, title
    for series in result:
        assert series["metric"].get("run", RUN) == RUN
        float(series["value"][1])


def test_prometheus_scrapes_all_that_ray_lists_and_reaches_it(cluster, watched):
    listed = json.loads((cluster.folder / "ray" / "prom_metrics_service_discovery.json").read_text())
    wanted = {target for group in listed for target in group["targets"]}
    until_all_up(watched, wanted)


def until_all_up(watched: Prometheus, wanted: set[str]) -> None:
    deadline = time.monotonic() + 30
    up: set[str] = set()
    while up != wanted and time.monotonic() < deadline:
        up = {series["metric"]["instance"] for series in watched.query("up == 1")}
        time.sleep(1)
    assert up == wanted


def test_the_numbers_are_those_of_the_run(cluster, watched):
    lines = (cluster.folder / "runs" / RUN / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    step, loss = (
        {int(float(at)): value for at, value in series["values"]}
        for name in ("ray_fvlm_step", "ray_fvlm_caption_loss_fine")
        for series in watched.query(f"{name}[1m]")
    )
    compared = [at for at in step if at in loss and int(float(step[at])) in rows]
    assert compared
    # Ray gathers the gauges one after another, so that a step's loss may come with its neighbour's number.
    for at in compared:
        near = [
            rows[s]["caption/loss_fine"] for s in range(int(float(step[at])) - 3, int(float(step[at])) + 4) if s in rows
        ]
        assert any(float(loss[at]) == pytest.approx(value, rel=1e-6) for value in near)


def test_no_alert_is_raised_for_a_run_that_does_well(watched):
    rules = [rule for group in watched.ask("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule.get("lastError")] == []
    # What the run trains on is tiny, and its machine is shared: how long it waits, and how full that is, is its affair.
    theirs = {"FvlmDataWaitHigh", "FvlmDiskNearlyFull", "FvlmMemoryNearlyFull"}
    alerts = [alert for alert in watched.ask("alerts")["alerts"] if alert["labels"]["alertname"] not in theirs]
    assert [alert for alert in alerts if alert["state"] == "firing"] == []


def test_a_run_that_was_killed_and_goes_on_shows_a_restart(cluster, training, watched):
    (expression,) = {expression for title, expression in queries(dashboard()) if title == "Restarts"}
    assert [series["value"][1] for series in watched.query(expression)] == ["0"]
    ranks = [p for p in members(cluster, cluster.pid) if any("RayTrainWorker" in part for part in p.cmdline())]
    assert len(ranks) == 1
    psutil.Process(ranks[0].pid).kill()
    until(lambda: [series["value"][1] for series in watched.query(expression)] == ["1"], training, 180)
