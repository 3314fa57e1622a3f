"""A run of the product's loop on the tiny model (`tiny_run`), evaluated on real clips that are decoded here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import make_spec, write_shard
from tiny_run import CLIPS, LATENT, SIDE, batches, make_config, make_run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fvlm.config import Config, EvalConfig
from fvlm.data.read import BlockReader, RawBatch
from fvlm.data.schema import Manifest
from fvlm.data.shards import write_manifest
from fvlm.data.text import CaptionTokenizer
from fvlm.train.evaluation import Evaluation
from fvlm.train.held_out import EvalClips
from fvlm.train.loop import Run, train
from fvlm.train.optim import make_optimizer
from fvlm.train.parallel import shard_decoder
from fvlm.train.sinks import EVALS, JsonLines, TrainLog

HELD_OUT = 7
"""Clips: three global batches, and one that does not fill another."""
END = 2
"""Id of the end token in `reference.tiny_language`, which knows 29."""
WORDS = "a the red green blue yellow purple orange circle square triangle moves left right up down while".split()  # noqa: SIM905


def write_clips(folder: Path, clips: int, seed: int, **changes: Any) -> Manifest:
    """A dataset whose clips the tiny model can take."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"stored_frames": 8, "frame_size": SIDE, "latent_shape": LATENT} | changes
    spec = make_spec(rows_per_row_group=2, **shape)
    shard = write_shard(folder / "shard-00000.parquet", spec, range(clips), seed)
    return write_manifest(folder, spec, [shard], rejected=0)


def tokenizer() -> CaptionTokenizer:
    words = ["?", "pad", "end", *WORDS]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="end", pad_token="end", unk_token="?")
    assert fast.eos_token_id == END and len(words) <= 29
    return CaptionTokenizer(fast, max_tokens=12, train_eos=True)


def config_of(folder: Path, held_out: Path | None, norm: str = "batch", **train: Any) -> Config:
    """Evaluates after every second step."""
    config = make_config(folder, **{"max_steps": 5, "log_every": 1, **train})
    asked = EvalConfig(path=str(held_out or ""), every=2, clips=HELD_OUT, pictures=CLIPS)
    model = dataclasses.replace(config.model, visual_norm=norm)
    data = dataclasses.replace(config.data, max_caption_tokens=12)
    return dataclasses.replace(config, eval=asked, model=model, data=data)


def decoding(clips: EvalClips, rank: int = 0, world: int = 1) -> Callable[[], Iterator[RawBatch]]:
    """As `ray_jobs.evaluation`, in this process."""

    def decode() -> Iterator[RawBatch]:
        blocks = BlockReader(clips.reader)
        yield from blocks.steps(0, clips.batches, rank, world)
        blocks.close()

    return decode


def go_on(
    config: Config,
    clips: EvalClips | None,
    step: int = 0,
    rank: int = 0,
    world: int = 1,
    shard: bool = False,
    decode: Callable[[], Iterator[RawBatch]] | None = None,
    long: Callable[[], Any] = contextlib.nullcontext,
) -> Run:
    """One start, from `step` to the end; without `clips` there are no evaluations."""
    run = make_run(config, step)
    if shard:
        shard_decoder(run.model)
        run.optimizer = make_optimizer(run.model, config.optim)
    sinks = [TrainLog(config.run_dir, config.train.max_steps), JsonLines(config.run_dir, step)] if rank == 0 else []
    hooks = []
    if clips:
        decode = decode or decoding(clips, rank, world)
        hooks.append(Evaluation(run, clips, tokenizer(), rank, sinks, decode, long))
    train(run, batches(step + 1, rank=rank, world=world), hooks)
    for sink in sinks:
        sink.close()
    return run


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / EVALS).read_bytes().splitlines()]


def losses(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(("eval/caption", "eval/recon"))}
