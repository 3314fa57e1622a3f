"""Prometheus' files, the alerts and the dashboard: valid, tested, and about things that exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from ops.misspell import misspell
from ops.monitoring import METRIC, complaints, dashboard, metrics, problems
from ops.tools import CLUSTER, prometheus, run

pytestmark = pytest.mark.ops

FOLDER = CLUSTER / "monitoring"
ALERTS = [
    rule["alert"] for group in yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"] for rule in group["rules"]
]
MISSPELT = {
    "prometheus.yml": ("scrape_interval", "rule_files", "static_configs", "targets"),
    "prometheus-kubernetes.yml": ("evaluation_interval", "dns_sd_configs", "names"),
    "rules.yml": ("groups", "alert", "expr", "for", "annotations"),
    "rules_test.yml": ("rule_files", "input_series", "alert_rule_test", "eval_time", "exp_alerts"),
    "dashboard.json": (
        "templating",
        "panels",
        "targets",
        "expr",
        "fieldConfig",
        "gridPos",
        "reduceOptions",
        "lineWidth",
    ),
}


@pytest.fixture
def monitoring(copy: Path) -> Path:
    return copy / "monitoring"


def test_promtool_and_grafana_know_every_key_and_all_rule_tests_pass(monitoring):
    assert problems(monitoring) == []


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, names in MISSPELT.items() for key in names])
def test_a_misspelt_key_is_caught(monitoring, file, key):
    misspell(monitoring / file, key)
    assert problems(monitoring)


def test_no_file_is_left_out_of_these_tests():
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == set(MISSPELT)


def with_expression(monitoring: Path, alert: str, expression: str) -> list[str]:
    """What the rule tests say when the alert has another expression."""
    path = monitoring / "rules.yml"
    rules = yaml.safe_load(path.read_text())
    (rule,) = (rule for group in rules["groups"] for rule in group["rules"] if rule["alert"] == alert)
    rule["expr"] = expression
    path.write_text(yaml.safe_dump(rules))
    return complaints(prometheus() / "promtool", "test", "rules", monitoring / "rules_test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_the_rule_tests_notice_an_alert_that_never_or_always_fires(monitoring, alert):
    assert with_expression(monitoring, alert, "vector(1) > 2")
    assert with_expression(monitoring, alert, "vector(1)")


def test_there_is_an_alert_for_everything_that_somebody_must_be_told():
    wanted = {
        "FvlmRunStalled", "FvlmRunGone", "FvlmDataWaitHigh", "FvlmRatioNotFinite", "FvlmCheckpointsLate",
        "FvlmDiskNearlyFull", "FvlmRestartsTooMany", "FvlmCorruptSamples",
    }  # fmt: skip
    assert wanted <= set(ALERTS)


def test_the_run_is_on_one_page():
    titles = " | ".join(panel["title"] for panel in dashboard()["panels"]).lower()
    wanted = """
        ratios, caption loss, reconstruction loss, clips/s, waiting for data, step's time, gpu memory, host memory,
        checkpoints, restarts, damaged clips
    """
    assert [word for word in wanted.split(",") if word.strip() not in titles] == []
    assert "ingest_replaced" in (FOLDER / "dashboard.json").read_text()


def test_panels_do_not_overlap_and_have_numbers_of_their_own():
    cells, numbers = set(), set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= covered
        numbers.add(panel["id"])
    assert len(numbers) == len(dashboard()["panels"])


def test_the_rules_use_no_metric_that_the_rule_tests_do_not_have():
    rules, tests = (metrics((FOLDER / name).read_text()) for name in ("rules.yml", "rules_test.yml"))
    assert rules == tests
    assert all(METRIC.fullmatch(name) for name in rules)


def test_prometheus_on_a_workstation_looks_where_the_workstation_s_cluster_shows_its_metrics():
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (port,) = re.findall(r"FVLM_METRICS_PORT:-(\d+)", (CLUSTER / "local" / "start.sh").read_text())
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{port}"]}]


def test_prometheus_in_kubernetes_looks_where_the_pods_show_theirs():
    (job,) = yaml.safe_load((FOLDER / "prometheus-kubernetes.yml").read_text())["scrape_configs"]
    service = yaml.safe_load((CLUSTER / "kuberay" / "base" / "metrics.yaml").read_text())
    (found,) = job["dns_sd_configs"]
    assert found["names"] == [service["metadata"]["name"]]
    assert found["port"] == service["spec"]["ports"][0]["port"]
    assert service["spec"]["clusterIP"] == "None"


def test_promtool_is_the_real_one():
    code, said = run(prometheus() / "promtool", "--version")
    assert code == 0
    assert said.startswith("promtool, version")
    assert shutil.which(str(prometheus() / "prometheus"))
