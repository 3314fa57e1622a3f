"""Every value that a run depends on. Frozen, validated, printed and stored whole.

Presets (`fvlm.presets`) return a full `Config`; the command line overrides single keys (`--optim.lr 1e-4`).
`IDENTITY` names what makes a run that run: a run folder refuses to go on when one of these has changed.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from fvlm.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """Architecture. Names are Hugging Face hub names, local folders, or keys of `fvlm.model.hub.ARCHITECTURES`."""

    vision: str = "facebook/dinov2-small"
    """A DINOv2."""
    language: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A causal language model of the Llama family."""
    init: Literal["hub", "random"] = "hub"
    """"hub": pretrained weights by name. "random": the same architecture from its config, nothing is downloaded."""
    query_width: int = 384
    """Q: width of the query vectors."""
    deep_query: bool = True
    """The query passes through every encoder layer. False: one attention on the final features (ablation only)."""
    visual_norm: Literal["batch", "token", "none"] = "batch"
    """What a visual token is divided by: the std of the whole global batch, its own, or nothing."""
    train_vision: bool = True
    """False freezes DINOv2 (not the query projections)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    fine_iterations: int = 2
    """Refinements after the coarse pass; the last one is trained on."""
    lambda_recon: float = 0.5
    """Weight of the reconstruction loss."""
    coarse_every: int = 10
    """Every so many steps the coarse and the earlier fine losses are read too, without gradient."""
    caption_start: bool = True
    """Put `video_end_token` before the caption and train every caption token. False: tokens 2..L, no such token."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """A prepared dataset: a folder, s3://bucket/path or gs://bucket/path."""
    num_frames: int = 8
    """T: frames used a clip, at even steps among the stored ones."""
    frame_size: int = 256
    """Side of a frame in pixels; must be what the dataset holds."""
    global_batch: int = 16
    """G: clips in one optimizer step, over all ranks. 0: as many as fit into the GPU of the machine that starts the run
    (times the ranks), found once, when the run begins, and kept in its config.json."""
    lanes: int = 16
    """C: canonical streams. The number of ranks must divide it; it must divide `global_batch`."""
    window_steps: int = 8
    """Rows are shuffled inside windows of so many steps of a lane; also the steps that one ingest task prepares."""
    max_caption_tokens: int = 64
    """Longer captions are cut, counted and shown."""
    train_eos: bool = True
    """Append the end token and train on it. False: padding is ignored by token id, which is also the end token's."""
    decode_threads: int = 0
    """Threads that decode for one rank. 0: its share of the cluster's CPUs."""
    on_corrupt: Literal["stop", "replace"] = "stop"
    """A damaged clip ends the run with its name, or is replaced by a neighbour, counted and listed in corrupt.jsonl."""
    max_corrupt: float = 0.001
    """Share of the dataset's clips that may be damaged with on_corrupt "replace"; one more ends the run."""
    cache_dir: str = ""
    """Local folder in which row groups of a remote dataset are kept; safe to share between runs. Empty: no cache."""
    cache_gb: float = 50.0
    """Most that `cache_dir` may hold; what was used least recently goes first."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 3e-5
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_steps: int = 500
    """Linear from lr / warmup_steps in the first step, then constant."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int = 100_000
    seed: int = 0
    """Decides the order of the samples and the random initialisation."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """"bf16": autocast; parameters and optimiser stay float32."""
    compile: Literal["auto", "off", "layers", "whole"] = "auto"
    """torch.compile: one program for each kind of transformer block, or one for all of forward and backward, which
    takes many times as long to compile. "auto": "layers" on a GPU, "off" on a CPU."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record forward and backward pass, so that the host starts them with two calls and not with thousands.
    "auto": on a GPU with one rank, as far as its step can be recorded; "off" elsewhere."""
    deterministic: bool = False
    """On a GPU choose kernels that add in a fixed order, so that a repeated or resumed run, on as many ranks, has the
    same bits. On a CPU it always has."""
    compile_cache: str = "~/.cache/fvlm/compile"
    """Folder on each node's own disk where compiled programs are kept for the next start; safe to share."""
    memory: Literal["auto", "speed", "balanced", "small"] = "auto"
    """What is kept for the backward pass: all; all but the inside of the patches' blocks; or the inside of no block.
    What is not kept is computed again, to the same bits. "auto": the first that fits into the GPU's free memory."""
    log_every: int = 10
    save_every: int = 500
    keep_last: int = 3
    """Checkpoints kept besides the milestones."""
    milestones: tuple[int, ...] = (2_000, 10_000, 20_000)
    """Steps whose checkpoints are never deleted; so are all multiples of the last one."""
    ratio_window: int = 100
    """Readings in the running averages of the ratios."""
    max_skipped: int = 20
    """A step whose loss or gradient is not finite is skipped; so many in a row end the run. More than the 8 to 16 clips
    of a row group, which all can be broken at once and are spread over as many steps."""
    checkpoint_dir: str = ""
    """Checkpoints go to DIR/RUN: a folder that all nodes see, s3://bucket/path, ... Empty: `checkpoints` in the run
    folder."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation within a run. It changes nothing in the training, so all of it is free to change between restarts."""

    path: str = ""
    """A prepared dataset of held-out clips: a folder, s3://bucket/path or gs://bucket/path. Empty: no held-out losses,
    and the pictures are of training clips."""
    every: int = 2_000
    """Steps from one evaluation to the next; there is one after the last step too. 0: never."""
    clips: int = 256
    """Held-out clips that are looked at, the same every time: as many whole global batches as there are in so many."""
    pictures: int = 4
    """Clips of which each evaluation draws a picture: gaze, caption, predicted frames. No more than `global_batch`."""


@dataclass(frozen=True)
class ScaleConfig:
    workers: int = 1
    """Ranks. Free to change between restarts."""
    min_workers: int = 0
    """Go on with fewer ranks, down to so many, when the cluster has lost nodes, and with more when it has grown. 0: as
    many as `workers`, always."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    strategy: Literal["replicate", "shard"] = "replicate"
    """"replicate": every rank has the whole model. "shard": of the language model's layers each rank has a part, for
    one that is too large otherwise; the same training, more traffic between ranks. Free to change between restarts."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for one rank, and threads it computes with where there is no GPU; the others decode."""
    max_failures: int = 3
    """Failures in a row, without a new checkpoint between them, that one start of the command survives."""
    hang_s: float = 600.0
    """A rank that finished no step for so many seconds writes down where it stands and ends, so that all ranks start
    again. Three times as long for the first step of a start (data, compilation). 0: it waits for ever."""
    store_wait_s: float = 86_400.0
    """A store or network disk, of the data or of the checkpoints, that does not answer is tried again for so many
    seconds, with lines in the log that say how long it has been away; then the command ends with 75. 0: for ever."""
    room_wait_s: float = 900.0
    """A cluster without an autoscaler whose nodes are too few or too small for the ranks, whatever else runs there, may
    grow for so many seconds; then the command ends. 0: it waits for ever."""


@dataclass(frozen=True)
class LogConfig:
    wandb_project: str = "foveated-vlm-joint"
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """"auto": online when WANDB_API_KEY is set or `wandb login` was done, offline otherwise."""
    samples: bool = False
    """List the clips of every step in the run folder's samples/."""


@dataclass(frozen=True)
class Config:
    preset: str = ""
    """Set by the preset."""
    run: str = ""
    """Name of the run and of its folder. Empty: the preset's name."""
    runs_dir: str = "runs"
    """Where run folders live; on a cluster, storage that all nodes see."""
    import_checkpoint: str = ""
    """A `latest.pt` of the earlier trainer, to begin from. Once the run has a checkpoint of its own, that wins."""
    ingest_memory: str = "auto"
    """Most memory that the whole ingest may hold, such as 2GB. "auto": 1.3 GB a rank, at most a quarter of all memory,
    and never too little."""
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def run_name(self) -> str:
        return self.run or self.preset

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_name

    @property
    def rank_counts(self) -> list[int]:
        """The numbers of ranks that are allowed: those that share the lanes evenly, from `min_workers` to `workers`."""
        least = self.scale.min_workers or self.scale.workers
        return [n for n in range(least, self.scale.workers + 1) if self.data.lanes % n == 0]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """The whole config, a line a section."""
        lines = [f"{key}: {value!r}" for key, value in self.to_dict().items() if not isinstance(value, dict)]
        for name, section in self.to_dict().items():
            if isinstance(section, dict):
                lines.append(f"{name}: " + ", ".join(f"{key}={value!r}" for key, value in section.items()))
        return "\n".join(lines)


IDENTITY = ("preset", "model", "objective", "data", "optim", "train.seed", "train.precision")
"""Sections and keys that may not change once a run has begun ..."""
NOT_IDENTITY = tuple(
    f"data.{key}" for key in ("path", "decode_threads", "on_corrupt", "max_corrupt", "cache_dir", "cache_gb")
)
"""... but for these (the dataset itself is compared by its fingerprint, not by where it lies)."""


MAX_RUN_NAME = 100
"""Ray adds a time and a number to it, and a file's name has at most 255 bytes."""
RUN_NAME = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_RUN_NAME - 1}}}"


def is_uri(path: str) -> bool:
    """Whether `path` is a URI: it means the same in every folder, and pathlib would mangle it."""
    return "://" in path


ARCHITECTURE = "architecture.json"
"""File of a run folder: what its model is built from (`fvlm.model.hub`)."""
MODEL_NAMES = ("model.vision", "model.language")
"""Names on the hub or local folders. A folder is the same one however it is spelled, so it is compared as the place
that it really is. One that was moved is another one: the run has to be told its old name, by a link there."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data': {'lanes': 4}} -> {'data.lanes': 4}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a stored or live config that may not change, by dotted key."""
    return {
        key: real_folder(value) if key in MODEL_NAMES else value
        for key, value in flatten(config).items()
        if key not in NOT_IDENTITY and any(key == name or key.startswith(f"{name}.") for name in IDENTITY)
    }


def real_folder(name: Any) -> Any:
    """A local folder by its absolute path without links; anything else as it is."""
    if isinstance(name, str) and name and Path(name).is_dir():
        return str(Path(name).resolve())
    return name


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


ABOVE_ZERO = """
    data.num_frames data.frame_size data.lanes data.window_steps data.max_caption_tokens data.cache_gb
    objective.fine_iterations objective.coarse_every optim.lr optim.grad_clip
    train.max_steps train.log_every train.save_every train.keep_last train.ratio_window train.max_skipped scale.workers
    eval.clips
""".split()  # noqa: SIM905  (a list is four times as long)
NOT_NEGATIVE = """
    optim.warmup_steps optim.weight_decay objective.lambda_recon data.global_batch data.decode_threads data.max_corrupt
    eval.every eval.pictures scale.min_workers scale.max_failures scale.hang_s scale.cpus_per_worker
    scale.store_wait_s scale.room_wait_s
""".split()  # noqa: SIM905


def validate(config: Config) -> Config:
    """Return `config`, or raise UserError that names the key, the value and values that would do."""
    data, workers, values = config.data, config.scale.workers, flatten(config.to_dict())
    for key in ABOVE_ZERO:
        _require(values[key] > 0, f"--{key.replace('_', '-')} is {values[key]}; it must be above 0.")
    for key in NOT_NEGATIVE:
        _require(values[key] >= 0, f"--{key.replace('_', '-')} is {values[key]}; it must not be negative.")
    _require(
        bool(config.eval.every) or not config.eval.path,
        "--eval.path is given and --eval.every is 0, so nothing would be evaluated. Say every how many steps.",
    )
    places = {
        "data.path": data.path,
        "eval.path": config.eval.path,
        "train.checkpoint-dir": config.train.checkpoint_dir,
    }
    for key, place in places.items():
        _require(
            not urlsplit(place).password,
            f"--{key} holds a secret, which would be stored with the run, shown in W&B and in lists of jobs. Leave it "
            "out, and give it as the store's own clients expect: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "~/.aws, ...",
        )
    _require(not is_uri(config.runs_dir), f"--runs-dir {config.runs_dir}: give a folder; a run cannot lie elsewhere.")
    _require(
        data.global_batch % data.lanes == 0,
        f"--data.lanes {data.lanes} does not divide --data.global-batch {data.global_batch}. "
        f"Values that do: {_divisors(data.global_batch)}.",
    )
    _require(
        data.max_caption_tokens > 1 or config.objective.caption_start,
        "--data.max-caption-tokens is 1: without a start token (--objective.no-caption-start) the first token of a "
        "caption is never trained, so nothing would be. Use 2 or more, or --objective.caption-start.",
    )
    _require(
        data.lanes % workers == 0,
        f"--scale.workers {workers} does not divide --data.lanes {data.lanes}, so the ranks could not share the lanes "
        f"evenly. Numbers of workers that do: {_divisors(data.lanes)}.",
    )
    _require(
        config.scale.strategy != "shard" or config.train.compile != "whole",
        "--scale.strategy shard gathers each layer's weights when it runs, which one program for the whole step "
        "(--train.compile whole) cannot contain. Use --train.compile layers.",
    )
    _require(
        workers == 1 or config.train.cuda_graphs != "on",
        f"--train.cuda-graphs on is for one rank, and --scale.workers is {workers}: ranks talk to each other while "
        "they compute, which is not recorded. Leave it out.",
    )
    _require(
        config.scale.min_workers <= workers,
        f"--scale.min-workers {config.scale.min_workers} is more than --scale.workers {workers}.",
    )
    _require(
        re.fullmatch(RUN_NAME, config.run_name) is not None,
        f"--run {config.run_name!r}: a run's name is the name of a folder, of jobs, and of places in stores and on "
        f"W&B; use letters from a to z, digits, '-', '_' and '.', a letter or digit first, at most {MAX_RUN_NAME} "
        "characters.",
    )
    return config
