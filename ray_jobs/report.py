"""Training's way out into Ray: metrics for the dashboard and Prometheus."""

from __future__ import annotations

from ray.util.metrics import Gauge

from fvlm.train.metrics import Row
from fvlm.train.sinks import Picture


class RayMetrics:
    """A sink: every metric as a gauge `fvlm_...` (`ray_fvlm_...` at the metrics endpoint), tagged with the run."""

    def __init__(self, run_name: str):
        self._run_name = run_name
        self._gauges: dict[str, Gauge] = {}

    def write(self, rows: list[Row], latest: Row) -> None:
        self._set(latest)

    def evaluated(self, row: Row, pictures: list[Picture]) -> None:
        self._set({name: value for name, value in row.items() if name != "step"} | {"eval/step": row["step"]})

    def _set(self, row: Row) -> None:
        for name, value in row.items():
            gauge_name = "fvlm_" + name.replace("/", "_")
            if gauge_name not in self._gauges:
                gauge = Gauge(gauge_name, description=f"fvlm: {name}", tag_keys=("run",))
                gauge.set_default_tags({"run": self._run_name})
                self._gauges[gauge_name] = gauge
            self._gauges[gauge_name].set(value)

    def note(self, text: str) -> None:
        """Gauges have no notes."""

    def close(self) -> None:
        """Nothing to release."""
