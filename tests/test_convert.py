"""The earlier trainer's shards as our dataset: what arrives, what is refused and why, and what a kill leaves."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from legacy_shards import LAYOUT, assert_same, make_sample, rows_of, spec, write_shard, write_source
from PIL import Image

from fvlm.convert.legacy_parts import Conversion
from fvlm.data import parts
from fvlm.data.schema import EncodedClip
from fvlm.data.shards import ShardWriter, check_shards, read_manifest
from fvlm.errors import UserError
from ray_jobs.convert import ConvertConfig, convert

TRAINED_ON = np.linspace(0, 23, 8, dtype=int)

CLUSTER = """
import sys, ray
from ray_jobs.cluster import connect
with connect(num_cpus=2):
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Cluster:
    """One cluster for all commands here: a cluster of its own costs each of them several seconds."""

    address: str
    environment: dict[str, str]

    def start(self, src: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ray_jobs.convert", "--src", str(src), "--out", str(out), *flags]
        return subprocess.Popen(
            [*command, "--address", self.address],
            env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def convert(self, src: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        process = self.start(src, out, *flags)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdin
        yield Cluster(process.stdout.readline().strip(), environment)
        process.stdin.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures(row: dict[str, Any], frames: int) -> np.ndarray:
    """[T, S, S, 3] uint8, decoded by Pillow."""
    return np.stack([np.asarray(Image.open(io.BytesIO(row[f"frame_{t:02d}"]))) for t in range(frames)])


def test_the_miniature_is_converted_bit_for_bit(shared_dir: Path, tmp_path: Path) -> None:
    legacy, out = shared_dir / "legacy", tmp_path / "dataset"
    if not legacy.is_dir():
        pytest.skip(f"{legacy} is absent")
    before = contents(legacy)
    command = [sys.executable, "-m", "ray_jobs.convert", "--src", str(legacy), "--out", str(out)]
    done = subprocess.run(
        [*command, "--codec", "lossless", "--verify"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "left alone, being no shard_*.pt: latest.pt" in done.stdout
    for line in ("clips in          12", "clips out         12", "verified          12 clips", "parts 2/2"):
        assert line in done.stdout
    assert contents(legacy) == before
    check_shards(read_manifest(out))
    rows = rows_of(out)
    samples = [
        (f"{name}/{index}", sample)
        for name in ("shard_0000", "shard_0001")
        for index, sample in enumerate(torch.load(legacy / f"{name}.pt", weights_only=True)["samples"])
    ]
    assert [row["clip_id"] for row in rows] == [clip_id for clip_id, _ in samples]
    for row, (_, sample) in zip(rows, samples, strict=True):
        assert_same(row, sample, np.arange(24))
        np.testing.assert_array_equal(pictures(row, 24), sample["frames"].permute(0, 2, 3, 1).numpy())


def test_jpeg_of_the_8_frames_is_verified_by_psnr_now_and_later(cluster: Cluster, tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "dataset"
    src.mkdir()
    samples = [make_sample(number, size=98) for number in range(4)]
    write_shard(src / "shard_0000.pt", samples[:3])
    write_shard(src / "shard_0007.pt", samples[3:])
    done = cluster.convert(src, out, "--frames", "8", "--quality", "90", "--subsampling", "422", "--verify")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    assert (manifest.spec.num_frames, manifest.spec.jpeg_quality, manifest.spec.jpeg_subsampling) == (8, 90, "422")
    rows = rows_of(out)
    assert [row["clip_id"] for row in rows] == ["shard_0000/0", "shard_0000/1", "shard_0000/2", "shard_0007/0"]
    psnr = []
    for row, sample in zip(rows, samples, strict=True):
        assert_same(row, sample, TRAINED_ON)
        original = sample["frames"][torch.from_numpy(TRAINED_ON)].permute(0, 2, 3, 1).numpy().astype(float)
        psnr += list(10 * np.log10(255**2 / ((pictures(row, 8) - original) ** 2).mean((1, 2, 3))))
    assert f"median {np.median(psnr):.1f} dB, least {min(psnr):.1f} dB" in done.stdout
    before = contents(out)
    later = cluster.convert(src, out, "--frames", "8", "--quality", "90", "--subsampling", "422", "--verify")
    assert later.returncode == 0 and "complete already" in later.stdout and "verified          4 clips" in later.stdout
    assert contents(out) == before

    poor = cluster.convert(src, tmp_path / "poor", "--quality", "3", "--verify", "--tasks", "1")
    assert poor.returncode == 2 and poor.stderr.count("\n") == 1
    assert "error: clip shard_000" in poor.stderr and "higher --quality" in poor.stderr


KILLS, SHARDS = 10, 60


@pytest.mark.long
def test_killed_ten_times_it_ends_with_the_bytes_of_an_undisturbed_run(cluster: Cluster, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number in range(SHARDS):  # three files under many names; PNGs, so that a part takes a while
        path = src / f"shard_{number:04d}.pt"
        if number < 3:
            write_shard(path, [make_sample(3 * number + index, size=98) for index in range(3)])
        else:
            path.hardlink_to(src / f"shard_{number % 3:04d}.pt")
    untouched = contents(src)
    moments, out, killed = random.Random(0), tmp_path / "killed", 0
    while killed < KILLS:
        done_before, awaited = len(list(out.glob("_parts/*.json"))), moments.randint(0, 2)
        process = cluster.start(src, out, "--codec", "png", "--tasks", "1")
        while process.poll() is None and (
            not (out / "_parts" / "lock").exists() or len(list(out.glob("_parts/*.json"))) < done_before + awaited
        ):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None, f"the command ended before it was killed: {process.communicate()}"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
        assert not (out / "manifest.json").exists()
    begun = len(list(out.glob("_parts/*.json")))
    assert 0 < begun < SHARDS, "the kills came at moments that prove nothing"
    finished = cluster.convert(src, out, "--codec", "png")
    assert finished.returncode == 0, finished.stderr
    assert f"of {SHARDS} parts are done" in finished.stdout

    whole = tmp_path / "whole"
    undisturbed = cluster.convert(src, whole, "--codec", "png")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert contents(out) == contents(whole)
    shards = {f"shard-{number:05d}.parquet" for number in range(SHARDS)}
    assert set(contents(out)) == shards | {"files.parquet", "manifest.json", "prepare.json", "rejects.jsonl"}
    assert not (out / "_parts").exists() and contents(src) == untouched


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write_damaged(src: Path, proof: Path) -> dict[str, tuple[int | None, str]]:
    """Shards with every kind of damage, 6 good samples among them. -> clip id: row and reason of each that is not."""
    src.mkdir()

    def changed(**changes: Any) -> dict[str, Any]:
        return make_sample(0) | changes

    good = make_sample(0)
    write_shard(src / "shard_0000.pt", [
        changed(frames=good["frames"][:23], latents=good["latents"][:23]),
        {key: value for key, value in good.items() if key != "latents"},
        changed(frames=good["frames"][:23]),
        changed(caption=b"bytes"),
        changed(caption="\ud800"),
        changed(latents=good["latents"].float()),
        changed(latents=torch.full_like(good["latents"], float("nan"))),
        changed(frames=good["frames"].float()),
        changed(frames=[1, 2]),
        changed(frames=good["frames"][..., :30]),
        make_sample(0, size=40),
        "no dict",
        make_sample(1), make_sample(2),
    ])  # fmt: skip
    write_shard(src / "shard_0001.pt", [make_sample(3), changed(evil=Evil(proof))])
    whole = write_shard(src / "shard_0002.pt", [make_sample(4)]).read_bytes()
    (src / "shard_0002.pt").write_bytes(whole[: len(whole) // 2])
    (src / "shard_0003.pt").write_bytes(pickle.dumps(Evil(proof)))
    (src / "shard_0004.pt").write_bytes(b"")
    write_shard(src / "shard_0005.pt", [])
    torch.save([make_sample(5)], src / "shard_0006.pt")
    torch.save({"step": 3}, src / "shard_0007.pt")
    write_shard(src / "shard_0008.pt", [make_sample(6)], count=2)
    write_shard(
        src / "shard_0009.pt", [make_sample(7) | {"score": np.float32(0.5), "fps": np.int64(25), "x": np.ones(2).dtype}]
    )
    write_shard(src / "shard_0010.pt", [make_sample(8) | {"extra": torch.ones(2), "list": [1, "a", None]}])
    write_shard(src / "shard_0011.pt", [make_sample(9)])
    in_shard_0 = [
        "other layout", "lacks latents", "wrong latents", "wrong caption", "wrong caption", "wrong latents",
        "wrong latents", "wrong frames", "wrong frames", "wrong frames", "other layout", "not a sample",
    ]  # fmt: skip
    damaged: dict[str, tuple[int | None, str]] = {f"shard_0000/{i}": (i, reason) for i, reason in enumerate(in_shard_0)}
    whole_files = {
        1: "unsafe pickle", 2: "unreadable file", 3: "unreadable file", 4: "unreadable file", 5: "no samples",
        6: "not a shard", 7: "not a shard", 8: "count differs",
    }  # fmt: skip
    return damaged | {f"shard_{number:04d}": (None, reason) for number, reason in whole_files.items()}


def test_damage_of_every_kind_is_reported_and_stops_nothing_but_a_strict_run(cluster: Cluster, tmp_path: Path) -> None:
    src, out, proof = tmp_path / "src", tmp_path / "dataset", tmp_path / "code-was-run"
    damaged = write_damaged(src, proof)
    with (src / "shard_0003.pt").open("rb") as file:  # the trap is a real one
        pickle.load(file)
    assert proof.exists()
    proof.rmdir()

    done = cluster.convert(src, out, "--codec", "png", "--verify")
    assert done.returncode == 0, done.stderr
    assert not proof.exists()
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_bytes().splitlines()]
    assert {reject["clip_id"]: (reject["row"], reject["reason"]) for reject in rejects} == damaged
    for reject in rejects:
        assert reject["detail"].startswith(reject["clip_id"].split("/")[0] + ".pt")
        assert f"damaged: {reject['reason']}: {reject['detail']}" in done.stdout
    assert any("refused: it asks for posix.mkdir" in reject["detail"] for reject in rejects)
    for line in (
        "clips in          18",
        "clips out         6",
        f"damaged           {len(damaged)}",
        "  wrong caption   2",
    ):
        assert line in done.stdout, line
    rows = {row["clip_id"]: row for row in rows_of(out)}
    good = {"shard_0000/12": 1, "shard_0000/13": 2, "shard_0008/0": 6, "shard_0011/0": 9}
    for clip_id, number in good.items():
        assert_same(rows[clip_id], make_sample(number), np.arange(24))
    assert rows.keys() == good.keys() | {"shard_0009/0", "shard_0010/0"}
    sources = {clip_id: json.loads(row["source"]) for clip_id, row in rows.items()}
    assert sources["shard_0009/0"]["fields"] == {"video_id": "v1", "score": 0.5, "fps": 25}
    assert sources["shard_0009/0"]["left_out"] == ["x"]
    assert sources["shard_0010/0"] == {
        "file": "shard_0010.pt", "index": 0, "fields": {"video_id": "v0", "list": [1, "a", None]},
        "left_out": ["extra"],
    }  # fmt: skip

    strict = cluster.convert(src, tmp_path / "strict", "--codec", "png", "--strict", "--tasks", "1")
    assert strict.returncode == 2 and strict.stderr.count("\n") == 1
    assert "error: other layout: shard_0000.pt, sample 0:" in strict.stderr and "--strict" in strict.stderr
    assert not (tmp_path / "strict" / "manifest.json").exists()
    with pytest.raises(UserError, match=f"{len(damaged)} damaged samples were left out; --strict wants none"):
        convert(ConvertConfig(src, out, codec="png", strict=True))


def test_a_folder_of_loose_samples_is_a_dataset_too(cluster: Cluster, tmp_path: Path) -> None:
    src, out = tmp_path / "features", tmp_path / "dataset"
    src.mkdir()
    for number in range(130):  # more than one part takes
        torch.save(make_sample(number, size=8, latent=1), src / f"video-{number:03d}.pt")
    torch.save({"frames": 1, "caption": ""}, src / "video-007.pt")
    done = cluster.convert(src, out, "--verify", "--codec", "png", "--tasks", "1")
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    kept = [number for number in range(130) if number != 7]
    assert [row["clip_id"] for row in rows] == [f"video-{number:03d}" for number in kept]
    assert_same(rows[100], make_sample(kept[100], size=8, latent=1), np.arange(24))
    assert len(list(out.glob("shard-*"))) == 2 and "damaged: lacks latents: video-007.pt, sample 0" in done.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "src")


def test_a_command_with_bad_input_ends_with_code_2_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [
        sys.executable,
        "-m",
        "ray_jobs.convert",
        "--src",
        str(tmp_path / "empty"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--src {tmp_path / 'empty'}: neither shards" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_too_little_disk_is_told_with_both_numbers_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = Conversion(LAYOUT, spec()).estimate(sorted(source.iterdir()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    out = tmp_path / "deep" / "dataset"
    with pytest.raises(UserError, match=rf"about {needed / 1e9:.3f} GB will be written, but only [0-9.]+ GB are free"):
        convert(ConvertConfig(source, out, codec="png"))
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda src, out: ConvertConfig(src, src / "out"), "lies in --src"),
        (lambda src, out: ConvertConfig(src / "absent", out), "no such folder"),
        (lambda src, out: ConvertConfig(src, out, quality=0), "--quality is 0"),
        (lambda src, out: ConvertConfig(src, out, tasks=-1), "--tasks is -1"),
    ],
)
def test_what_cannot_be_right_is_named(source: Path, tmp_path: Path, prepare: Any, message: str) -> None:
    before = contents(source)
    with pytest.raises(UserError, match=message):
        convert(prepare(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists() and contents(source) == before


def test_a_folder_with_another_dataset_or_of_another_source_is_refused_untouched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with ShardWriter(out / "shard-00000.parquet", spec(num_frames=1)) as writer:
        writer.add(EncodedClip("a", "b", [b"c"], np.zeros((1, 128), np.uint8), {}))
    before = contents(out)
    with pytest.raises(UserError, match=r"shard-00000.parquet is there, but no prepare.json"):
        convert(ConvertConfig(source, out))
    parts.begin(out, {"frame_codec": "png"})
    with pytest.raises(UserError, match=r"frame_codec was 'png', now 'jpeg'.*source_files was None, now 2"):
        convert(ConvertConfig(source, out))
    (out / "prepare.json").unlink()
    assert contents(out) == before


def test_latents_that_cannot_be_kept_bit_for_bit_are_refused_with_the_reason(tmp_path: Path) -> None:
    sample = make_sample(0)
    write_shard(tmp_path / "shard_0000.pt", [sample | {"latents": sample["latents"].float()}])
    with pytest.raises(UserError, match=r"no usable sample: 1 wrong latents .*torch.float32; bfloat16 and float16"):
        convert(ConvertConfig(tmp_path, tmp_path.parent / "out"))
