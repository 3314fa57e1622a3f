"""One rank's training: the state, built or restored, the hooks around the loop, the first and the last lines."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

import fvlm
from fvlm.batch import Batch
from fvlm.config import Config
from fvlm.data.collate import Collator
from fvlm.data.corrupt import CORRUPT
from fvlm.data.plan import Plan
from fvlm.data.schema import Manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer
from fvlm.model.hub import build_model, kept_architecture
from fvlm.ranks import world_size
from fvlm.train.device import on_device
from fvlm.train.evaluation import Evaluation
from fvlm.train.flops import FlopMeter
from fvlm.train.hang import HangWatch, collect_stacks
from fvlm.train.held_out import EvalClips, eval_clips
from fvlm.train.log_writer import LogWriter
from fvlm.train.logger import Logger
from fvlm.train.loop import Hook, Run, train
from fvlm.train.memory import clips_of_a_rank, mock_step_seconds, out_of_memory, settle_memory, warm_up
from fvlm.train.metrics import Clock, Metrics, Row
from fvlm.train.numerics import configure_numerics
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.resume import Choice
from fvlm.train.run_folder import TOKENIZER
from fvlm.train.samples import Samples
from fvlm.train.save_signal import SaveSignal
from fvlm.train.saver import Saver, ShardGiver
from fvlm.train.sharded import build_sharded
from fvlm.train.sinks import JsonLines, Sink, TrainLog
from fvlm.train.spill import GpuMemory, SlowdownWatch, slow_mock_step
from fvlm.train.step import Step, compile_kind
from fvlm.train.store import CheckpointStore
from fvlm.train.wandb_choice import wandb_choice
from fvlm.train.wandb_sink import Wandb
from fvlm.wsl2 import is_wsl2
from ray_jobs.agreement import StopAgreement
from ray_jobs.evaluation import decoded
from ray_jobs.feed import Feed
from ray_jobs.report import RayMetrics
from ray_jobs.startup import StartUp


@dataclass(frozen=True)
class Place:
    """Where one rank stands among the others, and on what it computes."""

    rank: int
    world: int
    device: torch.device


def train_on(
    place: Place,
    config: Config,
    manifest: Manifest,
    store: CheckpointStore,
    choice: Choice,
    feed: Feed,
    ledger: Any,
    start_up: StartUp,
) -> None:
    """Build or restore the state, and train until the end or until all ranks are asked to stop."""
    # From before the first tensors go from rank to rank: one that never comes to them would keep the others for ever.
    with HangWatch(config, choice.step, place.rank, place.world) as watch:
        train_watched(place, config, manifest, store, choice, feed, ledger, start_up, watch)


def train_watched(
    place: Place,
    config: Config,
    manifest: Manifest,
    store: CheckpointStore,
    choice: Choice,
    feed: Feed,
    ledger: Any,
    start_up: StartUp,
    watch: HangWatch,
) -> None:
    """`train_on`, with `watch` begun."""
    latent_shape = manifest.spec.latent_shape
    config = settle_memory(config, latent_shape, place.device)
    main, on_gpu = place.rank == 0, place.device.type == "cuda"
    # Before the model is made: it seeds torch's generator too.
    meter = FlopMeter.of_config(config, latent_shape, place.device) if main and on_gpu else None
    run = make_run(config, manifest, place.device, store, choice, watch.extend)
    watch.extend()
    clips = eval_clips(config, manifest)
    with contextlib.ExitStack() as cleanup:
        writer = cleanup.enter_context(LogWriter(make_sinks(config, run.step, place.device))) if main else None
        sinks: list[Sink] = [writer] if writer else []
        if writer:
            announce(run, int(tell_damage(ledger, sinks)["ingest/corrupt"]), sinks, choice, place.world, clips)
        if on_gpu or compile_kind(config, place.device) != "off":
            notes = mock_steps(run.take_step, manifest, meter)
            watch.extend()
            start_up.passed("for a mock step")
            for sink, note in itertools.product(sinks, notes):
                sink.note(note)
        tokens = caption_tokenizer(config)
        saving = SaveSignal()
        saver = cleanup.enter_context(Saver(run, store, writer.note, watch.extend, saving)) if writer else None
        samples = Samples(config, run.step, place.rank, place.world)

        def counts() -> Row:
            return feed.counts() | (saver.lap() if saver else {})

        remote = functools.partial(ask_others, feed, ledger, sinks)
        logger = cleanup.enter_context(Logger(run, sinks, samples, counts, remote, writer, meter=meter))
        hooks: list[Hook] = [logger, watch]
        if clips:
            decode = functools.partial(decoded, clips, place.rank, place.world)
            hooks.append(Evaluation(run, clips, tokens, place.rank, sinks, decode, watch.long, logger.read_gathered))
        last = saver or ShardGiver(run, watch.extend, saving)
        hooks += [last, start_up.tell(writer.note)] if writer else [last]
        start_up.passed("for model and weights")
        made = cleanup.enter_context(contextlib.closing(feed.batches(Collator(manifest.spec, tokens), place.device)))
        batches = samples.of(on_device(made, place.device))
        train_or_say_what_fits(
            run, meter.of(batches) if meter else batches, hooks, StopAgreement(ledger, place.world), latent_shape
        )
        if run.step < config.train.max_steps:
            logger.flush()
            watch.extend()
            last.save_now()
        if writer:
            with watch.long():  # W&B may have to send much
                conclude(run, feed, sinks, int(tell_damage(ledger, sinks)["ingest/corrupt"]))


def train_or_say_what_fits(
    run: Run, batches: Iterator[Batch], hooks: list[Hook], stop: Callable[[], bool], latent_shape: tuple[int, int, int]
) -> None:
    """Train. Raises UserError, with a batch that would fit, when the GPU's memory does not suffice."""
    try:
        train(run, batches, hooks, stop)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, f"step {run.step + 1}", run.config, latent_shape) from error


def caption_tokenizer(config: Config) -> CaptionTokenizer:
    data = config.data
    return CaptionTokenizer(load_tokenizer(config.run_dir / TOKENIZER), data.max_caption_tokens, data.train_eos)


def conclude(run: Run, feed: Feed, sinks: list[Sink], damaged: int) -> None:
    """The last lines of a start."""
    config = run.config
    end = "finished" if run.step == config.train.max_steps else "stopped after"
    for sink in sinks:
        sink.note(f"{end} {run.step} steps in {run.clock.trained_s:.0f} s of training; "
                  f"rank 0 cut {feed.captions_cut} captions at {config.data.max_caption_tokens} tokens")  # fmt: skip
        for line in known_damage(config, damaged):
            sink.note(line)
    for sink in reversed(sinks):  # the log last: others still have something to tell
        sink.close()


def ask_others(feed: Feed, ledger: Any, sinks: list[Sink]) -> Row:
    """What a log line has to ask other processes for. In the writer's thread."""
    return feed.waiting() | tell_damage(ledger, sinks)


def tell_damage(ledger: Any, sinks: list[Sink]) -> Row:
    """Note the clips that any rank found damaged since the last call.

    ingest/corrupt   clips of the dataset that are known to be damaged, from earlier starts too
    ingest/replaced  times that another clip stood in for one, on all ranks, since the command was started
    """
    found, known, replaced = ray.get(ledger.damage.remote())
    for clip in found:
        for sink in sinks:
            sink.note(f"damaged, clip {clip.replaced_by!r} stands in for it: {clip.error}")
    return {"ingest/corrupt": float(known), "ingest/replaced": float(replaced)}


def known_damage(config: Config, clips: int) -> list[str]:
    """One line, where there is something to say."""
    listed = f"listed in {config.run_dir / CORRUPT}"
    return [f"{clips} clips are known to be damaged, others stand in for them; {listed}"] if clips else []


def make_run(
    config: Config,
    manifest: Manifest,
    device: torch.device,
    store: CheckpointStore,
    choice: Choice,
    alive: Callable[[], None] = lambda: None,
) -> Run:
    """The run as the chosen checkpoint left it, or at step 0. alive: called while the checkpoint is fetched"""
    configure_numerics(config, device)
    pretrained = choice.name is None  # otherwise the checkpoint has all weights
    latent_shape = manifest.spec.latent_shape
    if config.scale.strategy == "shard" and world_size() > 1:
        model = build_sharded(config, latent_shape, device, pretrained)
    else:
        architecture = kept_architecture(config)
        model = build_model(config.model, latent_shape, config.train.seed, pretrained, architecture).to(device)
        freeze_unreached(model, config)
    optimizer = make_optimizer(model, config.optim)
    run = Run(config, Plan.of_config(manifest, config), model, optimizer, Metrics(config.train.ratio_window), Clock())
    if choice.name:
        with store.open(choice.name, alive) as checkpoint:
            run.restore(checkpoint)
    return run


def mock_steps(step: Step, manifest: Manifest, meter: FlopMeter | None) -> list[str]:
    """Mock steps of every shape, before the first batch comes. -> lines for the log. All ranks make them together."""
    shape, dtype = manifest.spec.latent_shape, getattr(torch, manifest.spec.latent_dtype)
    notes = [warm_up(step, shape, dtype)]
    return notes + (look_at_speed(step, shape, dtype, meter) if step.model.q_static.is_cuda else [])


def look_at_speed(
    step: Step, latent_shape: tuple[int, int, int], latent_dtype: torch.dtype, meter: FlopMeter | None
) -> list[str]:
    """What there is to say of the time that a mock step takes on a GPU. All ranks do it together; those with a meter
    say something."""
    seconds = mock_step_seconds(step, latent_shape, latent_dtype)
    if meter is None:
        return []
    flops = clips_of_a_rank(step.config) * meter.by_length[step.config.data.max_caption_tokens]
    memory = GpuMemory.now(step.model.q_static.device)
    slow = slow_mock_step(seconds, flops, meter.peak_tflops, memory, is_wsl2())
    return [slow] if slow else []


def make_sinks(config: Config, step: int, device: torch.device) -> list[Sink]:
    log = TrainLog(config.run_dir, config.train.max_steps)
    sinks: list[Sink] = [log, JsonLines(config.run_dir, step), RayMetrics(config.run_name)]
    if device.type == "cuda":
        sinks.append(SlowdownWatch(log.note, functools.partial(GpuMemory.now, device), is_wsl2()))
    choice = wandb_choice(config)
    log.note(choice.said)
    if choice.mode != "off":
        sinks.append(Wandb(config, log.note, [Path(file).parent for file in (fvlm.__file__, __file__)]))
    return sinks


def announce(run: Run, damaged: int, sinks: list[Sink], choice: Choice, world: int, clips: EvalClips | None) -> None:
    """The first lines of a start: what, on what, from where."""
    parameters = sum(p.numel() for p in run.model.parameters())
    plan = run.plan
    lines = [
        f"{run.config.run_name}: {parameters / 1e6:.1f} M parameters on {world} x {run.model.q_static.device.type}, "
        f"{plan.num_clips} clips, {plan.steps_per_epoch} steps an epoch; {plan.remainder} clips are left out "
        "of each epoch, other ones each time",
        *collect_stacks(run.config.run_dir),
        *choice.notes,
        f"resumed at step {run.step} from {choice.name}" if choice.name else "starting at step 0",
        *known_damage(run.config, damaged),
    ]
    if clips:
        lines.append(f"evaluation every {run.config.eval.every} steps and after the last: {clips}")
    for sink in sinks:
        for line in lines:
            sink.note(line)
