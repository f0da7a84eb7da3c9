"""AnyDoor (Chen et al. 2024) itself."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import InputError
from ...geometry import Box, resize
from ...model import RefineByAlign
from ...reference_encoding import EncodedReference, encode_reference
from ...refinement import make_scheduler
from ...stitch import stitch
from ...zoom_crop import separate
from ..dataset import Item
from .outcome import Outcome

BOX_MARGIN, CROP_MARGIN = 1.1, 2.0
"""Sides of the box that is redrawn, in those of the artifact's, and of the crop in those of the box; AnyDoor draws the latter from 1.5 to 2.9."""


class AnyDoor:
    """AnyDoor (Chen et al. 2024) as the paper uses it: the whole reference object drawn into the box of the artifact, no alignment; 50 DDIM
    steps, guidance 5. AnyDoor pastes its whole crop, less 5 px of border; here only what the mask covers, as ours is.
    """

    def __init__(self, folder: str | Path, device: str | torch.device, dtype: torch.dtype):
        self.model = RefineByAlign.load(folder, device=device, dtype=dtype)
        if not self.model.config.detail_encoder:
            raise InputError("weights", f"{folder} is not AnyDoor", "give a folder that `rba convert anydoor` wrote")

    @torch.no_grad()
    def __call__(self, item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
        reference, result = encode_reference(self.model, item.reference, item.object_mask), item.image
        for artifact in separate(item.mask):
            box = enlarged(Box.around(artifact), BOX_MARGIN, *artifact.shape)
            crop = crop_around(box, *artifact.shape)
            inside = Box(box.x - crop.x, box.y - crop.y, box.width, box.height)
            result = stitch(result, artifact, self.draw(crop.crop(result), inside, reference, seed), crop)
        return Outcome(result)

    def draw(self, picture: Tensor, box: Box, reference: EncodedReference, seed: int) -> Tensor:
        """A crop `[3, H, W]` with the object in its box, from noise alone: nothing of the crop is imposed."""
        model, size = self.model, self.model.config.image_size
        padding = centred(*picture.shape[-2:])
        hint = padded_hint(picture, box, padding, reference.detail, size)
        condition = F.pixel_unshuffle(hint[None].to(model.device, model.dtype), model.stride).expand(2, -1, -1, -1)
        embedding = torch.cat([model.unconditional(reference.embedding), reference.embedding])
        sampler = make_scheduler(model, model.config.scheduler)
        sampler.set_timesteps(model.config.steps)
        latents = torch.randn(1, model.vae.config.latent_channels, size // model.stride, size // model.stride, generator=torch.Generator().manual_seed(seed)).to(condition)
        for timestep in sampler.timesteps:
            sample = model.unet_input(latents.expand(2, -1, -1, -1), condition)
            dropped, guided = model.unet(sample, timestep.to(sample.device), embedding).sample.chunk(2)
            latents = sampler.step(dropped + model.config.guidance * (guided - dropped), timestep, latents, return_dict=False)[0]
        left, right, top, bottom = padding
        height, width = picture.shape[-2:]
        drawn = resize(model.decode_latents(latents)[0].cpu(), height + top + bottom, width + left + right)
        return drawn[:, top : top + height, left : left + width]


def enlarged(box: Box, factor: float, height: int, width: int) -> Box:
    """About its centre, cut off at the picture's border."""
    grown_width, grown_height = round(factor * box.width), round(factor * box.height)
    return _cut(Box(box.x - (grown_width - box.width) // 2, box.y - (grown_height - box.height) // 2, grown_width, grown_height), height, width)


def crop_around(box: Box, height: int, width: int) -> Box:
    """The square around the enlarged box, cut off at the picture's border."""
    grown = enlarged(box, CROP_MARGIN, height, width)
    return _cut(grown.square(max(grown.width, grown.height)), height, width)


def _cut(box: Box, height: int, width: int) -> Box:
    left, top = max(box.x, 0), max(box.y, 0)
    return Box(left, top, min(box.x + box.width, width) - left, min(box.y + box.height, height) - top)


def centred(height: int, width: int) -> tuple[int, int, int, int]:
    """What to add to the shorter side of a crop, half on either end: left, right, top, bottom."""
    missing = abs(height - width)
    first, second = missing // 2, missing - missing // 2
    return (first, second, 0, 0) if height > width else (0, 0, first, second)


def padded_hint(picture: Tensor, box: Box, padding: tuple[int, int, int, int], detail: Tensor, size: int) -> Tensor:
    """AnyDoor's hint `[4, size, size]`: in the box the map, and 1 in the mask's channel; in the padding black, and -1."""
    mask = box.paste(torch.zeros(1, *picture.shape[-2:]), torch.ones(1, box.height, box.width))
    laid = box.paste(picture, resize(detail.to(picture), box.height, box.width))
    hint = F.pad(torch.cat([laid * 2 - 1, mask]), padding, value=-1)
    colours = F.interpolate(hint[None, :3], (size, size), mode="bilinear", antialias=True)[0]
    return torch.cat([colours, F.interpolate(hint[None, 3:], (size, size), mode="nearest")[0]])
