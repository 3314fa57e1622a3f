"""What a step needs of a device's memory, known before the first one; and what to do when it is not there."""

from __future__ import annotations

import dataclasses
import itertools
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fvlm.batch import Batch
from fvlm.config import Config, ScaleConfig
from fvlm.data.text import padded_lengths
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.hub import build_model, kept_architecture
from fvlm.ranks import as_one_rank, world_size
from fvlm.train.device import synchronise
from fvlm.train.gpu_memory import free_gpu_memory
from fvlm.train.optim import allocate_moments, freeze_unreached, make_optimizer
from fvlm.train.parallel import BUCKET_ELEMENTS
from fvlm.train.run_folder import CONFIG, read_began
from fvlm.train.spill import usable
from fvlm.train.step import RECOMPUTED, Step, compile_kind

GB = 1e9
MOST_CLIPS = 4096


@dataclass(frozen=True)
class Need:
    """Bytes of one rank. `peak` is the most that lives at once in a step, all the others included."""

    weights: int
    optimizer: int
    gradients: int
    peak: int

    @property
    def activations(self) -> int:
        """What the step itself adds, less the gradients (not all of which live when most of it does)."""
        return self.peak - self.weights - self.optimizer - self.gradients

    def __str__(self) -> str:
        return (
            f"{self.peak / GB:.1f} GB (weights {self.weights / GB:.1f}, gradients {self.gradients / GB:.1f}, "
            f"optimizer {self.optimizer / GB:.1f}, activations and workspace {self.activations / GB:.1f})"
        )


def estimate(config: Config, latent_shape: tuple[int, int, int], clips: int) -> Need:
    """Of a step with readings on `clips` clips a rank, not compiled: a compiled one keeps less. Takes seconds.

    The step is run for real, but on tensors that have shapes and no contents (torch's fake tensors); what lives is
    counted. Attention counts as a fused kernel. Of several ranks each has a bucket of gradients twice, and with
    `scale.strategy` "shard" less of the weights and moments; gradients count whole, see `shard_decoder`. Does not
    communicate, so any rank may ask at any time.
    """
    graphs = config.train.cuda_graphs
    recorded = graphs == "on" or (graphs == "auto" and config.scale.workers == 1)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, init="random"),
        train=dataclasses.replace(config.train, compile="off", cuda_graphs="off"),
    )
    with torch.device("meta"):
        model = build_model(config.model, latent_shape, seed=0, architecture=kept_architecture(config))
    # A rank alone: what several add is counted in `of_one_rank`, and real sums of fake tensors cannot be had.
    with as_one_rank(), FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        model.llm.tie_weights()  # which empty tensors are no longer
        freeze_unreached(model, config)
        optimizer = make_optimizer(model, config.optim)
        batch = mock_batch(config, latent_shape, clips, model.llm.config.vocab_size)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = sum(p.untyped_storage().nbytes() for p in trained)
        live = LiveBytes()
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            live.add(tensor)
        weights = live.now
        step = Step(config, model, optimizer)
        with live:
            allocate_moments(optimizer)
            optimizer_state = live.now - weights
            live.peak = live.now
            step(batch, 0)
    # Every caption length that is recorded keeps gradients of its own.
    lengths = len(padded_lengths(config.data.max_caption_tokens)) if recorded else 1
    need = Need(weights, optimizer_state, gradients, live.peak + (lengths - 1) * gradients)
    return of_one_rank(need, model, config.scale) if config.scale.workers > 1 else need


def of_one_rank(need: Need, model: FoveatedVLM, scale: ScaleConfig) -> Need:
    """One rank's part of `need`, which is that of a rank alone."""
    layers = [0]
    if scale.strategy == "shard":
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in model.llm.model.layers]
    elsewhere = sum(layers) * (scale.workers - 1) // scale.workers
    moments = 2 * elsewhere  # AdamW's
    gathered = 2 * max(layers)  # one runs, the next one is on its way
    bucket = min(need.gradients - sum(layers), BUCKET_ELEMENTS * 4)
    return dataclasses.replace(
        need,
        weights=need.weights - elsewhere,
        optimizer=need.optimizer - moments,
        peak=need.peak - elsewhere - moments + gathered + bucket,
    )


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made, or that were added, and that still live; and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


def mock_batch(
    config: Config,
    latent_shape: tuple[int, int, int],
    clips: int,
    vocabulary: int,
    tokens: int | None = None,
    latent_dtype: torch.dtype = torch.float16,
) -> Batch:
    """Grey frames, and captions of so many tokens: without a number, of the most that a run can meet."""
    data = config.data
    ids = torch.arange(clips * (tokens or data.max_caption_tokens)).view(clips, -1) % vocabulary
    frames = torch.full((clips, data.num_frames, data.frame_size, data.frame_size, 3), 127, dtype=torch.uint8)
    latents = torch.zeros(clips, data.num_frames, *latent_shape, dtype=latent_dtype)
    return Batch(frames, latents, ids, ids.clone(), ("mock",) * clips)


def settle_memory(config: Config, latent_shape: tuple[int, int, int], device: torch.device) -> Config:
    """`train.memory` "auto" -> the fastest way that fits into what is free on every rank's GPU; "speed" on a CPU."""
    if config.train.memory != "auto":
        return config
    modes = list(RECOMPUTED)
    choice = 0
    if device.type == "cuda":
        free, clips = usable(torch.cuda.mem_get_info(device)[0]), clips_of_a_rank(config)
        while choice < len(modes) - 1 and estimate(with_memory(config, modes[choice]), latent_shape, clips).peak > free:
            choice += 1
        if world_size() > 1:
            furthest = torch.tensor(choice, device=device)
            dist.all_reduce(furthest, dist.ReduceOp.MAX)
            choice = int(furthest)
    return with_memory(config, modes[choice])


def with_memory(config: Config, mode: str) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, memory=mode))  # type: ignore[arg-type]


def clips_of_a_rank(config: Config) -> int:
    return config.data.global_batch // config.scale.workers


def mock_step(
    step: Step, latent_shape: tuple[int, int, int], tokens: int, readings: bool, latent_dtype: torch.dtype
) -> None:
    """Forward and backward of a mock batch. Changes nothing. All ranks do it together."""
    config, model, device = step.config, step.model, step.model.q_static.device
    clips, vocabulary = clips_of_a_rank(config), model.llm.config.vocab_size
    batch = mock_batch(config, latent_shape, clips, vocabulary, tokens, latent_dtype).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        losses = step.losses_of(model, batch, config.objective, readings)
    step.average.backward(losses.loss)
    model.zero_grad(set_to_none=True)


def mock_step_seconds(step: Step, latent_shape: tuple[int, int, int], latent_dtype: torch.dtype) -> float:
    """Of one more mock step after `warm_up`, of the longest captions. All ranks do it together."""
    device, tokens = step.model.q_static.device, step.config.data.max_caption_tokens
    synchronise(device)
    begin = time.perf_counter()
    mock_step(step, latent_shape, tokens, readings=False, latent_dtype=latent_dtype)
    synchronise(device)
    return time.perf_counter() - begin


def warm_up(step: Step, latent_shape: tuple[int, int, int], latent_dtype: torch.dtype = torch.float16) -> str:
    """Forward and backward of mock batches of every shape, with readings and without: what is to be compiled or
    recorded is, and too little memory shows now. AdamW's moments are there from now on, as zeros; nothing else changes.
    All ranks do it together. Returns a line. Raises UserError.

    latent_dtype: the dataset's, for a program that was compiled for another is compiled anew
    """
    config, device = step.config, step.model.q_static.device
    try:
        allocate_moments(step.optimizer)
        # All lengths with readings, then all without: the second time a length is met its step is recorded.
        for readings, tokens in itertools.product((True, False), padded_lengths(config.data.max_caption_tokens)):
            mock_step(step, latent_shape, tokens, readings, latent_dtype)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, "a mock step, before the first one", config, latent_shape) from error
    line = f"a mock step has passed (train.compile {compile_kind(config, device)}, train.memory {config.train.memory})"
    if device.type != "cuda":
        return line
    peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    reserved = torch.cuda.max_memory_reserved(device)  # a recording keeps its own between replays
    return (
        f"{line}: {peak / GB:.1f} GB at its peak, {reserved / GB:.1f} taken from {total / GB:.1f} GB, "
        "AdamW's moments included"
    ) + (f". Steps are launched kernel by kernel: {step.refusal}" if step.refusal else "")


def out_of_memory(
    error: torch.OutOfMemoryError, phase: str, config: Config, latent_shape: tuple[int, int, int]
) -> UserError:
    """The error with what was asked for, what would fit, and what to change. Checkpoints are not touched."""
    asked = str(error).removeprefix("CUDA out of memory. ").split(". ")[0]
    clips = clips_of_a_rank(config)
    lines = f"out of GPU memory in {phase}, with {clips} clips a rank: {asked}. "
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        fits = largest_batch(config, latent_shape, usable(free))
        lines += f"About {fits} clips a rank would fit into the {free / GB:.1f} GB that are free for it. "
    return UserError(
        lines + f"Try --train.memory small (now {config.train.memory}), more ranks (--scale.workers), or, as another "
        f"experiment, a smaller --data.global-batch (now {config.data.global_batch}). The last checkpoint is whole."
    )


def largest_batch(config: Config, latent_shape: tuple[int, int, int], free: int) -> int:
    """The most clips a rank whose step is estimated to fit into `free` bytes; 0 for none. Takes a minute."""
    fits, need = 0, 0
    clips, more = 1, estimate(config, latent_shape, 1).peak
    while more <= free and clips < MOST_CLIPS:
        fits, need = clips, more
        clips, more = 2 * clips, estimate(config, latent_shape, 2 * clips).peak
    if more <= free or fits == 0:
        return fits if more > free else clips
    between = fits + int((clips - fits) * (free - need) / (more - need))  # evenly, once clips outweigh all else
    while between > fits and estimate(config, latent_shape, between).peak > free:
        between -= 1
    return between


def settle_batch(config: Config, latent_shape: tuple[int, int, int]) -> Config:
    """`data.global_batch` 0 -> what the run began with; for a new run the most, in whole lanes, that fits this GPU.

    Raises UserError without a GPU here, and when it has no room for a clip of every lane. Leaves CUDA alone in this
    process: the one that starts a run has no use for it, and its context would take memory from the first rank.
    """
    data, ranks = config.data, config.scale.workers
    if data.global_batch:
        return config
    if (config.run_dir / CONFIG).exists():
        clips = int(read_began(config.run_dir)["config"]["data"]["global_batch"])
    elif (free := free_gpu_memory()) is None:
        raise UserError("--data.global-batch 0 asks for what fits the GPU, and this machine has none. Give a number.")
    else:
        settled = with_memory(config, "balanced") if config.train.memory == "auto" else config
        free = usable(free)
        clips = largest_batch(settled, latent_shape, free) * ranks // data.lanes * data.lanes
        if clips == 0:
            raise UserError(
                f"--data.global-batch 0: {free / GB:.1f} GB of GPU memory do not hold {data.lanes // ranks} clips a "
                "rank, one of every lane. Use --train.memory small, more ranks, or fewer --data.lanes "
                f"(now {data.lanes})."
            )
    return dataclasses.replace(config, data=dataclasses.replace(data, global_batch=clips))
