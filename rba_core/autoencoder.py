"""A small autoencoder that a CPU can train in minutes: a block transform with a learnt decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .imageio import RGB_TO_YCC


class BlockAutoencoder(ModelMixin, ConfigMixin):
    """Latents are the lowest DCT coefficients of each `patch_size`² block in YCbCr, as JPEG keeps them, each
    channel scaled towards unit variance; a residual network after the inverse transform removes the seams and
    restores what follows from context. Called like `AutoencoderKL`; its encoder has nothing to learn, hence
    the same picture always has the same latents.

    luma, chroma   coefficients kept of Y and of Cb, Cr each; latent channels are luma + 2 chroma
    width          channels of the residual network
    """

    @register_to_config
    def __init__(self, patch_size: int = 8, luma: int = 15, chroma: int = 3, width: int = 64, latent_channels: int = 21, scaling_factor: float = 1.0):
        super().__init__()
        if latent_channels != luma + 2 * chroma:
            raise ValueError(f"latent_channels is {latent_channels}, luma + 2 chroma {luma + 2 * chroma}")
        basis = block_basis(patch_size, luma, chroma)
        self.register_buffer("analysis", basis)
        self.register_buffer("synthesis", torch.linalg.pinv(basis.flatten(1)).T.reshape(basis.shape).contiguous())  # else older diffusers refuse to save it
        self.register_buffer("scale", torch.ones(latent_channels))
        self.residual = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip
        nn.init.zeros_(self.residual[-2].weight)
        nn.init.zeros_(self.residual[-2].bias)

    @torch.no_grad()
    def fit_scale(self, pictures: Tensor) -> None:
        """Set the channels' scales from pictures `[B, 3, H, W]` in [-1, 1]. Not all the way to unit variance:
        the lower frequencies matter more to the eye, and so they keep more weight in the diffusion's loss."""
        spread = F.conv2d(pictures, self.analysis, stride=self.config.patch_size).std((0, 2, 3))
        scale = spread**-0.75
        self.scale.copy_(scale / (scale * spread).square().mean().sqrt())

    def encode(self, pictures: Tensor) -> AutoencoderKLOutput:
        """`[B, 3, H, W]` in [-1, 1] -> a distribution without spread over `[B, C, H / patch, W / patch]`."""
        latents = F.conv2d(pictures, self.analysis, stride=self.config.patch_size) * self.scale[:, None, None]
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([latents, torch.full_like(latents, -30.0)], 1), deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        pictures = F.conv_transpose2d(latents / self.scale[:, None, None], self.synthesis, stride=self.config.patch_size)
        return DecoderOutput(pictures + self.residual(pictures))


def block_basis(size: int, luma: int, chroma: int) -> Tensor:
    """The kept DCT-II functions as convolution kernels `[luma + 2 chroma, 3, size, size]`, lowest frequency first."""
    frequency, position = torch.arange(size)[:, None], torch.arange(size)[None] + 0.5
    cosines = torch.cos(math.pi * frequency * position / size) * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    order = sorted(((u, v) for u in range(size) for v in range(size)), key=lambda uv: (sum(uv), uv))
    planes = torch.tensor(RGB_TO_YCC)
    kernels = [planes[plane][:, None, None] * torch.outer(cosines[u], cosines[v]) for plane, count in enumerate((luma, chroma, chroma)) for u, v in order[:count]]
    return torch.stack(kernels)
