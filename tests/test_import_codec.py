"""A checkpoint of the earlier trainer goes on with latents of its own codec alone, whatever shape others have."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import make_spec, write_shard

from fvlm.checks.run import look_at_import
from fvlm.config import Config
from fvlm.data.latents import BlockTransform
from fvlm.data.schema import Manifest
from fvlm.data.shards import write_manifest
from fvlm.errors import UserError
from fvlm.train.run_folder import exclusive
from ray_jobs.options import parse
from ray_jobs.train import prepare_run


def dataset(folder: Path, codec: str) -> Manifest:
    folder.mkdir()
    spec = make_spec(latent_codec=codec)
    return write_manifest(folder, spec, [write_shard(folder / "shard-00000.parquet", spec, range(8))], rejected=0)


def config_of(folder: Path, manifest: Manifest) -> Config:
    paths = ["--runs-dir", str(folder / "runs"), "--data.path", manifest.root]
    small = "--data.frame-size 56 --data.lanes 4 --data.global-batch 4 --log.wandb off"
    return parse(["demo", *paths, "--import-checkpoint", str(folder / "latest.pt"), *small.split()])


@pytest.mark.parametrize("codec", [BlockTransform.name, "autoencoder-kl-0123456789abcdef", "sd-vae-ft-mse-2"])
def test_latents_of_another_codec_are_refused_by_the_start_and_by_the_doctor(tmp_path, codec):
    manifest = dataset(tmp_path / "data", codec)
    config = config_of(tmp_path, manifest)
    (tmp_path / "latest.pt").write_bytes(b"is not opened")
    said = rf"--import-checkpoint .*latest\.pt: .*sd-vae-ft-mse.*{codec}.*--latents sd-v"
    with pytest.raises(UserError, match=said), exclusive(config.run_dir):  # as the command does
        prepare_run(config)
    assert not config.run_dir.exists()
    (found,) = look_at_import(config, manifest)
    assert found.level == "FAIL" and codec in found.value


def test_its_own_codec_is_accepted_and_the_file_is_looked_at_next(tmp_path):
    manifest = dataset(tmp_path / "data", "sd-vae-ft-mse")
    config = config_of(tmp_path, manifest)
    with pytest.raises(UserError, match=r"latest\.pt: no such file"):
        prepare_run(config)
    assert [found.level for found in look_at_import(config, manifest)] == ["FAIL"]
    (tmp_path / "latest.pt").write_bytes(b"no checkpoint")
    assert [found.level for found in look_at_import(config, manifest)] == ["ok"]
    with pytest.raises(UserError, match=r"latest\.pt: cannot be read|latest\.pt: refused"):
        prepare_run(config)
