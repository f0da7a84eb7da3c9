"""Zoom-in crop (Sec. 3.4): a square around M_a, as artifacts are tiny: under 4% of the image in over half of the cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from .errors import InputError
from .geometry import Box, resize, resize_mask

if TYPE_CHECKING:
    from .model import RefineByAlign


@dataclass(frozen=True)
class ZoomCrop:
    """One artifact and its surroundings at the model's resolution.

    image   `[3, S, S]` in [0, 1]
    mask    `[S, S]` in {0, 1}
    box     where the crop stands in the whole picture
    """

    image: Tensor
    mask: Tensor
    box: Box


def separate(mask: Tensor) -> list[Tensor]:
    """The connected parts of a mask `[H, W]`, largest first; parts closer than their own size stay together."""
    set_pixels = mask.cpu().numpy() > 0.5
    largest = max(1, int(np.sqrt(set_pixels.sum())))
    near = ndimage.distance_transform_edt(~set_pixels) <= max(1, largest // 4)
    labels, count = ndimage.label(near)
    parts = [torch.from_numpy(set_pixels & (labels == label)).to(mask) for label in range(1, count + 1)]
    return sorted(parts, key=lambda part: -int(part.sum()))


def crop_box(mask: Tensor, context: float, multiple: int) -> Box:
    """The square around a mask `[H, W]`: `context` times its longer side, a multiple of the latent stride."""
    if context < 1:
        raise InputError("context", f"is {context:g}, less than the mask itself", "use 1 or more (2 shows as much again around it)")
    height, width = mask.shape
    box = Box.around(mask)
    needed = -(-max(box.width, box.height) // multiple) * multiple
    wanted = -(-round(max(box.width, box.height) * context) // multiple) * multiple
    fits = min(height, width) // multiple * multiple
    return box.square(max(needed, min(wanted, fits))).clamped(height, width)


def zoom_crop(image: Tensor, mask: Tensor, size: int, *, context: float = 2.0, multiple: int = 8) -> ZoomCrop:
    """Crop `image` `[3, H, W]` around `mask` `[H, W]` and resample to `size` pixels a side.

    A mask longer than the picture's shorter side gives a square that reaches over the border; there the
    border's own pixels are repeated.
    """
    box = crop_box(mask, context, multiple)
    cut_mask = resize_mask(box.crop(mask[None])[0], size, size)
    if not cut_mask.any():  # a mask of few pixels in a wide crop may vanish when shrunk
        cut_mask = (F.adaptive_max_pool2d(box.crop(mask[None])[None], size)[0, 0] > 0.5).float()
    return ZoomCrop(resize(box.crop(image), size, size), cut_mask, box)


def blanked(pictures: Tensor, masks: Tensor) -> Tensor:
    """Crops `[B, 3, S, S]` in [0, 1] as an inpainting U-Net sees them: grey under their masks `[B, 1, S, S]`."""
    return pictures * (1 - masks) + 0.5 * masks


def crop_for(model: RefineByAlign, image: Tensor, mask: Tensor, context: float | None = None) -> ZoomCrop:
    """`zoom_crop` at the model's own size, on its grid of latents. context: default, the refinement's own."""
    context = model.config.context if context is None else context
    return zoom_crop(image, mask, model.config.image_size, context=context, multiple=model.stride)
