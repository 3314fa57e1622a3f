"""W&B's own variables are obeyed where our options are at their default, and the log says what decided."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wandb_file import records, starts

from fvlm.checks.access import look_at_wandb
from fvlm.train.sinks import TRAIN_LOG
from fvlm.train.wandb_choice import wandb_choice
from fvlm.train.wandb_sink import Wandb
from ray_jobs.options import parse
from ray_jobs.training import make_sinks


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.mark.parametrize(
    "variable, options, mode, said",
    [
        ("disabled", [], "off", "W&B: off (WANDB_MODE=disabled)"),
        ("offline", [], "offline", "W&B: offline (WANDB_MODE=offline), project fvlm-demo (--log.wandb-project)"),
        ("dryrun", [], "offline", "W&B: offline (WANDB_MODE=dryrun), project"),
        ("online", [], "online", "W&B: online (WANDB_MODE=online), project"),
        ("Disabled", [], "off", "W&B: off (WANDB_MODE=Disabled)"),
        ("disabled", ["--log.wandb", "offline"], "offline", "(--log.wandb offline, over WANDB_MODE=disabled)"),
        ("online", ["--log.wandb", "off"], "off", "W&B: off (--log.wandb off, over WANDB_MODE=online)"),
        ("offline", ["--log.wandb", "offline"], "offline", "W&B: offline (--log.wandb offline), project"),
        ("sometimes", [], "offline", "(there is no key; WANDB_MODE=sometimes means nothing to W&B)"),
        ("", [], "offline", "W&B: offline (there is no key), project"),
    ],
)
def test_the_mode(monkeypatch, variable, options, mode, said):
    monkeypatch.setenv("WANDB_MODE", variable)
    choice = wandb_choice(parse(["demo", *options]))
    assert choice.mode == mode and said in choice.said


def test_a_key_makes_it_online_and_is_never_said(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    choice = wandb_choice(parse(["demo"]))
    assert choice.said.startswith("W&B: online (WANDB_API_KEY has a key)") and "planted" not in choice.said
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_choice(parse(["demo"])).mode == "off"


def test_project_and_entity(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    choice = wandb_choice(parse(["demo"]))  # whose default is the preset's
    assert (choice.project, choice.entity) == ("theirs", "team")
    assert choice.said.endswith("project theirs (WANDB_PROJECT), entity team (WANDB_ENTITY)")
    choice = wandb_choice(parse(["demo", "--log.wandb-project", "mine"]))
    assert choice.project == "mine" and "project mine (--log.wandb-project, over WANDB_PROJECT=theirs)" in choice.said
    assert wandb_choice(parse(["joint_multifine"])).project == "theirs"


def test_the_log_says_it_and_a_disabled_one_is_not_begun(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = parse(["demo", "--runs-dir", str(tmp_path)])
    config.run_dir.mkdir()
    sinks = make_sinks(config, 0, torch.device("cpu"))
    assert not any(isinstance(sink, Wandb) for sink in sinks)
    assert "W&B: off (WANDB_MODE=disabled)" in (config.run_dir / TRAIN_LOG).read_text()
    assert not (config.run_dir / "wandb_id").exists()
    assert str(look_at_wandb(config)[0]) == "ok    W&B: off (WANDB_MODE=disabled)"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "offline (WANDB_MODE=offline)" in look_at_wandb(config)[0].value


REAL = """
import sys
from fvlm.train.wandb_sink import Wandb
from ray_jobs.options import parse
config = parse(["demo", "--runs-dir", sys.argv[1]])
config.run_dir.mkdir()
sink = Wandb(config, lambda text: print("NOTE", text))
sink.write([], {"step": 1, "train/loss": 1.0})
sink.close()
"""


def test_its_own_file_has_the_project_and_the_entity_of_the_variables(tmp_path):
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team"}
    done = subprocess.run([sys.executable, "-c", REAL, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "NOTE" not in done.stdout, done.stdout + done.stderr
    (folder,) = starts(Path(tmp_path / "demo"))
    begun = [record.run for record in records(folder) if record.HasField("run")]
    assert (begun[0].project, begun[0].entity) == ("theirs", "team")
