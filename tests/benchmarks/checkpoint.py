"""What a checkpoint costs: python tests/benchmarks/checkpoint.py [PRESET]

Trains a preset's model on random clips on this device and saves every third step into a folder in build/:
time that training was held, seconds until the checkpoint was safe, and the share of a step's time; medians of ten
saves. The preset's model is made with random weights.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fvlm import presets
from fvlm.batch import Batch
from fvlm.data.plan import Plan
from fvlm.model.hub import build_model
from fvlm.train.loop import Run
from fvlm.train.metrics import Clock, Metrics, Row
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.saver import Saver
from fvlm.train.step import train_step
from fvlm.train.store import LocalStore

SAVES, EVERY = 10, 3


def main(preset: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Path("build").mkdir(exist_ok=True)  # on the disk of this folder, and not in memory as /tmp may be
    with tempfile.TemporaryDirectory(dir="build") as folder:
        config = presets.get(preset, runs_dir=folder)
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, init="random"),
            train=dataclasses.replace(config.train, save_every=EVERY, keep_last=2, max_steps=10**6),
        )
        config.run_dir.mkdir()
        data, side = config.data, config.data.frame_size // 8
        model = build_model(config.model, (4, side, side), 0, pretrained=False).to(device)
        freeze_unreached(model, config)
        optimizer = make_optimizer(model, config.optim)
        plan = Plan(np.array([64]), 4, 0, data.global_batch, data.lanes, data.window_steps, "")
        run = Run(config, plan, model, optimizer, Metrics(config.train.ratio_window), Clock())
        shape = (data.global_batch, data.num_frames)
        ids = torch.randint(4, 60, (data.global_batch, data.max_caption_tokens), device=device)
        batch = Batch(
            frames=torch.randint(0, 255, (*shape, data.frame_size, data.frame_size, 3), device=device).byte(),
            latents=torch.randn(*shape, 4, side, side, device=device),
            caption_ids=ids,
            labels=ids,
            clip_ids=tuple(map(str, range(data.global_batch))),
        ).check()
        rows, steps, store = [], [], LocalStore(Path(folder) / "checkpoints")
        with Saver(run, store, lambda text: None) as saver:
            while len(rows) < SAVES:
                begin = time.perf_counter()
                float(train_step(model, optimizer, batch, run.step, config)["train/loss"])
                steps.append(time.perf_counter() - begin)
                run.step += 1
                saver.after_step(run.step, {})
                rows += [row] if (row := saver.lap()) else []
        size = sum(file.stat().st_size for file in (store.root / store.names()[-1]).iterdir())
    stall, write, step = (
        statistics.median(values)
        for values in (
            [row["checkpoint/stall_ms"] for row in rows],
            [row["checkpoint/write_s"] for row in rows],
            [1e3 * value for value in steps[1:]],
        )
    )
    gpu = f", its computation for {statistics.median(holds):.2f} ms" if (holds := holds_of(rows)) else ""
    print(
        f"{preset} on {device.type}: {size / 1e6:.0f} MB, training held for {stall:.1f} ms ({100 * stall / step:.1f} % "
        f"of a step of {step:.0f} ms){gpu}, safe after {write:.2f} s; medians of {SAVES}"
    )


def holds_of(rows: list[Row]) -> list[float]:
    """Of a GPU."""
    return [row["checkpoint/hold_ms"] for row in rows if "checkpoint/hold_ms" in row]


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
