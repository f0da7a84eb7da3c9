"""First leg: the embedded encoder learns dense correspondence, and to keep what a patch looks like.

DINOv2 comes to the paper with both; ours is a small `Dinov2Model` trained from nothing. Loss: InfoNCE over
the 256 reference tokens for each token of the image crop (targets from the known flow), the same the other
way round, and a linear read-out of each patch's pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Model

from ..data.scenes import REFERENCE_FILL, Scenes, grid
from ..model import RefineByAlign


def place_tokens(encoder: Dinov2Model) -> None:
    """Start the position embedding from 2-D sines and cosines: from random ones, a short training never
    learns which tokens are neighbours (Beyer et al. 2022)."""
    width = encoder.config.hidden_size
    side = encoder.config.image_size // encoder.config.patch_size
    frequency = side ** -(torch.arange(width // 4) / (width // 4)) * torch.pi / 2
    phase = torch.arange(side)[:, None] * frequency
    wave = torch.cat([phase.sin(), phase.cos()], -1)
    rows, columns = wave[:, None].expand(side, side, -1), wave[None].expand(side, side, -1)
    with torch.no_grad():
        encoder.embeddings.position_embeddings[0, 1:] = 0.5 * torch.cat([rows, columns], -1).flatten(0, 1)


class EncoderObjective(nn.Module):
    def __init__(self, model: RefineByAlign, width: int = 128):
        super().__init__()
        self.stem, self.encoder = model.stem, model.encoder
        self.tokens, self.patch = model.tokens, model.patch_size
        if model.encoder.embeddings.mask_token is not None:
            model.encoder.embeddings.mask_token.requires_grad_(False)  # unused, which parallel training would take for an error
        hidden = model.encoder.config.hidden_size
        self.match = nn.Linear(hidden, width)
        self.paint = nn.Linear(hidden, 3 * self.patch**2)
        self.temperature = nn.Parameter(torch.tensor(2.5))

    def forward(self, scenes: Scenes, damaged: Tensor) -> dict[str, Tensor]:
        pictures = torch.cat([damaged, scenes.reference])
        tokens = self.tokens(pictures)
        query, key = F.normalize(self.match(tokens).float(), dim=-1).chunk(2)
        similarity = (query @ key.mT) * self.temperature.exp()
        target = token_targets(scenes.flow, scenes.visible, side=16)
        forward = -(target * similarity.log_softmax(-1)).sum() / target.sum().clamp(min=1)
        backward_target = target / target.sum(1, keepdim=True).clamp(min=0.5)
        backward = -(backward_target * similarity.log_softmax(1)).sum() / backward_target.sum().clamp(min=1)
        pixels = F.pixel_unshuffle(pictures, self.patch).flatten(2).mT
        painted = F.mse_loss(self.paint(tokens).float(), (pixels - 0.5) / 0.25)
        return {"match": forward, "back": 0.5 * backward, "paint": painted}


def token_targets(flow: Tensor, visible: Tensor, side: int, tokens: int = 16) -> Tensor:
    """Where each of `side²` cells of the crop should look: bilinear weights `[B, side², tokens²]`.

    A cell's row sums to the share of its points that the flow can speak of, 0 where there is none.
    """
    batch, size = flow.shape[:2]
    position = (flow.clamp(-1.5, 1.5) * 0.5 + 0.5) * tokens - 0.5
    axis = torch.arange(tokens, device=flow.device)
    hats = (1 - (position[..., None].clamp(0, tokens - 1) - axis).abs()).clamp(min=0)
    weights = hats[..., 1, :, None] * hats[..., 0, None, :] * visible[:, 0, ..., None, None]
    weights = weights.flatten(3).movedim(-1, 1)
    return F.adaptive_avg_pool2d(weights, side).flatten(2).mT


def damage(scenes: Scenes, generator: torch.Generator, shares: tuple[float, float, float, float]) -> Tensor:
    """The image crop with M_a's inside cut out, smeared, swapped for another picture's, or garbled; `shares`
    of each in the batch, sum 1. `generator` is the CPU's, wherever the scenes are."""
    image, mask = scenes.image, scenes.mask
    hole = torch.full_like(image, REFERENCE_FILL)
    smeared = F.interpolate(F.adaptive_avg_pool2d(image, 7), image.shape[-2:], mode="bilinear")
    shift = (torch.randn(len(image), 2, 10, 10, generator=generator) * 0.12).to(image)
    shift = F.interpolate(shift, image.shape[-2:], mode="bicubic").movedim(1, -1)
    garbled = F.grid_sample(image, grid(image.shape[-1], len(image)).to(image) + shift, padding_mode="reflection", align_corners=False)
    kinds = torch.stack([hole, smeared, image.roll(1, 0), garbled])
    kind = torch.multinomial(torch.tensor(shares), len(image), replacement=True, generator=generator)
    inside = kinds[kind.to(image.device), torch.arange(len(image), device=image.device)]
    return image * (1 - mask) + inside * mask
