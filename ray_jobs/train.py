"""`python -m ray_jobs.train PRESET [--key value ...]`: start a run, or go on with it. There is no resume flag."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import ray

from fvlm.checks.machine import Machine, require_processes
from fvlm.config import Config
from fvlm.convert.legacy_checkpoint import import_run
from fvlm.data.corrupt import CorruptList
from fvlm.data.memory import MB, IngestMemory
from fvlm.data.outage import Outage, wait_out
from fvlm.data.plan import Plan
from fvlm.data.row_groups import stored_captions
from fvlm.data.schema import Manifest
from fvlm.data.shards import check_shards, read_manifest
from fvlm.data.text import (
    load_tokenizer,
    published_tokenizer,
    require_tokens_fit,
    save_tokenizer,
    train_tokenizer,
)
from fvlm.entry_point import Terminated
from fvlm.errors import Damaged, UserError
from fvlm.files import make_dirs, unwritable_is_a_user_error
from fvlm.model.hub import Architecture, keep_architecture, require_pretrained
from fvlm.resources import usable_cpus
from fvlm.train.held_out import eval_clips
from fvlm.train.memory import settle_batch
from fvlm.train.run_folder import (
    CONFIG,
    TOKENIZER,
    changes_since,
    exclusive,
    open_run,
    read_began,
    undone_on_failure,
)
from fvlm.train.run_log import FAILED, read_log
from fvlm.train.sinks import TRAIN_LOG, TrainLog
from fvlm.train.state import checkpoint_name
from fvlm.train.store import checkpoint_store, newest_step, require_known
from ray_jobs.cli import run_command, told_in_one_line
from ray_jobs.cluster import connect
from ray_jobs.command import remember
from ray_jobs.feed_test import feeds
from ray_jobs.ingest import cpus_needed, ingest_memory, store_needed
from ray_jobs.log_follower import LogFollower
from ray_jobs.options import FeedTest, command_line
from ray_jobs.supervise import StopRequest, keep_training, on_gpu, summary

CAPTIONS_FOR_TOKENIZER = 100_000
COMMAND_WAITS = "the command waits, Ctrl-C ends it."


def main() -> None:
    """The command: parse, check everything that can be checked, then train on Ray."""
    config, test = command_line()
    if test:
        sys.exit(0 if run_feed_test(settle(config), test) else 1)
    outage = Outage(functools.partial(print, flush=True), config.scale.store_wait_s)
    config, manifest, done = wait_out(lambda: check_input(config), COMMAND_WAITS, outage)
    run_dir, steps, store = config.run_dir, config.train.max_steps, checkpoint_store(config)
    if done >= steps and is_of_this_run(config, manifest):
        print(f"{config.run_name} is finished: {done} of {steps} steps. Nothing to do.\n{run_dir}")
        return
    memory = ingest_memory(config, manifest)
    with exclusive(run_dir) as lock_note:
        note = wait_out(lambda: begin_or_go_on(config, manifest), COMMAND_WAITS, outage)
        print(f"{config.describe()}\ningest: at most {memory}", flush=True)
        if lock_note:
            tell(note, lock_note)
        with failure_noted(note), cluster(config, memory), LogFollower(run_dir / TRAIN_LOG), StopRequest() as stop:
            check_resources(config, memory, on_gpu(config))
            done = keep_training(config, manifest, stop, note)
            if done < steps and not read_log(run_dir / TRAIN_LOG).ended:
                note(f"stopped by signal {stop.signal} at step {done}, before the ranks of this start had begun")
    if done < steps:
        print(f"{config.run_name}: stopped at step {done} of {steps}; the same command goes on there.", flush=True)
        os._exit(128 + (stop.signal or 0))  # a thread may still wait in Ray for a place: a plain exit would crash on it
    print(f"{config.run_name}: finished {steps} steps. Checkpoint: {store.locate(checkpoint_name(done))}", flush=True)


@contextlib.contextmanager
def failure_noted(note: Callable[[str], None]) -> Iterator[None]:
    """The log says why the command ended before it did its work: whoever looks later may not have its output."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        name = error.signal.name if isinstance(error, Terminated) else "Ctrl-C"
        with contextlib.suppress(UserError, OSError):
            note(f"stopped by {name}, without waiting for a checkpoint")
        raise
    except Exception as error:
        with contextlib.suppress(UserError, OSError):  # there may be no room for the line
            note(f"{FAILED}{told_in_one_line(error) or summary(error)}")
        raise


def settle(config: Config) -> Config:
    """The config with the number of clips that `data.global_batch` 0 stands for. Raises UserError."""
    if config.data.global_batch == 0:
        config = settle_batch(config, open_manifest(config).spec.latent_shape)
    return config


def cluster(config: Config, memory: IngestMemory) -> AbstractContextManager[None]:
    """The one that was named, or one on this machine, of the size that the run needs."""
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        require_processes(Machine())
    return connect(max(usable_cpus(), cpus_needed(config)), store_needed(config, memory))


def run_feed_test(config: Config, test: FeedTest) -> bool:
    """Whether the ingest would feed a GPU. Makes no run folder. Raises UserError."""
    manifest = open_dataset(config)
    memory = ingest_memory(config, manifest)
    print(f"ingest: at most {memory}", flush=True)
    with cluster(config, memory):
        check_resources(config, memory, use_gpu=False)
        return feeds(config, manifest, memory, test)


def open_manifest(config: Config) -> Manifest:
    """Raises UserError."""
    if not config.data.path:
        raise UserError(
            "--data.path is missing: the folder of a prepared dataset (`python -m ray_jobs.prepare --help`)."
        )
    return read_manifest(config.data.path)


def open_dataset(config: Config) -> Manifest:
    """Everything about the data that can fail: paths, manifest, plan, memory, shards. Raises UserError."""
    manifest = open_manifest(config)
    check_dataset(config, manifest)
    Plan.of_config(manifest, config)  # a dataset that does not fill one batch is an error here
    ingest_memory(config, manifest)  # and a budget that does not suffice
    look_at_shards(config, manifest)
    return manifest


def look_at_shards(config: Config, manifest: Manifest) -> None:
    """Raises UserError: something is damaged, and is not to be replaced."""
    for damage in check_shards(manifest, damage_is_error=config.data.on_corrupt == "stop"):
        print(f"damaged, its clips will be replaced: {damage}", flush=True)


def check_evaluation(config: Config, manifest: Manifest) -> None:
    """Raises UserError: the held-out clips are not there, or do not fit the run."""
    clips = eval_clips(config, manifest)
    if clips and config.eval.path:
        look_at_shards(config, clips.reader.manifest)


def check_input(config: Config) -> tuple[Config, Manifest, int]:
    """Everything that can fail before anything is written: the datasets, and where checkpoints lie.

    -> the config with its batch size, the manifest, finished steps
    Raises UserError, StoreUnavailable; then it can be called again.
    """
    config = settle(config)
    manifest = open_dataset(config)
    check_evaluation(config, manifest)
    return config, manifest, newest_step(checkpoint_store(config))


def prepare_run(config: Config, manifest: Manifest | None = None, note: Callable[[str], None] = print) -> Manifest:
    """The run's folder, models, tokenizer and first checkpoint, as far as they are not there. For the process that
    holds the run.

    manifest: `check_input`'s; None: it is called here
    Raises UserError, StoreUnavailable; then what was added to the folder is gone again.
    """
    manifest = manifest or check_input(config)[1]
    run_dir = config.run_dir
    make_dirs(run_dir)
    with undone_on_failure(run_dir):
        open_run(config, manifest, note)
        prepare_models(config, manifest)
        store = checkpoint_store(config)
        names = store.names()
        require_known(store, run_dir, names)
        if config.import_checkpoint and not names:
            import_run(Path(config.import_checkpoint), config, manifest, store)
    return manifest


def prepare_models(config: Config, manifest: Manifest) -> None:
    """Architecture and tokenizer, which the run's folder keeps, and the weights that a run without a checkpoint begins
    with: fetched, and their headers read. Raises UserError."""
    begun = bool(checkpoint_store(config).names())
    architecture = keep_architecture(config, begun)
    make_tokenizer(config, manifest, config.run_dir / TOKENIZER, architecture)
    if config.model.init == "hub" and not begun and not config.import_checkpoint:
        require_pretrained(config.model, architecture)


def begin_or_go_on(config: Config, manifest: Manifest) -> Callable[[str], None]:
    """Make the held run ready for its ranks. -> what takes notes for its log. Raises UserError, StoreUnavailable."""
    run_dir = config.run_dir
    with unwritable_is_a_user_error(run_dir), undone_on_failure(run_dir):
        note = TrainLog(run_dir, config.train.max_steps).note
        prepare_run(config, manifest, functools.partial(tell, note))
        remember(config, sys.argv[1:])
        CorruptList(run_dir, manifest.num_clips, config.data.max_corrupt)  # too many: an error before anything starts
    return note


def tell(note: Callable[[str], None], text: str) -> None:
    """On the terminal, and in the run's log."""
    print(text, flush=True)
    note(text)


def is_of_this_run(config: Config, manifest: Manifest) -> bool:
    """Whether the run's folder is there, and of this config. Raises UserError: it is damaged."""
    there = (config.run_dir / CONFIG).exists()
    return there and not changes_since(read_began(config.run_dir), config, manifest)


def check_dataset(config: Config, manifest: Manifest) -> None:
    spec, data = manifest.spec, config.data
    if spec.frame_size != data.frame_size:
        raise UserError(
            f"{manifest.where} holds frames of {spec.frame_size} px; the config wants {data.frame_size}. "
            f"Use --data.frame-size {spec.frame_size}, or prepare the videos at {data.frame_size}."
        )
    if spec.num_frames < data.num_frames:
        raise UserError(
            f"{manifest.where} holds {spec.num_frames} frames a clip; the config wants {data.num_frames}. "
            f"Use --data.num-frames {spec.num_frames} or less, or prepare with more."
        )


def make_tokenizer(config: Config, manifest: Manifest, folder: Path, architecture: Architecture) -> None:
    """Once a run: the language model's own tokenizer, or one trained on the captions where the model is random.

    Raises UserError: it cannot be had, or has tokens that the language model does not know.
    """
    rows = int(architecture.language.config["vocab_size"])
    if folder.exists():
        require_tokens_fit(load_tokenizer(folder), rows, str(folder))
    elif config.model.init == "hub":
        files = architecture.files("language")
        tokenizer = published_tokenizer(files)
        require_tokens_fit(tokenizer, rows, files.where)
        save_tokenizer(tokenizer, folder)
    else:
        texts = captions(manifest, tolerant=config.data.on_corrupt == "replace")
        save_tokenizer(train_tokenizer(texts, rows), folder)


def captions(manifest: Manifest, tolerant: bool) -> Iterator[str]:
    """The captions of the dataset, in file order, at most CAPTIONS_FOR_TOKENIZER.

    tolerant: row groups that are damaged are left out, each with a line; otherwise they are an error (Damaged)
    """

    def left_out(damage: Damaged) -> None:
        print(f"left out of the tokenizer's training: {damage}", flush=True)

    shards = stored_captions(manifest, left_out if tolerant else None)
    return itertools.islice(itertools.chain.from_iterable(shards), CAPTIONS_FOR_TOKENIZER)


def check_resources(config: Config, memory: IngestMemory, use_gpu: bool) -> None:
    """Ray waits without a word for what a cluster lacks: say so. A cluster of ours will not grow: raise UserError."""
    has = ray.cluster_resources()
    store = has.get("object_store_memory", 0)
    if store < store_needed(config, memory):
        raise UserError(
            f"the cluster's object store holds {store / MB:,.0f} MB and the ingest needs "
            f"{store_needed(config, memory) / MB:,.0f} MB, or Ray would write batches to the disk. Start Ray with a "
            "larger --object-store-memory, or lower --ingest-memory."
        )
    least = min(config.rank_counts)
    for name, needed in (("CPU", cpus_needed(config, least)), ("GPU", least if use_gpu else 0)):
        if has.get(name, 0) >= needed:
            continue
        lack = f"{least} workers need {needed} {name}s, and the cluster has {has.get(name, 0):g}"
        if os.environ.get("RAY_ADDRESS", "local") == "local":
            raise UserError(f"{lack}. Use fewer --scale.workers, or --scale.device cpu.")
        print(f"{lack}: waiting until it has more.", flush=True)


if __name__ == "__main__":
    run_command(main)
