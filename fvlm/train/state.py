"""Checkpoints: what one is made of, its check to the last byte, and its way into a model.

    step-00000500/
        model.safetensors      every parameter by name, float32, tied ones once
        optimizer.safetensors  AdamW's moments by parameter name ("exp_avg/NAME"), and random generators ("rng/...")
        state.json             step, what a run says of itself (run_state.py), and size and SHA-256 of the two above;
                               its last line holds the SHA-256 of every byte before that line

It is the same for any number of ranks, whether each has the whole model or a part. Nothing in it is a pickle. How it
gets to a disk or an object store whole or not at all: store.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fvlm.errors import StoreUnavailable, UserError
from fvlm.files import away_is_unavailable, is_away, sha256_file
from fvlm.train.tensor_file import TensorFile
from fvlm.train.tensor_parts import gathered, part_like

CHECKPOINT_VERSION = 2
"""1: without the last line, and without best values, W&B id and step, and world size. Still read."""
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
RNG_CPU, RNG_CUDA = "rng/torch", "rng/cuda"
"""The generators that exist. Nothing in a step draws from them today (the plan and the data have counters of their own,
and the models no dropout); NumPy's and Python's global ones are not used at all."""
REPLACED = "-old"
_NAME = re.compile(rf"step-(\d{{8}})({REPLACED})?")
_CHECKSUM = '  "sha256": "{}"\n}}\n'
_CHECKSUM_LENGTH = len(_CHECKSUM.format("0" * 64))


class DamagedCheckpoint(UserError):
    """The bytes of a checkpoint are not what was written; the one before it may do."""

    def __init__(self, path: Path, file: Path, what: str):
        super().__init__(f"{file}: missing or damaged ({what}). Delete {path} to resume from the checkpoint before it.")


# ---- names


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def is_checkpoint_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def step_of(checkpoint: Path | str) -> int:
    """Number of finished steps of a checkpoint, from its name."""
    match = _NAME.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ValueError(f"{checkpoint}: not the name of a checkpoint")
    return int(match[1])


def checkpoints(root: Path) -> list[Path]:
    """All whole checkpoints in the folder `root`, oldest first. Looks at names only."""
    if not root.is_dir():
        return []
    found = {path.name: path for path in root.iterdir() if is_checkpoint_name(path.name) and (path / STATE).is_file()}
    # One that is being replaced by a new one of its step counts until that is there.
    return [found[name] for name in sorted(found) if name.removesuffix(REPLACED) not in found.keys() - {name}]


# ---- what one is made of


@dataclass(frozen=True)
class Contents:
    """A checkpoint that is not written yet. The tensors must stay as they are until it is."""

    step: int
    model: Mapping[str, torch.Tensor]
    """Parameters by name, on the CPU."""
    optimizer: Mapping[str, torch.Tensor]
    """Moments and generators by the names in the module's text, on the CPU."""
    state: str
    """JSON of what the run says of itself: an object with any keys but "format_version", "step" and "files"."""
    progress: Callable[[], None] = lambda: None
    """Called whenever a few MB more are written or hashed."""

    @property
    def name(self) -> str:
        return checkpoint_name(self.step)

    def tensor_files(self) -> dict[str, TensorFile]:
        return {MODEL: TensorFile(self.model, self.progress), OPTIMIZER: TensorFile(self.optimizer, self.progress)}

    def state_file(self, files: Mapping[str, TensorFile]) -> bytes:
        """state.json, which vouches for `files`."""
        vouched = {name: {"bytes": file.size, "sha256": file.sha256()} for name, file in files.items()}
        head = {"format_version": CHECKPOINT_VERSION, "step": self.step, "files": vouched}
        body = json.dumps(head | json.loads(self.state), indent=2).removesuffix("\n}") + ",\n"
        return (body + _CHECKSUM.format(hashlib.sha256(body.encode()).hexdigest())).encode()


def state_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors that a step changes, where they lie: those of the model's file, and those of the optimizer's."""
    parameters = dict(model.named_parameters())
    moments = {
        f"{key}/{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {name: parameter.detach() for name, parameter in parameters.items()}, moments


def random_generators() -> dict[str, torch.Tensor]:
    """Copies of the generators' states; a GPU's where this process computes on one."""
    tensors = {RNG_CPU: torch.get_rng_state()}
    if torch.cuda.is_initialized():  # to ask otherwise would start CUDA in a process that only writes a checkpoint
        tensors[RNG_CUDA] = torch.cuda.get_rng_state()
    return tensors


def contents_of(step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Contents:
    """The checkpoint of this moment. On the CPU it shares memory with model and optimizer: write it before a step.

    With shards all ranks must make it together.
    """
    parameters, moments = state_tensors(model, optimizer)
    return Contents(
        step,
        {name: gathered(tensor).cpu() for name, tensor in parameters.items()},
        {name: gathered(tensor).cpu() for name, tensor in moments.items()} | random_generators(),
        json.dumps(state),
    )


# ---- the check


def verify(path: Path) -> dict[str, Any]:
    """The state of a checkpoint all of whose bytes are what was written.

    Raises DamagedCheckpoint, naming the file and what is wrong, and UserError for a newer format.
    """
    state = read_state(path)
    for name, wanted in state["files"].items():
        file = path / name
        with away_is_unavailable(file):
            if not file.is_file():
                raise DamagedCheckpoint(path, file, "it is not there")
            size = file.stat().st_size
        if size != wanted["bytes"]:
            raise DamagedCheckpoint(path, file, f"{size} bytes, {wanted['bytes']} were written")
        try:
            digest = sha256_file(file)
        except OSError as error:
            raise _unreadable(path, file, error) from error
        if digest != wanted["sha256"]:
            raise DamagedCheckpoint(path, file, f"its SHA-256 is not the one that {STATE} vouches for")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """state.json alone, checked. Raises DamagedCheckpoint, and UserError for a newer format."""
    file = path / STATE
    try:
        raw = file.read_bytes()
        state = json.loads(raw)
        version = state["format_version"]
    except OSError as error:
        raise _unreadable(path, file, error) from error
    except (ValueError, KeyError, TypeError) as error:  # a flipped byte may be no UTF-8: a ValueError
        raise DamagedCheckpoint(path, file, f"no whole JSON of a checkpoint: {error!r}") from error
    body, last = raw[:-_CHECKSUM_LENGTH], raw[-_CHECKSUM_LENGTH:]
    is_sealed = "sha256" in state or version == CHECKPOINT_VERSION
    if is_sealed and last != _CHECKSUM.format(hashlib.sha256(body).hexdigest()).encode():
        raise DamagedCheckpoint(path, file, "the SHA-256 in its last line is not that of the lines before")
    if version not in range(1, CHECKPOINT_VERSION + 1):
        raise UserError(
            f"{path}: checkpoint format {version}; this release reads 1 to {CHECKPOINT_VERSION}. Update fvlm."
        )
    state.pop("sha256", None)
    if not _vouches(state):
        raise DamagedCheckpoint(path, file, "its list of files is not one")
    if is_checkpoint_name(path.name) and state.get("step") != step_of(path):
        raise DamagedCheckpoint(path, file, f"it is of step {state.get('step')}; the folder was renamed")
    return state


def _unreadable(path: Path, file: Path, error: OSError) -> UserError | StoreUnavailable:
    """Missing, or on a bad sector: damaged. Forbidden, or on a network disk that is away: not, and the checkpoint
    before it would not do instead."""
    if is_away(error, file):
        return StoreUnavailable(f"{file}: the disk does not answer ({error.strerror}). Check the mount and its server.")
    if isinstance(error, PermissionError):
        return UserError(f"{file}: may not be read ({error.strerror}). Give this user the right to, and start again.")
    return DamagedCheckpoint(path, file, f"it cannot be read: {error.strerror}")


def _vouches(state: dict[str, Any]) -> bool:
    files = state.get("files")
    return (
        isinstance(files, dict)
        and files.keys() == {MODEL, OPTIMIZER}
        and all(isinstance(file, dict) and file.keys() == {"bytes", "sha256"} for file in files.values())
    )


# ---- its way into a model


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint that was verified and fits; nothing of the model has changed yet."""

    path: Path
    state: dict[str, Any]
    _model: tuple[dict[str, nn.Parameter], dict[str, torch.Tensor]]
    _optimizer: tuple[torch.optim.Optimizer, dict[str, Any]] | None
    _generators: dict[str, torch.Tensor]

    def apply(self) -> None:
        """Fill the model, the optimizer and the random generators."""
        parameters, tensors = self._model
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(part_like(tensors[name], parameter))
        if self._optimizer is None:
            return
        optimizer, packed = self._optimizer
        optimizer.load_state_dict(packed)
        torch.set_rng_state(self._generators[RNG_CPU])
        # A run may go on where there is a GPU, or none, other than before.
        if RNG_CUDA in self._generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._generators[RNG_CUDA])


def open_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> StoredCheckpoint:
    """Everything that can be wrong with `path`, for this model and optimizer, and no change to either.

    Raises DamagedCheckpoint; UserError for a newer format or tensors of another architecture, naming the first few.
    """
    state = verify(path)
    parameters = dict(model.named_parameters())
    tensors = load_file(path / MODEL)
    _check_fit(path / MODEL, tensors, parameters)
    if optimizer is None:
        return StoredCheckpoint(path, state, (parameters, tensors), None, {})
    stored = load_file(path / OPTIMIZER)
    generators = {name: stored.pop(name) for name in (RNG_CPU, RNG_CUDA) if name in stored}
    if RNG_CPU not in generators:
        raise UserError(f"{path / OPTIMIZER}: {RNG_CPU} is missing. This was not written by fvlm.")
    packed = _pack_moments(path / OPTIMIZER, stored, parameters, optimizer)
    return StoredCheckpoint(path, state, (parameters, tensors), (optimizer, packed), generators)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill model (and optimizer) from a checkpoint and return its state. Raises as `open_checkpoint` does."""
    stored = open_checkpoint(path, model, optimizer)
    stored.apply()
    return stored.state


def _pack_moments(
    path: Path, tensors: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes."""
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters or (kind != "step" and tensor.shape != parameters[name].shape):
            raise UserError(
                f"{path}: {key} {tuple(tensor.shape)} belongs to no parameter of this model; another architecture."
            )
        if kind not in MOMENTS or tensor.dtype != torch.float32:
            raise UserError(f"{path}: {key} ({tensor.dtype}) is none of AdamW's; they are {sorted(MOMENTS)}, float32.")
        by_name.setdefault(name, {})[kind] = tensor if kind == "step" else part_like(tensor, parameters[name])
    index_of = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    trained = {name: index_of[id(p)] for name, p in parameters.items() if id(p) in index_of}
    if by_name.keys() != trained.keys():
        raise UserError(f"{path}: holds moments of {len(by_name)} parameters, the model trains {len(trained)}; "
                        f"they differ in {sorted(by_name.keys() ^ trained.keys())[:3]}.")  # fmt: skip
    for name, moments in by_name.items():
        if moments.keys() != MOMENTS:
            raise UserError(f"{path}: {sorted(MOMENTS - moments.keys())[0]}/{name} is missing.")
    packed = optimizer.state_dict()
    packed["state"] = {trained[name]: moments for name, moments in by_name.items()}
    return packed


def _check_fit(path: Path, stored: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    def kind(tensor: torch.Tensor) -> str:
        return f"{tuple(tensor.shape)}{'' if tensor.dtype == torch.float32 else f' {tensor.dtype}'}"

    problems = [f"{name}: not in the checkpoint" for name in wanted.keys() - stored.keys()]
    problems += [f"{name}: not in this model" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name}: {kind(stored[name])} in the checkpoint, {kind(wanted[name])} in this model"
        for name in wanted.keys() & stored.keys()
        if kind(stored[name]) != kind(wanted[name])
    ]
    if problems:
        raise UserError(
            f"{path}: a checkpoint of another architecture. {len(problems)} tensors do not fit, for example "
            f"{'; '.join(sorted(problems)[:3])}. Use the config the run began with, or another --run name."
        )
