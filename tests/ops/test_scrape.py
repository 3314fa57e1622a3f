"""A real run, a real Prometheus that scrapes it, and the query of every panel of the dashboard."""

from __future__ import annotations

import json
import time

import psutil
import pytest
from jobs import members, until

from ops.conftest import RUN
from ops.monitoring import dashboard, queries
from ops.prometheus import Prometheus

pytestmark = [pytest.mark.ops, pytest.mark.timeout(600)]

WITHOUT_GPU = {
    "max by (ip, GpuIndex) (ray_node_gram_used) * 1e6",
    "max by (ip, GpuIndex) (ray_node_gpus_utilization) / 100",
}
"""Queries that return nothing where there is no GPU, and must where there is one."""
MFU = 'max by (run) (ray_fvlm_train_mfu{run=~".+"})'
"""Returns nothing for a float32 run, as the watched one is."""


QUERIES = queries(dashboard())


@pytest.mark.parametrize(
    ("title", "expression"), QUERIES, ids=[f"{title} {number}" for number, (title, _) in enumerate(QUERIES)]
)
def test_every_query_of_every_panel_returns_the_run_s_or_the_node_s_numbers(watched, title, expression):
    result = watched.query(expression)
    if expression in WITHOUT_GPU and not watched.query("ray_node_gpus_available > 0"):
        pytest.skip("no GPU here")
    if expression == MFU and not result:
        pytest.skip("the run has no MFU")
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
