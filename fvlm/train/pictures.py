"""Pictures of a run: its curves, and where its queries look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")  # no screen
from matplotlib import pyplot as plt

from fvlm.train.sinks import METRICS


def plot_curves(run_dir: Path, png: Path) -> None:
    """Loss and ratio curves of a run, from its metrics.jsonl. Ratios above 1 mean that fine beats coarse."""
    rows = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
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
    plt.close(figure)


def _series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    chosen = [row for row in rows if key in row]
    return [row["step"] for row in chosen], [row[key] for row in chosen]


def plot_gaze(
    frames_THW3: torch.Tensor, coarse_Trc: torch.Tensor, fine_Trc: torch.Tensor, captions: Sequence[str], png: Path
) -> None:
    """One clip's frames, and over them where the coarse and the fine queries look.

    frames: uint8; maps: attention on patches [T, rows, columns]; captions: lines to print above.
    """
    frames = frames_THW3.numpy()
    t = len(frames)
    figure, axes = plt.subplots(3, t, figsize=(1.6 * t, 5.6), layout="constrained")
    # One scale for both rows, so that they can be compared.
    top = float(max(coarse_Trc.max(), fine_Trc.max()))
    for i in range(t):
        for row, (label, attention) in enumerate((("frame", None), ("coarse", coarse_Trc), ("fine", fine_Trc))):
            axis = axes[row][i]
            axis.imshow(frames[i] if attention is None else np.dot(frames[i], [0.3, 0.6, 0.1]), cmap="gray")
            if attention is not None:
                extent = (-0.5, frames.shape[2] - 0.5, frames.shape[1] - 0.5, -0.5)
                axis.imshow(attention[i].numpy(), cmap="inferno", alpha=0.6, extent=extent, vmin=0, vmax=top)
            axis.set(xticks=[], yticks=[], title=f"{i + 1}" if row == 0 else "", ylabel=label if i == 0 else "")
    figure.suptitle("\n".join(captions), fontsize=10)
    figure.savefig(png, dpi=110)
    plt.close(figure)
