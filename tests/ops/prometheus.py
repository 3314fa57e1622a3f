"""A real Prometheus, as `cluster/monitoring` configures it, that scrapes a cluster of a test."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import requests
from jobs import Cluster, free_ports

from ops.tools import CLUSTER, prometheus

SCRAPE_S = 2


@dataclass(frozen=True)
class Curve:
    """One series of an answer."""

    labels: dict[str, str]
    times: list[float]
    """Seconds since 1970."""
    values: list[float]


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
            "scrape_interval: 15s": f"scrape_interval: {SCRAPE_S}s",  # so as not to wait
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

    def curves(self, expression: str, begin: float, end: float) -> list[Curve]:
        """Its values between two times (seconds since 1970), one for each scrape, as Grafana asks for them."""
        found = self.ask("query_range", query=expression, start=str(begin), end=str(end), step=str(SCRAPE_S))
        return [
            Curve(series["metric"], [at for at, _ in series["values"]], [float(value) for _, value in series["values"]])
            for series in found["result"]
        ]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
