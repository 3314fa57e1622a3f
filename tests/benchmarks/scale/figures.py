"""The figures of `law.Parts`, each taken on its own, in processes of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from law import Parts

from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.data.collate import Collator
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader, RawBatch
from fvlm.data.shards import read_manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer
from fvlm.model.hub import build_model
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.run_folder import TOKENIZER
from fvlm.train.step import Step

WARM, TIMED = 2, 10


def measure(config: Config, cores: int, port: int) -> Parts:
    """`config` is of a run whose folder has its tokenizer; `port` is free."""
    clips = config.data.global_batch
    (few,), (many,) = (_together(1, _steps, config, part) for part in (clips // 4, clips))
    clip_s = (many - few) / (clips - clips // 4)
    (alone,) = _together(1, _steps, config, clips // cores)
    crowd = _together(cores, _steps_of_a_rank, config, clips // cores, cores, f"tcp://127.0.0.1:{port}")
    (ingest_s,) = _together(1, _ingest, config)
    return Parts(many - clip_s * clips, clip_s, max(crowd) / alone, ingest_s)


def _together(count: int, measured: Callable[..., float], *args: Any) -> list[float]:
    """What `measured(number, *args)` returns in each of `count` processes that begin at the same moment."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_child, args=(n, barrier, results, measured, args)) for n in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return found


def _child(number: int, barrier: Any, results: Any, measured: Callable[..., float], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    results.put(measured(number, barrier, *args))


def _steps(number: int, barrier: Any, config: Config, clips: int) -> float:
    """Seconds a step with so many clips."""
    manifest = read_manifest(Path(config.data.path))
    batch = next(_batches(config))
    batch = Batch(*(t[:clips].clone() for t in batch.tensors()), batch.clip_ids[:clips])
    model = build_model(config.model, manifest.spec.latent_shape, config.train.seed)
    freeze_unreached(model, config)
    step = Step(config, model, make_optimizer(model, config.optim))
    for n in range(WARM):
        step(batch, n)
    barrier.wait()
    begin = time.perf_counter()
    for n in range(TIMED):
        step(batch, n)  # with readings as often as a run has them
    return (time.perf_counter() - begin) / TIMED


def _steps_of_a_rank(number: int, barrier: Any, config: Config, clips: int, ranks: int, address: str) -> float:
    """The same, with gradients averaged over `ranks` such processes."""
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=ranks)
    seconds = _steps(number, barrier, config, clips)
    dist.destroy_process_group()
    return seconds


def _ingest(number: int, barrier: Any, config: Config) -> float:
    """CPU seconds a clip, read and decoded in this process."""
    for _ in _raw(config):
        pass
    clips, begin = 0, time.process_time()
    for raw in _raw(config):
        clips += len(raw["caption"])
    return (time.process_time() - begin) / clips


def _raw(config: Config) -> Iterator[RawBatch]:
    manifest = read_manifest(Path(config.data.path))
    reader = ClipReader(manifest, Plan.of_config(manifest, config), config.data.num_frames)
    return BlockReader(reader).steps(0, reader.plan.steps_per_epoch)


def _batches(config: Config) -> Iterator[Batch]:
    data = config.data
    tokenizer = CaptionTokenizer(load_tokenizer(config.run_dir / TOKENIZER), data.max_caption_tokens, data.train_eos)
    return map(Collator(read_manifest(Path(data.path)).spec, tokenizer), _raw(config))
