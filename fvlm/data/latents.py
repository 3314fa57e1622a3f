"""Latent codecs: frames -> the small half-precision pictures that the prediction head learns to foresee."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fvlm.data.schema import DatasetSpec, LatentDtype
from fvlm.errors import UserError
from fvlm.files import sha256_file
from fvlm.hub_files import CONFIG, ModelFiles

if TYPE_CHECKING:
    import torch

SD_VAE = "sd-vae-ft-mse"
"""Name of the codec with which the earlier trainer's data were made, and of the one with these very weights."""
SD_VAE_ON_HUB = "stabilityai/sd-vae-ft-mse"
SD_VAE_SHA256 = "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"
"""Of diffusion_pytorch_model.safetensors as it is published there, 334,643,276 bytes."""
SD_VAE_FACTOR = 0.18215
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
OTHER_VAE = "autoencoder-kl-"
"""Name of any other VAE's codec, before the hash of what makes its latents."""
CHOICES = (
    f"{SD_VAE} (what the 135M experiment and --import-checkpoint need; its weights come from the hub) or "
    "block-transform (needs no weights; other numbers of the same shape)"
)


class LatentCodec(Protocol):
    """What preparation and reports need of a codec.

    name:  goes into the dataset's spec
    dtype: of the stored numbers
    """

    name: str
    dtype: LatentDtype

    def shape(self, frame_size: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of a frame of S x S pixels. Raises UserError when S does not fit."""
        ...

    def encode(self, frames: np.ndarray, clip_id: str) -> np.ndarray:
        """[T, S, S, 3] uint8 RGB -> [T, latent_bytes] uint8: the half-precision numbers, C order, little endian.

        A codec that draws random numbers seeds them with `clip_id`, so that the same clip gives the same bytes.
        """
        ...

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """[T, C, h, w] float (stored ones through `from_bits`, or predicted ones) -> [T, S, S, 3] uint8 RGB."""
        ...


def to_bits(latents: np.ndarray, dtype: LatentDtype) -> np.ndarray:
    """[T, ...] float32 -> [T, bytes] uint8, rounded to the nearest `dtype`."""
    if dtype == "float16":
        halves = latents.astype("<f2")
    else:  # numpy has no bfloat16
        import torch

        numbers = torch.from_numpy(np.array(latents, np.float32, order="C"))
        halves = numbers.to(torch.bfloat16).view(torch.int16).numpy()
    return np.ascontiguousarray(halves).reshape(len(latents), -1).view(np.uint8)


def from_bits(bits: np.ndarray, dtype: LatentDtype, shape: tuple[int, int, int]) -> np.ndarray:
    """[T, bytes] uint8, as stored -> [T, *shape] float32. Exact."""
    halves = np.ascontiguousarray(bits)
    if dtype == "float16":
        numbers = halves.view("<f2").astype(np.float32)
    else:
        numbers = (halves.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return numbers.reshape(len(bits), *shape)


def _shape(channels: int, factor: int, frame_size: int, codec: str) -> tuple[int, int, int]:
    if frame_size % factor:
        near = frame_size // factor * factor
        raise UserError(
            f"frame size {frame_size}: the {codec} latents need a multiple of {factor}. "
            f"Take {near or factor} or {near + factor}."
        )
    return (channels, frame_size // factor, frame_size // factor)


def _dct(n: int) -> np.ndarray:
    """[n, n] orthonormal DCT-II: row k is cos(pi (2x + 1) k / 2n), normalised (Ahmed, Natarajan, Rao 1974)."""
    k, x = np.arange(n)[:, None], np.arange(n)[None]
    rows = np.cos(np.pi * (2 * x + 1) * k / (2 * n))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class BlockTransform:
    """4 coefficients of an orthonormal 8 x 8 block transform: latents without any weights to download.

    Pixels are brought to [-1, 1]. A block of 8 x 8 RGB pixels is 192 numbers; their three-dimensional DCT (over colour,
    y and x) is orthonormal, and these coefficients of it are kept:

        0  brightness, mean of the block                (colour 0, y 0, x 0)   divided by 6
        1  red against blue, mean                       (colour 1, y 0, x 0)   divided by 1.5
        2  red and blue against green, mean             (colour 2, y 0, x 0)   divided by 0.75
        3  brightness, left against right of the block  (colour 0, y 0, x 1)   divided by 1

    The divisors bring each to a standard deviation near 1 on natural video, as the VAE's scaling factor does. As the
    rows are orthonormal, the transpose decodes, and no other picture made from these four numbers is nearer to the
    original: a colour thumbnail of S/8 pixels, twice as sharp from left to right.
    """

    name = "block-transform"
    dtype: LatentDtype = "float16"
    KEPT = ((0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 1))
    SCALE = (6.0, 1.5, 0.75, 1.0)

    def __init__(self) -> None:
        colour, pixel = _dct(3), _dct(8)
        rows = [np.einsum("y,x,c->yxc", pixel[y], pixel[x], colour[c]).ravel() for c, y, x in self.KEPT]
        self.basis = np.stack(rows).astype(np.float32)  # [4, 8 * 8 * 3], orthonormal rows
        self.scale = np.array(self.SCALE, np.float32)

    def shape(self, frame_size: int) -> tuple[int, int, int]:
        return _shape(4, 8, frame_size, self.name)

    def encode(self, frames: np.ndarray, clip_id: str) -> np.ndarray:
        t, size = frames.shape[:2]
        _, h, w = self.shape(size)
        blocks = frames.reshape(t, h, 8, w, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(t, h, w, 192)
        # einsum, not matmul: a BLAS sums in an order that varies with its threads; equal clips shall give equal bytes
        latents = np.einsum("thwp,kp->tkhw", blocks / np.float32(127.5) - 1, self.basis, optimize=False)
        return to_bits(latents / self.scale[:, None, None], self.dtype)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        t, _, h, w = latents.shape
        scaled = latents.astype(np.float32) * self.scale[:, None, None]
        blocks = np.einsum("tkhw,kp->thwp", scaled, self.basis).reshape(t, h, w, 8, 8, 3)
        pixels = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(t, 8 * h, 8 * w, 3)
        return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


class AutoencoderKLCodec:
    """Stable Diffusion's VAE through `diffusers`: sampled latents times its scaling factor, kept as bfloat16.

    weights: a hub name or a local folder; device: a torch device. `name` says which weights they are, by their hash,
    wherever they come from: equal names mean equal latents.
    Raises UserError when diffusers is not installed, or the weights cannot be had or are not those of their config.
    """

    dtype: LatentDtype = "bfloat16"
    FRAMES_AT_ONCE = 8
    """Bounds the memory that the VAE takes, whatever the length of a clip."""

    def __init__(self, weights: str = SD_VAE_ON_HUB, device: str = "cpu"):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise UserError(
                "the VAE's latents need the package diffusers. Install it (`pip install 'fvlm[vae]'`), or take "
                f"`--latents {BlockTransform.name}`, which needs nothing."
            ) from error
        try:
            files = ModelFiles("--latents", weights)
            files.json(CONFIG)
            path = files.path(VAE_WEIGHTS)
            vae, report = AutoencoderKL.from_pretrained(
                path.parent, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
            )  # True needs another package
        except (OSError, ValueError, RuntimeError, UserError) as error:  # what diffusers raises for foreign weights
            raise UserError(
                f"the VAE's weights {weights!r} cannot be had or are not right: {str(error).strip().splitlines()[0]} "
                "Run once where huggingface.co is reachable, or set HF_HOME to a cache that holds them, or take "
                f"`--latents {BlockTransform.name}`."
            ) from error
        # Diffusers leaves at random what a file lacks, and says so in its log alone.
        wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
        if wrong:
            said = ", ".join(f"{kind.replace('_', ' ')} {keys[:3]}" for kind, keys in wrong.items())
            raise UserError(f"{path}: not the weights of its config.json: {said}. Fetch both again.")
        self.vae, self.device = vae.to(device).eval().requires_grad_(False), device
        self.factor = float(vae.config.scaling_factor)
        self.name = vae_name(sha256_file(path), vae.config)

    def shape(self, frame_size: int) -> tuple[int, int, int]:
        config = self.vae.config
        return _shape(config.latent_channels, 2 ** (len(config.block_out_channels) - 1), frame_size, self.name)

    def encode(self, frames: np.ndarray, clip_id: str) -> np.ndarray:
        import torch

        seed = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:8], "little")
        noise = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers whatever the device
        latents = []
        for chunk in torch.from_numpy(np.ascontiguousarray(frames)).split(self.FRAMES_AT_ONCE):
            with torch.inference_mode():
                spread = self.vae.encode(self._normalise(chunk)).latent_dist
            mean, std = spread.mean.float().cpu(), spread.std.float().cpu()
            latents.append((mean + std * torch.randn(mean.shape, generator=noise)) * self.factor)
        return to_bits(torch.cat(latents).numpy(), self.dtype)

    def _normalise(self, frames: torch.Tensor) -> torch.Tensor:
        """[n, S, S, 3] uint8 -> [n, 3, S, S] in [-1, 1] on the device."""
        return frames.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, latents: np.ndarray) -> np.ndarray:
        import torch

        frames = []
        for chunk in torch.from_numpy(np.ascontiguousarray(latents, np.float32)).split(self.FRAMES_AT_ONCE):
            with torch.inference_mode():
                image = self.vae.decode(chunk.to(self.device) / self.factor).sample  # [n, 3, S, S]
            frames.append(((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return torch.cat(frames).numpy()


def vae_name(weights_sha256: str, config: Any) -> str:
    """A VAE's name in a dataset's spec: that of the published one, or a hash of what decides its latents.

    config: diffusers' config, whose factor is part of what is stored
    """
    shift = config.get("shift_factor")
    if weights_sha256 == SD_VAE_SHA256 and config.scaling_factor == SD_VAE_FACTOR and not shift:
        return SD_VAE
    made_by = f"{weights_sha256} {float(config.scaling_factor)!r}"
    return OTHER_VAE + hashlib.sha256(made_by.encode()).hexdigest()[:16]


def require_sd_vae_latents(spec: DatasetSpec, where: str, checkpoint: str) -> None:
    """Raises UserError unless the latents of a dataset are of the codec that the earlier trainer's checkpoints learned.

    The shape alone does not tell: block-transform has the same.
    """
    if spec.latent_codec != SD_VAE:
        raise UserError(
            f"--import-checkpoint {checkpoint}: it has learned to foresee latents of {SD_VAE}, and {where} holds those "
            f"of {spec.latent_codec}, which are other numbers. Convert the data that it was trained on (`python -m "
            f"ray_jobs.convert`), or prepare the videos with --latents {SD_VAE}."
        )


def make_codec(name: str, device: str = "cpu") -> LatentCodec:
    """The codec of that name: "block-transform", "sd-vae-ft-mse", or a folder with the weights of an AutoencoderKL.

    Raises UserError for any other name, and for "", and where the VAE cannot be had.
    """
    if not name:
        raise UserError(f"--latents is missing: {CHOICES}, or a folder with the weights of an AutoencoderKL.")
    if name == BlockTransform.name:
        return BlockTransform()
    if name == SD_VAE:
        return AutoencoderKLCodec(device=device)
    if Path(name).is_dir():
        return AutoencoderKLCodec(name, device)
    raise UserError(
        f"--latents {name}: no such codec. There are {BlockTransform.name} and {SD_VAE}; "
        "a folder with the weights of an AutoencoderKL does as well."
    )
