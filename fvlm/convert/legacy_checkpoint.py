"""Take over a run of the earlier trainer: its `latest.pt` becomes a checkpoint of ours.

    python -m fvlm.convert.legacy_checkpoint latest.pt --out DIR     # a look, without training
    python -m ray_jobs.train PRESET --import-checkpoint latest.pt    # the first start of a run

Every key of the file goes somewhere that the printed table names; a key that maps to nothing, a missing one, or a wrong
shape is an error. Nothing is guessed, and no code in the file is run.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch.serialization import safe_globals

from fvlm import presets
from fvlm.config import Config
from fvlm.data.latents import require_sd_vae_latents
from fvlm.data.plan import Plan
from fvlm.data.schema import Manifest
from fvlm.entry_point import run_command
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.hub import Architecture, build_model, kept_architecture
from fvlm.train.metrics import RATIOS, Metrics
from fvlm.train.optim import freeze_unreached
from fvlm.train.run_state import RunState
from fvlm.train.state import Contents, random_generators
from fvlm.train.store import CheckpointStore, LocalStore

# DINOv2 as transformers 4 named it -> as transformers 5 does. Everything else kept its name.
_RENAMED = (
    (re.compile(r"^(encoder\.dino\.encoder\.layer\.\d+\.attention)\.attention\.(query|key|value)\."), ("q", "k", "v")),
    (re.compile(r"^(encoder\.dino\.encoder\.layer\.\d+\.attention)\.output\.dense\."), ("o",)),
)
TIED, EMBEDDINGS = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
BUFFERS = ("encoder._dummy",)
TOP_LEVEL = {
    "step", "epoch", "model_state_dict", "optimizer_state_dict", "scaler_state_dict", "scheduler_state_dict", "metrics",
    "config", "timestamp",
}  # fmt: skip
SECTIONS = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "metrics", "config")
METRICS = {"cap_ratio": "caption/ratio_avg", "rec_ratio": "recon/ratio_avg"}
SETTINGS = {
    "num_frames": "data.num_frames",
    "batch_size": "data.global_batch",
    "learning_rate": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "warmup_steps": "optim.warmup_steps",
    "grad_clip": "optim.grad_clip",
    "lambda_recon": "objective.lambda_recon",
    "fine_iterations": "objective.fine_iterations",
    "deep_query": "model.deep_query",
}
"""Keys of the earlier trainer's config that decide the experiment, and ours that say the same."""
FIXED = {"grad_accum": 1, "lambda_coarse": 0.0}
"""Settings of its that have one value here."""
_MAKE_SCALAR: Any = np.float64().__reduce__()[0]
NUMBERS: list[Any] = [
    np.dtype,
    *((_MAKE_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # NumPy 1, NumPy 2
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
]
"""What a pickle may call besides tensors: its averages are NumPy's numbers. These make numbers and nothing else."""


@dataclass(frozen=True)
class LegacyCheckpoint:
    """An imported run. Tensors are views into the file, which is mapped, not loaded."""

    step: int
    """Finished steps; also the number of the next one."""
    model: dict[str, torch.Tensor]
    """By our parameter names."""
    optimizer: dict[str, torch.Tensor]
    """"exp_avg/NAME", "exp_avg_sq/NAME", "step/NAME", as our checkpoints hold them."""
    metrics: dict[str, float]
    """What people watched, by the names we log it under."""
    table: list[tuple[str, str]]
    """Every key of the file, and where it went."""
    differences: list[str]
    """Settings in which the file's run and ours differ."""

    def describe(self, path: Path) -> str:
        """The table of all keys, and what differs."""
        width = max(len(key) for key, _ in self.table)
        lines = [f"{path}: {self.step} steps, {len(self.model)} tensors, {len(self.table)} keys:"]
        lines += [f"  {key:<{width}}  {where}" for key, where in self.table]
        lines.append(
            f"A fresh epoch of this trainer's order begins at step {self.step}; the data's old order is not kept."
        )
        lines += [f"NOTE: another setting than the imported run's: {difference}" for difference in self.differences]
        return "\n".join(lines)


def read_legacy_checkpoint(path: Path, model: FoveatedVLM, config: Config) -> LegacyCheckpoint:
    """Read `path` for a model of this architecture, which may be on the meta device: only names and shapes count.

    Parameters that `config` does not train must be switched off in `model` (`freeze_unreached`). Raises UserError,
    naming file, key and reason.
    """
    raw = _load(path)
    table: list[tuple[str, str]] = []
    names = _map_model(path, raw["model_state_dict"], model, table)
    optimizer = _map_optimizer(path, raw["optimizer_state_dict"], list(names), model, table)
    differences = _compare_optimizer(raw["optimizer_state_dict"]["param_groups"], config, table)
    differences += _compare_settings(raw["config"], config, table)
    step = _step(path, raw, table)
    metrics = {METRICS[key]: float(value) for key, value in raw["metrics"].items() if key in METRICS}
    for key in raw["metrics"]:
        table.append((f"metrics.{key}", METRICS.get(key, "not kept: not a metric of ours")))
    table += [
        ("epoch", "not kept: the earlier trainer has no position in its data; a fresh epoch begins"),
        ("scaler_state_dict", "not kept: bf16 needs no loss scaler"),
        ("timestamp", "not kept"),
    ]
    stored = raw["model_state_dict"]
    return LegacyCheckpoint(
        step, {ours: stored[theirs] for ours, theirs in names.items()}, optimizer, metrics, table, differences
    )  # fmt: skip


def import_run(path: Path, config: Config, manifest: Manifest, store: CheckpointStore) -> str:
    """Begin a run from `path`: write its state to `store`, print where every key went, and return the name.

    The plan starts a fresh epoch at the imported step. Weights and moments go from file to file, never all in memory.
    """
    require_sd_vae_latents(manifest.spec, manifest.where, str(path))
    skeleton = _skeleton(config, manifest.spec.latent_shape, kept_architecture(config))
    legacy = read_legacy_checkpoint(path, skeleton, config)
    print(legacy.describe(path), flush=True)
    plan = Plan.of_config(manifest, config, origin=legacy.step)
    metrics = Metrics(config.train.ratio_window)
    metrics.load_state_dict({"windows": {name: [] for name in RATIOS}, "latest": legacy.metrics, "best": {}})
    state = RunState.of(config, plan, metrics.state_dict(), trained_s=0.0, step=legacy.step)
    return _write(legacy, store, config.train.seed, state.to_dict())


def _skeleton(
    config: Config, latent_shape: tuple[int, int, int], architecture: Architecture | None = None
) -> FoveatedVLM:
    """Names, shapes and order of the model's parameters, without memory for them."""
    with torch.device("meta"):
        model = build_model(config.model, latent_shape, config.train.seed, False, architecture)
    freeze_unreached(model, config)
    return model


def _write(legacy: LegacyCheckpoint, store: CheckpointStore, seed: int, state: dict[str, Any]) -> str:
    torch.manual_seed(seed)  # the file has no random state; nothing in a step draws from it
    moments = legacy.optimizer | random_generators()
    contents = Contents(legacy.step, legacy.model, moments, json.dumps(state))
    store.write(contents)
    return contents.name


def our_name(key: str) -> str:
    """The name that a key of the earlier trainer's model has here."""
    for pattern, heads in _RENAMED:
        match = pattern.match(key)
        if match:
            head = heads[0] if len(heads) == 1 else match[2][0]  # query -> q, key -> k, value -> v
            return f"{match[1]}.{head}_proj.{key[match.end() :]}"
    return key


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--import-checkpoint {path}: no such file.")
    try:
        with safe_globals(NUMBERS):
            raw = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own words would have people load it with weights_only=False.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path}: refused; loading it would run code that is not plain weights "
            f"({found[1] if found else 'not a pickle of tensors'}). Nothing in it was run."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read; cut short or damaged ({str(error).splitlines()[0]}).") from error
    keys = set(raw) if isinstance(raw, dict) else set()
    if keys != TOP_LEVEL:
        raise UserError(
            f"{path}: not a checkpoint of the earlier trainer: missing keys {sorted(TOP_LEVEL - keys)}, "
            f"unknown keys {sorted(map(str, keys - TOP_LEVEL))}."
        )
    for key in SECTIONS:
        if not isinstance(raw[key], dict):
            raise UserError(f"{path}: {key} is a {type(raw[key]).__name__}; the earlier trainer writes a dict.")
    return raw


def _map_model(
    path: Path, stored: dict[str, torch.Tensor], model: FoveatedVLM, table: list[tuple[str, str]]
) -> dict[str, str]:
    """{our name: their key}, in the file's order."""
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names: dict[str, str] = {}
    for key, tensor in stored.items():
        if key in BUFFERS:
            table.append((key, "not kept: a buffer that held nothing"))
        elif key == TIED and TIED not in wanted:
            if EMBEDDINGS not in stored or not torch.equal(tensor, stored[EMBEDDINGS]):
                raise UserError(
                    f"{path}: {TIED} is not the same as {EMBEDDINGS}, but this language model ties the two."
                )
            table.append((key, f"tied to {EMBEDDINGS}; equal, kept once"))
        else:
            name = our_name(key)
            if name not in wanted:
                raise UserError(f"{path}: {key} maps to {name}, which this model does not have: another architecture.")
            if name in names:
                raise UserError(f"{path}: {names[name]} and {key} both map to {name}.")
            if tuple(tensor.shape) != wanted[name]:
                raise UserError(f"{path}: {key} is {tuple(tensor.shape)}, but {name} of this model is {wanted[name]}.")
            names[name] = key
            table.append((key, name))
    missing = [name for name in wanted if name not in names]
    if missing:
        raise UserError(f"{path}: lacks {len(missing)} tensors of this model, for example {missing[:3]}.")
    # The optimiser counts parameters by position; a file in another order would hand moments to the wrong ones.
    if list(names) != list(wanted):
        first = next(theirs for theirs, ours in zip(names, wanted, strict=True) if theirs != ours)
        raise UserError(f"{path}: its keys are not in the order of the model's parameters (from {first} on).")
    return names


def _map_optimizer(
    path: Path, stored: dict[str, Any], order: list[str], model: FoveatedVLM, table: list[tuple[str, str]]
) -> dict[str, torch.Tensor]:
    """Moments by our names. The file counts parameters by position in `order`."""
    if not {"param_groups", "state"} <= stored.keys():
        raise UserError(f"{path}: optimizer_state_dict has the keys {sorted(stored)}; param_groups and state are due.")
    groups, states = stored["param_groups"], stored["state"]
    positions = [position for group in groups for position in group["params"]]
    if positions != list(range(len(order))):
        raise UserError(
            f"{path}: the optimizer has {len(positions)} parameters in {len(groups)} groups, the model {len(order)}."
        )
    unknown = [index for index in states if index not in range(len(order))]
    if unknown:
        raise UserError(f"{path}: optimizer_state_dict.state has the indices {unknown[:3]}, which are no parameters.")
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for index, name in enumerate(order):
        trained, state = parameters[name].requires_grad, states.get(index)
        if trained != (state is not None):
            raise UserError(
                f"{path}: optimizer state {index} ({name}) is {'missing' if trained else 'there'}, but this config "
                f"{'trains' if trained else 'does not train'} that parameter. Check --objective.caption-start and "
                "--model.train-vision against the run that wrote the file."
            )
        if state is None:
            table.append((f"optimizer {index}", f"{name}: never had a gradient, has no moments"))
            continue
        if set(state) != {"step", "exp_avg", "exp_avg_sq"}:
            raise UserError(f"{path}: optimizer state {index} ({name}) has the keys {sorted(state)}; not AdamW's.")
        for kind in ("exp_avg", "exp_avg_sq"):
            if state[kind].shape != parameters[name].shape:
                raise UserError(
                    f"{path}: optimizer state {index}.{kind} is {tuple(state[kind].shape)}, but {name} is "
                    f"{tuple(parameters[name].shape)}."
                )
        tensors |= {f"{kind}/{name}": value for kind, value in state.items()}
        table.append((f"optimizer {index}", f"moments of {name}"))
    return tensors


def _step(path: Path, raw: dict[str, Any], table: list[tuple[str, str]]) -> int:
    step, scheduler = int(raw["step"]), raw["scheduler_state_dict"]
    if scheduler.get("last_epoch") != step:
        raise UserError(
            f"{path}: step is {step}, but scheduler_state_dict.last_epoch is {scheduler.get('last_epoch')}; "
            "the file is of two minds about where the run stands."
        )
    table.append(("step", f"{step} finished steps; the run goes on with step number {step}"))
    table.append(("scheduler_state_dict", f"learning rate of step {step}: a function of the step here"))
    return step


def _compare_optimizer(groups: list[dict[str, Any]], config: Config, table: list[tuple[str, str]]) -> list[str]:
    optim = config.optim
    ours = {"betas": (optim.beta1, optim.beta2), "eps": optim.eps, "weight_decay": optim.weight_decay}
    differences = []
    for number, group in enumerate(groups):
        for key in group:
            if key != "params":  # the indices: each has a line already
                where = "compared with our optim settings" if key in ours else "not kept: see ours"
                table.append((f"optimizer group {number}.{key}", where))
        for key, value in ours.items():
            theirs = group.get(key, value)
            if (tuple(theirs) if key == "betas" else theirs) != value:
                differences.append(f"optimizer group {number}.{key}: {theirs!r} there, {value!r} here")
    return differences


def _compare_settings(theirs: dict[str, Any], config: Config, table: list[tuple[str, str]]) -> list[str]:
    differences = []
    compared = SETTINGS | {key: f"{value!r}, the only value here" for key, value in FIXED.items()}
    for key in theirs:
        table.append((f"config.{key}", f"compared with {compared[key]}" if key in compared else "not kept: see ours"))
    for key, ours in SETTINGS.items():
        section, name = ours.split(".")
        value = getattr(getattr(config, section), name)
        if key in theirs and theirs[key] != value:
            differences.append(f"{ours}: {theirs[key]!r} there, {value!r} here")
    for key, value in FIXED.items():
        if theirs.get(key, value) != value:
            differences.append(f"{key}: {theirs[key]!r} there; this trainer has only {value!r}")
    return differences


@dataclass(frozen=True)
class Look:
    """Show what a checkpoint of the earlier trainer holds, and write it in our format."""

    checkpoint: tyro.conf.Positional[Path]
    out: Path
    """Folder in which the checkpoint's folder is made."""
    config: Config
    """The run it would become."""


def main() -> None:
    look = tyro.cli(Look, default=Look(tyro.MISSING, tyro.MISSING, presets.joint_multifine()), description=__doc__)
    raw = _load(look.checkpoint)
    if "z_vae_init" not in raw["model_state_dict"]:
        raise UserError(f"{look.checkpoint}: lacks z_vae_init, the tensor that tells the shape of a latent.")
    latent_shape = tuple(raw["model_state_dict"]["z_vae_init"].shape[1:])
    legacy = read_legacy_checkpoint(look.checkpoint, _skeleton(look.config, latent_shape), look.config)
    print(legacy.describe(look.checkpoint))
    name = _write(legacy, LocalStore(look.out), look.config.train.seed, {"config": look.config.to_dict()})
    print(f"written: {look.out / name}")


if __name__ == "__main__":
    run_command(main)
