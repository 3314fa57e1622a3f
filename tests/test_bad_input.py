"""Bad input to training gets one clear line, exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import make_spec, write_dataset, write_shard

from fvlm.data.memory import IngestMemory
from fvlm.data.schema import FORMAT_VERSION, ShardFile
from fvlm.data.shards import write_manifest
from fvlm.errors import UserError
from fvlm.files import sha256_file
from fvlm.train.resume import Choice
from fvlm.train.run_folder import CHECKPOINTS, CONFIG, exclusive
from fvlm.train.state import MODEL
from fvlm.train.store import checkpoint_store
from ray_jobs import train
from ray_jobs.cli import run_command
from ray_jobs.options import parse
from ray_jobs.training import make_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that is never changed."""
    folder = tmp_path_factory.mktemp("good")
    write_dataset(folder, clips=24)
    return folder


@pytest.fixture
def data(good: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(good, tmp_path / "data"))


def arguments(data: Path, runs: Path, *more: str) -> list[str]:
    options = {"data.frame-size": 56, "data.global-batch": 4, "data.lanes": 4, "log.wandb": "off"}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["demo", "--data.path", str(data), "--runs-dir", str(runs), *given, *more]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    """Run the command in this process, Ray left out: it must end with exit code 2. -> what it says on stderr."""

    def no_ray(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started before the input was checked")

    monkeypatch.setattr(train, "connect", no_ray)
    monkeypatch.setattr(sys, "argv", ["train", *args])
    with pytest.raises(SystemExit) as end:
        run_command(train.main)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return " ".join(said.err.replace("│", " ").split())


@pytest.fixture
def refusal(monkeypatch, capsys, tmp_path):
    """`refusal(data, "--more", ...)` -> the message; the folder of runs must be as it was."""

    def run(data: Path, *more: str) -> str:
        runs = tmp_path / "runs"
        before = tree(runs)
        message = refused(monkeypatch, capsys, arguments(data, runs, *more))
        assert tree(runs) == before
        assert before or not list(runs.glob("*"))
        return message

    return run


def require(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def test_the_good_dataset_is_accepted(good, tmp_path):
    """Otherwise the refusals below would prove little."""
    config = parse(arguments(good, tmp_path / "runs"))
    train.prepare_run(config)
    assert (config.run_dir / CONFIG).is_file()


# The command line


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--optim.learning-rate", "1"], ["--optim.learning-rate", "--optim."]),
        (["--data.globl-batch", "8"], ["--data.globl-batch", "--data.global-batch"]),
        (["--train.max-step", "8"], ["--train.max-step", "--train.max-steps"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(refusal, good, words, wanted):
    require(refusal(good, *words), *wanted)


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--train.max-steps", "many"], ["max-steps", "many", "INT"]),
        (["--optim.lr", "fast"], ["--optim.lr", "fast", "FLOAT"]),
        (["--model.init", "scratch"], ["--model.init", "scratch", "hub", "random"]),
    ],
)
def test_an_ill_typed_value_is_refused_with_its_key_and_type(refusal, good, words, wanted):
    require(refusal(good, *words), *wanted)


def test_an_unknown_preset_is_refused_with_those_there_are(monkeypatch, capsys):
    require(refused(monkeypatch, capsys, ["dem"]), "dem", "demo", "joint_multifine")


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--scale.workers", "3"], ["--scale.workers 3 does not divide --data.lanes 4", "1, 2, 4"]),
        (["--data.lanes", "3"], ["--data.lanes 3 does not divide --data.global-batch 4", "1, 2, 4"]),
        (["--eval.path", "held-out"], ["--eval.path", "--eval.every is 0"]),
        (["--train.save-every", "0"], ["--train.save-every is 0", "above 0"]),
        (["--optim.warmup-steps", "-1"], ["--optim.warmup-steps is -1", "must not be negative"]),
        (["--run", "../elsewhere"], ["--run '../elsewhere'", "name of a folder"]),
    ],
)
def test_values_that_cannot_be_are_refused_with_those_that_can(refusal, good, words, wanted):
    require(refusal(good, *words), "error: ", *wanted)


def test_a_missing_data_path_ends_the_real_command_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "ray_jobs.train", "demo", "--runs-dir", str(tmp_path / "runs")]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    require(done.stderr, "error: --data.path is missing", "ray_jobs.prepare")
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


# The dataset


def test_a_folder_that_is_no_dataset_is_refused(refusal, tmp_path):
    require(refusal(tmp_path / "absent"), "absent: not a dataset", "manifest.json", "ray_jobs.prepare")


def test_an_empty_dataset_is_refused(refusal, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    write_manifest(folder, make_spec(), [], rejected=3)
    require(refusal(folder), str(folder), "0 clips do not fill one global batch of 4", "more clips")


def test_fewer_clips_than_a_global_batch_are_refused(refusal, good):
    message = refusal(good, "--data.global-batch", "32", "--data.lanes", "32")
    require(message, str(good), "24 clips do not fill one global batch of 32", "--data.global-batch 24 or less")


@pytest.mark.parametrize("change", ["cut", "empty", "grown", "gone"])
def test_a_truncated_replaced_or_missing_shard_is_refused_by_name(refusal, data, change):
    shard = data / "shard-00001.parquet"
    content = shard.read_bytes()
    shard.unlink()
    if change != "gone":
        middle = len(content) // 2  # with bytes put in there, the footer at the end is still a good one
        damaged = {"cut": content[:-100], "empty": b"", "grown": content[:middle] + bytes(9) + content[middle:]}
        shard.write_bytes(damaged[change])
    wanted = "is not there" if change == "gone" else "truncated or replaced"
    require(refusal(data), str(shard), wanted, "Restore it")


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"stored_frames": 4}, ["num_frames 8 != 4"]),
        ({"frame_size": 112}, ["frame_size 56 != 112"]),
        ({"frame_codec": "png"}, ["frame_codec 'jpeg' != 'png'"]),
        ({"latent_codec": "sd-vae-ft-mse"}, ["latent_codec 'test-noise' != 'sd-vae-ft-mse'"]),
        ({"format_version": FORMAT_VERSION + 1}, [f"format_version is {FORMAT_VERSION + 1}", "reads version"]),
    ],
    ids=["frames", "size", "frame-codec", "latent-codec", "version"],
)
def test_a_shard_that_is_not_what_the_manifest_says_is_refused_by_name(refusal, data, changes, wanted):
    """The list of files agrees with it, so only the shard itself can tell."""
    shard = data / "shard-00001.parquet"
    other = make_spec(**changes)
    foreign = write_shard(shard, other, range(8, 16))
    kept = [
        ShardFile(path.name, 8, path.stat().st_size, sha256_file(path))
        for path in (data / "shard-00000.parquet", data / "shard-00002.parquet")
    ]
    write_manifest(data, make_spec(), [kept[0], foreign, kept[1]], rejected=0)
    require(refusal(data), str(shard), *wanted)


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--data.frame-size", "112"], ["frames of 56 px", "wants 112", "--data.frame-size 56"]),
        (["--data.num-frames", "9"], ["8 frames a clip", "wants 9", "--data.num-frames 8 or less"]),
    ],
)
def test_a_dataset_of_another_size_than_the_config_wants_is_refused(refusal, good, words, wanted):
    require(refusal(good, *words), str(good), *wanted)


def test_a_manifest_of_a_newer_format_or_a_damaged_one_is_refused(refusal, data):
    path = data / "manifest.json"
    good = json.loads(path.read_text())
    newer = good | {"spec": good["spec"] | {"format_version": FORMAT_VERSION + 1}}
    path.write_text(json.dumps(newer))
    require(refusal(data), str(path), f"format_version is {FORMAT_VERSION + 1}", "prepare it again")
    path.write_text(json.dumps(good)[:-20])
    require(refusal(data), str(path), "damaged")
    path.write_text(json.dumps(good))
    files = data / "files.parquet"
    files.write_bytes(files.read_bytes()[:-1] + b"x")
    require(refusal(data), str(files), "SHA-256", "Restore")


# The run folder


@pytest.fixture
def begun(good: Path, tmp_path: Path) -> Path:
    """A run folder with a checkpoint of step 0."""
    config = parse(arguments(good, tmp_path / "runs"))
    manifest = train.prepare_run(config)
    run = make_run(config, manifest, torch.device("cpu"), checkpoint_store(config), Choice(None, 0, 0, ()))
    for parameter in (p for group in run.optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()  # so that there are moments
    run.save(config.run_dir / CHECKPOINTS)
    return config.run_dir


def test_a_run_folder_of_another_config_is_refused_with_every_difference(refusal, begun, good):
    message = refusal(good, "--optim.lr", "0.5", "--data.max-caption-tokens", "7", "--train.max-steps", "999")
    require(message, str(begun), "optim.lr: 0.001 -> 0.5", "data.max_caption_tokens: 24 -> 7", "another --run name")
    assert "max_steps" not in message  # may change


def test_a_run_folder_of_another_dataset_is_refused(refusal, begun, good, tmp_path):
    other = write_dataset(tmp_path / "other", clips=24, seed=1)
    require(refusal(Path(other.root)), str(begun), f"dataset: {good} -> {other.root}", "another --run name")


def test_the_same_dataset_may_move(begun, data):
    train.prepare_run(parse(arguments(data, begun.parent)))


def test_a_damaged_run_config_is_refused(refusal, begun, good):
    (begun / CONFIG).write_text("{")
    require(refusal(good), str(begun / CONFIG), "missing or damaged", "another --run name")


def restore(begun: Path, good: Path, *more: str) -> None:
    """What every rank does with the newest checkpoint."""
    config = parse(arguments(good, begun.parent, *more))
    manifest = train.prepare_run(config)
    before = tree(begun)
    try:
        store = checkpoint_store(config)
        make_run(config, manifest, torch.device("cpu"), store, Choice("step-00000000", 0, 0, ()))
    finally:
        assert tree(begun) == before


def test_the_good_checkpoint_is_accepted(begun, good):
    restore(begun, good)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensors_that_do_not_fit(begun, good):
    """config.json was edited to agree with the command line; the tensors cannot be."""
    began = json.loads((begun / CONFIG).read_text())
    began["config"]["model"]["query_width"] = 48
    (begun / CONFIG).write_text(json.dumps(began))
    with pytest.raises(UserError) as error:
        restore(begun, good, "--model.query-width", "48")
    require(str(error.value), "step-00000000", "another architecture", "(96,", "(48,", "or another --run name")


def test_a_checkpoint_with_a_flipped_byte_is_refused(begun, good):
    path = begun / CHECKPOINTS / "step-00000000" / MODEL
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        restore(begun, good)
    require(str(error.value), str(path), "missing or damaged", f"Delete {path.parent}")


# What only shows when a run begins


def test_a_language_model_that_cannot_be_had_leaves_no_run_behind(refusal, good, tmp_path):
    absent = str(tmp_path / "no-such-model")
    message = refusal(good, "--model.init", "hub", "--model.language", absent)
    require(message, f"--model.language '{absent}'", "neither a local folder nor reachable on the hub")


def test_captions_of_one_token_without_a_start_token_are_refused(refusal, good):
    message = refusal(good, "--data.max-caption-tokens", "1", "--objective.no-caption-start")
    require(message, "--data.max-caption-tokens is 1", "Use 2 or more, or --objective.caption-start")
    assert parse(arguments(good, Path("runs"), "--data.max-caption-tokens", "1")).data.max_caption_tokens == 1


def test_an_absent_checkpoint_to_import_leaves_no_run_behind(refusal, good, tmp_path):
    absent = str(tmp_path / "latest.pt")
    require(refusal(good, "--import-checkpoint", absent), absent)


def test_a_run_that_is_being_trained_is_refused(begun, good, monkeypatch, capsys):
    with exclusive(begun):
        message = refused(monkeypatch, capsys, arguments(good, begun.parent))
    require(message, str(begun), "trained by another process")


def test_what_fails_once_a_run_has_begun_is_the_last_line_of_its_log(good, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(sys, "argv", ["train", *arguments(good, tmp_path / "runs")])
    with pytest.raises(SystemExit) as end:
        run_command(train.main)
    reason = capsys.readouterr().err.strip().removeprefix("error: ")
    assert end.value.code == 2 and "127.0.0.1:1" in reason
    (log,) = (tmp_path / "runs").glob("*/train.log")
    assert log.read_text().endswith(f" failed: {reason}\n")


def test_more_gpus_than_a_machine_has_are_refused_instead_of_waited_for(good, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0, "object_store_memory": 1e9})
    config = parse(arguments(good, tmp_path, "--scale.workers", "2"))
    memory = IngestMemory(block_steps=1, block_bytes=1_000_000, waiting=1, compressed=0)
    train.check_resources(config, memory, use_gpu=False)
    with pytest.raises(UserError, match="2 workers need 2 GPUs, and the cluster has 1"):
        train.check_resources(config, memory, use_gpu=True)


def test_an_object_store_that_would_spill_is_refused(good, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "object_store_memory": 1e8})
    memory = IngestMemory(block_steps=1, block_bytes=20_000_000, waiting=1, compressed=0)
    with pytest.raises(UserError, match="object store holds 100 MB and the ingest needs 340 MB"):
        train.check_resources(parse(arguments(good, tmp_path)), memory, use_gpu=False)
