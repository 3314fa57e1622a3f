"""What one batch is: the contract between `fvlm.data`, which makes it, and `fvlm.model`, which takes it.

Shape letters used throughout the project:
    B clips   T frames   H W pixels   L caption tokens   N patches + CLS
    D vision width   E language width   Q query width
    Z = (4, h, w) one frame's latent
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100
"""Label of a caption position that is not trained on (padding), as in `torch.nn.functional.cross_entropy`."""

LATENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Batch:
    """One rank's share of one optimizer step.

    frames:      [B, T, H, W, 3] uint8, RGB, 0..255. Never float on a CPU: the device normalises.
    latents:     [B, T, *Z] half precision, as stored: sampled from the VAE and multiplied by its scaling factor.
    caption_ids: [B, L] int64, right-padded; what stands at a padded position does not matter.
    labels:      [B, L] int64, `caption_ids` where the token is trained on and IGNORE elsewhere.
    clip_ids:    B strings, for logs and error messages.
    """

    frames: torch.Tensor
    latents: torch.Tensor
    caption_ids: torch.Tensor
    labels: torch.Tensor
    clip_ids: tuple[str, ...]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """frames, latents, caption_ids, labels"""
        return self.frames, self.latents, self.caption_ids, self.labels

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._with([tensor.to(device, non_blocking=non_blocking) for tensor in self.tensors()])

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, from which a GPU can fetch by itself."""
        return self._with([tensor.pin_memory() for tensor in self.tensors()])

    def _with(self, tensors: list[torch.Tensor]) -> Batch:
        frames, latents, caption_ids, labels = tensors
        return Batch(frames, latents, caption_ids, labels, self.clip_ids)

    def check(self) -> Batch:
        """Return self, or raise ValueError that names the field at fault. Costs no device synchronisation."""
        b, t = self.frames.shape[:2]

        def require(ok: bool, field: str, wanted: str) -> None:
            if not ok:
                value = getattr(self, field)
                raise ValueError(f"batch.{field}: wanted {wanted}, got {value.dtype} {tuple(value.shape)}")

        require(
            self.frames.dtype == torch.uint8 and self.frames.ndim == 5 and self.frames.shape[-1] == 3,
            "frames",
            "uint8 [B, T, H, W, 3]",
        )
        require(
            self.latents.dtype in LATENT_DTYPES and self.latents.ndim == 5 and self.latents.shape[:2] == (b, t),
            "latents",
            f"half precision [{b}, {t}, C, h, w]",
        )
        for field in ("caption_ids", "labels"):
            value = getattr(self, field)
            require(value.dtype == torch.int64 and value.ndim == 2 and value.shape[0] == b, field, f"int64 [{b}, L]")
        require(
            self.labels.shape == self.caption_ids.shape,
            "labels",
            f"the shape of caption_ids {tuple(self.caption_ids.shape)}",
        )
        if len(self.clip_ids) != b:
            raise ValueError(f"batch.clip_ids: wanted {b} ids, got {len(self.clip_ids)}")
        return self
