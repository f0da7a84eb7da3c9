"""Second leg: the decoder of the small autoencoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoder import BlockAutoencoder


class AutoencoderObjective(nn.Module):
    """Pixels and their high frequencies by L1."""

    def __init__(self, vae: BlockAutoencoder):
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        target = pictures * 2 - 1
        difference = self.vae.decode(self.vae.encode(target).latent_dist.mode()).sample.float() - target
        fine = difference - F.avg_pool2d(difference, 5, 1, 2, count_include_pad=False)
        return {"pixels": difference.abs().mean(), "detail": fine.abs().mean()}
