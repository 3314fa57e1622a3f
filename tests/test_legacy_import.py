"""The take-over of a run of the earlier trainer, by the product alone: its import, objective, optimiser and schedule.

Two sources of truth: the miniature that the earlier trainer itself wrote (skipped where it is absent), and a second
writer of the same formats (`legacy_writer.py`) with other sizes, three fine iterations, and a warm-up under way.
No name of a tensor is translated here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from legacy_run import (
    USED,
    Takeover,
    assert_rows,
    assert_sums,
    every_key,
    expected_row,
    one_thread,
    table_of,
    take_over,
)
from legacy_writer import LATENT, QUERY_WIDTH, blank_checkpoint, write_legacy_run
from reference import ReferenceModel, tiny_vision
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fvlm.convert.legacy_checkpoint import import_run
from fvlm.data.plan import Plan
from fvlm.data.read import BlockReader, ClipReader
from fvlm.data.shards import read_manifest
from fvlm.errors import UserError
from fvlm.model.hub import build_model
from fvlm.train.loop import Run
from fvlm.train.metrics import Clock, Metrics
from fvlm.train.optim import freeze_unreached, make_optimizer
from fvlm.train.state import checkpoints
from fvlm.train.step import train_step
from fvlm.train.store import LocalStore
from ray_jobs.options import parse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def miniature(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Takeover:
    if not (shared_dir / "legacy" / "latest.pt").is_file():
        pytest.skip(f"{shared_dir / 'legacy'} is absent: a run of the earlier trainer, too large for the repository")
    return take_over(shared_dir / "legacy", tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Takeover:
    old = tmp_path_factory.mktemp("second-writer")
    with one_thread():
        write_legacy_run(old)
    return take_over(old, tmp_path_factory.mktemp("second"))


@pytest.fixture(scope="module", params=["miniature", "second"])
def takeover(request: pytest.FixtureRequest) -> Takeover:
    return request.getfixturevalue(request.param)


# ---- the numbers, step by step


@dataclass(frozen=True)
class Continued:
    """What came of an imported run: `text` is what the import printed."""

    takeover: Takeover
    text: str
    rows: list[dict[str, float]]
    run: Run


@pytest.fixture(scope="module")
def continued(takeover: Takeover, tmp_path_factory: pytest.TempPathFactory) -> Continued:
    """Six steps of the product from its own checkpoint of the imported run."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        config, manifest, checkpoint = takeover.import_into(tmp_path_factory.mktemp("continued"))
    with one_thread():
        model = build_model(config.model, manifest.spec.latent_shape, config.train.seed, pretrained=False)
        freeze_unreached(model, config)
        optimizer = make_optimizer(model, config.optim)
        plan = Plan.of_config(manifest, config)
        run = Run(config, plan, model, optimizer, Metrics(config.train.ratio_window), Clock())
        run.restore(checkpoint)
        rows = []
        for step in takeover.expected["steps"]:
            scalars = train_step(model, optimizer, takeover.batch(step), run.step, config)
            run.step += 1
            rate = {"train/lr": optimizer.param_groups[0]["lr"]}
            rows.append({name: value.item() for name, value in scalars.items()} | rate)
    return Continued(takeover, printed.getvalue(), rows, run)


def test_an_imported_run_goes_on_with_the_losses_gradient_norms_and_rates_of_the_old_trainer(continued):
    assert continued.rows[0].keys() >= expected_row(continued.takeover.expected["steps"][0]).keys()
    assert_rows(continued.rows, continued.takeover.expected)


def test_after_six_steps_every_parameter_sums_to_what_the_old_trainer_had(continued):
    sums = {name: p.detach().double().sum().item() for name, p in continued.run.model.named_parameters()}
    assert_sums(sums, continued.takeover.expected)


def test_an_imported_run_begins_a_fresh_epoch_at_the_imported_step(continued):
    run, first = continued.run, continued.takeover.first
    reader = ClipReader(read_manifest(continued.takeover.folder / "data"), run.plan, len(USED))
    batches = [batch["clip_id"] for batch in BlockReader(reader).steps(first, run.step)]
    for number, (step, ids) in enumerate(zip(continued.takeover.expected["steps"], batches, strict=True), first):
        assert ids == [f"step-{number}-clip-{clip}" for clip in step["clips"]]
    assert run.plan.epochs(first) == 0.0
    assert run.plan.epochs(run.step) == 1.0


def test_parameters_that_never_had_a_gradient_stay_as_they_were(continued):
    old = torch.load(continued.takeover.latest, weights_only=False)["model_state_dict"]["video_end_token"]
    assert torch.equal(continued.run.model.video_end_token, old)


def test_the_averages_that_people_watched_go_on_though_they_are_numpys_numbers(second, tmp_path):
    old = torch.load(second.latest, weights_only=False)["metrics"]
    assert type(old["cap_ratio"]) is np.float64
    _, _, checkpoint = second.import_into(tmp_path)
    latest = json.loads((checkpoint / "state.json").read_text())["metrics"]["latest"]
    assert latest == {"caption/ratio_avg": old["cap_ratio"], "recon/ratio_avg": old["rec_ratio"]}


# ---- the table of all keys


def run_as_main(module: str, args: list[str]) -> int:
    """`python -m module args` without the seconds that another process takes to begin -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *args])
        patch.delitem(sys.modules, module, raising=False)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def test_the_table_names_every_key_of_the_file_and_where_it_went(continued):
    table = table_of(continued.text)
    assert table.keys() == every_key(continued.takeover.latest)
    first = continued.takeover.first
    assert f"A fresh epoch of this trainer's order begins at step {first}" in continued.text
    assert "NOTE" not in continued.text  # the settings are the old run's
    # Chosen by hand from the design; what else there is, the numbers above vouch for.
    layer = "encoder.dino.encoder.layer.1.attention"
    assert table[f"{layer}.attention.key.bias"] == f"{layer}.k_proj.bias"
    assert table[f"{layer}.output.dense.weight"] == f"{layer}.o_proj.weight"
    assert table["optimizer 1"] == "moments of q_init"
    assert "never had a gradient" in table["optimizer 6"]
    assert table["metrics.cap_ratio"] == "caption/ratio_avg"


def test_settings_other_than_the_old_runs_are_told(second, tmp_path, capsys):
    options = second.options(tmp_path, second.latest)
    options += ["--optim.lr", "1e-4", "--optim.beta2", "0.95", "--objective.fine-iterations", "2"]
    import_run(second.latest, parse(options), read_manifest(second.folder / "data"), LocalStore(tmp_path))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE")]
    assert len(notes) == 3
    assert any("optim.lr: 0.0005 there, 0.0001 here" in note for note in notes)
    assert any("objective.fine_iterations: 3 there, 2 here" in note for note in notes)
    assert any("betas: (0.9, 0.999) there, (0.9, 0.95) here" in note for note in notes)


def test_a_look_prints_the_table_and_writes_the_same_tensors_without_a_dataset(second, tmp_path, capsys):
    command = [str(second.latest), "--out", str(tmp_path), *second.architecture("config.")]
    assert run_as_main("fvlm.convert.legacy_checkpoint", command) == 0
    printed = capsys.readouterr().out
    assert table_of(printed).keys() == every_key(second.latest)
    _, _, imported = second.import_into(tmp_path / "other")
    (looked,) = checkpoints(tmp_path)
    assert f"written: {looked}" in printed
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, theirs = load_file(looked / name), load_file(imported / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


# ---- the whole job


def train(options: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_jobs.train", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.long
def test_the_whole_job_goes_on_with_the_old_trainers_numbers_and_imports_only_once(miniature, tmp_path, capsys):
    latest = tmp_path / "latest.pt"
    latest.symlink_to(miniature.latest)
    options = miniature.options(tmp_path, latest)
    started = train(options)
    assert started.returncode == 0, started.stdout + started.stderr
    assert "A fresh epoch of this trainer's order begins at step 6" in started.stdout
    assert table_of(started.stdout).keys() == every_key(latest)
    assert "resumed at step 6 from step-00000006" in started.stdout

    latest.unlink()  # whoever asked for it again would fail
    assert run_as_main("ray_jobs.train", options) == 0
    assert "finished: 12 of 12 steps" in capsys.readouterr().out
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-00000006", "step-00000012"]

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["step"] for row in rows] == [7, 8, 9, 10, 11, 12]
    assert_rows(rows, miniature.expected)
    assert [row["train/epoch"] for row in rows] == pytest.approx([n / 6 for n in range(1, 7)])
    tensors = load_file(folder / "step-00000012" / "model.safetensors")
    assert_sums({name: tensor.double().sum().item() for name, tensor in tensors.items()}, miniature.expected)


# ---- what is refused


class MakesFolder:
    """Unpickled by a trusting reader, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return os.mkdir, (self.path,)


def moved_to_the_end(tree: dict[str, Any], key: str) -> None:
    tree[key] = tree.pop(key)


def untied(raw: dict[str, Any]) -> None:
    raw["model_state_dict"]["llm.lm_head.weight"] = raw["model_state_dict"]["llm.lm_head.weight"] + 1


def cut_state(raw: dict[str, Any], key: str) -> None:
    state = raw["optimizer_state_dict"]["state"][0]
    state[key] = state[key][:, 1:]


BREAKAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown key of the model": (
        lambda raw: raw["model_state_dict"].update({"encoder.lora": torch.zeros(2)}), "encoder.lora maps to",
    ),
    "two keys for one parameter": (
        lambda raw: raw["model_state_dict"].update(
            {"encoder.dino.encoder.layer.0.attention.q_proj.bias": torch.zeros(24)}), "q_proj.bias both map to",
    ),
    "missing key of the model": (lambda raw: raw["model_state_dict"].pop("pred_head.decoder.2.bias"), "decoder.2.bias"),
    "wrong shape": (
        lambda raw: raw["model_state_dict"].update(q_init=torch.zeros(1, 7)), r"q_init is \(1, 7\), .* is \(1, 20\)",
    ),
    "another order": (lambda raw: moved_to_the_end(raw["model_state_dict"], "q_init"), "the order .*from z_vae_init"),
    "a head of its own": (untied, "llm.lm_head.weight is not the same as llm.model.embed_tokens.weight"),
    "moments missing": (
        lambda raw: raw["optimizer_state_dict"]["state"].pop(1), r"state 1 \(q_init\) is missing, .* trains",
    ),
    "moments of an untrained parameter": (
        lambda raw: raw["optimizer_state_dict"]["state"].update({6: raw["optimizer_state_dict"]["state"][5]}),
        r"state 6 \(video_end_token\) is there, .* does not train",
    ),
    "moments of another shape": (
        lambda raw: cut_state(raw, "exp_avg_sq"), r"state 0.exp_avg_sq is \(1, 19\), but q_static"
    ),
    "moments of no parameter": (
        lambda raw: raw["optimizer_state_dict"]["state"].update({999: {}}), r"indices \[999\]",
    ),
    "moments of another optimizer": (
        lambda raw: raw["optimizer_state_dict"]["state"][3].pop("exp_avg"), r"state 3 \(coarse_token\) has the keys",
    ),
    "another count of parameters": (
        lambda raw: raw["optimizer_state_dict"]["param_groups"][0]["params"].pop(), "has 137 .* the model 138",
    ),
    "no moments at all": (lambda raw: raw["optimizer_state_dict"].clear(), "optimizer_state_dict has the keys"),
    "schedule of another step": (lambda raw: raw["scheduler_state_dict"].update(last_epoch=3), "step is 4, .* is 3"),
    "no schedule": (lambda raw: raw["scheduler_state_dict"].clear(), "last_epoch is None"),
    "a section of another kind": (lambda raw: raw.update(metrics=None), "metrics is a NoneType"),
    "top-level key missing": (lambda raw: raw.pop("scheduler_state_dict"), r"missing keys \['scheduler_state_dict'\]"),
    "top-level key too many": (lambda raw: raw.update(ema={}), r"unknown keys \['ema'\]"),
}  # fmt: skip


def assert_refused(second: Takeover, folder: Path, latest: Path, message: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(str(latest))}.*{message}"):
        second.import_into(folder, latest)
    assert list((folder / "checkpoints").rglob("*")) == []


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name_and_nothing_is_written(second, tmp_path, breakage):
    spoil, message = BREAKAGES[breakage]
    raw = torch.load(second.latest, weights_only=False, mmap=True)
    spoil(raw)
    torch.save(raw, tmp_path / "spoilt.pt")
    assert_refused(second, tmp_path, tmp_path / "spoilt.pt", message)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused_by_name(second, tmp_path, share):
    content = second.latest.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    assert_refused(second, tmp_path, tmp_path / "cut.pt", "cannot be read; cut short or damaged")


def test_a_checkpoint_that_is_not_there_is_named(second, tmp_path):
    assert_refused(second, tmp_path, tmp_path / "none.pt", "no such file")


def test_code_in_a_checkpoint_is_refused_by_its_name_and_not_run(second, tmp_path, capsys):
    raw = torch.load(second.latest, weights_only=False, mmap=True)
    made = tmp_path / "made"
    raw["metrics"]["cap_ratio"] = MakesFolder(made)
    torch.save(raw, tmp_path / "evil.pt")
    torch.load(tmp_path / "evil.pt", weights_only=False, mmap=True)
    assert made.exists()  # it does run where it is trusted
    made.rmdir()
    assert_refused(second, tmp_path, tmp_path / "evil.pt", r"would run code .*mkdir.* Nothing in it was run")
    assert run_as_main("ray_jobs.train", second.options(tmp_path, tmp_path / "evil.pt")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'evil.pt'}: refused; loading it would run code")
    assert not made.exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- memory

IMPORT = """
import sys
from pathlib import Path
from fvlm.convert.legacy_checkpoint import import_run
from fvlm.data.shards import read_manifest
from fvlm.model.hub import build_model
from fvlm.train.store import LocalStore
from ray_jobs.options import parse
config, manifest = parse(sys.argv[2:]), read_manifest(sys.argv[1])
build_model(config.model, manifest.spec.latent_shape, 0, pretrained=False)  # what it imports is no part of the import
print("ready", flush=True)
sys.stdin.readline()
import_run(Path(config.import_checkpoint), config, manifest, LocalStore(Path(config.runs_dir)))
"""


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0  # a process that has ended has none


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells a process's memory")
def test_a_large_checkpoint_goes_from_file_to_file_and_is_never_held_in_memory(second, tmp_path):
    language = LlamaConfig(**second.expected["llm"] | {"vocab_size": 500_000}, tie_word_embeddings=True)
    language.save_pretrained(tmp_path / "language")
    model = ReferenceModel(tiny_vision(layers=4), LlamaForCausalLM(language), QUERY_WIDTH, LATENT)
    torch.save(blank_checkpoint(model, second.first), tmp_path / "latest.pt")
    size = (tmp_path / "latest.pt").stat().st_size
    assert size > 200e6
    options = [*second.options(tmp_path / "runs", tmp_path / "latest.pt"), "--model.language", f"{tmp_path}/language"]
    command = [sys.executable, "-c", IMPORT, str(second.folder / "data"), *options]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    (written,) = checkpoints(tmp_path / "runs")
    assert sum(file.stat().st_size for file in written.iterdir()) > 0.9 * size
    assert peak - before < 0.15 * size
