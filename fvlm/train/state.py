"""Checkpoints: a folder that a reader finds whole or not at all.

    checkpoints/step-00000500/
        model.safetensors      every parameter by name, float32, tied ones once
        optimizer.safetensors  AdamW's moments by parameter name ("exp_avg/NAME"), and random generators ("rng/...")
        state.json             step, plan, config, versions, running averages, and size and SHA-256 of the two above

It is written under a temporary name, fsynced, and renamed. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fvlm.errors import UserError
from fvlm.files import TEMPORARY, fsync_dir, fsync_file, no_space_is_a_user_error, sha256_file

CHECKPOINT_VERSION = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Number of finished steps of a checkpoint, from its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: not the name of a checkpoint")
    return int(match[1])


def checkpoints(root: Path) -> list[Path]:
    """All whole checkpoints in `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / STATE).is_file())


def save_checkpoint(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write `root/step-........` and return it. Raises UserError when the disk is full; older ones stay as they are.

    state: anything JSON can hold; comes back from `load_checkpoint`.
    """
    model_tensors = {name: p.detach() for name, p in model.named_parameters()}
    return write_checkpoint(root, step, model_tensors, _optimizer_tensors(model, optimizer), state)


def write_checkpoint(
    root: Path,
    step: int,
    model_tensors: dict[str, torch.Tensor],
    optimizer_tensors: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> Path:
    """What `save_checkpoint` does, for tensors that come from elsewhere; names as in the module's text."""
    root.mkdir(parents=True, exist_ok=True)
    final = root / checkpoint_name(step)
    temporary = root / f"{TEMPORARY}{os.getpid()}-{final.name}"
    try:
        with no_space_is_a_user_error(final):
            temporary.mkdir()
            _save_tensors(model_tensors, temporary / MODEL)
            _save_tensors(optimizer_tensors, temporary / OPTIMIZER)
            files = {
                name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256_file(temporary / name)}
                for name in (MODEL, OPTIMIZER)
            }
            whole = {"format_version": CHECKPOINT_VERSION, "step": step, "files": files} | state
            (temporary / STATE).write_text(json.dumps(whole, indent=2) + "\n")
            for name in (MODEL, OPTIMIZER, STATE):
                fsync_file(temporary / name)
            fsync_dir(temporary)
        if final.exists():  # the same step, saved again after a restart: equal content
            _delete(final)
        temporary.rename(final)
        fsync_dir(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill model (and optimizer) from a checkpoint and return its state. Nothing is changed unless everything fits.

    Raises UserError for a damaged file, a newer format, or tensors of another architecture, naming the first few.
    """
    state = read_state(path)
    for name, wanted in state["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != wanted["bytes"] or sha256_file(file) != wanted["sha256"]:
            raise UserError(
                f"{file}: missing or damaged (not the bytes that {STATE} vouches for). "
                f"Delete {path} to resume from the checkpoint before it."
            )
    parameters = dict(model.named_parameters())
    tensors = load_file(path / MODEL)
    _check_fit(
        path / MODEL,
        {k: tuple(v.shape) for k, v in tensors.items()},
        {k: tuple(v.shape) for k, v in parameters.items()},
    )
    if optimizer is not None:
        _load_optimizer(path / OPTIMIZER, parameters, optimizer)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return state


def read_state(path: Path) -> dict[str, Any]:
    """state.json alone. Raises UserError when it is damaged or of a newer format."""
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        version = state["format_version"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(
            f"{path / STATE}: damaged ({error}). Delete {path} to resume from the one before it."
        ) from error
    if version != CHECKPOINT_VERSION:
        raise UserError(f"{path}: checkpoint format {version}; this release reads {CHECKPOINT_VERSION}. Update fvlm.")
    return state


def prune(root: Path, keep_last: int, milestones: tuple[int, ...]) -> list[Path]:
    """Delete all but the last `keep_last` checkpoints and the milestones. Returns what was deleted."""
    old = [path for path in checkpoints(root)[:-keep_last] if not is_milestone(step_of(path), milestones)]
    for path in old:
        _delete(path)
    return old


def _delete(path: Path) -> None:
    """Out of sight first: a half-deleted checkpoint must not look like one."""
    doomed = path.with_name(f"{TEMPORARY}{os.getpid()}-old-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def is_milestone(step: int, milestones: tuple[int, ...]) -> bool:
    """One of the steps named, or a multiple of the last."""
    return step in milestones or (bool(milestones) and step % milestones[-1] == 0)


def remove_leftovers(root: Path) -> None:
    """Delete what a killed writer left. Only the process that owns the run may call this."""
    for path in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except safetensors.SafetensorError as error:
        # safetensors wraps the operating system's error; unwrap the one that has a cure.
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else error from error


def random_generators() -> dict[str, torch.Tensor]:
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = random_generators()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    return tensors


def _load_optimizer(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors = load_file(path)
    torch.set_rng_state(tensors.pop("rng/torch"))
    cuda = tensors.pop("rng/cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        if name not in parameters or (kind != "step" and tensor.shape != parameters[name].shape):
            raise UserError(
                f"{path}: {key} {tuple(tensor.shape)} belongs to no parameter of this model; another architecture."
            )
        by_name.setdefault(name, {})[kind] = tensor
    index_of = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    trained = {name: index_of[id(p)] for name, p in parameters.items() if id(p) in index_of}
    if by_name.keys() != trained.keys():
        raise UserError(f"{path}: holds moments of {len(by_name)} parameters, the model trains {len(trained)}; "
                        f"they differ in {sorted(by_name.keys() ^ trained.keys())[:3]}.")  # fmt: skip
    packed = optimizer.state_dict()
    packed["state"] = {trained[name]: values for name, values in by_name.items()}
    optimizer.load_state_dict(packed)


def _check_fit(path: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - stored.keys()]
    problems += [f"{name}: not in this model" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name}: {stored[name]} in the checkpoint, {wanted[name]} in this model"
        for name in wanted.keys() & stored.keys()
        if stored[name] != wanted[name]
    ]
    if problems:
        raise UserError(
            f"{path}: a checkpoint of another architecture. {len(problems)} tensors do not fit, for example "
            f"{'; '.join(sorted(problems)[:3])}. Use the config the run began with, or another --run name."
        )
