"""One run before its start: how large its checkpoints are, whether its folder may be used, what is left to do."""

from __future__ import annotations

from pathlib import Path

import torch

from fvlm.checks.disk import existing, look_at_writing
from fvlm.checks.finding import Finding, of_error
from fvlm.checks.machine import Machine
from fvlm.config import Config, ModelConfig
from fvlm.data.corrupt import CorruptList
from fvlm.data.latents import require_sd_vae_latents
from fvlm.data.schema import Manifest
from fvlm.data.storage import Storage
from fvlm.errors import Unavailable, UserError
from fvlm.files import file_error
from fvlm.model.hub import Architecture, build_model, kept_architecture
from fvlm.train.run_folder import CONFIG, TOKENIZER, changes_since, has_progress, read_began
from fvlm.train.run_report import LastStart, RunReport, is_locked, report
from fvlm.train.step import compile_kind, require_compiler
from fvlm.train.store import checkpoint_store, is_milestone, newest_step

BYTES_OF_STATE = 12
"""Of a parameter in a checkpoint: itself and AdamW's two moments, float32."""


OTHER_CONFIG = "Use the old values to continue it, or another --run name to start a new one."


def parameters(model: ModelConfig, latent_shape: tuple[int, int, int], architecture: Architecture | None = None) -> int:
    """How many the whole model has, tied ones once; nothing of it is allocated. Raises UserError: an unknown name."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(model, latent_shape, 0, False, architecture).parameters())


def checkpoints_left(config: Config, done: int) -> int:
    """Checkpoints that the run will hold more than after step `done`: the last few, one being written, milestones."""
    train = config.train
    steps = range((done // train.save_every + 1) * train.save_every, train.max_steps + 1, train.save_every)
    milestones = sum(is_milestone(step, train.milestones) for step in steps)
    kept = train.keep_last if done < train.save_every else 0  # a run that goes on has these already
    return kept + 1 + milestones if done < train.max_steps else 0


def look_at_run(config: Config, manifest: Manifest | None, now: float) -> tuple[list[Finding], bool]:
    """Its folder. -> findings, and whether a start finds weights and tokenizer there.

    manifest: None where the dataset cannot be read; now: seconds since 1970
    """
    run_dir, what = config.run_dir, f"run {config.run_name}"
    try:
        if not (run_dir / CONFIG).exists():
            return [Finding("ok", what, f"new: {run_dir}")], False
        if is_locked(run_dir):
            cure = "Wait for it, stop it, or use another --run; `python -m ray_jobs.status` shows how it goes."
            return [Finding("FAIL", what, f"{run_dir} is being trained by another process", cure)], False
        if manifest:
            began = read_began(run_dir)
            if (changes := changes_since(began, config, manifest)) and has_progress(config, began):
                listed = "; ".join(changes)
                return [Finding("FAIL", what, f"this run began with another config: {listed}", OTHER_CONFIG)], False
            CorruptList(run_dir, manifest.num_clips, config.data.max_corrupt)
        done = newest_step(checkpoint_store(config))
    except OSError as error:
        return [of_error(what, file_error(error))], False
    except (UserError, Unavailable) as error:
        return [of_error(what, error)], False
    found = report(run_dir, LastStart(config, None, held=False), now)
    return [_position(config, done, found)], done > 0 and (run_dir / TOKENIZER).is_dir()


def look_at_import(config: Config, manifest: Manifest | None) -> list[Finding]:
    """Whether a new run could begin from `import_checkpoint` with this dataset; the file itself is not opened."""
    path = config.import_checkpoint
    if not path or manifest is None:
        return []
    try:
        require_sd_vae_latents(manifest.spec, manifest.where, path)
    except UserError as error:
        return [of_error("import", error)]
    if not Path(path).is_file():
        return [Finding("FAIL", "import", f"--import-checkpoint {path}: no such file", "Give the path of a latest.pt.")]
    return [Finding("ok", "import", f"{path}; the dataset's latents are of its codec")]


def _position(config: Config, done: int, found: RunReport) -> Finding:
    what, steps = f"run {config.run_name}", f"{done} of {config.train.max_steps} steps"
    if found.checkpoint and found.checkpoint.problem:
        cure = "A start passes it over, if one before it is whole; its steps are repeated."
        return Finding("warn", what, f"the newest checkpoint is damaged: {found.checkpoint.problem}", cure)
    if done >= config.train.max_steps:
        cure = "There is nothing to do; --train.max-steps trains on, --run begins another one."
        return Finding("note", what, f"finished, {steps}", cure)
    return Finding("ok", what, f"goes on after {steps}" if done else f"begins at step 0 in {config.run_dir}")


def look_at_compiler(config: Config) -> list[Finding]:
    """What torch.compile needs; nothing where the run, as this machine would train it, compiles nothing."""
    on_gpu = config.scale.device != "cpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu or config.scale.device == "cuda" else "cpu"
    if compile_kind(config, torch.device(device)) == "off":
        return []
    try:
        require_compiler(config, device)
    except UserError as error:
        return [of_error("compiler", error)]
    return [Finding("ok", "compiler", f"train.compile {config.train.compile} has what it needs")]


def look_at_checkpoint_disk(config: Config, machine: Machine, latent_shape: tuple[int, int, int]) -> list[Finding]:
    """The disk of the run folder, and that of its checkpoints where they go elsewhere."""
    try:
        each = BYTES_OF_STATE * parameters(config.model, latent_shape, kept_architecture(config))
        store = checkpoint_store(config)
        more = checkpoints_left(config, newest_step(store)) * each
    except OSError as error:
        return [of_error("checkpoints", file_error(error))]
    except (UserError, Unavailable) as error:
        return [of_error("checkpoints", error)]
    place = config.train.checkpoint_dir
    if not place:
        return look_at_writing(machine, "runs", config.run_dir, "--runs-dir", more, each if more else 0)
    found = look_at_writing(machine, "runs", config.run_dir, "--runs-dir", 0, 0)
    storage = Storage(place)
    if storage.is_local:
        folder = existing(storage.folder)
        return found + look_at_writing(machine, "checkpoints", folder, "--train.checkpoint-dir", more, each)
    return [*found, Finding("ok", "checkpoints", f"{store.locate()} answers; {more / 1e9:,.1f} GB will be written")]
