"""Put the redrawn crop back so that not one pixel outside the mask changes."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .geometry import Box, resize


def feather_inside(mask: Tensor, radius: float) -> Tensor:
    """Blend weights `[H, W]` in [0, 1]: exactly 0 outside the mask, 1 deeper in it than `radius` pixels."""
    inside = mask.cpu().numpy() > 0.5
    depth = ndimage.distance_transform_edt(np.pad(inside, 1, mode="edge"))[1:-1, 1:-1]
    weight = inside if radius <= 0 else np.clip(depth / (radius + 1), 0, 1) * inside
    return torch.from_numpy(weight.astype(np.float32)).to(mask.device)


def colour_offset(redrawn: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """What to add to `redrawn` `[3, H, W]` so that it agrees with `original` around the mask.

    The differences on a ring outside the mask, spread inwards by normalised Gaussian convolution: a
    low-frequency field, so drift in tone goes and detail stays.
    """
    inside = mask.cpu().numpy() > 0.5
    width = max(2.0, np.sqrt(inside.sum()) / 4)
    ring = (ndimage.distance_transform_edt(~inside) <= width) & ~inside
    if not ring.any():
        return torch.zeros_like(redrawn)
    difference = (original - redrawn).cpu().numpy() * ring
    reach = (0, width * 1.5, width * 1.5)
    total = ndimage.gaussian_filter(ring.astype(np.float32)[None], reach)
    field = ndimage.gaussian_filter(difference, reach) / np.maximum(total, 1e-6)
    return torch.from_numpy(np.where(total > 1e-4, field, difference.sum((1, 2), keepdims=True) / ring.sum())).to(redrawn)


def continued_inwards(image: Tensor, mask: Tensor) -> Tensor:
    """`image` with each pixel under the mask that of the nearest pixel outside: what to feather into, for the
    artifact itself would shine through as a hairline along the mask's border."""
    inside = mask.cpu().numpy() > 0.5
    if inside.all():
        return image
    row, column = ndimage.distance_transform_edt(inside, return_distances=False, return_indices=True)
    return image[:, torch.from_numpy(row), torch.from_numpy(column)]


def stitch(image: Tensor, mask: Tensor, redrawn: Tensor, box: Box, *, feather: float = 1.0, colour_match: bool = True) -> Tensor:
    """Blend a redrawn crop into its picture.

    image     `[3, H, W]` in [0, 1]
    mask      `[H, W]`; outside (<= 0.5) the result is the image, bit for bit
    redrawn   `[3, S, S]` in [0, 1], any S: resampled to the box
    box       where the crop stands in the image
    feather   width of the blend in pixels of the image, inside the mask
    """
    redrawn = resize(redrawn.to(image.device).float(), box.height, box.width)
    original = box.crop(image).float()
    cut_mask = box.crop(mask[None])[0]
    if colour_match:
        redrawn = (redrawn + colour_offset(redrawn, original, cut_mask)).clamp(0, 1)
    weight = feather_inside(cut_mask, feather)
    beside = continued_inwards(original, cut_mask)
    blended = torch.where(weight > 0, beside + weight * (redrawn - beside), original)
    return box.paste(image, blended.to(image.dtype))
