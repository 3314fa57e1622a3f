"""One rank's training: the state, built or restored, the hooks around the loop, the first and the last lines."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

import fvlm
from fvlm.config import Config
from fvlm.data.collate import Collator
from fvlm.data.corrupt import CORRUPT
from fvlm.data.plan import Plan
from fvlm.data.schema import Manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer
from fvlm.model.hub import build_model
from fvlm.ranks import world_size
from fvlm.train.device import on_device
from fvlm.train.evaluation import Evaluation
from fvlm.train.hang import HangWatch, collect_stacks
from fvlm.train.held_out import EvalClips, eval_clips
from fvlm.train.logger import Logger
from fvlm.train.loop import Hook, Run, train
from fvlm.train.memory import out_of_memory, settle_memory, warm_up
from fvlm.train.metrics import Clock, Metrics, Row
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.resume import Choice
from fvlm.train.run_folder import TOKENIZER
from fvlm.train.samples import Samples
from fvlm.train.saver import Saver, ShardGiver
from fvlm.train.sharded import build_sharded
from fvlm.train.sinks import JsonLines, Sink, TrainLog
from fvlm.train.step import compile_kind
from fvlm.train.store import CheckpointStore
from fvlm.train.wandb_sink import Wandb
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
    run = make_run(config, manifest, place.device, store, choice)
    watch.extend()
    main = place.rank == 0
    sinks = make_sinks(config, run.step) if main else []
    clips = eval_clips(config, manifest)
    if main:
        announce(run, int(tell_damage(ledger, sinks)["ingest/corrupt"]), sinks, choice, place.world, clips)
    if place.device.type == "cuda" or compile_kind(config, place.device) != "off":
        memory = warm_up(run.take_step, latent_shape, getattr(torch, manifest.spec.latent_dtype))
        watch.extend()
        start_up.passed("for a mock step")
        for sink in sinks:
            sink.note(memory)
    tokens = CaptionTokenizer(
        load_tokenizer(config.run_dir / TOKENIZER), config.data.max_caption_tokens, config.data.train_eos
    )
    collate = Collator(manifest.spec, tokens)
    samples = Samples(config, run.step, place.rank, place.world)
    with contextlib.ExitStack() as cleanup:
        saver = cleanup.enter_context(Saver(run, store, sinks[0].note, watch.extend)) if main else None

        def lap() -> Row:
            # The other ranks' rows are not written anywhere, and what they asked for the first would not hear of.
            return feed.lap() | (tell_damage(ledger, sinks) | saver.lap() if saver else {})

        logger = Logger(run, sinks, samples, lap)
        giver = ShardGiver(run)
        hooks: list[Hook] = [logger, watch]
        if clips:
            decode = functools.partial(decoded, clips, place.rank, place.world)
            hooks.append(Evaluation(run, clips, tokens, place.rank, sinks, decode, watch.long))
        hooks.append(saver or giver)
        hooks += [start_up.tell(sinks[0].note)] if saver else []
        start_up.passed("for model and weights")
        batches = samples.of(on_device(map(collate, feed), place.device))
        try:
            train(run, batches, hooks, StopAgreement(ledger, place.world))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, f"step {run.step + 1}", config, latent_shape) from error
        if run.step < config.train.max_steps:
            logger.flush()
            watch.extend()
            (saver or giver).save_now()
        if main:
            with watch.long():  # W&B may have to send much
                conclude(run, collate, sinks, int(lap()["ingest/corrupt"]))


def conclude(run: Run, collate: Collator, sinks: list[Sink], damaged: int) -> None:
    """The last lines of a start."""
    config = run.config
    end = "finished" if run.step == config.train.max_steps else "stopped after"
    for sink in sinks:
        sink.note(f"{end} {run.step} steps in {run.clock.trained_s:.0f} s of training; "
                  f"rank 0 cut {collate.captions_cut} captions at {config.data.max_caption_tokens} tokens")  # fmt: skip
        for line in known_damage(config, damaged):
            sink.note(line)
    for sink in reversed(sinks):  # the log last: others still have something to tell
        sink.close()


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


def make_run(config: Config, manifest: Manifest, device: torch.device, store: CheckpointStore, choice: Choice) -> Run:
    """The run as the chosen checkpoint left it, or at step 0."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.precision == "bf16"
    pretrained = choice.name is None  # otherwise the checkpoint has all weights
    latent_shape = manifest.spec.latent_shape
    if config.scale.strategy == "shard" and world_size() > 1:
        model = build_sharded(config, latent_shape, device, pretrained)
    else:
        model = build_model(config.model, latent_shape, config.train.seed, pretrained).to(device)
        freeze_unreached(model, config)
    optimizer = make_optimizer(model, config.optim)
    run = Run(config, Plan.of_config(manifest, config), model, optimizer, Metrics(config.train.ratio_window), Clock())
    if choice.name:
        with store.open(choice.name) as checkpoint:
            run.restore(checkpoint)
    return run


def make_sinks(config: Config, step: int) -> list[Sink]:
    log = TrainLog(config.run_dir, config.train.max_steps)
    sinks: list[Sink] = [log, JsonLines(config.run_dir, step), RayMetrics(config.run_name)]
    if config.log.wandb != "off":
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
