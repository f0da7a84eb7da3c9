"""Alignment by features: cells of the crop look where the reference looks like them, for users without a model trained to align.

The reference is cut out and padded to a square as for the U-Net, so that its aspect stays; the grid over that square is as
fine as its features are, 32 x 32 and more where tokens for the U-Net are 16 x 16. What comes out is what `attend` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import Reached
from .errors import InputError
from .geometry import resize
from .reference_encoding import EncodedReference, segment
from .refinement import Progress
from .zoom_crop import ZoomCrop

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from .model import RefineByAlign

Features = Callable[[Tensor, int], Tensor]
"""A square picture `[3, S, S]` in [0, 1], of any size, and which of the two it is, `CROP` or `REFERENCE` -> its features, `[C, N, N]`."""
CROP, REFERENCE = 0, 1

TEMPERATURE, COARSE_TEMPERATURE = 0.02, 0.05
"""Of the softmax over cosines: what is nearer by so much counts e times as much. The finer the grid, the more cells share
what there is, hence the lower; the second is for 16 x 16 and less."""
DINOV2_TOKENS = 37
"""Along a side: the grid that DINOv2's position embedding was trained on, 518 px; on another one it is interpolated."""
FINEST = 64
"""Cells along a side at most: attention over finer grids takes gigabytes. They are averaged."""


@dataclass(frozen=True)
class FeatureAligner:
    """An aligner like `CrossAttention`, by features of both pictures.

    temperature   of the mutual softmax over cosines; default: by the grid
    fill          grey level around the segmented reference, 0 to 1
    """

    features: Features
    temperature: float | None = None
    fill: float = 0.5

    @torch.no_grad()
    def encode(self, reference: Tensor, mask: Tensor) -> EncodedReference:
        """The reference `[3, H, W]` under its mask `[H, W]`, its embedding the features `[1, N², C]`: for `attend` alone."""
        square, box = segment(reference, mask, self.fill)
        return EncodedReference(self.cells(square, REFERENCE)[None], box, (mask > 0.5).float())

    @torch.no_grad()
    def attend(self, crop: ZoomCrop, reference: EncodedReference) -> Tensor:
        """Where each of the crop's d x d cells looks in the reference, `[d², N²]`, rows of sum 1; never beside the object."""
        coverage = reference.to_tokens(reference.mask).flatten()
        query, temperature = self.cells(crop.image, CROP), self.temperature
        if temperature is None:
            temperature = COARSE_TEMPERATURE if reference.tokens <= 16 else TEMPERATURE
        return mutual_softmax(query, reference.embedding[0].to(query), (coverage > 0.1 * coverage.max()).to(query.device), temperature)

    def cells(self, picture: Tensor, which: int) -> Tensor:
        """`[N², C]`"""
        found = self.features(picture, which).float()
        return F.adaptive_avg_pool2d(found, min(found.shape[-1], FINEST)).flatten(1).T


def mutual_softmax(query: Tensor, key: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """`[d², C]`, `[N², C]` -> `[d², N²]`: the softmax over keys times that over queries, of cosines / temperature, rows scaled to
    sum 1. A key that many queries are like counts less for each, so that a region maps to a region and not to one token.

    allowed   `[N²]`, bool: keys that may be looked at
    """
    likeness = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature
    return (2 * likeness - likeness.logsumexp(0)).masked_fill(~allowed, -torch.inf).softmax(-1)


def patch_features(encode: Callable[[Tensor], Tensor], side: int) -> Features:
    """A vision transformer's tokens as features: `encode` takes pictures `[1, 3, side, side]` in [0, 1] and gives `[1, N², C]`."""

    def features(picture: Tensor, which: int) -> Tensor:
        tokens = encode(resize(picture, side, side)[None])[0]
        return tokens.T.unflatten(-1, (round(len(tokens) ** 0.5),) * 2)

    return features


def model_aligner(model: RefineByAlign, tokens: int = 16) -> FeatureAligner:
    """The model's own encoder aligns, `tokens` along a side: 16 are what rba-tiny's was trained with, `DINOV2_TOKENS` what a
    full DINOv2 was."""
    return FeatureAligner(patch_features(model.tokens, tokens * model.patch_size), fill=model.config.reference_fill)


@dataclass(frozen=True)
class Dift:
    """DIFT (Tang et al. 2023): features of a diffusion U-Net's decoder, for a picture noised to one timestep, mean over noises.

    context      `[1, L, C]`, the prompt's embedding; the paper gives "a photo of a …", an empty prompt serves too
    size         side of the picture that the autoencoder sees, pixels
    timestep     of the noise schedule, 0 the cleanest; 261 is the paper's for Stable Diffusion 2.1
    up_block     whose output counts, 0 the coarsest; the paper's is 1
    ensemble     noises
    conditions   further keyword arguments of the U-Net, as SDXL's has (`added_cond_kwargs`)
    """

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    context: Tensor
    size: int
    timestep: int = 261
    up_block: int = 1
    ensemble: int = 8
    seed: int = 0
    conditions: Mapping = field(default_factory=dict)
    progress: Progress | None = None

    @torch.no_grad()
    def __call__(self, picture: Tensor, which: int) -> Tensor:
        if not 0 <= self.up_block < len(self.unet.up_blocks):
            raise InputError("up block", f"is {self.up_block}", f"this model has 0 to {len(self.unet.up_blocks) - 1}")
        check_ensemble(self.ensemble)
        pixels = resize(picture, self.size, self.size)[None].to(self.context) * 2 - 1
        latents = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        return ensemble_mean(self.noisy_features, latents, which, self.ensemble, self.seed, self.progress)

    def noisy_features(self, latents: Tensor, noise: Tensor) -> Tensor:
        """`[1, c, h, w]` both -> `[C, h, w]`; nothing after the block runs."""
        timestep = torch.tensor([self.timestep], device=latents.device)

        def read(block: torch.nn.Module, given: tuple, features: Tensor) -> None:
            raise Reached(features)

        handle = self.unet.up_blocks[self.up_block].register_forward_hook(read)
        try:
            self.unet(self.scheduler.add_noise(latents, noise, timestep), timestep, self.context, **self.conditions)
        except Reached as reached:
            return reached.value[0]
        finally:
            handle.remove()
        raise RuntimeError(f"up block {self.up_block} did not run")


def check_ensemble(count: int) -> None:
    if count < 1:
        raise InputError("ensemble", f"is {count}", "use 1 or more (8 as in the paper)")


def ensemble_mean(features: Callable[[Tensor, Tensor], Tensor], latents: Tensor, which: int, count: int, seed: int, progress: Progress | None = None) -> Tensor:
    """The mean over `count` noises of what `features` gives for latents and a noise. Crop and reference have noises of their own:
    of one noise in both, each cell would find its own place again."""
    generator = torch.Generator().manual_seed((2 * seed + which) % 2**64)
    total = 0
    for index in range(count):
        total = total + features(latents, torch.randn(latents.shape, generator=generator).to(latents)).float()
        if progress:
            progress(index + 1, count)
    return total / count


def combined(diffusion: Features, patches: Features, weight: float = 0.5) -> Features:
    """SD+DINO (Zhang et al. 2023): both of unit length, (weight F_SD, (1 - weight) F_DINO), on the finer one's grid."""
    if not 0 <= weight <= 1:
        raise InputError("weight", f"is {weight:g}", "use 0 (patches alone) to 1 (diffusion alone)")

    def features(picture: Tensor, which: int) -> Tensor:
        found = [diffusion(picture, which).float(), patches(picture, which).float()]
        side = max(each.shape[-1] for each in found)
        first, second = (F.normalize(F.interpolate(each[None], (side, side), mode="bilinear"), dim=1)[0].to(found[0].device) for each in found)
        return torch.cat([weight * first, (1 - weight) * second])

    return features
