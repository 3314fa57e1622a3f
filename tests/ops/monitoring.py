"""The files of `cluster/monitoring`, read by Prometheus' and Grafana's own code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ops.tools import CLUSTER, checkers, prometheus, run

CONFIGS = ("prometheus.yml", "prometheus-kubernetes.yml")
METRIC = re.compile(r"\bray_[a-z0-9_]+")


def problems(folder: Path) -> list[str]:
    """What promtool says of Prometheus' files, and Grafana's library of the dashboard."""
    promtool = prometheus() / "promtool"
    found = []
    for config in CONFIGS:
        found += complaints(promtool, "check", "config", folder / config)
    found += complaints(promtool, "check", "rules", folder / "rules.yml")
    found += complaints(promtool, "test", "rules", folder / "rules_test.yml")
    code, said = run(checkers() / "python", Path(__file__).with_name("grafana_keys.py"), folder / "dashboard.json")
    found += [f"Grafana knows no {line}" for line in said.splitlines()] if code == 0 else [said]
    return found + bad_queries(promtool, folder / "dashboard.json")


def complaints(*command: str | Path) -> list[str]:
    code, said = run(*command)
    return [said] if code else []


def dashboard(folder: Path = CLUSTER / "monitoring") -> dict[str, Any]:
    return json.loads((folder / "dashboard.json").read_text())


def queries(board: dict[str, Any]) -> list[tuple[str, str]]:
    """(panel's title, PromQL) of every query, for all runs, over an hour."""
    return [(panel["title"], promql(target)) for panel in board["panels"] for target in panel["targets"]]


def promql(target: dict[str, Any]) -> str:
    """A panel's query, as Grafana sends it for all runs and an hour."""
    return target["expr"].replace('run=~"$run"', 'run=~".+"').replace("$__range", "1h")


def bad_queries(promtool: Path, board: Path) -> list[str]:
    """Queries that are no PromQL, by promtool's reading of them as recording rules."""
    try:
        rules = [
            {"record": f"query_{n}", "expr": expr} for n, (_, expr) in enumerate(queries(json.loads(board.read_text())))
        ]
    except KeyError as missing:
        return [f"dashboard.json: a panel or query without {missing}"]
    path = board.with_name("dashboard-queries.json")
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    found = complaints(promtool, "check", "rules", path)
    path.unlink()
    return found


def metrics(text: str) -> set[str]:
    """Names of Ray's and our metrics in a file."""
    return set(METRIC.findall(text))
