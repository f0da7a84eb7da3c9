"""What AnyDoor's detail encoder is shown (Chen et al. 2024, Sec. 3.3): the high-frequency map of the reference, where the object is to stand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Box, resize

MAP_SIZE = 256
"""Side of a high-frequency map, pixels."""
THRESHOLD = 50
"""Of 255: weaker edges are left out."""
BOX_MARGIN = 1.1
"""Sides of the map's place in the hint, in those of the mask's box."""


def high_frequency_map(picture: Tensor, mask: Tensor) -> Tensor:
    """What of a picture `[3, S, S]` in [0, 1] lies on strong edges inside the mask `[S, S]`: `[3, 256, 256]`, black elsewhere.

    As AnyDoor computes it by OpenCV, in steps of 1/255: Sobel's derivatives (3 x 3, the border mirrored), half their absolute sum, the
    largest of the channels, times the picture; the mask eroded by 5 x 5 twice, not from the border.
    """
    picture, mask = (F.interpolate(value[None].float(), (MAP_SIZE,) * 2, mode="bilinear") for value in (picture, mask[None]))
    picture = (255 * picture).round()
    inside = -F.max_pool2d(-(mask > 0.5).float(), 9, 1, 4)
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=picture.device)
    kernels = torch.stack([across, across.T])[:, None]
    slopes = F.conv2d(F.pad(picture, (1, 1, 1, 1), mode="reflect").transpose(0, 1), kernels).abs().clamp(max=255)
    strength = slopes.mean(1).round().amax(0) * inside[0, 0]
    strength = torch.where(strength < THRESHOLD, 0, strength)
    return (strength / 255 * picture[0]).floor() / 255


def make_hint(image: Tensor, mask: Tensor, detail: Tensor | None = None) -> Tensor:
    """The crop `[3, S, S]` in [0, 1] with the high-frequency map stretched over the box of the mask `[S, S]`, black without one, in
    [-1, 1], and the mask, of any form, in {0, 1}: `[4, S, S]`."""
    size = mask.shape[-1]
    box = Box.around(mask)
    width, height = round(BOX_MARGIN * box.width), round(BOX_MARGIN * box.height)
    box = Box(box.x - (width - box.width) // 2, box.y - (height - box.height) // 2, width, height)
    laid = torch.zeros(3, height, width).to(image) if detail is None else resize(detail.to(image), height, width)
    return torch.cat([box.paste(image, laid) * 2 - 1, mask.view(1, size, size).to(image)])
