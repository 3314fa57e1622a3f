"""What Ray Train runs on every rank: build or restore the state, join it to the ingest, train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from fvlm.config import Config
from fvlm.data.collate import Collator
from fvlm.data.corrupt import CORRUPT, CorruptClip, CorruptList
from fvlm.data.memory import IngestMemory
from fvlm.data.plan import Plan
from fvlm.data.read import ClipReader
from fvlm.data.schema import Manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer
from fvlm.model.hub import build_model
from fvlm.train.device import on_device
from fvlm.train.loop import Logger, Run, Saver, train
from fvlm.train.metrics import Clock, Metrics, Row
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.run_folder import CHECKPOINTS, TOKENIZER, latest_checkpoint
from fvlm.train.sinks import JsonLines, Sink, TrainLog, Wandb
from fvlm.train.state import remove_leftovers
from ray_jobs.cli import user_error
from ray_jobs.feed import Feed
from ray_jobs.ingest import rank_batches, share_of_one_rank
from ray_jobs.report import RayMetrics, report_checkpoint


@ray.remote
class Ledger:
    """What all ranks of a run share: why one gave up, so that no restart of the group tries the same in vain; and the
    list of damaged clips, which has one writer."""

    def __init__(self, corrupt: CorruptList) -> None:
        self._reason: str | None = None
        self._corrupt = corrupt
        self._news: list[CorruptClip] = []
        self._replaced = 0

    def replaced(self, clips: list[CorruptClip]) -> None:
        """Others stood in for these, on one rank. Raises UserError when too many are damaged."""
        self._replaced += len(clips)
        self._news += [clip for clip in clips if self._corrupt.add(clip)]

    def damage(self) -> tuple[list[CorruptClip], int, int]:
        """-> clips found damaged since the last call, on any rank; how many are known; how often others stood in."""
        news, self._news = self._news, []
        return news, len(self._corrupt.known), self._replaced

    def record(self, reason: str) -> None:
        self._reason = self._reason or reason

    def reason(self) -> str | None:
        return self._reason


def train_rank(task: dict[str, Any]) -> None:
    """What Ray Train runs on every rank."""
    config, manifest, memory, ledger = (task[key] for key in ("config", "manifest", "memory", "ledger"))
    if ray.get(ledger.reason.remote()):
        return
    try:
        run_rank(config, manifest, memory, ledger)
    except Exception as error:
        reason = user_error(error)
        if reason is None:
            raise
        ray.get(ledger.record.remote(str(reason)))
        # Others may wait for this rank, in a collective or in Ray's report: only a failure ends them. The group is then
        # started again, to return at once.
        if ray.train.get_context().get_world_size() > 1:
            raise


def run_rank(config: Config, manifest: Manifest, memory: IngestMemory, ledger: Any) -> None:
    """Build or restore the run's state, join it to the ingest, train."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    run_dir = config.run_dir
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        # Threads without a core of their own wait for each other in spin loops: two on one core are 5 times slower.
        torch.set_num_threads(max(1, int(config.scale.cpus_per_worker)))
    checkpoint = latest_checkpoint(run_dir)
    run = make_run(config, manifest, device, checkpoint)
    sinks: list[Sink] = make_sinks(config, run.step) if rank == 0 else []
    if rank == 0:
        remove_leftovers(run_dir / CHECKPOINTS)
    reader = ClipReader.of_config(manifest, run.plan, config)
    announce(run, reader, sinks, checkpoint, world)
    collate = Collator(manifest.spec, CaptionTokenizer(
        load_tokenizer(run_dir / TOKENIZER), config.data.max_caption_tokens, config.data.train_eos))  # fmt: skip

    def lap() -> Row:
        # The other ranks' rows are not written anywhere, and what they asked for the first would not hear of.
        return feed.lap() | (tell_damage(ledger, sinks) if rank == 0 else {})

    share = share_of_one_rank(config, memory, device.type == "cuda")
    raw = rank_batches(reader, share, rank, world, run.step, config.train.max_steps)
    feed = Feed(raw, share, rank, lambda clips: ray.get(ledger.replaced.remote(clips)))
    logger = Logger(run, sinks, lap)
    saver = Saver(run, run_dir / CHECKPOINTS, rank == 0, report_checkpoint)
    train(run, on_device(map(collate, feed), device), [logger, saver])
    known = int(lap()["ingest/corrupt"]) if rank == 0 else 0
    for sink in sinks:
        sink.note(f"finished {run.step} steps in {run.clock.trained_s:.0f} s of training; "
                  f"rank 0 cut {collate.captions_cut} captions at {config.data.max_caption_tokens} tokens")  # fmt: skip
        for line in known_damage(config, known):
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


def make_run(config: Config, manifest: Manifest, device: torch.device, checkpoint: Path | None) -> Run:
    """The run as `checkpoint` left it, or at step 0."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.precision == "bf16"
    pretrained = checkpoint is None  # otherwise it has all weights
    model = build_model(config.model, manifest.spec.latent_shape, config.train.seed, pretrained).to(device)
    freeze_unreached(model, config)
    optimizer = make_optimizer(model, config.optim)
    run = Run(config, Plan.of_config(manifest, config), model, optimizer, Metrics(config.train.ratio_window), Clock())
    if checkpoint:
        run.restore(checkpoint)
    return run


def make_sinks(config: Config, step: int) -> list[Sink]:
    sinks: list[Sink] = [TrainLog(config.run_dir, config.train.max_steps), JsonLines(config.run_dir, step)]
    sinks.append(RayMetrics(config.run_name))
    if config.log.wandb != "off":
        sinks.append(Wandb(config))
    return sinks


def announce(run: Run, reader: ClipReader, sinks: list[Sink], checkpoint: Path | None, world: int) -> None:
    """The first lines of a start: what, on what, from where."""
    parameters = sum(p.numel() for p in run.model.parameters())
    plan = run.plan
    lines = [
        f"{run.config.run_name}: {parameters / 1e6:.1f} M parameters on {world} x {run.model.q_static.device.type}, "
        f"{plan.num_clips} clips, {plan.steps_per_epoch} steps an epoch; {plan.remainder} clips are left out "
        "of each epoch, other ones each time",
        f"resumed at step {run.step} from {checkpoint.name}" if checkpoint else "starting at step 0",
        *known_damage(run.config, len(reader.known_bad)),
    ]
    for sink in sinks:
        for line in lines:
            sink.note(line)
