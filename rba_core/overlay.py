"""Correspondence to look at: a map drawn over its reference, matched points side by side."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from .collage import Collage
from .geometry import Box, resize
from .imageio import to_bytes
from .zoom_crop import ZoomCrop

RED, WHITE = (1.0, 0.15, 0.1), (1.0, 1.0, 1.0)


def overlay(reference: Tensor, soft_or_mask: Tensor, mask: Tensor | None = None) -> Tensor:
    """Tint a reference where a map is high, the rest darkened, and outline M*.

    reference      `[3, H, W]` in [0, 1]
    soft_or_mask   `[H, W]` in [0, 1]
    mask           M*, `[H, W]`, to outline; default: where the map is above 0.5
    returns        `[3, H, W]` in [0, 1]
    """
    heat = soft_or_mask.to(reference).clamp(0, 1)
    hot = torch.stack([torch.ones_like(heat), heat**0.7, heat**4 * 0.6])  # red through orange to yellow
    tinted = reference * (1 - 0.35 * (1 - heat)) * (1 - 0.55 * heat) + 0.55 * heat * hot
    return outline(tinted, soft_or_mask if mask is None else mask, WHITE)


def outline(picture: Tensor, mask: Tensor, colour: tuple[float, float, float] = RED) -> Tensor:
    """Draw a mask's contour on `[3, H, W]`, just outside of it, two pixels wide at 512."""
    selected = (mask > 0.5).to(picture)[None, None]
    width = max(1, round(min(picture.shape[-2:]) / 256))
    ring = F.max_pool2d(selected, 2 * width + 1, 1, width)[0, 0] - selected[0, 0]
    return torch.where(ring > 0.5, picture.new_tensor(colour)[:, None, None], picture)


def draw_matches(image: Tensor, crop: ZoomCrop, reference: Tensor, collage: Collage | None, side: int = 384, points: int = 9) -> Tensor:
    """The crop and what of the reference `[3, H, W]` it was laid on, next to each other, with matched points in the same
    colour: filled where crop and reference agree, hollow where they do not (sureness below a quarter). Lines lead from
    those under the mask.

    image   `[3, h, w]`, the crop's own
    returns `[3, side, 2 side + gap]` in [0, 1]; white without a collage
    """
    gap = side // 16
    if collage is None:
        return torch.ones(3, side, 2 * side + gap)
    size = collage.flow.shape[-1]
    places = collage.flow.flatten(1)
    low, high = places.amin(1), places.amax(1)
    square = Box(*(int(value) for value in low), *(max(1, int(value)) for value in high - low)).square(max(1, int((high - low).max())))
    sheet = Image.new("RGB", (2 * side + gap, side), "white")
    marked = outline(resize(crop.box.crop(image), side, side), F.interpolate(crop.mask[None, None], (side, side))[0, 0], WHITE)
    sheet.paste(Image.fromarray(to_bytes(marked)), (0, 0))
    sheet.paste(Image.fromarray(to_bytes(resize(square.crop(reference, fill=1.0), side, side))), (side + gap, 0))
    draw, radius = ImageDraw.Draw(sheet), max(2, side // 100)
    steps = (np.arange(points) + 0.5) / points
    matched = []
    for row, v in enumerate(steps):
        for column, u in enumerate(steps):
            x, y = int(u * size), int(v * size)
            if collage.valid[y, x]:
                seen = (collage.flow[:, y, x] - torch.tensor([square.x, square.y])) / square.width * side
                colour = tuple(int(255 * value) for value in colorsys.hsv_to_rgb(column / points, 1.0 - 0.5 * row / points, 1.0))
                masked = crop.mask[int(v * len(crop.mask)), int(u * len(crop.mask))] > 0.5
                matched.append(((u * side, v * side), (float(seen[0]) + side + gap, float(seen[1])), colour, masked, collage.sureness[y, x] >= 0.25))
    for here, there, colour, masked, _ in matched:
        if masked:
            draw.line([here, there], fill=colour, width=1)
    for here, there, colour, _, sure in matched:  # over the lines
        for x, y in (here, there):
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour if sure else None, outline="black" if sure else colour)
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1).float() / 255


def attention_picture(rows: Tensor) -> Tensor:
    """Attention `[d², N²]` as a grey picture `[3, d², N²]`, each row's peak white: 8 bits then tell even a flat row."""
    return (rows / rows.amax(1, keepdim=True).clamp(min=1e-12)).expand(3, -1, -1)
