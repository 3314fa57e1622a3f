"""A run is built from what it began with: its architecture, the hub's commit and its tokenizer are its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import write_dataset
from published import TEXTS, Hub, change_json, change_weights, serving, write_language, write_vision
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fvlm.checks.access import look_at_hub
from fvlm.config import Config
from fvlm.data.schema import Manifest
from fvlm.data.text import load_tokenizer, published_tokenizer, save_tokenizer
from fvlm.errors import UserError
from fvlm.hub_files import ModelFiles
from fvlm.model.hub import ARCHITECTURE, ARCHITECTURES, build_model, kept_architecture
from fvlm.train.optim import allocate_moments
from fvlm.train.resume import Choice
from fvlm.train.run_folder import TOKENIZER, exclusive
from fvlm.train.state import contents_of
from fvlm.train.store import CHECKPOINTS, LocalStore, checkpoint_store
from ray_jobs.options import parse
from ray_jobs.train import prepare_run
from ray_jobs.training import make_run

VISION, LANGUAGE = "owner/vision", "owner/language"
CPU, START = torch.device("cpu"), Choice(None, 0, 0, ())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("data"), clips=8, shards=1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.models = {
            VISION: write_vision(tmp_path / "vision"),
            LANGUAGE: write_language(tmp_path / "language", torch.bfloat16),
        }
        yield hub


def config_of(folder: Path, manifest: Manifest, vision: str = VISION, language: str = LANGUAGE, *more: str) -> Config:
    names = ["--model.init", "hub", "--model.vision", vision, "--model.language", language, "--model.query-width", "24"]
    data = ["--data.path", manifest.root, "--data.frame-size", "56", "--data.lanes", "4", "--data.global-batch", "4"]
    small = ["--data.num-frames", "4", "--log.wandb", "off"]
    return parse(["demo", "--run", "run", "--runs-dir", str(folder / "runs"), *names, *data, *small, *more])


def weights(config: Config, manifest: Manifest, choice: Choice) -> dict[str, torch.Tensor]:
    run = make_run(config, manifest, CPU, checkpoint_store(config), choice)
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def save_checkpoint(config: Config, manifest: Manifest) -> Choice:
    """The state that a start begins with, as its first checkpoint."""
    run = make_run(config, manifest, CPU, checkpoint_store(config), START)
    allocate_moments(run.optimizer)
    contents = contents_of(0, run.model, run.optimizer, run.state_dict())
    LocalStore(config.run_dir / CHECKPOINTS).write(contents)
    return Choice(contents.name, 0, 0, ())


def lose_everything(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, no cache: what is left is the run's folder."""
    hub.models.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_a_run_stays_at_the_hubs_commit_of_its_first_start(hub, tmp_path, manifest):
    config = config_of(tmp_path, manifest)
    prepare_run(config)
    first = {name: hub.commit(name) for name in (VISION, LANGUAGE)}
    kept = kept_architecture(config)
    assert kept and {p.name: p.revision for p in (kept.vision, kept.language)} == first
    before = weights(config, manifest, START)
    # The hub's newest commit is another model of the same shape.
    change_json(hub.models[LANGUAGE] / "config.json", rms_norm_eps=0.1)
    change_weights(hub.models[LANGUAGE], lambda t: {key: tensor * 2 for key, tensor in t.items()})
    assert hub.commit(LANGUAGE) != first[LANGUAGE]
    prepare_run(config)
    assert kept_architecture(config) == kept
    after = weights(config, manifest, START)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_is_resumed_from_its_own_folder_when_hub_and_cache_are_gone(hub, tmp_path, manifest, monkeypatch):
    change_json(hub.models[LANGUAGE] / "config.json", rms_norm_eps=0.01)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    change_json(hub.models[LANGUAGE] / "config.json", rope_parameters=rope)
    config = config_of(tmp_path, manifest)
    prepare_run(config)
    choice = save_checkpoint(config, manifest)
    before = weights(config, manifest, choice)
    lose_everything(hub, tmp_path, monkeypatch)
    assert look_at_hub(config, begun=True)[0].level == "ok"
    prepare_run(config)
    run = make_run(config, manifest, CPU, checkpoint_store(config), choice)
    assert run.model.llm.config.rms_norm_eps == 0.01
    assert run.model.llm.config.rope_parameters["rope_theta"] == 500.0
    named = dict(run.model.named_parameters())
    assert all(p.dtype == torch.float32 for p in named.values())  # whatever dtype the hub's files are in
    assert all(torch.equal(before[name], named[name]) for name in before)


def test_a_resume_does_not_take_a_table_for_what_the_run_began_with(hub, tmp_path, manifest):
    """A name of the table whose config.json on the hub says something else."""
    hub.models["facebook/dinov2-small"] = hub.models.pop(VISION)
    change_json(hub.models["facebook/dinov2-small"] / "config.json", layer_norm_eps=1e-3)
    config = config_of(tmp_path, manifest, vision="facebook/dinov2-small")
    prepare_run(config)
    run = make_run(config, manifest, CPU, checkpoint_store(config), save_checkpoint(config, manifest))
    assert run.model.encoder.dino.config.layer_norm_eps == 1e-3
    assert run.model.encoder.dino.config.hidden_size == 24


def test_a_run_of_an_earlier_release_gets_its_architecture_as_it_was_resumed(tmp_path, manifest):
    """Without architecture.json, and without a network: by the table."""
    config = config_of(tmp_path, manifest, "tiny-dinov2", "tiny-llama", "--model.init", "random")
    prepare_run(config)
    save_checkpoint(config, manifest)
    (config.run_dir / ARCHITECTURE).unlink()
    as_hub = dataclasses.replace(config, model=dataclasses.replace(config.model, init="hub"))
    path = config.run_dir / "config.json"
    path.write_text(path.read_text().replace('"init": "random"', '"init": "hub"'))
    prepare_run(as_hub)
    kept = kept_architecture(as_hub)
    assert kept and kept.language.config["vocab_size"] == ARCHITECTURES["tiny-llama"]["vocab_size"]
    assert look_at_hub(as_hub, begun=True)[0].level == "ok"


def test_a_folder_that_was_mended_before_the_first_checkpoint_is_read_again(tmp_path, manifest):
    vision, language = write_vision(tmp_path / "vision"), write_language(tmp_path / "language")
    config = config_of(tmp_path, manifest, str(vision), str(language))
    prepare_run(config)
    change_json(language / "config.json", rms_norm_eps=0.25)
    prepare_run(config)
    kept = kept_architecture(config)
    assert kept and kept.language.config["rms_norm_eps"] == 0.25
    save_checkpoint(config, manifest)
    change_json(language / "config.json", rms_norm_eps=0.5)
    prepare_run(config)
    assert kept_architecture(config) == kept


def test_a_damaged_architecture_is_an_error_that_names_the_file(tmp_path, manifest):
    vision, language = write_vision(tmp_path / "vision"), write_language(tmp_path / "language")
    config = config_of(tmp_path, manifest, str(vision), str(language))
    prepare_run(config)
    (config.run_dir / ARCHITECTURE).write_text('{"vision": {}}')
    with pytest.raises(UserError, match=rf"{ARCHITECTURE}: damaged .*Restore it, or use another --run"):
        prepare_run(config)
    assert look_at_hub(config, begun=True)[0].level == "FAIL"


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "GatedRepo", ["gated on the hub, which needs a token (HTTP 401)", "HF_TOKEN"]),
        (403, "GatedRepo", ["gated on the hub, which needs a token (HTTP 403)", "HF_TOKEN"]),
        (401, "RepoNotFound", ["wants a token that may read it", "(HTTP 401)", "HF_TOKEN"]),
        (401, "", ["wants a token that may read it", "(HTTP 401)", "HF_TOKEN"]),
        (403, "", ["wants a token that may read it", "(HTTP 403)", "HF_TOKEN"]),
        (404, "RepoNotFound", ["has no model of that name (HTTP 404)", "Check the name"]),
        (503, "", ["neither a local folder nor reachable on the hub (HTTP 503)", "hf download"]),
    ],
)
def test_what_the_hub_refuses_is_one_line_of_the_start_and_of_the_doctor(
    hub, tmp_path, manifest, monkeypatch, status, code, said
):
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of HTTP 503
    hub.refuses[LANGUAGE] = (status, code)
    config = config_of(tmp_path, manifest)
    with pytest.raises(UserError) as error, exclusive(config.run_dir):  # as the command does
        prepare_run(config)
    message = str(error.value)
    assert "\n" not in message and not [word for word in [*said, LANGUAGE] if word not in message], message
    assert not config.run_dir.exists()
    found = {each.what: each for each in look_at_hub(config, begun=False)}[f"weights {LANGUAGE}"]
    assert found.level == "FAIL" and f"HTTP {status}" in found.value, str(found)
    assert "planted" not in message + str(found)


def test_a_model_of_the_hub_without_safetensors_is_refused(hub, tmp_path, manifest):
    whole = hub.models[LANGUAGE]
    (whole / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"owner/language' at [0-9a-f]{12}: has no model\.safetensors and no model"):
        prepare_run(config_of(tmp_path, manifest))


# ---- the tokenizer


def test_ids_are_those_of_tokenizer_json_whatever_class_is_declared(tmp_path):
    folder = write_language(tmp_path / "language")
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = published_tokenizer(ModelFiles("--model.language", str(folder)))
    save_tokenizer(tokenizer, tmp_path / "saved")
    wanted = [reference.encode(text).ids for text in TEXTS]
    for each in (tokenizer, load_tokenizer(tmp_path / "saved")):
        assert [each(text)["input_ids"] for text in TEXTS] == wanted
        assert each.eos_token_id == each.pad_token_id == reference.token_to_id("<|im_end|>")


def test_a_run_that_began_with_other_ids_keeps_them(hub, tmp_path, manifest):
    config = config_of(tmp_path, manifest)
    prepare_run(config)
    shutil.rmtree(config.run_dir / TOKENIZER)
    declared = AutoTokenizer.from_pretrained(hub.models[LANGUAGE])  # as an earlier release made it
    save_tokenizer(declared, config.run_dir / TOKENIZER)
    prepare_run(config)
    ids = [load_tokenizer(config.run_dir / TOKENIZER)(text)["input_ids"] for text in TEXTS]
    assert ids == [declared(text)["input_ids"] for text in TEXTS]


def test_what_is_kept_is_readable_json(tmp_path, manifest):
    vision, language = write_vision(tmp_path / "vision"), write_language(tmp_path / "language")
    config = config_of(tmp_path, manifest, str(vision), str(language))
    prepare_run(config)
    raw = json.loads((config.run_dir / ARCHITECTURE).read_text())
    assert raw["language"]["name"] == str(language) and raw["language"]["config"]["hidden_size"] == 32
    assert raw["vision"]["revision"] == "" and raw["vision"]["config"]["model_type"] == "dinov2"
    model = build_model(config.model, manifest.spec.latent_shape, 0, architecture=kept_architecture(config))
    assert model.llm.config.hidden_size == 32
