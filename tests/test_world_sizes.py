"""One checkpoint, gone on from by 1, 2 and 4 ranks: the same samples, the same losses, the same weights.

Real processes joined by gloo; batches from real shards, by the plan. Ray has no part in the mathematics.
"""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from datasets import write_dataset

from fvlm import presets
from fvlm.config import Config
from fvlm.data.collate import Collator
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.shards import read_manifest
from fvlm.data.text import CaptionTokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from fvlm.model.hub import build_model, vocabulary_size
from fvlm.train.loop import Run
from fvlm.train.metrics import Clock, Metrics
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.step import train_step

START, STEPS, LANES = 3, 20, 4
NO_GRADIENT = "attention.k_proj.bias"
"""Softmax does not see the keys' bias: its true gradient is zero, and Adam turns the rounding noise in its place into
steps of full length. It changes nothing else."""


def make_config(data: Path) -> Config:
    demo = presets.get("demo")
    return dataclasses.replace(
        demo,
        run="run",
        runs_dir=str(data.parent),
        data=dataclasses.replace(
            demo.data, path=str(data), frame_size=56, global_batch=LANES, lanes=LANES, window_steps=4
        ),
    )


def make_run(config: Config, checkpoint: Path | None) -> Run:
    manifest = read_manifest(Path(config.data.path))
    model = build_model(config.model, manifest.spec.latent_shape, config.train.seed, pretrained=False)
    freeze_unreached(model, config)
    optimizer = make_optimizer(model, config.optim)
    run = Run(config, Plan.of_config(manifest, config), model, optimizer, Metrics(10), Clock())
    if checkpoint:
        run.restore(checkpoint)
    return run


def steps(run: Run, tokenizer: Path, stop: int, rank: int = 0, world: int = 1) -> list[dict[str, float]]:
    """Train up to `stop`. -> what every step read"""
    manifest = read_manifest(Path(run.config.data.path))
    reader = BlockReader(ClipReader.of_config(manifest, run.plan, run.config))
    tokens = CaptionTokenizer(load_tokenizer(tokenizer), run.config.data.max_caption_tokens, run.config.data.train_eos)
    collate = Collator(manifest.spec, tokens)
    rows = []
    for raw in reader.steps(run.step, stop, rank, world):
        scalars = train_step(run.model, run.optimizer, collate(raw), run.step, run.config)
        run.step += 1
        rows.append({name: value.item() for name, value in scalars.items()})
    reader.close()
    return rows


def rank_main(rank: int, world: int, port: int, config: Config, checkpoint: Path, tokenizer: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    run = make_run(config, checkpoint)
    rows = steps(run, tokenizer, START + STEPS, rank, world)
    if rank == 0:
        torch.save((rows, {name: p.detach() for name, p in run.model.named_parameters()}), out)
    dist.destroy_process_group()


@dataclasses.dataclass
class Trained:
    rows: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def go_on(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """world -> what STEPS further steps with so many ranks lead to"""
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", clips=26)
    config = make_config(folder / "data")
    captions = [f"clip number {i} of the data" for i in range(26)]
    save_tokenizer(train_tokenizer(captions, vocabulary_size(config.model)), folder / "tokenizer")
    run = make_run(config, None)
    steps(run, folder / "tokenizer", START)
    checkpoint = run.save(folder / "checkpoints")

    def train(world: int) -> Trained:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        out = folder / "out.pt"
        mp.spawn(rank_main, (world, port, config, checkpoint, folder / "tokenizer", out), nprocs=world)
        return Trained(*torch.load(out, weights_only=True))

    return train


@pytest.fixture(scope="module")
def alone(go_on: Any) -> Trained:
    return go_on(1)


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_goes_on_with_the_same_losses_and_weights(go_on, alone, world):
    several = go_on(world)
    assert len(several.rows) == STEPS
    for mine, theirs in zip(several.rows, alone.rows, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for name, weight in several.weights.items():
        if not name.endswith(NO_GRADIENT):
            torch.testing.assert_close(weight, alone.weights[name], rtol=0, atol=1e-4, msg=name)


def test_the_same_number_of_ranks_ends_with_the_same_bits(go_on):
    once, again = go_on(2), go_on(2)
    assert once.rows == again.rows
    assert all(torch.equal(weight, again.weights[name]) for name, weight in once.weights.items())
