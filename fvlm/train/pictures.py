"""A run's curves. (Pictures of its clips: `fvlm.train.clip_view`.)"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

from fvlm.train.sinks import METRICS


def plot_curves(run_dir: Path, png: Path) -> None:
    """Loss and ratio curves of a run, from its metrics.jsonl. Ratios above 1 mean that fine beats coarse."""
    rows = [json.loads(line) for line in (run_dir / METRICS).read_bytes().splitlines()]
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, (name, title) in enumerate(
        (("caption", "caption loss (nats)"), ("recon", "reconstruction loss (MSE)"))
    ):
        losses, ratios = axes[0][column], axes[1][column]
        for kind, style in (("loss_fine", "-"), ("loss_coarse", ".")):
            x, y = _series(rows, f"{name}/{kind}")
            losses.plot(x, y, style, label=kind.removeprefix("loss_"), linewidth=1, markersize=4)
        losses.set(title=title)
        losses.legend()
        for kind, style, label in (("ratio", ".", "one reading"), ("ratio_avg", "-", "running average")):
            x, y = _series(rows, f"{name}/{kind}")
            ratios.plot(x, y, style, label=label, linewidth=1, markersize=4)
        ratios.axhline(1, color="grey", linewidth=0.8)
        ratios.set(title=f"{name} ratio: coarse / fine", xlabel="step")
        ratios.legend()
    figure.savefig(png, dpi=110)


def _series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    chosen = [row for row in rows if key in row]
    return [row["step"] for row in chosen], [row[key] for row in chosen]
