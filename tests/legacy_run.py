"""A run of the earlier trainer, read from its files, and everything that a take-over of it by the product needs.

No name of a tensor is translated here: that is the product's to do.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Dinov2Config, LlamaConfig, PreTrainedTokenizerFast

from fvlm.batch import IGNORE, Batch
from fvlm.config import Config
from fvlm.convert.legacy_checkpoint import import_run
from fvlm.data.decode import encode_frame
from fvlm.data.plan import Plan
from fvlm.data.schema import DatasetSpec, EncodedClip, Manifest
from fvlm.data.shards import ShardWriter, read_manifest, write_manifest
from fvlm.train.store import LocalStore
from ray_jobs.options import parse

STORED, USED, ROWS_PER_GROUP, WINDOW = 24, np.linspace(0, 23, 8, dtype=int), 3, 4
END = "<|im_end|>"


@dataclass(frozen=True)
class Takeover:
    """A run of the earlier trainer, what it went on to compute, and what a user of ours would make of it."""

    old: Path
    """Folder with latest.pt, shards and expected.json."""
    expected: dict[str, Any]
    samples: list[dict[str, Any]]
    """Of all shards, in their order: a clip number is an index into them."""
    folder: Path
    """vision/ and language/ (configs and tokenizer, no weights), and the dataset in data/."""

    @property
    def latest(self) -> Path:
        return self.old / "latest.pt"

    @property
    def first(self) -> int:
        return int(self.expected["resume_step"])

    @property
    def clips(self) -> int:
        """In one batch."""
        return len(self.expected["steps"][0]["clips"])

    def architecture(self, prefix: str = "") -> list[str]:
        """Options that say which experiment this is; with `prefix` those of another command."""
        e = self.expected
        width = e.get("query_width", e["dino"]["hidden_size"])
        sizes = f"--model.query-width {width} --objective.fine-iterations {e['fine_iterations']}"
        optim = f"--optim.lr {e['lr']} --optim.warmup-steps {e['warmup_steps']}"
        weights = f"--objective.lambda-recon {e['lambda_recon']} --optim.weight-decay {e['weight_decay']}"
        folders = f"--model.vision {self.folder / 'vision'} --model.language {self.folder / 'language'}"
        data = f"--data.global-batch {self.clips}"
        words = f"{sizes} {optim} {weights} --optim.grad-clip {e['grad_clip']} {folders} {data}".split()
        return [word.replace("--", f"--{prefix}", 1) if word.startswith("--") else word for word in words]

    def options(self, folder: Path, latest: Path, steps: int = 6) -> list[str]:
        """The command line of the run that goes on `steps` steps in `folder`/run."""
        paths = f"--run run --runs-dir {folder} --data.path {self.folder / 'data'} --import-checkpoint {latest}"
        data = f"--data.frame-size {self.expected['frame_size']} --data.lanes {self.clips} --data.window-steps {WINDOW}"
        train = f"--train.precision fp32 --train.log-every 1 --train.max-steps {self.first + steps}"
        small = "--objective.coarse-every 1 --log.wandb off"
        return ["joint_multifine", *self.architecture(), *f"{paths} {data} {train} {small}".split()]

    def batch(self, step: dict[str, Any]) -> Batch:
        clips = [self.samples[number] for number in step["clips"]]
        ids = torch.tensor(step["caption_ids"])
        return Batch(
            frames=torch.stack([clip["frames"][USED].permute(0, 2, 3, 1) for clip in clips]),
            latents=torch.stack([clip["latents"][USED] for clip in clips]),
            caption_ids=ids,
            labels=ids.masked_fill(ids == self.expected["pad_id"], IGNORE),
            clip_ids=tuple(clip["video_id"] for clip in clips),
        ).check()

    def import_into(self, folder: Path, latest: Path | None = None) -> tuple[Config, Manifest, Path]:
        """Import `latest` (or the run's own) as the first start of a run does -> config, dataset, checkpoint."""
        config = parse(self.options(folder, latest or self.latest))
        manifest = read_manifest(self.folder / "data")
        store = LocalStore(folder / "checkpoints")
        return config, manifest, store.root / import_run(Path(config.import_checkpoint), config, manifest, store)


def expected_row(step: dict[str, Any]) -> dict[str, float]:
    """A step of expected.json under the names of our metrics."""
    row = {"train/lr": step["lr"], "train/loss": step["loss"], "train/grad_norm": step["grad_norm"]}
    for name in ("caption", "recon"):
        row[f"{name}/loss_coarse"] = step[f"{name}_coarse"]
        row[f"{name}/loss_fine"] = step[f"{name}_iters"][-1]
        row |= {f"{name}/iter_{i + 1}": value for i, value in enumerate(step[f"{name}_iters"])}
    return row


def assert_rows(rows: list[dict[str, float]], expected: dict[str, Any]) -> None:
    for step, row in zip(expected["steps"], rows, strict=True):
        wanted = expected_row(step)
        got = {name: row[name] for name in wanted}
        assert got == pytest.approx(wanted, rel=1e-5), f"step number {step['step']}"  # 5e-7 is reached


def assert_sums(sums: dict[str, float], expected: dict[str, Any]) -> None:
    """A bias on keys changes no attention: its gradient is rounding alone, and AdamW walks by the sign of that."""
    wanted = expected["final_param_sums"]
    assert sums.keys() == wanted.keys()
    for name, value in wanted.items():
        assert sums[name] == pytest.approx(value, rel=1e-3 if name.endswith(".k_proj.bias") else 1e-4), name


class one_thread:
    """As the expected numbers were made."""

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)


def take_over(old: Path, folder: Path) -> Takeover:
    expected = json.loads((old / "expected.json").read_text())
    samples = [
        sample
        for shard in sorted(old.glob("shard_*.pt"))
        for sample in torch.load(shard, weights_only=True, mmap=True)["samples"]
    ]
    takeover = Takeover(old, expected, samples, folder)
    write_architectures(takeover)
    write_dataset(takeover)
    return takeover


def write_architectures(takeover: Takeover) -> None:
    """The folders that stand for two hub names: config.json, and a tokenizer that knows the run's words."""
    sizes, pad = dict(takeover.expected["llm"]), takeover.expected["pad_id"]
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta")}
    Dinov2Config(**takeover.expected["dino"]).save_pretrained(takeover.folder / "vision")
    LlamaConfig(
        **sizes, rope_parameters=rope, tie_word_embeddings=True, pad_token_id=pad, eos_token_id=pad
    ).save_pretrained(takeover.folder / "language")
    words = Tokenizer(models.WordLevel(takeover.expected["vocab"] | {END: pad, "<unknown>": 0}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=END).save_pretrained(
        takeover.folder / "language"
    )


def write_dataset(takeover: Takeover) -> None:
    """A dataset of ours whose plan, begun at the imported step, gives the batches that the earlier trainer took.

    The plan is not replaced: rows are laid where it will look. A clip that was taken twice has a row for each time.
    """
    steps, share = takeover.expected["steps"], takeover.clips
    clips = len(steps) * share
    shard_rows = np.array([clips // 2, clips - clips // 2])
    plan = Plan(shard_rows, ROWS_PER_GROUP, 0, share, share, WINDOW, "", origin=takeover.first)
    assert plan.steps_per_epoch == len(steps)
    stored: dict[tuple[int, int], tuple[str, int]] = {}
    """(shard, row in the shard) -> clip id, number."""
    for lo, hi in plan.windows(takeover.first, takeover.first + len(steps)):
        places = plan.rows(lo, hi)
        rows = places.group * ROWS_PER_GROUP + places.row
        for step, where in zip(range(lo, hi), np.stack([places.shard, rows], axis=-1).tolist(), strict=True):
            for number, (shard, row) in zip(steps[step - takeover.first]["clips"], where, strict=True):
                stored[shard, row] = (f"step-{step}-clip-{number}", number)
    latent = takeover.samples[0]["latents"]
    spec = DatasetSpec(
        STORED, takeover.expected["frame_size"], "png", "as-is", "sd-vae-ft-mse", "bfloat16", tuple(latent.shape[1:]),
        rows_per_row_group=ROWS_PER_GROUP,
    )  # fmt: skip
    encoded = [
        [encode_frame(frame.permute(1, 2, 0).numpy(), spec) for frame in sample["frames"]]
        for sample in takeover.samples
    ]
    root = takeover.folder / "data"
    root.mkdir()
    files = []
    for shard, rows in enumerate(shard_rows.tolist()):
        with ShardWriter(root / f"shard-{shard:05d}.parquet", spec) as writer:
            for row in range(rows):
                clip_id, number = stored[shard, row]
                sample = takeover.samples[number]
                bits = sample["latents"].contiguous().view(torch.uint8).reshape(STORED, -1).numpy()
                writer.add(EncodedClip(clip_id, sample["caption"], encoded[number], bits, {"clip": number}))
        files.append(writer.file)
    write_manifest(root, spec, files, rejected=0)


def table_of(text: str) -> dict[str, str]:
    """key -> where it went, from what was printed."""
    rows = [re.split(r"  +", line[2:], maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    assert len({key for key, _ in rows}) == len(rows)
    return dict(rows)


def every_key(latest: Path) -> set[str]:
    raw = torch.load(latest, weights_only=False)
    whole = {"step", "epoch", "scaler_state_dict", "scheduler_state_dict", "timestamp"}
    (group,) = raw["optimizer_state_dict"]["param_groups"]
    nested = {f"{section}.{key}" for section in ("metrics", "config") for key in raw[section]}
    settings = {f"optimizer group 0.{key}" for key in group if key != "params"}
    return whole | nested | settings | raw["model_state_dict"].keys() | {f"optimizer {i}" for i in group["params"]}
