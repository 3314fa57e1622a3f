"""What Ray Train runs on every rank: build or restore the state, join it to the ingest, train."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from fvlm.config import Config
from fvlm.data.collate import Collator
from fvlm.data.corrupt import CORRUPT
from fvlm.data.memory import IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer
from fvlm.model.hub import build_model
from fvlm.train.device import on_device
from fvlm.train.hang import HangWatch, collect_stacks
from fvlm.train.logger import Logger
from fvlm.train.loop import Hook, Run, train
from fvlm.train.metrics import Clock, Metrics, Row
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.resume import Choice, choose_checkpoint
from fvlm.train.run_folder import TOKENIZER, Claim
from fvlm.train.samples import Samples
from fvlm.train.saver import Saver
from fvlm.train.sinks import JsonLines, Sink, TrainLog, Wandb
from fvlm.train.store import CheckpointStore, checkpoint_store
from ray_jobs.agreement import StopAgreement
from ray_jobs.cli import user_error
from ray_jobs.feed import Feed, begun
from ray_jobs.ingest import rank_batches, share_of_one_rank
from ray_jobs.report import RayMetrics
from ray_jobs.startup import StartUp


def train_rank(task: dict[str, Any]) -> None:
    """What Ray Train runs on every rank."""
    config, manifest, memory, ledger = (task[key] for key in ("config", "manifest", "memory", "ledger"))
    try:
        with contextlib.ExitStack() as cleanup:
            run_rank(config, manifest, memory, ledger, cleanup, StartUp(task["begun"]))
    except Exception as error:
        reason = user_error(error)
        if reason is None:
            raise
        ray.get(ledger.record.remote(str(reason)))
        if ray.train.get_context().get_world_size() > 1:
            raise  # others may wait for this rank in a collective, and only a failure ends them


def run_rank(
    config: Config,
    manifest: Manifest,
    memory: IngestMemory,
    ledger: Any,
    cleanup: contextlib.ExitStack,
    start_up: StartUp,
) -> None:
    """Build or restore the run's state, join it to the ingest, train until the end or until all are asked to stop."""
    start_up.passed("until the ranks ran and were joined")
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    ray.get(ledger.joined.remote(ray.get_runtime_context().get_node_id()))
    run_dir, steps = config.run_dir, config.train.max_steps
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Threads without a core of their own wait for each other in spin loops: two on one core are 5 times slower.
        torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
    store = checkpoint_store(config, Claim(run_dir).require) if rank == 0 else checkpoint_store(config)
    choice = told_by_rank_0(lambda: choose_checkpoint(store, run_dir), rank, world)
    start_up.passed("to choose the checkpoint")

    # The ingest takes seconds to start: it does so while the model is built.
    plan = dataclasses.replace(Plan.of_config(manifest, config), origin=choice.origin)
    reader = ClipReader.of_config(manifest, plan, config)
    share = share_of_one_rank(config, memory, device.type == "cuda")
    raw = begun(rank_batches(reader, share, rank, world, choice.step, steps))
    feed = Feed(raw, share, rank, lambda clips: ray.get(ledger.replaced.remote(clips)))

    run = make_run(config, manifest, device, store, choice)
    sinks: list[Sink] = make_sinks(config, run.step) if rank == 0 else []
    if rank == 0:
        announce(run, reader, sinks, choice, world)
    tokens = CaptionTokenizer(
        load_tokenizer(run_dir / TOKENIZER), config.data.max_caption_tokens, config.data.train_eos
    )
    collate = Collator(manifest.spec, tokens)
    samples = Samples(config, run.step, rank, world)

    saver = cleanup.enter_context(Saver(run, store, sinks[0].note)) if rank == 0 else None
    watch = cleanup.enter_context(HangWatch(config, run.step, rank, world))

    def lap() -> Row:
        # The other ranks' rows are not written anywhere, and what they asked for the first would not hear of.
        return feed.lap() | (tell_damage(ledger, sinks) | saver.lap() if saver else {})

    logger = Logger(run, sinks, samples, lap)
    hooks: list[Hook] = [logger, watch]
    if saver:
        hooks += [saver, start_up.tell(sinks[0].note)]
    start_up.passed("for model and weights")
    train(run, samples.of(on_device(map(collate, feed), device)), hooks, StopAgreement(ledger, world))
    if run.step < steps:
        logger.flush()
        with watch.long():
            if saver:
                saver.save_now()
    if rank == 0:
        conclude(run, collate, sinks, int(lap()["ingest/corrupt"]))


def told_by_rank_0(choose: Callable[[], Choice], rank: int, world: int) -> Choice:
    """Rank 0's choice, on every rank. What keeps rank 0 from choosing ends them all."""
    choice = [choose() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(choice)
    (chosen,) = choice
    assert chosen is not None
    return chosen


def conclude(run: Run, collate: Collator, sinks: list[Sink], damaged: int) -> None:
    """The last lines of a start."""
    config = run.config
    end = "finished" if run.step == config.train.max_steps else "stopped after"
    for sink in sinks:
        sink.note(f"{end} {run.step} steps in {run.clock.trained_s:.0f} s of training; "
                  f"rank 0 cut {collate.captions_cut} captions at {config.data.max_caption_tokens} tokens")  # fmt: skip
        for line in known_damage(config, damaged):
            sink.note(line)
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
    model = build_model(config.model, manifest.spec.latent_shape, config.train.seed, pretrained).to(device)
    freeze_unreached(model, config)
    optimizer = make_optimizer(model, config.optim)
    run = Run(config, Plan.of_config(manifest, config), model, optimizer, Metrics(config.train.ratio_window), Clock())
    if choice.name:
        with store.open(choice.name) as checkpoint:
            run.restore(checkpoint)
    return run


def make_sinks(config: Config, step: int) -> list[Sink]:
    sinks: list[Sink] = [TrainLog(config.run_dir, config.train.max_steps), JsonLines(config.run_dir, step)]
    sinks.append(RayMetrics(config.run_name))
    if config.log.wandb != "off":
        sinks.append(Wandb(config))
    return sinks


def announce(run: Run, reader: ClipReader, sinks: list[Sink], choice: Choice, world: int) -> None:
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
        *known_damage(run.config, len(reader.known_bad)),
    ]
    for sink in sinks:
        for line in lines:
            sink.note(line)
