"""Rough pictures of a crop while it is sampled: a linear map from latents to colours, as samplers' previews use, fitted to the autoencoder at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .model import RefineByAlign


Preview = Callable[[Tensor], None]
"""Called in each step, before its progress, with a picture `[3, h, w]` in [0, 1], a pixel a latent."""

CHART = 4
"""Colours along a side of the chart that the map is fitted to, besides the crop: it has those that the crop lacks."""
RIDGE = 1e-3


class LatentPreview:
    """known    latents of the crop `[1, c, h, w]`, shown wherever `hole` `[1, 1, h, w]` is 0
    picture  the crop that they are of, `[3, S, S]` in [0, 1]
    """

    def __init__(self, model: RefineByAlign, known: Tensor, hole: Tensor, picture: Tensor):
        self.levels, self.predicts = model.scheduler.alphas_cumprod, model.scheduler.config.prediction_type
        self.known, self.hole = known.float(), hole.float()
        colours = torch.rand(1, 3, CHART, CHART, generator=torch.Generator().manual_seed(0))
        chart = F.interpolate(colours, scale_factor=4 * model.stride, mode="bilinear")
        seen = [(self.known, picture[None]), (model.encode_image(chart).float(), chart)]
        latents = torch.cat([with_one(latents) for latents, _ in seen])
        wanted = torch.cat([rows(F.adaptive_avg_pool2d(shown.to(known.device).float(), latents.shape[-2:])) for latents, shown in seen])
        ridge = RIDGE * len(latents) * torch.eye(latents.shape[1], device=latents.device)
        self.colours = torch.linalg.solve(latents.mT @ latents + ridge, latents.mT @ wanted)

    def __call__(self, scaled: Tensor, prediction: Tensor, timestep: Tensor) -> Tensor:
        """What a step's prediction makes of its input z_t, both `[1, c, h, w]`: the picture of z_0, `[3, h, w]`."""
        level = self.levels[timestep.round().long().cpu()].to(scaled.device)
        scaled, prediction = scaled.float(), prediction.float()
        if self.predicts == "v_prediction":
            clean = level.sqrt() * scaled - (1 - level).sqrt() * prediction
        else:
            clean = (scaled - (1 - level).sqrt() * prediction) / level.sqrt()
        latents = self.hole * clean + (1 - self.hole) * self.known
        return (with_one(latents) @ self.colours).T.unflatten(1, latents.shape[-2:]).clamp(0, 1)


def rows(pictures: Tensor) -> Tensor:
    """`[1, c, h, w]` -> `[hw, c]`"""
    return pictures[0].flatten(1).T


def with_one(latents: Tensor) -> Tensor:
    return F.pad(rows(latents), (0, 1), value=1.0)
