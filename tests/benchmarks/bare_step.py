"""The training step alone, on batches that lie decoded in the host's memory: what a whole run is compared with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.data.collate import Collator
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer
from fvlm.train.device import on_device
from fvlm.train.step import Step


def seconds_of_laps(step: Step, batches: list[Batch], laps: int, lap_steps: int, device: torch.device) -> list[float]:
    """Seconds a step of each lap of `lap_steps` steps, steps that read the coarse losses included as a run has them.

    The batches are taken again and again, and copied to the device as training copies them. The host waits for the
    device at the end of a lap.
    """
    there = on_device(itertools.cycle(batches), device)
    seconds = []
    for lap in range(laps):
        begin = time.perf_counter()
        for number in range(lap * lap_steps, (lap + 1) * lap_steps):
            scalars = step(next(there), number)
        float(scalars["train/loss"])
        seconds.append((time.perf_counter() - begin) / lap_steps)
    return seconds


def decoded(config: Config, manifest: Manifest, tokenizer: Path, most: int | None = None) -> list[Batch]:
    """The batches of an epoch, or the first `most`, in memory. tokenizer: the folder of one."""
    data = config.data
    reader = ClipReader(manifest, Plan.of_config(manifest, config), data.num_frames)
    captions = CaptionTokenizer(load_tokenizer(tokenizer), data.max_caption_tokens, data.train_eos)
    raws: Iterable = BlockReader(reader).steps(0, min(reader.plan.steps_per_epoch, most or reader.plan.steps_per_epoch))
    # Copies: the reader uses its memory again.
    return [
        Batch(*(t.clone() for t in batch.tensors()), batch.clip_ids)
        for batch in map(Collator(manifest.spec, captions), raws)
    ]
