"""Is the step right on this GPU? python tests/benchmarks/gpu/parity.py [--help]. No Ray, no network, under two minutes.

    reference      losses and gradients of our step, eager and as CUDA graphs, against tests/reference.py in float64:
                   float32 without TF32, float32 with it, and bf16
    waits          whether the host waits for the GPU anywhere in a step (torch's sync debug mode, set to "error")
    memory         what `fvlm.train.memory.estimate` says of a step against the most that torch's allocator gave out
    deterministic  steps from the same weights on the same batches, twice, with `train.deterministic`: equal bits?

Prints a line for each figure with its bound; exit code 1 when one is beyond it. --json FILE has everything.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # works where fvlm is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "step"))
from chips import machine, synchronise
from compare import free
from reference import ReferenceModel, reference_losses
from transformers import AutoModel, AutoModelForCausalLM
from variants import OURS, base_model, build, latent_shape, make_config, random_batch, with_changes

from fvlm.config import Config
from fvlm.model.foveated import FoveatedVLM
from fvlm.train.memory import estimate
from fvlm.train.numerics import configure_numerics
from fvlm.train.step import make_losses

PARTS = ("reference", "waits", "memory", "deterministic")
VARIANTS = ("eager", "graphs")
BOUNDS = {"fp32": (1e-5, 1e-5), "tf32": (2e-3, 2e-2), "bf16": (2e-2, 1e-1)}
"""Relative, of each loss and of all gradients together. float32 rounds at 6e-8, TF32 products at 5e-4, bf16 at 4e-3."""
MEMORY_BOUND = 0.1
"""Of the estimate, by which the peak may be above it: `fvlm.train.spill.SPARE` leaves as much."""
STEPS = 6


@dataclasses.dataclass
class Checks:
    """Figures with their bounds, and whether all are kept."""

    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, what: str, value: float | bool | str, bound: float | bool | None = None, **more: Any) -> None:
        """A number must not exceed its bound; a bool must equal it; None bounds nothing."""
        kept = bound is None or (value == bound if isinstance(bound, bool) else float(value) <= bound)
        self.rows.append({"what": what, "value": value, "bound": bound, "kept": kept} | more)
        shown = f"{value:.2e}" if isinstance(value, float) else str(value)
        limit = "" if bound is None else f"  (bound {bound})"
        print(f"{'ok  ' if kept else 'FAIL'} {what}: {shown}{limit}", flush=True)

    @property
    def kept(self) -> bool:
        return all(row["kept"] for row in self.rows)


def reference_of(model: FoveatedVLM, device: torch.device) -> ReferenceModel:
    """The naive model with the same weights, in float64."""
    vision, language = (
        auto.from_config(copy.deepcopy(part.config), attn_implementation="eager")
        for auto, part in ((AutoModel, model.encoder.dino), (AutoModelForCausalLM, model.llm))
    )
    reference = ReferenceModel(vision, language, model.config.query_width, tuple(model.z_vae_init.shape[1:]))
    reference.load_state_dict(model.state_dict())
    return reference.double().to(device)


def gradients_of(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def check_reference(checks: Checks, config: Config, device: torch.device, variants: list[str]) -> None:
    base = base_model(config)
    batch = random_batch(config, device)
    objective = config.objective
    reference = reference_of(base, device)
    wanted = reference_losses(
        reference, batch, objective.fine_iterations, objective.lambda_recon, objective.caption_start, "batch"
    )
    exact = gradients_of(reference, wanted.loss)
    of_reference = [wanted.loss, wanted.caption_coarse, wanted.recon_coarse, *wanted.caption, *wanted.recon]
    losses_exact = [float(value.detach()) for value in of_reference]
    del reference, wanted, of_reference
    for precision in ("fp32", "tf32", "bf16"):
        for name in variants if precision != "tf32" else variants[:1]:
            changes = OURS[name] | {"train.precision": "bf16" if precision == "bf16" else "fp32"}
            got, gradients = _losses_and_gradients(with_changes(config, changes), base, batch, precision, device)
            of_losses, of_gradients = BOUNDS[precision]
            off = [abs(ours / theirs - 1) for ours, theirs in zip(got, losses_exact, strict=True)]
            checks.add(f"{precision} {name}: losses, the furthest off", max(off), of_losses, losses=got)
            errors = {key: _relative(gradients[key], exact[key]) for key in gradients if not is_key_bias(key)}
            worst = max(errors, key=errors.__getitem__)
            total = _relative(
                *(torch.cat([g[key].flatten().double() for key in sorted(g)]) for g in (gradients, exact))
            )
            checks.add(
                f"{precision} {name}: gradients, together", total, of_gradients, worst_tensor=worst, worst=errors[worst]
            )
            torch._dynamo.reset()
    checks.add("as many gradients as the reference has", gradients.keys() == exact.keys(), True)


def _losses_and_gradients(
    config: Config, base: FoveatedVLM, batch: Any, precision: str, device: torch.device
) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    model = copy.deepcopy(base).to(device)
    losses_of = make_losses(config, model)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        if config.train.cuda_graphs == "on":  # recorded the second time
            losses_of(model, batch, config.objective, readings=True).loss.backward()
        losses = losses_of(model, batch, config.objective, readings=True)
    gradients = gradients_of(model, losses.loss)
    values = [losses.loss, losses.caption_coarse, losses.recon_coarse, *losses.caption, *losses.recon]
    return [float(value.detach()) for value in values if value is not None], gradients


def is_key_bias(name: str) -> bool:
    """Of DINOv2's keys: softmax does not see them, so their true gradient is zero and what is computed is rounding."""
    return name.endswith(("attention.k_proj.bias", "attention.key.bias"))


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check_waits(checks: Checks, config: Config, device: torch.device, variants: list[str]) -> None:
    """On a CPU nobody can wait; the steps run all the same."""
    base, batch = base_model(config), random_batch(config, device)
    for name in variants:
        variant = build(name, "bf16", config, base, device)
        for step in (variant.plain, variant.reading):
            step(batch), step(batch)
        synchronise(device)
        told = "no"
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for step in (variant.plain, variant.reading):
                step(batch)
        except RuntimeError as error:
            told = str(error).splitlines()[0]
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        checks.add(f"{name}: the host waits for the GPU within a step", told != "no", False, told=told)


def check_memory(checks: Checks, config: Config, device: torch.device, variants: list[str]) -> None:
    batch, base = random_batch(config, device), base_model(config)
    half = batch.caption_ids.shape[1] // 2
    shorter = dataclasses.replace(batch, caption_ids=batch.caption_ids[:, :half], labels=batch.labels[:, :half])
    for memory in ("speed", "balanced", "small"):
        changed = with_changes(config, {"train.memory": memory})
        need = estimate(changed, latent_shape(changed), changed.data.global_batch)
        if device.type != "cuda":
            checks.add(f"{memory}: estimated GB", need.peak / 1e9)
            continue
        for name in variants:
            free(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device) - sum(t.nbytes for t in batch.tensors())
            variant = build(name, "bf16", changed, base, device)
            for one, step in itertools.product((batch, shorter), (variant.reading, variant.plain, variant.plain)):
                step(one)
            synchronise(device)
            peak = torch.cuda.max_memory_allocated(device) - before
            reserved = torch.cuda.max_memory_reserved(device)
            checks.add(
                f"{memory}, {name}: peak {peak / 1e9:.2f} GB above the estimated {need.peak / 1e9:.2f} GB",
                peak / need.peak - 1,
                MEMORY_BOUND if name == "eager" else None,
                peak_gb=peak / 1e9, estimate_gb=need.peak / 1e9, reserved_gb=reserved / 1e9,
            )  # fmt: skip
            del variant
            torch._dynamo.reset()


def check_deterministic(checks: Checks, config: Config, device: torch.device, variants: list[str]) -> None:
    """Last: the setting stays for the process."""
    config = with_changes(config, {"train.deterministic": True})
    configure_numerics(config, device)
    base = base_model(config)
    batches = [random_batch(config, device, seed) for seed in range(STEPS)]
    for name in variants:
        runs, seconds = [], []
        for _ in range(2):
            torch._dynamo.reset()
            variant = build(name, "bf16", config, base, device)
            variant.number(batches[0], 0)
            synchronise(device)
            begin = time.perf_counter()
            rows = [variant.number(batch, number)["train/loss"] for number, batch in enumerate(batches)]
            synchronise(device)
            seconds.append((time.perf_counter() - begin) / STEPS)
            weights = [float(p.detach().double().sum()) for p in _parameters(variant.step)]
            runs.append([float(row) for row in rows] + weights)
        equal = runs[0] == runs[1]
        checks.add(f"{name}: two runs of {STEPS} steps have the same bits", equal, True, ms=1e3 * min(seconds))


def _parameters(step: Any) -> Iterator[torch.Tensor]:
    yield from step.model.parameters()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="joint_multifine")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--variants", help=f"default on a GPU {','.join(VARIANTS)}, on a CPU eager")
    parser.add_argument("--batch", type=int, default=2, help="clips for the reference (the other parts: the preset's)")
    parser.add_argument("--layers", type=int, help="of both transformers, for a quick look")
    parser.add_argument("--size", type=int, help="side of a frame")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    variants = (args.variants or ("eager" if device.type == "cpu" else ",".join(VARIANTS))).split(",")
    changes = {"data.frame_size": args.size, "data.num_frames": args.frames}
    config = make_config(args.preset, args.layers, **changes)
    small = with_changes(config, {"data.global_batch": args.batch})
    if device.type == "cpu":
        config = small
    checks, seconds = Checks(), {}
    calls: dict[str, Callable[[], None]] = {
        "reference": lambda: check_reference(checks, small, device, variants),
        "waits": lambda: check_waits(checks, config, device, variants),
        "memory": lambda: check_memory(checks, config, device, variants),
        "deterministic": lambda: check_deterministic(checks, config, device, variants),
    }
    for part in args.parts.split(","):
        begin = time.monotonic()
        print(part, flush=True)
        try:
            calls[part]()
        except RuntimeError as error:  # the other parts' figures are worth having
            checks.add(f"{part} ran", str(error).splitlines()[0][:300], True)
        seconds[part] = time.monotonic() - begin
        if args.json:
            result = {"bench": "parity", "machine": machine(device), "preset": args.preset, "seconds": seconds}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result | {"batch": args.batch, "checks": checks.rows}, indent=1))
    return 0 if checks.kept else 1


if __name__ == "__main__":
    sys.exit(main())
