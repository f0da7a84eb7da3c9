"""DIFT (Tang et al. 2023): keypoints matched by features of a diffusion model, as in Fig. 2 of the paper."""

from __future__ import annotations

from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import feature_alignment
from ...geometry import Box
from ...model import RefineByAlign
from ...postprocessing import MatchedRegion
from ...zoom_crop import separate, zoom_crop
from ..dataset import Item
from .opencv import opencv
from .outcome import Outcome, united
from .user_weights import StableDiffusion, around_object

POINTS = 10
CONTEXT = 3.0
"""Side of the crop that the points lie in, in longer sides of the mask."""


class Dift:
    """DIFT (Tang et al. 2023): ten points of the mask's contour matched by the U-Net's features, M* the polygon of their matches; nothing is redrawn."""

    def __init__(self, folder: str | Path, device: str | torch.device, dtype: torch.dtype):
        self.cv2 = opencv("dift")
        self.diffusion = StableDiffusion("dift", folder, device, dtype)

    def __call__(self, item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
        square, on_object, box = around_object(item, self.diffusion.size)
        sought = self.features(square, feature_alignment.REFERENCE, seed)

        def region(artifact: Tensor) -> MatchedRegion:
            crop = zoom_crop(item.image, artifact, self.diffusion.size, context=CONTEXT)
            points = nearest(self.features(crop.image, feature_alignment.CROP, seed), contour_points(self.cv2, crop.mask), sought, on_object)
            corners = np.int32((points + 0.5) * box.width / self.diffusion.size) + np.int32([box.x, box.y])
            mask = torch.from_numpy(self.cv2.fillPoly(np.zeros(item.reference.shape[1:], np.uint8), [corners], 1)).float()
            return MatchedRegion(mask, Box.around(mask), mask)

        return Outcome(item.image, reduce(united, map(region, separate(item.mask))))

    def features(self, picture: Tensor, which: int, seed: int) -> Tensor:
        """`[3, S, S]` -> `[C, h, w]`, with an empty prompt."""
        diffusion = self.diffusion
        with torch.no_grad():
            prompt = diffusion.text([""])
        return feature_alignment.Dift(diffusion.vae, diffusion.unet, diffusion.scheduler, prompt, diffusion.size, seed=seed)(picture, which).cpu()


def contour_points(cv2, mask: Tensor) -> np.ndarray:
    """`[POINTS, 2]`, (x, y) in whole pixels, at equal distances along the longest outer contour of a mask `[S, S]`."""
    contours, _ = cv2.findContours(np.uint8(mask.numpy() > 0.5), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=len)[:, 0]
    return contour[np.arange(POINTS) * len(contour) // POINTS]


def nearest(query: Tensor, points: np.ndarray, key: Tensor, allowed: Tensor) -> np.ndarray:
    """Of points in one picture, those of the most alike features in the other, by cosine.

    query, key   features `[C, h, w]` of two pictures, both S pixels a side; read bilinearly between cells
    points       `[n, 2]`, (x, y) in pixels
    allowed      `[S, S]`, where matches may lie
    returns      `[n, 2]`, (x, y) in whole pixels
    """
    size = allowed.shape
    places = (torch.from_numpy(points).float() + 0.5) / size[0] * 2 - 1
    wanted = F.grid_sample(query[None], places[None, None], align_corners=False, padding_mode="border")[0, :, 0]

    def enlarged(values: Tensor) -> Tensor:
        return F.interpolate(values[None], size, mode="bilinear")[0]

    length = sum(enlarged(part).square().sum(0) for part in key.split(64)).sqrt()  # in parts: 1280 channels of 768 x 768 are 3 GB
    cosine = enlarged(torch.einsum("cn,chw->nhw", wanted, key)) / length.clamp(min=1e-9)
    best = cosine.masked_fill(allowed < 0.5, -torch.inf).flatten(1).argmax(1)
    return torch.stack([best % size[1], best // size[1]], -1).numpy()
