"""Latents are what their codec says, to the bit, and become pictures again."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fvlm.data.latents import SD_VAE, VAE_WEIGHTS, AutoencoderKLCodec, BlockTransform, from_bits, make_codec, to_bits
from fvlm.data.synthetic import draw, scene
from fvlm.errors import UserError
from fvlm.files import sha256_file


def moving_shapes(clips: int = 8, size: int = 64) -> np.ndarray:
    """[clips, S, S, 3] uint8"""
    scenes = [scene(np.random.default_rng(index)) for index in range(clips)]
    return np.stack([draw(*made, 0.3, size) for made in scenes])


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_stored_bits_are_those_of_torch_and_come_back_exactly(name: str, dtype: torch.dtype) -> None:
    numbers = np.random.default_rng(0).normal(size=(3, 4, 2, 2)).astype(np.float32)
    halves = torch.from_numpy(numbers).to(dtype)
    bits = to_bits(numbers, name)
    assert bits.dtype == np.uint8 and bits.shape == (3, 32)
    assert np.array_equal(bits, halves.reshape(3, -1).view(torch.uint8).numpy())
    assert np.array_equal(from_bits(bits, name, (4, 2, 2)), halves.float().numpy())


def test_block_transform_is_the_dct_by_its_formula() -> None:
    frame = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    codec = BlockTransform()
    latents = from_bits(codec.encode(frame, ""), "float16", (4, 1, 1)).ravel()
    for index, (c, v, u) in enumerate(codec.KEPT):
        total = 0.0
        for y in range(8):
            for x in range(8):
                for k in range(3):
                    waves = (
                        math.cos(math.pi * (2 * y + 1) * v / 16)
                        * math.cos(math.pi * (2 * x + 1) * u / 16)
                        * math.cos(math.pi * (2 * k + 1) * c / 6)
                    )
                    total += (frame[0, y, x, k] / 127.5 - 1) * waves
        norm = math.prod(math.sqrt((1 if order == 0 else 2) / n) for order, n in ((v, 8), (u, 8), (c, 3)))
        assert latents[index] == pytest.approx(total * norm / codec.SCALE[index], abs=2e-3)


def test_block_transform_decodes_to_the_blocks_own_colours() -> None:
    colours = np.random.default_rng(2).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    frames = colours.repeat(8, 1).repeat(8, 2)
    codec = BlockTransform()
    latents = from_bits(codec.encode(frames, ""), codec.dtype, codec.shape(32))
    assert np.abs(codec.decode(latents).astype(int) - frames).max() <= 1


def test_block_transform_of_its_own_pictures_is_itself() -> None:
    codec = BlockTransform()
    frames = moving_shapes()
    once = codec.decode(from_bits(codec.encode(frames, ""), codec.dtype, codec.shape(64)))
    twice = codec.decode(from_bits(codec.encode(once, ""), codec.dtype, codec.shape(64)))
    assert np.abs(once.astype(int) - twice).mean() < 0.5
    assert np.abs(once.astype(int) - frames).mean() < 6  # and they are recognisable


def test_block_transform_has_about_unit_variance(shared_videos: Path) -> None:
    from fvlm.data.video import read_clip

    codec = BlockTransform()
    clips = [
        read_clip(shared_videos / name, 8, 128, "short-side")[0]
        for name in ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4", "realshort.mp4", "nasa_13013.mp4")
    ]
    latents = np.stack([from_bits(codec.encode(clip, ""), codec.dtype, codec.shape(128)) for clip in clips])
    assert all(0.5 < std < 2 for std in latents.std((0, 1, 3, 4)))


def test_a_frame_size_that_does_not_fit_is_an_error_with_sizes_that_do() -> None:
    with pytest.raises(UserError, match=r"frame size 100.*96 or 104"):
        BlockTransform().shape(100)


def test_an_unknown_codec_is_an_error_that_names_the_known() -> None:
    with pytest.raises(UserError, match="block-transform and sd-vae-ft-mse"):
        make_codec("sd-vae-ft-mse-original")


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an AutoencoderKL of random weights that shrinks by 8, as the real one."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'fvlm[vae]')")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8],
        norm_num_groups=4,
        layers_per_block=1,
    )
    folder = tmp_path_factory.mktemp("vae") / "tiny-vae"
    vae.save_pretrained(folder)
    return folder


def test_vae_latents_are_its_sample_times_its_factor_seeded_by_the_clip(tiny_vae: Path) -> None:
    import diffusers

    frames = moving_shapes(10)
    codec = make_codec(str(tiny_vae))
    assert (codec.dtype, codec.shape(64)) == ("bfloat16", (4, 8, 8))
    bits = codec.encode(frames, "clip a")
    vae = diffusers.AutoencoderKL.from_pretrained(tiny_vae, low_cpu_mem_usage=False)
    with torch.no_grad():
        spread = vae.encode(torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    noise = (from_bits(bits, "bfloat16", (4, 8, 8)) / vae.config.scaling_factor - spread.mean.numpy()) / spread.std
    assert abs(float(noise.mean())) < 0.1 and 0.9 < float(noise.std()) < 1.1
    assert np.array_equal(bits, codec.encode(frames, "clip a"))
    assert not np.array_equal(bits, codec.encode(frames, "clip b"))


def test_vae_latents_become_pictures(tiny_vae: Path) -> None:
    codec = make_codec(str(tiny_vae))
    pictures = codec.decode(np.random.default_rng(0).normal(size=(9, 4, 8, 8)).astype(np.float32))
    assert pictures.shape == (9, 64, 64, 3) and pictures.dtype == np.uint8 and pictures.std() > 0


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install 'fvlm\[vae\]'"):
        AutoencoderKLCodec()


def test_without_weights_the_error_says_where_they_could_come_from(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'fvlm[vae]')")
    with pytest.raises(UserError, match="HF_HOME"):
        AutoencoderKLCodec(str(tmp_path))


def spoiled(tiny_vae: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    shutil.copytree(tiny_vae, folder)
    path = folder / VAE_WEIGHTS
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return str(folder)


def test_a_vae_is_known_by_its_weights_and_not_by_its_folder(tiny_vae: Path, tmp_path: Path) -> None:
    name = make_codec(str(tiny_vae)).name
    assert re.fullmatch(r"autoencoder-kl-[0-9a-f]{16}", name)
    copied = shutil.copytree(tiny_vae, tmp_path / "sd-vae-ft-mse")  # so called, and of other weights
    assert make_codec(str(copied)).name == name
    key = "encoder.conv_in.weight"
    other = spoiled(tiny_vae, tmp_path / "other" / tiny_vae.name, lambda t: t | {key: t[key] + 1e-3})
    assert make_codec(other).name != name
    config = copied / "config.json"  # latents are stored times this factor
    config.write_text(config.read_text().replace('"scaling_factor": 0.18215', '"scaling_factor": 0.5'))
    assert make_codec(str(copied)).name not in (name, SD_VAE)


def test_the_published_vae_is_known_wherever_it_lies(tiny_vae: Path, tmp_path: Path, monkeypatch) -> None:
    """Its own file cannot be had here, so another one stands for it, by its hash."""
    monkeypatch.setattr("fvlm.data.latents.SD_VAE_SHA256", sha256_file(tiny_vae / VAE_WEIGHTS))
    copied = shutil.copytree(tiny_vae, tmp_path / "vae")
    assert make_codec(str(copied)).name == SD_VAE == "sd-vae-ft-mse"
    cached = tmp_path / "hub" / "models--stabilityai--sd-vae-ft-mse"
    shutil.copytree(tiny_vae, cached / "snapshots" / ("0123" * 10))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123" * 10)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert make_codec("sd-vae-ft-mse").name == SD_VAE
    monkeypatch.setattr("fvlm.data.latents.SD_VAE_SHA256", "0" * 64)
    assert make_codec("sd-vae-ft-mse").name.startswith("autoencoder-kl-")


def test_a_vae_with_the_attention_names_of_older_diffusers_is_whole(tiny_vae: Path, tmp_path: Path) -> None:
    """As the published file has them."""
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key: str) -> str:
        for new, old in older.items():
            key = key.replace(f".{new}.", f".{old}.")
        return key

    folder = spoiled(tiny_vae, tmp_path / "vae", lambda t: {rename(key): tensor for key, tensor in t.items()})
    frames = moving_shapes(2)
    assert np.array_equal(make_codec(folder).encode(frames, "a"), make_codec(str(tiny_vae)).encode(frames, "a"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if "encoder.conv_in" not in k}, "missing keys .'encoder.conv_in.bias'"),
        (lambda t: t | {"extra.weight": torch.ones(2)}, "unexpected keys .'extra.weight'"),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, "missing keys"),
    ],
)
def test_a_vae_that_is_not_whole_is_refused_instead_of_drawn_at_random(tiny_vae, tmp_path, change, said) -> None:
    with pytest.raises(UserError, match=rf"{VAE_WEIGHTS}: not the weights of its config.json: {said}"):
        make_codec(spoiled(tiny_vae, tmp_path / "vae", change))


def test_a_vae_that_is_cut_short_or_a_pointer_is_refused_with_its_file(tiny_vae: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_vae, tmp_path / "vae") / VAE_WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"vae.* cannot be had or are not right"):
        make_codec(str(tmp_path / "vae"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")
    with pytest.raises(UserError, match=f"{VAE_WEIGHTS}: a git-lfs pointer"):
        make_codec(str(tmp_path / "vae"))


def test_a_codec_has_to_be_chosen() -> None:
    with pytest.raises(UserError, match=r"--latents is missing: sd-vae-ft-mse .* or block-transform"):
        make_codec("")
