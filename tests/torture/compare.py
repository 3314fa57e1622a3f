"""What of two runs has to be equal, and how far it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import deserialize

from fvlm.train.samples import SAMPLES, read_samples
from fvlm.train.sinks import METRICS
from fvlm.train.state import MODEL, OPTIMIZER, checkpoint_name

CHECKPOINTS = "checkpoints"
CLOCK_AND_MACHINE = ("step_time", "data_wait", "clips_per_s", "tflops", "mfu", "vram_gb", "eta_s", "trained_s")
"""train/... values of metrics.jsonl that depend on the clock. Those of ingest/... and of checkpoints do too."""
MOST_NAMED = 5

Row = dict[str, Any]
Tensors = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    samples_lost: int
    """Clips of a step that the undisturbed run was trained on, and this one's list lacks."""
    samples_doubled: int
    """Clips that this one's list has beyond them."""
    samples_equal: bool
    """Both lists whole, and the same, in their order."""
    weights_equal: bool
    optimizer_equal: bool
    metrics_equal: bool
    differences: list[str]
    """A line each."""

    @property
    def is_exact(self) -> bool:
        return not self.differences


def compare(undisturbed: Path, run: Path, steps: int) -> Comparison:
    """Two run folders, both of `steps` steps."""
    wanted, found = Counter(listed_samples(undisturbed)), Counter(listed_samples(run))
    lost, doubled = wanted - found, found - wanted
    samples = sample_differences(undisturbed, run, steps)
    samples += _named("samples lost", lost) + _named("samples doubled", doubled)
    weights = checkpoint_differences(undisturbed, run, steps, MODEL)
    optimizer = checkpoint_differences(undisturbed, run, steps, OPTIMIZER)
    metrics = metrics_differences(undisturbed / METRICS, run / METRICS, steps)
    return Comparison(
        samples_lost=lost.total(),
        samples_doubled=doubled.total(),
        samples_equal=not samples,
        weights_equal=not weights,
        optimizer_equal=not optimizer,
        metrics_equal=not metrics,
        differences=[*samples, *weights, *optimizer, *metrics],
    )


# ---- samples


def listed_samples(run: Path) -> list[tuple[int, str]]:
    """(step, clip) of everything in the sample log, however often it is there."""
    rows = [row for path in sorted((run / SAMPLES).glob("rank-*.jsonl")) for row in parsed(path)[0]]
    return [(row["step"], clip) for row in rows for clip in row["clips"]]


def sample_differences(undisturbed: Path, run: Path, steps: int) -> list[str]:
    """As the product reads them: whole, and in the order of the global batch."""
    logs = []
    for folder in (undisturbed, run):
        try:
            log = read_samples(folder)
        except ValueError as error:
            return [str(error)]
        if list(log) != list(range(1, steps + 1)):
            return [f"{folder / SAMPLES}: {len(log)} steps, not 1 to {steps}"]
        logs.append(log)
    other = [step for step, clips in logs[0].items() if logs[1][step] != clips]
    return _named("steps with other samples, or in another order", other)


# ---- tensors


def checkpoint_differences(undisturbed: Path, run: Path, steps: int, file: str) -> list[str]:
    """Of one file of the last checkpoint, bit for bit."""
    stored = []
    for folder in (undisturbed, run):
        path = folder / CHECKPOINTS / checkpoint_name(steps) / file
        if not path.is_file():
            return [f"{path} is not there"]
        stored.append(dict(deserialize(path.read_bytes())))
    return _named(f"{file}: tensors that differ", tensor_differences(*stored))


def tensor_differences(wanted: Tensors, found: Tensors) -> list[str]:
    """Names of tensors that are not there in both, or not the same to the last bit."""
    return [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]


# ---- metrics


def metrics_differences(undisturbed: Path, run: Path, steps: int) -> list[str]:
    """Each step once, and everything equal that does not depend on the clock."""
    rows = []
    for path in (undisturbed, run):
        parsed_rows, bad = parsed(path)
        times = Counter(row["step"] for row in parsed_rows)
        faults = _named(f"{path}: lines that are not whole", bad)
        faults += _named(f"{path}: steps that are missing", (s for s in range(1, steps + 1) if not times[s]))
        faults += _named(f"{path}: steps that are there more than once", (s for s, n in times.items() if n > 1))
        faults += _named(f"{path}: steps that were never to be", (s for s in times if not 1 <= s <= steps))
        if faults:
            return faults
        rows.append({row["step"]: row for row in parsed_rows})
    wanted, found = rows
    return _named(
        f"{run}: values that differ",
        (
            f"step {step} {key}: {wanted[step].get(key)!r} -> {found[step].get(key)!r}"
            for step in range(1, steps + 1)
            for key in sorted(wanted[step].keys() | found[step].keys())
            if is_exact(key) and not same(wanted[step].get(key), found[step].get(key))
        ),
    )


def is_exact(key: str) -> bool:
    """Whether a value of metrics.jsonl is a function of data and seed, and of nothing else."""
    section, _, name = key.partition("/")
    return section not in ("ingest", "checkpoint") and not (section == "train" and name in CLOCK_AND_MACHINE)


def same(wanted: Any, found: Any) -> bool:
    """Bit for bit: 0.0 is not -0.0, and nan is nan."""
    return json.dumps(wanted) == json.dumps(found)


def parsed(path: Path) -> tuple[list[Row], list[int]]:
    """-> rows, and the numbers of the lines that are none."""
    rows, bad = [], []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            bad.append(number)
    return rows, bad


def _named(what: str, found: Iterable[Any]) -> list[str]:
    """One line with the first few, or none when there are none."""
    items = list(found)
    more = f", and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
    return [f"{what}: {', '.join(map(str, items[:MOST_NAMED]))}{more}"] if items else []
