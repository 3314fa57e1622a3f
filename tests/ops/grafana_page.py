"""The Grafana page of `cluster/monitoring`, drawn by matplotlib from Prometheus' answers to the page's own queries."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from ops.monitoring import promql
from ops.pictures import save_small
from ops.prometheus import Curve, Prometheus

COLUMNS, INCHES_A_COLUMN, INCHES_A_ROW, DPI = 24, 0.56, 0.29, 100
BACK, PANEL, TEXT, FAINT = "#111217", "#181b1f", "#ccccdc", "#3a3f47"
COLOURS = ["#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#b877d9", "#8ab8ff"]
Answers = list[tuple[str, Curve]]
"""Legend and values."""


def draw(board: dict[str, Any], source: Prometheus, begin: float, end: float, path: Path) -> dict[str, int]:
    """Write the page as a PNG. -> how many curves each panel has, by its title and number

    begin, end: seconds since 1970
    """
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = Figure((COLUMNS * INCHES_A_COLUMN, rows * INCHES_A_ROW), dpi=DPI, facecolor=BACK)
    found = {}
    with matplotlib.rc_context({"font.size": 7.5, "text.color": TEXT, "axes.labelcolor": TEXT}):
        for panel in board["panels"]:
            answers = ask(panel, source, begin, end)
            place = panel["gridPos"]
            left, bottom = place["x"] / COLUMNS, 1 - (place["y"] + place["h"]) / rows
            box = figure.add_axes((left, bottom, place["w"] / COLUMNS, place["h"] / rows), facecolor=PANEL)
            box.set(xticks=[], yticks=[])
            box.spines[:].set(color=BACK, linewidth=3)
            box.annotate(
                panel["title"], (0, 1), (9, -8), textcoords="offset points", va="top", fontsize=8.5, weight="bold"
            )
            if not answers:
                box.annotate("No data", (0.5, 0.45), ha="center", va="center", color="#7b8087", fontsize=9)
            elif panel["type"] == "stat":
                number = answers[-1][1].values[-1]
                box.annotate(
                    shown(number, unit(panel)), (0.5, 0.4), ha="center", va="center", fontsize=19, color=COLOURS[0]
                )
            else:
                inside = [left + 0.13 * 8 / COLUMNS, bottom + 1.6 / rows, 0.82 * 8 / COLUMNS, (place["h"] - 2.7) / rows]
                plot(figure.add_axes(inside, facecolor=PANEL), panel, answers, begin, end)
            found[f"{panel['title']} {panel['id']}"] = len(answers)
    png = io.BytesIO()
    figure.savefig(png, facecolor=BACK)
    save_small(png.getvalue(), path)
    return found


def unit(panel: dict[str, Any]) -> str:
    return panel["fieldConfig"]["defaults"]["unit"]


def shown(value: float, unit: str) -> str:
    """As Grafana shows numbers of its units."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s" and value >= 90:
        return f"{value / 60:.1f} min"
    return f"{value:,.5g}" if unit == "none" else EngFormatter({"s": "s", "bytes": "B"}[unit])(float(f"{value:.3g}"))


def ask(panel: dict[str, Any], source: Prometheus, begin: float, end: float) -> Answers:
    return [
        (legend(target["legendFormat"], curve.labels), curve)
        for target in panel["targets"]
        for curve in source.curves(promql(target), begin, end)
    ]


def legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), template)


def plot(axes: Axes, panel: dict[str, Any], answers: Answers, begin: float, end: float) -> None:
    """A panel's curves, over minutes since `begin`."""
    custom = panel["fieldConfig"]["defaults"].get("custom", {})
    below: dict[float, float] = {}
    for colour, (name, curve) in zip(COLOURS, answers, strict=False):
        minutes = [(at - begin) / 60 for at in curve.times]
        if "stacking" in custom:
            base = [below.get(at, 0.0) for at in curve.times]
            top = [low + value for low, value in zip(base, curve.values, strict=True)]
            axes.fill_between(minutes, base, top, color=colour, alpha=custom["fillOpacity"] / 100, linewidth=0)
            below |= dict(zip(curve.times, top, strict=True))
        else:
            top = curve.values
        axes.plot(minutes, top, color=colour, linewidth=custom["lineWidth"], label=name)
    axes.set_xlim(0, (end - begin) / 60)
    if panel["fieldConfig"]["defaults"].get("min") == 0:
        axes.set_ylim(bottom=0, top=None if any(map(any, (curve.values for _, curve in answers))) else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, unit(panel))))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} min"))
    axes.tick_params(colors=TEXT, labelsize=6.5, length=0)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.spines[:].set_visible(False)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.1, -0.09),
        ncols=2 if len(answers) > 3 else 3,
        fontsize=6.5,
        frameon=False,
        labelcolor=TEXT,
        handlelength=1.2,
        columnspacing=1,
        borderaxespad=0,
    )
