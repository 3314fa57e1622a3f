"""What people watch: losses, ratios and their running averages, speed, waiting, time left."""

from __future__ import annotations

import collections
import math
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from fvlm.errors import UserError

Scalars = dict[str, torch.Tensor]
"""Metrics of one step by name, still on the device: reading one would make the host wait for the step."""
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
        """The host has waited for a batch, and the device had nothing left to do."""
        self.wait_s += self._passed()

    def stepped(self) -> None:
        self.computed()
        self.steps += 1

    def computed(self) -> None:
        """The host has waited for the device, which was busy with steps that it had been handed."""
        self.busy_s += self._passed()

    def _passed(self) -> float:
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self.trained_s += passed
        return passed

    def lap(self, steps: int | None = None) -> tuple[float, float]:
        """-> seconds a step and share of them spent waiting for data, since the last lap.

        steps: how many the device has finished in it; None: all that `stepped` was told of
        """
        total = self.wait_s + self.busy_s
        result = (total / max(self.steps if steps is None else steps, 1), self.wait_s / total if total else 0.0)
        self.wait_s = self.busy_s = 0.0
        self.steps = 0
        return result


class Gathered:
    """Scalars of some steps on their way to the host, as one tensor. On a CPU they are there at once."""

    def __init__(self, steps: list[tuple[int, Scalars]]):
        self._steps = [(step, list(scalars)) for step, scalars in steps]
        self.last_step = steps[-1][0]
        self.state: Future[dict[str, Any]] = Future()
        """Of the metrics, right after these."""
        self._copied: torch.cuda.Event | None = None
        values = torch.stack([value.detach().float() for _, scalars in steps for value in scalars.values()])
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def rows(self) -> list[Row]:
        """Waits until they are here."""
        if self._copied:
            self._copied.synchronize()
        values = iter(self._values.tolist())
        return [{"step": step} | {name: next(values) for name in names} for step, names in self._steps]


@dataclass(frozen=True)
class Read:
    """Metrics that were read, and what is to become of them."""

    rows: list[Row]
    latest: Row
    """The newest value of every metric."""
    _state: dict[str, Any] = field(repr=False)
    _wanted: Future[dict[str, Any]] = field(repr=False)

    def written(self) -> None:
        """They are in the files: a checkpoint of their last step may appear."""
        self._wanted.set_result(self._state)

    def failed(self, reason: BaseException) -> None:
        """They are not, and never will be."""
        self._wanted.set_exception(reason)


class Metrics:
    """Collects scalars on the device and reads those of many steps at once.

    caption/ratio_avg, recon/ratio_avg    mean of the last `ratio_window` readings
    caption/ratio_best, recon/ratio_best  the highest such mean so far; only means of a full window count, or the first
                                          readings of an untrained model would
    """

    def __init__(self, ratio_window: int):
        self._pending: list[tuple[int, Scalars]] = []
        self._gathered: collections.deque[Gathered] = collections.deque()
        self._newest: Future[dict[str, Any]] | None = None
        """State after what was gathered last; None before that."""
        self._windows = {name: collections.deque[float](maxlen=ratio_window) for name in RATIOS}
        self._latest: Row = {}
        self._best: dict[str, Row] = {}

    def add(self, step: int, scalars: Scalars) -> None:
        self._pending.append((step, scalars))

    def gather(self) -> None:
        """Have the scalars of the steps since the last call copied to the host. Does not wait for the device."""
        if self._pending:
            self._gathered.append(Gathered(self._pending))
            self._newest = self._gathered[-1].state
            self._pending = []

    @property
    def gathered(self) -> list[int]:
        """The last step of each `gather` that was not read yet, oldest first."""
        return [gathered.last_step for gathered in self._gathered]

    def read(self) -> Read:
        """What the oldest `gather` gathered, averages of the ratios included. The one place where the host waits."""
        gathered, rows = self._gathered[0], []
        read = gathered.rows()
        self._gathered.popleft()  # not before it is read: `abandon` tells those who wait for it
        for row in read:
            for name, window in self._windows.items():
                if name in row and math.isfinite(row[name]):
                    window.append(row[name])
                if name in row and window:
                    row |= self._averages(name, int(row["step"]))
            self._latest |= row
            rows.append(row)
        return Read(rows, self.latest, self._state(), gathered.state)

    def drain(self) -> list[Row]:
        """One row a step of all that was not read yet."""
        self.gather()
        rows = []
        while self._gathered:
            read = self.read()
            rows += read.rows
            read.written()
        return rows

    def abandon(self, reason: BaseException) -> None:
        """Nobody will read what is gathered: whoever waits for a `state_later` gets `reason` as an exception."""
        while self._gathered:
            self._gathered.popleft().state.set_exception(reason)

    @property
    def latest(self) -> Row:
        """The newest value of every metric; readings stay until the next one."""
        return dict(self._latest)

    def _averages(self, name: str, step: int) -> Row:
        """What is shown of a ratio that was just read."""
        window = self._windows[name]
        average = sum(window) / len(window)
        if len(window) == window.maxlen and (name not in self._best or average > self._best[name]["value"]):
            self._best[name] = {"value": average, "step": step}
        best = {f"{name}_best": self._best[name]["value"]} if name in self._best else {}
        return {f"{name}_avg": average} | best

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that later rows depend on. Raises ValueError while there are scalars to be read."""
        if self._pending or self._gathered:
            raise ValueError("metrics: drain() comes before state_dict(), or the steps since the last one are lost")
        return self._state()

    def state_later(self) -> Future[dict[str, Any]]:
        """What `state_dict` says once everything up to now was read, and before anything later is.

        It is there when what was read has also been written (`Read.written`), so a checkpoint that has it implies that
        the lines of its steps are in the files. Raises ValueError while there are scalars to be gathered.
        """
        if self._pending:
            raise ValueError("metrics: gather() comes before state_later()")
        if self._newest is None:
            self._newest = Future()
            self._newest.set_result(self._state())
        return self._newest

    def _state(self) -> dict[str, Any]:
        return {
            "windows": {name: list(window) for name, window in self._windows.items()},
            "latest": dict(self._latest),
            "best": {name: dict(best) for name, best in self._best.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError that names the key which is missing, foreign or of another kind; nothing has changed then.

        Of a window that was longer than ours the newest readings stay.
        """
        require_keys("metrics", state, {"windows", "latest", "best"})
        require_keys("metrics.windows", state["windows"], set(self._windows))
        for name, readings in state["windows"].items():
            if not isinstance(readings, list) or not all(isinstance(value, float) for value in readings):
                raise UserError(f"metrics.windows.{name} is not a list of floats")
        require_numbers("metrics.latest", state["latest"])
        if foreign := set(require_object("metrics.best", state["best"])) - set(self._windows):
            raise UserError(f"metrics.best: foreign keys {sorted(foreign)}")
        for name, best in state["best"].items():
            require_keys(f"metrics.best.{name}", best, {"value", "step"})
            require_numbers(f"metrics.best.{name}", best)
        for name, window in self._windows.items():
            window.clear()
            window.extend(state["windows"][name])
        self._newest = None
        self._latest = dict(state["latest"])
        self._best = {name: dict(best) for name, best in state["best"].items()}


def require_object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r:.60}, not an object")
    return value


def require_keys(where: str, value: Any, wanted: set[str]) -> None:
    """Raises UserError unless `value` is an object of exactly these keys."""
    if require_object(where, value).keys() != wanted:
        missing, foreign = sorted(wanted - value.keys()), sorted(value.keys() - wanted)
        raise UserError(f"{where}: missing keys {missing}, foreign keys {foreign}")


def require_numbers(where: str, value: Any) -> None:
    """Raises UserError unless `value` is an object whose values are all numbers."""
    for key, number in require_object(where, value).items():
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise UserError(f"{where}.{key} is {number!r:.60}, not a number")


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
    mfu = f"MFU {100 * latest['train/mfu']:.1f}% " if "train/mfu" in latest else ""
    return (
        f"step {step}/{max_steps} ({100 * step / max_steps:.1f}%) epoch {latest['train/epoch']:.2f} | "
        f"{losses('cap', 'caption')} | {losses('rec', 'recon')} | "
        f"{latest['train/step_time']:.3f} s/step {latest['train/clips_per_s']:.1f} clips/s "
        f"{mfu}wait {100 * latest['train/data_wait']:.1f}% | {ingest}VRAM {latest['train/vram_gb']:.1f} GB | "
        f"ETA {duration(latest['train/eta_s'])}"
    )


def evaluation_line(row: Row, pictures: int) -> str:
    """The line of train.log for one evaluation; `run_log` knows it by its first words."""
    parts = [
        f"{short} {row[f'eval/{name}/loss_fine']:.4f} r={row[f'eval/{name}/ratio']:.4f}"
        for short, name in (("cap:", "caption"), ("rec:", "recon"))
        if f"eval/{name}/loss_fine" in row
    ]
    parts.append(f"{row['eval/clips']:.0f} held-out clips" if parts else "no held-out clips")
    parts += [f"{row['eval/replaced']:.0f} replaced"] if row["eval/replaced"] else []
    return f"evaluated at step {row['step']:.0f}: " + " | ".join(
        [*parts, f"{pictures} pictures", f"{row['eval/seconds']:.1f} s"]
    )


def duration(seconds: float) -> str:
    """93784.0 -> '1d 02:03:04'"""
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
