"""Second leg: a small autoencoder, stride 8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn


class AutoencoderObjective(nn.Module):
    """Pixels and their high frequencies by L1, a slight pull of the latents to the unit normal."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        target = pictures * 2 - 1
        posterior = self.vae.encode(target).latent_dist
        painted = self.vae.decode(posterior.sample()).sample.float()
        difference = painted - target
        fine = difference - F.avg_pool2d(difference, 5, 1, 2, count_include_pad=False)
        return {"pixels": difference.abs().mean(), "detail": fine.abs().mean(), "kl": 1e-6 * posterior.kl().mean()}


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, pictures: Tensor) -> float:
    """1 / standard deviation of the latents: the autoencoder's `scaling_factor`."""
    return float(1 / vae.encode(pictures * 2 - 1).latent_dist.mode().std())
