"""Variants of the step side by side: each alone first, for what is counted, then in turns, for time."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from chips import machine, measured_peak
from counts import Compiled, count, count_kernels, is_out_of_memory, peak_memory
from variants import OURS, PRESENT, Variant, base_model, build, latent_shape, random_batch

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.train.chips import table_peak
from fvlm.train.device import synchronise
from fvlm.train.flops import clip_flops

LEAST_READING_S = 0.3
"""A shorter step is repeated without a wait between, as in training, until a reading takes as long."""
MOST_STEPS_A_READING = 20
LEAST_READINGS = 3
"""Taken even when the time is over."""
COMPILED = tuple(name for name, changes in OURS.items() if changes["train.compile"] != "off")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One variant of a comparison. `attention` concerns the present-style step alone."""

    name: str
    precision: str
    attention: str = "sdpa"

    @property
    def label(self) -> str:
        return self.name + (f" ({self.attention} attention)" if self.attention != "sdpa" else "")

    def __str__(self) -> str:
        return f"{self.label} {self.precision}"


@dataclasses.dataclass
class Row:
    """What one variant showed. Empty where it was not measured; `note` says why.

    loss:        of the first step, before its update
    loss_diff:   relative, from the comparison's first float32 row, or from its first row
    gflop_clip:  matrix products and convolutions of a step, recomputed ones too, by clips; gflop_clip_attention alike
    tflops:      all operations that the step makes, by time
    mfu:         operations that the mathematics needs, by time and the chip's best: the same numerator for all variants
    operators:   that compute something, dispatched in a step; operators_model: those of forward and backward alone
    kernels:     run by the GPU in a step; launches: calls of the host, one for a CUDA graph
    graphs, breaks: of torch.compile, for the plain step
    """

    variant: str
    precision: str
    batch: int
    loss: float | None = None
    loss_diff: float | None = None
    ms: float | None = None
    ms_all: list[float] = dataclasses.field(default_factory=list)
    clips_s: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    gflop_clip: float | None = None
    gflop_clip_attention: float | None = None
    operators: int | None = None
    operators_model: int | None = None
    kernels: int | None = None
    launches: int | None = None
    peak_gb: float | None = None
    reserved_gb: float | None = None
    first_s: float | None = None
    compile_s: float | None = None
    graphs: int | None = None
    breaks: int | None = None
    break_reasons: list[str] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def label(self) -> str:
        return f"{self.variant} {self.precision} B{self.batch}"


class Bench:
    """What all parts share: the device, its best, the clock, and operations a clip that were counted already."""

    def __init__(self, device: torch.device, repeats: int, present_repeats: int, warmup: int, budget_s: float):
        self.device, self.repeats, self.present_repeats, self.warmup = device, repeats, present_repeats, warmup
        self.begin, self.budget_s = time.monotonic(), budget_s
        self.machine = machine(device)
        torch.backends.cuda.matmul.allow_tf32 = False  # or the float32 peak would be TF32's
        self.peaks = {"table_bf16": table_peak(device)} | {
            precision: measured_peak(device, dtype)
            for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
        self._useful: dict[Any, float] = {}

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget_s - (time.monotonic() - self.begin)

    def peak(self, precision: str) -> float:
        """TFLOP/s that MFU is a share of: the table's for bf16 where the chip is in it, otherwise measured."""
        listed = self.peaks["table_bf16"]
        return listed if precision == "bf16" and listed else self.peaks[precision]

    def useful(self, config: Config) -> float:
        """Operations a clip that the mathematics needs, by the trainer's own count, at the longest caption."""
        key = (config.model, config.objective, config.data.num_frames, config.data.frame_size)
        key = (*key, config.data.max_caption_tokens)
        if key not in self._useful:
            (self._useful[key],) = clip_flops(config, latent_shape(config), [config.data.max_caption_tokens])
        return self._useful[key]


def compare(bench: Bench, config: Config, specs: list[Spec]) -> list[Row]:
    """A row for every spec. One that does not fit in memory, or cannot be here, has a note, and the others go on."""
    base = base_model(config)
    batch = random_batch(config, bench.device)
    rows, variants = [], []
    for spec in specs:
        row = Row(spec.label, spec.precision, config.data.global_batch)
        try:
            variants.append(_alone(bench, config, spec, base, batch, row))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            row.note = "out of memory"
            variants.append(None)
        except UserError as error:
            row.note = str(error)
            variants.append(None)
        rows.append(row)
        free(bench.device)
        print(f"  {spec}: " + (row.note or f"first step {row.first_s:.1f} s, loss {row.loss:.6f}"), flush=True)
    _in_turns(bench, rows, variants, batch)
    with_loss = [row for row in rows if row.loss is not None]
    reference = next((row for row in with_loss if row.precision == "fp32"), with_loss[0] if with_loss else None)
    for row in rows:
        if row.loss is not None and reference is not None and reference.loss:
            row.loss_diff = abs(row.loss - reference.loss) / abs(reference.loss)
        if row.ms is not None:
            _rates(bench, config, row)
    variants.clear()
    free(bench.device)
    return rows


def _alone(bench: Bench, config: Config, spec: Spec, base: FoveatedVLM, batch: Batch, row: Row) -> Variant:
    """Build a variant and take its first steps with nothing else going on: loss, counts, memory, compilation."""
    before, compiled = Compiled.now(), spec.name in COMPILED
    with peak_memory(bench.device) as memory:
        variant = build(spec.name, spec.precision, config, base, bench.device, spec.attention)
        begin = time.perf_counter()
        row.loss = float(variant.plain(batch)["train/loss"])
        row.first_s = time.perf_counter() - begin
        if not compiled:  # the second step: in the first one the optimizer makes its state
            _, counts = count(lambda: variant.plain(batch))
            row.operators, row.operators_model = counts.operators, counts.operators_model
            row.gflop_clip, row.gflop_clip_attention = (
                counts.products / row.batch / 1e9,
                counts.attention / row.batch / 1e9,
            )
        # After two steps of half a minute nothing is left to warm up.
        for _ in range(bench.warmup if compiled or row.first_s < 30 else 0):
            variant.plain(batch)
        synchronise(bench.device)
    row.peak_gb, row.reserved_gb = memory["peak_gb"], memory["reserved_gb"]
    row.kernels, row.launches = count_kernels(lambda: variant.plain(batch), bench.device)
    if compiled:
        row.graphs, row.breaks, row.break_reasons = Compiled.now().since(before)
    return variant


def _in_turns(bench: Bench, rows: list[Row], variants: list[Variant | None], batch: Batch) -> None:
    """Readings of all variants in turns, so that what else the machine does meets all of them."""
    present = [variant for variant in zip(rows, variants, strict=True) if variant[1] is not None]
    steps = {row.label: steps_a_reading(bench, variant, batch) for row, variant in present}
    for repeat in range(max(bench.repeats, bench.present_repeats)):
        for row, variant in present:
            if repeat >= (bench.present_repeats if variant.name in PRESENT else bench.repeats):
                continue
            if bench.left() < 0 and repeat >= LEAST_READINGS:
                row.note = f"cut at {len(row.ms_all)} repetitions: out of time"
                continue
            row.ms_all.append(1e3 * seconds(bench, variant.plain, batch, steps[row.label]))
    for row, _ in present:
        if row.ms_all:
            row.ms = statistics.median(row.ms_all)
            if row.graphs is not None and row.first_s is not None:
                row.compile_s = max(row.first_s - row.ms / 1e3, 0.0)


def steps_a_reading(bench: Bench, variant: Variant, batch: Batch) -> int:
    """1 on a CPU, where nothing is asynchronous."""
    if bench.device.type == "cpu":
        return 1
    return min(math.ceil(LEAST_READING_S / seconds(bench, variant.plain, batch, 1)), MOST_STEPS_A_READING)


def seconds(bench: Bench, step: Callable[[Batch], object], batch: Batch, steps: int) -> float:
    """Of one step, the mean of `steps` without a wait between them."""
    synchronise(bench.device)
    begin = time.perf_counter()
    for _ in range(steps):
        step(batch)
    synchronise(bench.device)
    return (time.perf_counter() - begin) / steps


def _rates(bench: Bench, config: Config, row: Row) -> None:
    assert row.ms is not None
    row.clips_s = row.batch / row.ms * 1e3
    if row.gflop_clip is not None and row.gflop_clip_attention is not None:
        row.tflops = row.clips_s * (row.gflop_clip + row.gflop_clip_attention) / 1e3
    useful = bench.useful(config) / 1e12 * row.clips_s
    row.tflops = useful if row.tflops is None else row.tflops
    row.mfu = useful / bench.peak(row.precision)


def free(device: torch.device) -> None:
    """Give back what is not used, so that the next variant's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


COLUMNS = (
    ("ms/step", "ms", ".1f"), ("clips/s", "clips_s", ".2f"), ("TFLOP/s", "tflops", ".2f"), ("MFU", "mfu", ".1%"),
    ("GFLOP/clip", "gflop_clip", ".1f"), ("+attention", "gflop_clip_attention", ".1f"),
    ("peak GB", "peak_gb", ".2f"), ("reserved", "reserved_gb", ".2f"),
    ("operators", "operators", ",d"), ("fwd+bwd", "operators_model", ",d"),
    ("kernels", "kernels", ",d"), ("launches", "launches", ",d"),
    ("compile s", "compile_s", ".1f"), ("graphs", "graphs", "d"), ("breaks", "breaks", "d"),
    ("loss", "loss", ".6f"), ("loss diff", "loss_diff", ".1e"),
)  # fmt: skip


def table(rows: list[Row]) -> str:
    """Columns in which no row has anything are left out."""
    shown = [column for column in COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    cells = [["", *(title for title, _, _ in shown)]]
    for row in rows:
        values = [(getattr(row, key), form) for _, key, form in shown]
        cells.append([row.label, *("-" if value is None else format(value, form) for value, form in values)])
    return "\n".join([aligned(cells), *(f"{row.label}: {row.note}" for row in rows if row.note)])


def aligned(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in cells
    )
