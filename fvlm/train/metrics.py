"""What people watch: losses, ratios and their running averages, speed, waiting, time left."""

from __future__ import annotations

import collections
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from fvlm.train.step import Scalars

Row = dict[str, float]
"""Metrics of one step by name, as they go to metrics.jsonl."""
RATIOS = ("caption/ratio", "recon/ratio")


@dataclass
class Clock:
    """Seconds of training, pauses left out, over all restarts; and where those since the last lap went."""

    trained_s: float = 0.0
    wait_s: float = 0.0
    busy_s: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self._mark = time.perf_counter()

    def resume(self) -> None:
        """Forget the time since the last call: a checkpoint was written, or the first batch awaited."""
        self._mark = time.perf_counter()

    def waited(self) -> None:
        self.wait_s += self._passed()

    def stepped(self) -> None:
        self.busy_s += self._passed()
        self.steps += 1

    def _passed(self) -> float:
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self.trained_s += passed
        return passed

    def lap(self) -> tuple[float, float]:
        """-> seconds a step and share of them spent waiting for data, since the last lap."""
        total = self.wait_s + self.busy_s
        result = (total / max(self.steps, 1), self.wait_s / total if total else 0.0)
        self.wait_s = self.busy_s = 0.0
        self.steps = 0
        return result


class Metrics:
    """Collects scalars on the device and reads them all at once, every `log_every` steps."""

    def __init__(self, ratio_window: int):
        self._pending: list[tuple[int, Scalars]] = []
        self._windows = {name: collections.deque[float](maxlen=ratio_window) for name in RATIOS}
        self._latest: Row = {}

    def add(self, step: int, scalars: Scalars) -> None:
        self._pending.append((step, scalars))

    def drain(self) -> list[Row]:
        """One row a step since the last call, averages of the ratios included. The one place where the host waits."""
        if not self._pending:
            return []
        tensors = [value.detach().float() for _, scalars in self._pending for value in scalars.values()]
        values = iter(torch.stack(tensors).tolist())
        rows = []
        for step, scalars in self._pending:
            row: Row = {"step": step} | {name: next(values) for name in scalars}
            for name, window in self._windows.items():
                if name in row and math.isfinite(row[name]):
                    window.append(row[name])
                if name in row and window:
                    row[f"{name}_avg"] = sum(window) / len(window)
            self._latest |= row
            rows.append(row)
        self._pending.clear()
        return rows

    @property
    def latest(self) -> Row:
        """The newest value of every metric; readings stay until the next one."""
        return dict(self._latest)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": {name: list(window) for name, window in self._windows.items()}, "latest": self._latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, window in self._windows.items():
            window.clear()
            window.extend(state["windows"][name])
        self._latest = dict(state["latest"])


def log_line(latest: Row, max_steps: int) -> str:
    """The line of train.log: step, epoch, both losses coarse -> [fine] with ratios, speed, time left."""

    def losses(short: str, name: str) -> str:
        iterations = sorted(key for key in latest if key.startswith(f"{name}/iter_"))
        fine = " -> ".join(f"{latest[key]:.4f}" for key in iterations)
        coarse = f"{latest[f'{name}/loss_coarse']:.4f}" if f"{name}/loss_coarse" in latest else "-"
        ratio = f"{latest[f'{name}/ratio_avg']:.4f}" if f"{name}/ratio_avg" in latest else "-"
        return f"{short}: {coarse} -> [{fine}] r={ratio}"

    step = int(latest["step"])
    ingest = ""
    if "ingest/blocks" in latest:
        ingest = (
            f"ingest {latest['ingest/clips_per_s']:.1f} clips/s, decode {latest['ingest/decode_ms']:.1f} ms, "
            f"{latest['ingest/blocks']:.0f} blocks {latest['ingest/store_mb']:.0f} MB waiting"
        )
        ingest += f", {latest['ingest/corrupt']:.0f} damaged clips" if latest["ingest/corrupt"] else ""
        retries = latest.get("ingest/retries", 0) + latest.get("ingest/rereads", 0)
        ingest += f", {retries:.0f} retries | " if retries else " | "
    return (
        f"step {step}/{max_steps} ({100 * step / max_steps:.1f}%) epoch {latest['train/epoch']:.2f} | "
        f"{losses('cap', 'caption')} | {losses('rec', 'recon')} | "
        f"{latest['train/step_time']:.3f} s/step {latest['train/clips_per_s']:.1f} clips/s "
        f"wait {100 * latest['train/data_wait']:.1f}% | {ingest}VRAM {latest['train/vram_gb']:.1f} GB | "
        f"ETA {duration(latest['train/eta_s'])}"
    )


def duration(seconds: float) -> str:
    """93784.0 -> '1d 02:03:04'"""
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
