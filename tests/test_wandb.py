"""W&B as a run uses it: its real service, offline, also really killed and really stopped. There is no server here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from wandb_file import history, records, starts
from wandb_rank import MOST_WAITING

from fvlm.config import Config
from fvlm.train import wandb_sink
from fvlm.train.sinks import WANDB_ID
from fvlm.train.wandb_sink import COMMIT, Entry, Wandb

PATIENCE_S = 240
SCRIPT = str(Path(__file__).with_name("wandb_rank.py"))
STOPPED_STEPS = 300


def begin(how: str, folder: Path, first: int, stop: int, **environment: str) -> subprocess.Popen[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | environment
    args = [sys.executable, SCRIPT, how, str(folder), str(first), str(stop)]
    return subprocess.Popen(args, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def end(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it says, once it has ended by itself."""
    try:
        output = process.communicate(timeout=PATIENCE_S)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    said: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return said


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three starts of a run: each of the later ones goes over the last two steps before it again."""
    folder = tmp_path_factory.mktemp("starts")
    for first, stop in ((1, 4), (3, 6), (5, 8)):
        faster = {"WANDB_X_STATS_SAMPLING_INTERVAL": "0.1", COMMIT: f"commit-{first}"}
        said = end(begin("plain", folder, first, stop, **faster))
        assert said["notes"] == []
    return folder / "run"


def test_all_starts_are_one_run_with_its_steps(run_dir):
    identity = (run_dir / WANDB_ID).read_text().strip()
    assert [folder.name.rsplit("-", 1)[1] for folder in starts(run_dir)] == [identity] * 3
    assert [[row["_step"] for row in history(folder)] for folder in starts(run_dir)] == [
        [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 8],
    ]  # fmt: skip


def test_every_evaluation_is_in_it_with_its_step_and_its_pictures(run_dir):
    for folder in starts(run_dir):
        for row in history(folder):
            assert row["train/loss"] == 1 / row["_step"]
            assert ("eval/caption/ratio" in row) == (row["_step"] % 2 == 0)
            if row["_step"] % 2:
                continue
            assert row["eval/step"] == row["_step"]
            (name,), (caption,) = row["eval/pictures/filenames"], row["eval/pictures/captions"]
            assert caption == f"step {row['_step']}" and (folder / "files" / name).is_file()


def test_config_code_and_system_figures_are_in_it(run_dir):
    for first, folder in zip((1, 3, 5), starts(run_dir), strict=True):
        config: dict[str, Any] = {}
        code, system = [], 0
        for record in records(folder):
            for update in (record.run.config.update, record.config.update):
                config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in update}
            if record.HasField("artifact") or record.request.HasField("log_artifact"):
                artifact = record.artifact if record.HasField("artifact") else record.request.log_artifact.artifact
                code += [entry.path for entry in artifact.manifest.contents]
            system += record.HasField("stats")
        assert config["commit"] == f"commit-{first}"
        assert config["optim"]["lr"] == 1 / first  # restarts change it
        assert "train/loop.py" in code and "config.py" in code
        assert system > 0


def test_a_dead_service_is_noted_once_counted_and_keeps_nobody(tmp_path):
    said = end(begin("killed", tmp_path, 1, 12))
    assert said["slowest"] < 1 and said["closed"] < 60
    first, *others, last = said["notes"]
    assert first.startswith("W&B: ") and "Training goes on" in first
    assert not any("Training goes on" in note for note in others)
    assert last.startswith("W&B lacks ") and "metrics.jsonl and evals.jsonl have them" in last


@pytest.mark.long
def test_a_service_that_hangs_is_given_a_moment_and_ended(tmp_path):
    """Ended: or this process would have waited for it at its own exit."""
    said = end(begin("stopped", tmp_path, 1, STOPPED_STEPS))
    assert said["slowest"] < 1 and said["closed"] < 20
    assert "it has not taken anything for long. Training goes on" in said["notes"][0]
    assert any("W&B did not end within" in note and "wandb sync" in note for note in said["notes"])
    lacks = int(said["notes"][-1].split()[2])
    assert 0 < lacks < 1.5 * STOPPED_STEPS - MOST_WAITING


@pytest.mark.long
def test_a_start_that_does_not_reach_wandb_is_kept_offline(tmp_path):
    away = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    said = end(begin("unreachable", tmp_path, 1, 4, **away))
    assert said["slowest"] < 1
    (note,) = said["notes"]
    assert "W&B cannot be reached" in note and f"wandb sync {tmp_path}/run/wandb/" in note
    (folder,) = starts(tmp_path / "run")
    assert [row["_step"] for row in history(folder)] == [1, 2, 3, 4]


def test_what_wandb_has_is_not_sent_again_but_for_evaluations(tmp_path, monkeypatch):
    """W&B had steps up to 7 when this start joined, and takes none that is behind."""
    monkeypatch.setattr(Wandb, "_begin", lambda self: None)
    config = Config(run="run", runs_dir=str(tmp_path))
    config.run_dir.mkdir(parents=True)
    sink = Wandb(config, lambda text: None)
    sink._next = 8
    logged: list[tuple[int, dict]] = []

    class Run:
        def log(self, values, step, commit=False):
            logged.append((step, values))

    for step in (6, 7, 10):
        sink._log(Run(), Entry(step, {"train/loss": 0.5}))
        sink._log(Run(), Entry(step, {"eval/caption/ratio": 1.0, "eval/step": step}))
    assert [(step, values.get("eval/step", "metrics")) for step, values in logged] == [
        (8, 6), (9, 7), (10, "metrics"), (10, 10),
    ]  # fmt: skip
    sink.close()


def test_the_commit_is_the_environments_or_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.setenv(COMMIT, "abc")
    assert wandb_sink.code_version([tmp_path]) == "abc"
    monkeypatch.delenv(COMMIT)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert wandb_sink.code_version([tmp_path]) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = wandb_sink.code_version([tmp_path])
    assert len(commit) == 40
    (tmp_path / "file").write_text("2")
    assert wandb_sink.code_version([tmp_path]) == f"{commit}-dirty"
