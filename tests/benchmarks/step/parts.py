"""What else there is to ask of a step: recompilations, the cost of readings, drift of bf16, and where the time goes."""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import LEAST_READINGS, Bench, Row, Spec, aligned, compare, free, seconds, steps_a_reading, table
from counts import Compiled
from variants import PRESENT, Variant, base_model, build, caption_batches, learnable_batches, random_batch, with_changes

from fvlm.config import Config
from fvlm.errors import UserError
from fvlm.train.device import synchronise


def captions(bench: Bench, config: Config, spec: Spec, steps: int) -> dict[str, Any]:
    """Compilations over so many steps with captions of real lengths, readings among them, after one step of each kind.

    A kind is a padded length, with readings or without.
    """
    variant = build(spec.name, spec.precision, config, base_model(config), bench.device)
    batches = caption_batches(config, bench.device, steps)
    lengths = collections.Counter(batch.caption_ids.shape[1] for batch in batches)
    begin, start = Compiled.now(), time.monotonic()
    for batch in {batch.caption_ids.shape[1]: batch for batch in batches}.values():
        variant.plain(batch)
        variant.reading(batch)
    synchronise(bench.device)
    warm, warm_s = Compiled.now(), time.monotonic() - start
    done = 0
    for number, batch in enumerate(batches):
        if bench.left() < 0:
            break
        variant.number(batch, number)
        done += 1
    synchronise(bench.device)
    graphs, breaks, reasons = warm.since(begin)
    out = {
        "variant": str(spec),
        "steps": done,
        "padded_lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "warmup_s": warm_s,
        "graphs": graphs,
        "breaks": breaks,
        "break_reasons": reasons,
        "recompilations": Compiled.now().since(warm)[0],
        "note": "" if done == steps else f"cut at {done} of {steps} steps: out of time",
    }
    print(
        f"{spec}: captions padded to {out['padded_lengths']}: {graphs} graphs in {warm_s:.1f} s of warm-up, "
        f"{breaks} breaks, then {out['recompilations']} recompilations in {done} steps {out['note']}"
    )
    return out


def readings(bench: Bench, config: Config, specs: list[Spec]) -> list[dict[str, Any]]:
    """What every `coarse_every`-th step pays for the losses of the coarse tokens and of the earlier iterations."""
    base, batch, rows = base_model(config), random_batch(config, bench.device), []
    every = config.objective.coarse_every
    for spec in specs:
        try:
            variant = build(spec.name, spec.precision, config, base, bench.device, spec.attention)
            for _ in range(max(bench.warmup, 1)):
                variant.plain(batch)
                variant.reading(batch)
        except UserError as error:
            print(f"{spec}: {error}")
            continue
        times: dict[str, list[float]] = {"plain": [], "reading": []}
        steps = steps_a_reading(bench, variant, batch)
        for repeat in range(bench.present_repeats if spec.name in PRESENT else bench.repeats):
            if bench.left() < 0 and repeat >= LEAST_READINGS:
                break
            times["plain"].append(seconds(bench, variant.plain, batch, steps))
            times["reading"].append(seconds(bench, variant.reading, batch, steps))
        plain, reading = (1e3 * statistics.median(values) for values in times.values())
        rows.append(
            {
                "variant": str(spec),
                "plain_ms": plain,
                "reading_ms": reading,
                "extra_ms": reading - plain,
                "repeats": len(times["plain"]),
                "share": (reading - plain) / (every * plain + reading - plain),
                "share_at_100": (reading - plain) / (100 * plain + reading - plain),
            }
        )
        del variant
        free(bench.device)
    cells = [["", "plain ms", "reading ms", f"share of the run, every {every}", "every 100"]]
    for row in rows:
        shares = [f"{row['share']:.2%}", f"{row['share_at_100']:.2%}"]
        cells.append([row["variant"], f"{row['plain_ms']:.1f}", f"{row['reading_ms']:.1f}", *shares])
    print(aligned(cells))
    return rows


def loss_curve(bench: Bench, config: Config, name: str, steps: int) -> dict[str, Any]:
    """The same steps in float32 and in bf16, from the same weights and on the same learnable batches.

    drift:  mean of bf16 - float32 over the last quarter, relative to float32's mean there
    spread: standard deviation of the single losses around float32's running mean in that quarter, likewise relative
    """
    # Random weights learn nothing at a rate made for pretrained ones.
    config = with_changes(config, {"optim.lr": 3e-4, "optim.warmup_steps": 20})
    base = base_model(config)
    variants = {precision: build(name, precision, config, base, bench.device) for precision in ("fp32", "bf16")}
    curves: dict[str, list[torch.Tensor]] = {precision: [] for precision in variants}
    for number, batch in zip(range(steps), learnable_batches(config, bench.device), strict=False):
        if bench.left() < 0 and number >= 20:
            break
        for precision, variant in variants.items():
            curves[precision].append(variant.number(batch, number)["train/loss"].clone())
    fp32, bf16 = (torch.stack(curve).double().cpu().numpy() for curve in curves.values())
    last = max(len(fp32) // 4, 1)
    mean = fp32[-last:].mean()
    smooth = np.convolve(fp32[-last:], np.ones(5) / 5, mode="same")
    done = len(fp32)
    out = {
        "variant": name,
        "steps": done,
        "first_loss": float(fp32[0]),
        "last_loss": float(mean),
        "drift": float((bf16[-last:].mean() - mean) / mean),
        "spread": float((fp32[-last:] - smooth)[2:-2].std() / mean) if last > 8 else None,
        "largest_step_difference": float(np.abs(bf16 / fp32 - 1).max()),
        "fp32": [round(float(x), 5) for x in fp32],
        "bf16": [round(float(x), 5) for x in bf16],
        "note": "" if done == steps else f"cut at {done} of {steps} steps: out of time",
    }
    print(
        f"{name}, {done} steps: loss {out['first_loss']:.3f} -> {mean:.4f} in float32; bf16 is {out['drift']:+.2%} off "
        "over the last quarter"
        + (f", where single losses spread by {out['spread']:.2%}" if out["spread"] is not None else "")
        + f". {out['note']}"
    )
    return out


def profile(bench: Bench, config: Config, spec: Spec, path: Path, steps: int = 3) -> dict[str, Any]:
    """Operators (on a GPU: kernels) by their own time: a table in `path`, the first ones in the result."""
    variant: Variant = build(spec.name, spec.precision, config, base_model(config), bench.device, spec.attention)
    batch = random_batch(config, bench.device)
    for _ in range(max(bench.warmup, 1)):
        variant.plain(batch)
    activities, key = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if bench.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            variant.plain(batch)
        synchronise(bench.device)
    averages = profiler.key_averages()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{spec}, {steps} steps\n\n{averages.table(sort_by=key, row_limit=60, max_name_column_width=90)}")
    # On a GPU an operator's entry repeats the time of its kernels.
    on_device = bench.device.type == "cuda"
    mine = [event for event in averages if not on_device or event.device_type == torch.autograd.DeviceType.CUDA]
    # A label that torch puts around the optimizer's kernels would count their time again.
    mine = [event for event in mine if not event.key.startswith("Optimizer.step#")] if on_device else mine
    total = sum(getattr(event, key) for event in mine) or 1.0
    top = sorted(mine, key=lambda event: -getattr(event, key))[:12]
    rows = [
        {"name": e.key[:100], "share": getattr(e, key) / total, "ms": getattr(e, key) / 1e3 / steps, "calls": e.count}
        for e in top
    ]
    print(aligned([["where the time goes", "share", "ms/step", "calls"]] + [
        [row["name"][:60], f"{row['share']:.1%}", f"{row['ms']:.2f}", f"{row['calls'] / steps:.0f}"] for row in rows
    ]))  # fmt: skip
    return {"variant": str(spec), "ms": total / 1e3 / steps, "top": rows, "file": path.name}


def sweep(bench: Bench, config: Config, specs: list[Spec], sizes: list[int]) -> dict[str, Any]:
    """Every batch size, until none of the variants fits in memory or the time is over."""
    rows: list[Row] = []
    end = ""
    for i, size in enumerate(sizes):
        if bench.left() < 0:
            end = f"batch sizes {sizes[i:]} were not measured: out of time"
            break
        torch._dynamo.reset()  # or its limit of compilations is reached, and steps go on uncompiled
        of_size = []
        for spec in specs:  # one after the other, each with the whole memory
            of_size += compare(bench, with_changes(config, {"data.global_batch": size}), [spec])
        rows += of_size
        if all(row.note == "out of memory" for row in of_size):
            end = f"batch {size} does not fit; larger ones were not tried"
            break
    print("\n".join(filter(None, [table(rows) if rows else "", end])))
    return {"rows": [dataclasses.asdict(row) for row in rows], "note": end}
