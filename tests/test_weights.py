"""Pretrained weights have every tensor of the model and no other, or are refused by name before a rank starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published import change_json, change_weights, write_language, write_tokenizer, write_vision
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config, Dinov2ForImageClassification
from transformers.utils import logging

from fvlm.checks.access import look_at_hub
from fvlm.config import Config, ModelConfig
from fvlm.errors import UserError
from fvlm.model.foveated import FoveatedVLM
from fvlm.model.hub import build_model, published_architecture, require_pretrained
from ray_jobs.train import prepare_models

LATENT = (4, 7, 7)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_vision(folder / "vision")
    write_language(folder / "language")
    return folder


@pytest.fixture
def copies(published, tmp_path) -> Path:
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    return tmp_path


def model_config(folder: Path) -> ModelConfig:
    return ModelConfig(vision=str(folder / "vision"), language=str(folder / "language"), query_width=24)


def by_transformers(config: ModelConfig) -> FoveatedVLM:
    """The whole model with weights as transformers itself loads them."""
    logging.set_verbosity_error()
    torch.manual_seed(5)
    vision = AutoModel.from_pretrained(config.vision, dtype=torch.float32, attn_implementation="sdpa")
    language = AutoModelForCausalLM.from_pretrained(
        config.language, dtype=torch.float32, attn_implementation="sdpa", ignore_mismatched_sizes=True
    )
    return FoveatedVLM(vision, language, config, LATENT)


def require_same(model: FoveatedVLM, wanted: FoveatedVLM) -> None:
    """Parameters, their order and kind, buffers and ties, to the last bit."""
    for mine, theirs in (
        (list(model.named_parameters()), list(wanted.named_parameters())),
        (list(model.named_buffers()), list(wanted.named_buffers())),
    ):
        assert [name for name, _ in mine] == [name for name, _ in theirs]
        for (name, value), (_, right) in zip(mine, theirs, strict=True):
            assert value.dtype == right.dtype and value.requires_grad == right.requires_grad, name
            assert torch.equal(value, right), name
    for each in (model, wanted):
        assert (each.llm.lm_head.weight is each.llm.model.embed_tokens.weight) == each.llm.config.tie_word_embeddings


# ---- files that are right


def plain(folder: Path) -> None: ...


def sharded(folder: Path) -> None:
    shutil.rmtree(folder / "language")
    write_language(folder / "language", shard="30KB")
    assert len(list((folder / "language").glob("model-*-of-*.safetensors"))) > 2


def half_precision_with_a_head_of_its_own(folder: Path) -> None:
    shutil.rmtree(folder / "language")
    write_language(folder / "language", torch.bfloat16, tie_word_embeddings=False)


def without_the_head_class(folder: Path) -> None:
    change_weights(folder / "language", lambda t: {key.removeprefix("model."): value for key, value in t.items()})


def with_old_rotary_buffers(folder: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder / "language", lambda t: t | {key: torch.ones(4)})


def with_the_tied_head_too(folder: Path) -> None:
    change_weights(folder / "language", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})


def with_a_classifier(folder: Path) -> None:
    raw = json.loads((folder / "vision" / "config.json").read_text())
    torch.manual_seed(3)
    Dinov2ForImageClassification(Dinov2Config.from_dict(raw)).save_pretrained(folder / "vision")


def without_a_mask_token(folder: Path) -> None:
    change_weights(folder / "vision", lambda t: {k: v for k, v in t.items() if k != "embeddings.mask_token"})


def with_swiglu(folder: Path) -> None:
    shutil.rmtree(folder / "vision")
    write_vision(folder / "vision", use_swiglu_ffn=True)


@pytest.mark.parametrize(
    "change",
    [
        plain, sharded, half_precision_with_a_head_of_its_own, without_the_head_class, with_old_rotary_buffers,
        with_the_tied_head_too, with_a_classifier, without_a_mask_token, with_swiglu,
    ],
)  # fmt: skip
def test_what_fits_is_loaded_to_the_bits_that_transformers_loads(copies, change):
    change(copies)
    config = model_config(copies)
    require_pretrained(config, published_architecture(config))
    model = build_model(config, LATENT, seed=5)
    after = torch.get_rng_state()
    require_same(model, by_transformers(config))
    assert torch.equal(after, torch.get_rng_state())
    assert [found.level for found in look_at_hub(Config(run="r", runs_dir=str(copies), model=config), False)] == [
        "ok",
        "ok",
    ]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_wrappers_prefix_before_every_key_is_left_out(copies, prefix):
    config = model_config(copies)
    wanted = by_transformers(config)
    for part in ("vision", "language"):
        change_weights(copies / part, lambda t: {prefix + key: value for key, value in t.items()})
    require_same(build_model(config, LATENT, seed=5), wanted)


def test_the_one_of_two_tied_tensors_that_safetensors_keeps_is_enough(copies):
    config = model_config(copies)
    wanted = by_transformers(config)
    change_weights(
        copies / "language",
        lambda t: {k.replace("model.embed_tokens", "lm_head"): v for k, v in t.items()},
    )
    require_same(build_model(config, LATENT, seed=5), wanted)


# ---- files that are wrong


def without(*words: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda t: {key: value for key, value in t.items() if not any(word in key for word in words)}


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12\n")


def only_a_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shard_missing(folder: Path) -> None:
    shutil.rmtree(folder)
    write_language(folder, shard="30KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def shards_of_two_models(folder: Path) -> None:
    shutil.rmtree(folder)
    write_language(folder, shard="30KB")
    path = sorted(folder.glob("model-*.safetensors"))[1]
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **values)


def spoil(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, change)


def dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "gone")


LAYER, ODD = "model.layers.1.", "model.layers.2.mlp.up_proj.weight"
LANGUAGE_FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a layer is missing": (spoil(without(LAYER)), ["model.safetensors: lacks 9 of", f"{LAYER}input_layernorm.weight"]),
    "one tensor is missing": (spoil(without("model.norm")), ["lacks 1 of", "model.norm.weight"]),
    "a layer too many": (spoil(lambda t: t | {ODD: torch.ones(48, 32)}), ["has 1 that the model has no place", ODD]),
    "an unknown prefix": (
        spoil(lambda t: {f"{'a' if 'norm' in k else 'b'}.{k}": v for k, v in t.items()}),
        ["model.safetensors: lacks", "a.model.layers.0.input_layernorm.weight"],
    ),
    "other layers": (set_config(num_hidden_layers=3), ["model.safetensors: lacks 9", "model.layers.2."]),
    "other widths": (set_config(intermediate_size=64), ["mlp.gate_proj.weight is (48, 32)", "(64, 32)"]),
    "an untied head": (set_config(tie_word_embeddings=False), ["lacks 1", "lm_head.weight"]),
    "a tied head that differs": (
        spoil(lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        ["lm_head.weight is not the same as model.embed_tokens.weight"],
    ),
    "quantised": (
        spoil(lambda t: {k: v.to(torch.int8) if "mlp" in k else v for k, v in t.items()}),
        ["stored as I8", "mlp.gate_proj"],
    ),
    "cut short": (lambda f: cut(f / "model.safetensors", 20_000), ["model.safetensors: no whole safetensors file"]),
    "cut in its header": (lambda f: cut(f / "model.safetensors", 100), ["model.safetensors: no whole safetensors"]),
    "empty": (lambda f: cut(f / "model.safetensors", 0), ["model.safetensors: empty"]),
    "a page of HTML": (
        lambda f: (f / "model.safetensors").write_text("<!DOCTYPE html><html>" * 40),
        ["model.safetensors: no whole safetensors file"],
    ),
    "a git-lfs pointer": (lambda f: lfs_pointer(f / "model.safetensors"), ["model.safetensors: a git-lfs pointer"]),
    "a link to nothing": (dangling, ["model.safetensors: a link to a file that is not there"]),
    "a pickle alone": (only_a_pickle, ["has pytorch_model.bin and no model.safetensors"]),
    "a shard is missing": (shard_missing, ["model.safetensors.index.json: names 'model-00002-of-"]),
    "shards of two models": (shards_of_two_models, ["model-00002-of-", "lacks model.", "fetch them again"]),
    "a config that is a pointer": (lambda f: lfs_pointer(f / "config.json"), ["config.json: a git-lfs pointer"]),
    "a config that is cut": (lambda f: cut(f / "config.json", 50), ["config.json: no valid JSON"]),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json: holds a list"]),
    "no width that heads share": (set_config(hidden_size=30), ["config.json describes no model"]),
    "a width that is a word": (set_config(hidden_size="wide"), ["config.json describes no model"]),
    "a tokenizer that is a pointer": (lambda f: lfs_pointer(f / "tokenizer.json"), ["tokenizer.json: a git-lfs"]),
    "a tokenizer that is cut": (lambda f: cut(f / "tokenizer.json", 900), ["tokenizer.json: no tokenizer"]),
    "a larger tokenizer": (lambda f: write_tokenizer(f, 430), ["its token", "429", "has 400 embeddings"]),
    "an end token that is nowhere": (
        lambda f: change_json(f / "tokenizer_config.json", eos_token={"content": "<end>"}),
        ["tokenizer_config.json: its eos_token '<end>' is not in"],
    ),
    "a Granite": (
        set_config(model_type="granite", embedding_multiplier=12.0),
        ["model_type 'granite'", "computes 'llama' models alone"],
    ),
    "a Granite's multiplier": (set_config(embedding_multiplier=12.0), ["config.json", "embedding_multiplier 12.0"]),
    "a sliding window": (set_config(sliding_window=4096), ["config.json", "sliding_window 4096"]),
    "soft caps": (set_config(final_logit_softcapping=30.0), ["final_logit_softcapping 30.0"]),
    "norms of queries": (set_config(use_qk_norm=True), ["use_qk_norm True"]),
    "experts": (set_config(num_local_experts=8), ["num_local_experts 8"]),
    "interleaved positions": (set_config(rope_interleaved=True), ["rope_interleaved True"]),
    "4 bits": (set_config(quantization_config={"bits": 4}), ["quantization_config {'bits': 4}"]),
    "code of its own": (set_config(auto_map={"AutoModel": "m.M"}), ["auto_map"]),
    "dropout": (set_config(attention_dropout=0.1), ["attention_dropout above 0"]),
}  # fmt: skip
VISION_FAULTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a layer is missing": (spoil(without("encoder.layer.1.")), ["model.safetensors: lacks 18 of", "encoder.layer.1."]),
    "a tensor too many": (spoil(lambda t: t | {"head.weight": torch.ones(2)}), ["no place for (head.weight)"]),
    "two models in one": (
        spoil(lambda t: {f"{who}.{k}": v for k, v in t.items() for who in ("teacher", "student")}),
        ["lacks", "has no place for", "student.embeddings.cls_token"],
    ),
    "other widths": (set_config(hidden_size=48), ["(1, 1, 24), and config.json makes it (1, 1, 48)"]),
    "cut short": (lambda f: cut(f / "model.safetensors", 20_000), ["model.safetensors: no whole safetensors file"]),
    "registers": (set_config(model_type="dinov2_with_registers"), ["computes 'dinov2' models alone"]),
    "registers in a DINOv2": (set_config(num_register_tokens=4), ["num_register_tokens 4"]),
    "grey frames": (set_config(num_channels=1), ["num_channels 1"]),
    "oblong frames": (set_config(image_size=[56, 84]), ["image_size [56, 84]"]),
    "drop path": (set_config(drop_path_rate=0.1), ["drop path above 0"]),
    "another activation": (set_config(hidden_act="relu"), ["hidden_act is 'relu'"]),
}


@pytest.mark.parametrize(
    ("part", "change", "parts"),
    [(part, *case) for part, faults in (("language", LANGUAGE_FAULTS), ("vision", VISION_FAULTS))
     for case in faults.values()],
    ids=[f"{part}: {name}" for part, faults in (("language", LANGUAGE_FAULTS), ("vision", VISION_FAULTS))
         for name in faults],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_name_by_the_start_and_by_the_doctor(copies, part, change, parts):
    change(copies / part)
    config = Config(run="r", runs_dir=str(copies / "runs"), model=model_config(copies))
    with pytest.raises(UserError) as error:
        refuse_as_a_start(config)
    assert not [word for word in parts if word not in str(error.value)], str(error.value)
    (found,) = [each for each in look_at_hub(config, begun=False) if each.level != "ok"]
    said = f"{found.value}. {found.cure}"
    assert found.level == "FAIL" and found.what == f"weights {copies / part}"
    assert not [word for word in parts if word not in said], said


def refuse_as_a_start(config: Config) -> None:
    """What `ray_jobs.train` does of the models before it takes a GPU."""
    config.run_dir.mkdir(parents=True)
    prepare_models(config, manifest=None)  # its captions are for a tokenizer of a random model


def test_weights_that_are_not_finite_are_refused_when_they_are_read(copies):
    change_weights(copies / "language", lambda t: t | {"model.norm.weight": torch.full((32,), torch.nan)})
    with pytest.raises(UserError, match=r"model\.safetensors: model\.norm\.weight holds NaN"):
        build_model(model_config(copies), LATENT, seed=0)
