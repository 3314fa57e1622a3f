"""Training's way out into Ray: metrics for the dashboard and Prometheus, checkpoints for Ray Train."""

from __future__ import annotations

import json
from pathlib import Path

import ray.train
from ray.train import Checkpoint
from ray.train.v2.api.report_config import CheckpointUploadMode
from ray.util.metrics import Gauge

from fvlm.train.metrics import Row

POINTER = "pointer.json"


class RayMetrics:
    """A sink: every metric as a gauge `fvlm_...` (`ray_fvlm_...` at the metrics endpoint), tagged with the run."""

    def __init__(self, run_name: str):
        self._run_name = run_name
        self._gauges: dict[str, Gauge] = {}

    def write(self, rows: list[Row], latest: Row) -> None:
        for name, value in latest.items():
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


def report_checkpoint(step: int, path: Path | None) -> None:
    """Tell Ray Train of a checkpoint; called by every rank, a barrier among them.

    Ray gets a pointer, not the tensors: the checkpoint is already where it belongs, written our way, and a run resumes
    from it whatever becomes of Ray's own record.
    """
    if path is None:
        ray.train.report({"step": step})
        return
    pointer_dir = Path(ray.train.get_context().get_storage().experiment_fs_path) / path.name
    pointer_dir.mkdir(parents=True, exist_ok=True)
    (pointer_dir / POINTER).write_text(json.dumps({"checkpoint": str(path), "step": step}) + "\n")
    ray.train.report(
        {"step": step},
        checkpoint=Checkpoint.from_directory(str(pointer_dir)),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        delete_local_checkpoint_after_upload=False,
    )
