"""Next-latent prediction: a small convolutional net over the previous latent, steered by the language model (FiLM)."""

from __future__ import annotations

import torch
from torch import nn


class PredictionHead(nn.Module):
    """FiLM (Perez et al. 2018): the hidden state gives a scale and a shift for every feature map.

    hidden [M, E], previous latent [M, C, h, w] -> predicted latent [M, C, h, w]
    """

    def __init__(self, hidden_width: int, latent_channels: int = 4):
        super().__init__()
        self.h_to_film = nn.Sequential(nn.Linear(hidden_width, 512), nn.GELU(), nn.Linear(512, 512))
        self.encoder = _three_convolutions(latent_channels, 64, 128, 256)
        self.decoder = _three_convolutions(256, 128, 64, latent_channels)

    def forward(self, hidden_ME: torch.Tensor, previous_MChw: torch.Tensor) -> torch.Tensor:
        if previous_MChw.is_cuda:
            # cuDNN computes in this format and would change to it and back around every convolution.
            previous_MChw = previous_MChw.contiguous(memory_format=torch.channels_last)
        gamma, beta = self.h_to_film(hidden_ME)[:, :, None, None].chunk(2, dim=1)  # [M, 256, 1, 1] each
        return self.decoder(gamma * self.encoder(previous_MChw) + beta)


def _three_convolutions(*widths: int) -> nn.Sequential:
    """3x3 convolutions of the given channel counts with GELU between them and none after the last."""
    a, b, c, d = widths
    return nn.Sequential(
        nn.Conv2d(a, b, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(b, c, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(c, d, 3, padding=1),
    )
