"""Every path of a command line is absolute before anything reads it, and a job is given no relative one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from datasets import write_dataset

from fvlm import presets
from fvlm.config import Config, is_uri
from fvlm.errors import UserError
from fvlm.train.run_folder import open_run
from fvlm.train.store import SAVED
from ray_jobs import paths, prepare
from ray_jobs.convert import ConvertConfig, convert
from ray_jobs.options import parse
from ray_jobs.paths import CONFIG_PATHS, absolute, absolute_paths, fixed_paths, get, option

FREE_TEXT = {"preset", "run", "ingest_memory", "log.wandb_project"}
"""Keys of a config that hold text of any kind and are no paths."""
OPTIONS = {"data.path": "clips", "runs_dir": "r", "data.cache_dir": "./cache", "eval.path": "../held",
           "import_checkpoint": "old/latest.pt", "train.checkpoint_dir": "kept", "train.compile_cache": "programs",
           "model.vision": "models/vision", "model.language": "models/language"}  # fmt: skip


def words(values: dict[str, str]) -> list[str]:
    return ["joint_multifine", *(word for key, value in values.items() for word in (option(key), value))]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folders of two models, and a home that is another folder."""
    (tmp_path / "here" / "models" / "vision").mkdir(parents=True)
    (tmp_path / "here" / "models" / "language").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_every_text_of_a_config_is_known_to_be_a_path_or_none():
    texts = set()
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else [section]
        prefix = f"{section.name}." if dataclasses.is_dataclass(value) else ""
        texts |= {f"{prefix}{field.name}" for field in fields if field.type == "str"}
    assert texts == FREE_TEXT | set(CONFIG_PATHS)
    assert set(OPTIONS) == set(CONFIG_PATHS)


def test_the_command_line_makes_every_path_absolute(here):
    config = parse(words(OPTIONS))
    assert {key: get(config, key) for key in CONFIG_PATHS} == {key: str(here / value) for key, value in OPTIONS.items()}
    assert config.run_dir == here / "r" / "joint_multifine"
    assert parse(["demo"]).runs_dir == str(here / "runs")  # the default too
    assert dict(zip(fixed_paths(config)[::2], fixed_paths(config)[1::2], strict=True)) == {
        option(key): str(here / value) for key, value in OPTIONS.items()
    }


def test_a_home_is_expanded_but_for_what_lies_on_each_nodes_own_disk(here):
    config = parse(words(dict.fromkeys(OPTIONS, "~/x")))
    home = str(here.parent / "home" / "x")
    assert {key: get(config, key) for key in CONFIG_PATHS} == dict.fromkeys(CONFIG_PATHS, home) | {
        "train.compile_cache": "~/x"
    }
    with pytest.raises(UserError, match=r"--data\.path '~nobody-of-that-name/x': there is no such home folder"):
        absolute("--data.path", "~nobody-of-that-name/x")


def test_uris_names_and_what_is_not_given_stay_as_they_are(here):
    uris = {"data.path": "s3://b/a/../clips?x=1", "eval.path": "gs://b/held", "train.checkpoint_dir": "file:///kept/"}
    config = parse(words(uris))
    assert {key: get(config, key) for key in uris} == uris
    assert all(is_uri(get(config, key)) for key in uris)
    named = parse(words({"model.vision": "facebook/dinov2-base", "model.language": "models/none"}))
    assert (named.model.vision, named.model.language) == ("facebook/dinov2-base", "models/none")
    assert (named.data.path, named.data.cache_dir, named.import_checkpoint) == ("", "", "")
    # Folders by their spelling alone, so that what is said of them names the place.
    missing = parse(words({"model.vision": "./none", "model.language": "~/none"}))
    assert missing.model.vision == str(here / "none")
    assert missing.model.language == str(here.parent / "home" / "none")
    assert absolute_paths(config) == config


@pytest.mark.parametrize("key", CONFIG_PATHS)
def test_a_submitted_job_is_refused_a_relative_path(key, here, monkeypatch):
    fixed = {key: str(here / value) for key, value in OPTIONS.items()}
    monkeypatch.setattr(paths, "in_job_copy", lambda: True)
    assert parse(words(fixed))
    with pytest.raises(UserError, match=f"{option(key)} '{OPTIONS[key]}' is relative, but a submitted job runs in"):
        parse(words(fixed | {key: OPTIONS[key]}))


def test_preparing_and_converting_in_a_job_are_refused_relative_paths_too(here, monkeypatch):
    monkeypatch.setattr(paths, "in_job_copy", lambda: True)
    given = {"videos": here, "captions": here / "c.csv", "out": here / "out"}
    for name, path in given.items():
        config = prepare.PrepareConfig(**given | {name: path.relative_to(here)})
        with pytest.raises(UserError, match=f"--{name} .* is relative, but a submitted job"):
            prepare.prepare(config)
    with pytest.raises(UserError, match=r"--latents 'models/vision' is relative"):
        prepare.prepare(prepare.PrepareConfig(**given, latents="models/vision"))
    for src, out, said in (("s", "/o", "--src 's'"), ("/s", "o", "--out 'o'")):
        with pytest.raises(UserError, match=f"{said} is relative"):
            convert(ConvertConfig(Path(src), Path(out)))


def test_a_dataset_may_not_be_made_in_its_source_through_a_link_either(here):
    (here / "src").mkdir()
    (here / "link").symlink_to("src")
    with pytest.raises(UserError, match="lies in --src"):
        convert(ConvertConfig(Path("src"), Path("link/out")))


# ---- a run and its model's folder


@pytest.fixture
def manifest(tmp_path):
    return write_dataset(tmp_path / "data", clips=8, shards=1)


def opened(manifest, *model: str) -> None:
    args = ["demo", "--runs-dir", str(Path(manifest.root).parent / "runs"), "--data.path", manifest.root]
    run_dir = open_run(parse([*args, *model]), manifest)
    (run_dir / SAVED).write_text("step-00000010")  # a run without a finished step would take any config


def test_a_run_goes_on_with_its_models_folder_however_and_from_wherever_it_is_named(here, manifest, monkeypatch):
    opened(manifest, "--model.vision", "models/vision")
    (here.parent / "link").symlink_to(here / "models")
    for folder, name in {
        here: "models/../models/vision/",
        here / "models": "vision",
        here.parent: "link/vision",
        Path("/"): str(here / "models" / "vision"),
    }.items():
        monkeypatch.chdir(folder)
        opened(manifest, "--model.vision", name)


def test_a_run_refuses_another_folder_under_the_same_relative_name(here, manifest, monkeypatch):
    opened(manifest, "--model.vision", "models/vision")
    (here.parent / "elsewhere" / "models" / "vision").mkdir(parents=True)
    monkeypatch.chdir(here.parent / "elsewhere")
    with pytest.raises(UserError, match=f"model.vision: '{here}/models/vision' -> '{here.parent}/elsewhere/models"):
        opened(manifest, "--model.vision", "models/vision")


def test_a_run_whose_config_names_the_folder_relatively_is_not_locked_out(here, manifest):
    """As an earlier release stored it."""
    config = presets.get("demo", runs_dir=str(here.parent / "runs"))
    open_run(dataclasses.replace(config, model=dataclasses.replace(config.model, vision="models/vision")), manifest)
    opened(manifest, "--model.vision", "models/vision")
