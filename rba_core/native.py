"""Alignment with a U-Net that runs elsewhere: Stable Diffusion 1.x and 2.x in LDM's layout, noised in units of sigma.

There z_t is held as x = z + sigma noise, sigma = sqrt((1 - alpha_bar) / alpha_bar), and the U-Net reads x / sqrt(1 + sigma²): the
same sqrt(alpha_bar) z + sqrt(1 - alpha_bar) noise that `RefineByAlign.add_noise` gives, whether it predicts noise or velocity.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .alignment import SAMPLER_STEPS, check_noise
from .zoom_crop import blanked

MLP, DINOV2 = ".mlp.safetensors", ".dinov2.safetensors"
"""How the names of what lies beside a checkpoint go on, in the place of .safetensors."""
TRAINING_STEPS = 1000
LAYERS = [
    *(("input", block) for block in (1, 2, 4, 5, 7, 8)),
    ("middle", 0),
    *(("output", block) for block in range(3, 12)),
]  # fmt: skip
"""Part and block of each cross-attention layer, in the order in which they run."""


def noise_sigma(sigmas: Tensor, timestep: int = 0, noise_level: float | None = None) -> Tensor:
    """Sigma `[]` of t, or nearest to a noise level.

    sigmas        `[T]`, rising, one a training step, or evenly spaced among them
    timestep      t, of 50 sampler steps, 0 = the noisiest, spaced as Stable Diffusion's own schedule: training steps 981, 961, …, 1
    noise_level   instead of t: sqrt(1 - alpha_bar), 0 to 1
    """
    check_noise(timestep, noise_level)
    if noise_level is not None:
        return sigmas[(sigmas / (1 + sigmas**2).sqrt() - noise_level).abs().argmin()]
    step = (SAMPLER_STEPS - 1 - timestep) * (TRAINING_STEPS // SAMPLER_STEPS) + 1
    return sigmas[step * len(sigmas) // TRAINING_STEPS]


def inpainting(pictures: Tensor, masks: Tensor, stride: int = 8) -> tuple[Tensor, Tensor]:
    """What nine-channel U-Nets are told, as in `RefineByAlign.inpainting_condition`: the pictures `[B, 3, S, S]`, grey under the
    masks `[B, S, S]`, still to be encoded, and of the latents those that a mask touches, `[B, 1, S / stride, S / stride]` in {0, 1}."""
    masks = masks[:, None]
    return blanked(pictures, masks), F.max_pool2d(masks, stride)
