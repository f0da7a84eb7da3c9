"""A correspondence map drawn over its reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
