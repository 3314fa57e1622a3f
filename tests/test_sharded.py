"""A model in shards as a start makes it: with the values of a whole one, all of it on rank 0's host alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import write_dataset
from gloo_ranks import Ranks

from fvlm import presets
from fvlm.config import Config, ScaleConfig
from fvlm.data.schema import Manifest
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.hub import build_model
from fvlm.train.loop import Run
from fvlm.train.memory import LiveBytes, mock_batch
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.parallel import shard_decoder
from fvlm.train.resume import Choice
from fvlm.train.sharded import build_sharded, fill_from_rank_0
from fvlm.train.state import checkpoint_name, contents_of
from fvlm.train.step import Step
from fvlm.train.store import LocalStore
from fvlm.train.tensor_parts import gathered, is_shard, part_like
from ray_jobs.training import make_run

LATENT, CPU = (4, 8, 8), torch.device("cpu")


def small(strategy: str = "shard", workers: int = 2) -> Config:
    demo = presets.get("demo")
    data = dataclasses.replace(demo.data, frame_size=56, num_frames=3, global_batch=4, lanes=4)
    return dataclasses.replace(demo, data=data, scale=ScaleConfig(workers=workers, strategy=strategy))  # type: ignore[arg-type]


def differences(model: FoveatedVLM, config: Config) -> list[str]:
    """In what `model` is not the one that a single rank builds, to the last bit."""
    drawn = torch.get_rng_state()
    whole = build_model(config.model, LATENT, config.train.seed)
    freeze_unreached(whole, config)
    found = [] if torch.equal(drawn, torch.get_rng_state()) or dist.get_rank() else ["random generator"]
    pairs = zip(model.named_parameters(), whole.named_parameters(), strict=True)
    for (name, p), (wanted_name, wanted) in pairs:
        same = name == wanted_name and p.requires_grad == wanted.requires_grad and torch.equal(gathered(p), wanted)
        found += [] if same else [name]
    for (name, b), (wanted_name, wanted) in zip(model.named_buffers(), whole.named_buffers(), strict=True):
        found += [] if name == wanted_name and torch.equal(b, wanted) else [name]
    tied = model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    sharded = all(is_shard(p) for layer in model.llm.model.layers for p in layer.parameters())
    return found + ([] if tied else ["tie"]) + ([] if sharded else ["whole layers"])


class HostBytes(LiveBytes):
    """Without tensors that have no contents, and of shards what is here."""

    def add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            super().add(tensor.to_local() if is_shard(tensor) else tensor)


def built(config: Config) -> dict[str, Any]:
    live = HostBytes()
    with live:
        model = build_sharded(config, LATENT, CPU, new=True)
    return {"differ": differences(model, config), **sizes(model), "peak": live.peak}


def sizes(model: FoveatedVLM) -> dict[str, int]:
    layers = list(model.llm.model.layers)
    return {
        "own": sum((p.to_local() if is_shard(p) else p).nbytes for p in model.parameters()),
        "whole": sum(p.numel() * 4 for p in model.parameters()),
        "layer": sum(p.numel() * 4 for p in layers[0].parameters()),
        "tensor": max(p.numel() * 4 for p in layers[0].parameters()),
    }


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_its_part_of_what_one_rank_would_build_and_none_but_the_first_has_it_all(ranks, world):
    """Three ranks: their parts are not of equal size."""
    first, *others = ranks.all(world, built, small(workers=world))
    assert [rank["differ"] for rank in (first, *others)] == [[]] * world
    for rank in others:
        # A whole tensor and the part of it; and what gloo still holds of those before, more of them on a busy machine.
        assert rank["own"] <= rank["peak"] < rank["own"] + rank["layer"]
        assert rank["peak"] < rank["whole"]


def filled(config: Config) -> dict[str, int]:
    """What is made while values go round, besides the model and rank 0's whole one."""
    model = build_sharded(config, LATENT, CPU, new=False)
    whole = build_model(config.model, LATENT, 1) if dist.get_rank() == 0 else None
    live = HostBytes()
    for parameter in (*model.parameters(), *(whole.parameters() if whole else ())):
        live.add(parameter)
    before = live.now
    with live:
        fill_from_rank_0(model, whole)
    return sizes(model) | {"peak": live.peak - before}


def test_while_values_go_round_no_rank_holds_a_layer_more(ranks):
    for rank in ranks.all(2, filled, small()):
        # gloo lets go of a tensor a moment later, so a busy machine may show a third one beside this and the next.
        assert rank["tensor"] <= rank["peak"] < rank["layer"]


def refused(config: Config) -> str:
    """What rank 0 says of weights with one layer more than the architecture that goes by the name."""
    model = build_sharded(config, LATENT, CPU, new=False)
    if dist.get_rank():
        return ""
    whole = build_model(config.model, LATENT, 1)
    whole.llm.model.layers.append(whole.llm.model.layers[0])
    whole.llm.model.layers[0] = torch.nn.Identity()
    try:
        fill_from_rank_0(model, whole)
    except UserError as error:
        return str(error)
    return "accepted"


def test_weights_of_another_architecture_are_refused_before_any_rank_waits_for_them(ranks):
    said, _ = ranks.all(2, refused, small())
    assert "tiny-llama" in said and "llm.model.layers.0." in said


def steps_of(model: FoveatedVLM, config: Config) -> dict[str, torch.Tensor]:
    step = Step(config, model, make_optimizer(model, config.optim))
    for number in range(2):
        step(mock_batch(config, LATENT, 2, 512), number)
    return {name: gathered(p).clone() for name, p in model.named_parameters()}


def trained_otherwise(config: Config) -> list[str]:
    """Parameters that two steps change in another way when the model was cut while it was whole."""
    whole = build_model(config.model, LATENT, config.train.seed)
    freeze_unreached(whole, config)
    shard_decoder(whole)
    wanted, got = steps_of(whole, config), steps_of(build_sharded(config, LATENT, CPU, new=True), config)
    return [name for name in wanted if not torch.equal(got[name], wanted[name])]


def test_it_trains_to_the_bits_of_a_model_that_was_cut_while_whole(ranks):
    assert ranks.all(2, trained_otherwise, small()) == [[], []]


def parts_of() -> tuple[list[float], list[int]]:
    model = build_sharded(small(workers=dist.get_world_size()), LATENT, CPU, new=False)
    weight = model.llm.model.layers[0].mlp.up_proj.weight
    rows = torch.arange(float(weight.shape[0]))[:, None].expand(weight.shape).contiguous()
    part = part_like(rows, weight)
    assert torch.equal(part.full_tensor(), rows)
    assert part.to_local().untyped_storage().nbytes() == part.to_local().nbytes  # of its own: the file may go
    return part.to_local()[:, 0].tolist(), list(part.shape)


def test_a_part_of_a_stored_tensor_is_what_fsdp_holds_there(ranks):
    parts = ranks.all(4, parts_of)
    assert [part[0] for part, _ in parts] == [0.0, 96.0, 192.0, 288.0] and parts[0][1] == [384, 128]


# ---- as the ranks of a run make it


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("data"), clips=26)


def everything(run: Run) -> dict[str, torch.Tensor]:
    contents = contents_of(run.step, run.model, run.optimizer, {})
    return {name: tensor.clone() for name, tensor in {**contents.model, **contents.optimizer}.items()}


def started(config: Config, manifest: Manifest, root: Path, choice: Choice) -> tuple[dict[str, torch.Tensor], int]:
    """-> weights, moments and generators, and layers that are in shards"""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    run = make_run(config, manifest, CPU, LocalStore(root), choice)
    return everything(run), sum(is_shard(p) for p in run.model.parameters())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_start_in_shards_has_what_a_whole_one_has(ranks: Ranks, manifest, tmp_path, resumed):
    spec = manifest.spec
    config = dataclasses.replace(small("replicate", 1), runs_dir=str(tmp_path), run="run")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, frame_size=spec.frame_size, num_frames=spec.num_frames)
    )
    choice = Choice(None, 0, 0, ())
    root = tmp_path / "checkpoints"
    if resumed:
        config.run_dir.mkdir(parents=True)
        run = make_run(config, manifest, CPU, LocalStore(root), choice)
        for number in range(2):
            run.take_step(mock_batch(config, spec.latent_shape, 4, 512), number)
            run.step += 1
        run.save(root)
        choice = Choice(checkpoint_name(2), 2, 0, ())
    wanted, _ = started(config, manifest, root, choice)
    config = dataclasses.replace(config, scale=ScaleConfig(workers=2, strategy="shard"))
    for got, shards in ranks.all(2, started, config, manifest, root, choice):
        assert shards > 0 and got.keys() == wanted.keys()
        assert [name for name in got if not torch.equal(got[name], wanted[name]) and not name.startswith("rng")] == []
