"""Pictures with detail at several scales, and views of them."""

import math

import torch
import torch.nn.functional as F


def texture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours with detail at several scales, `[3, H, W]` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(torch.rand(1, 3, height // cell + 2, width // cell + 2, generator=generator), (height, width), mode="bicubic")[0] * share
        for cell, share in ((24, 0.5), (9, 0.3), (4, 0.2))
    ]
    return sum(layers).clamp(0, 1)


def seen_through(reference: torch.Tensor, size: int, scale: float, angle: float, centre: tuple[float, float]) -> torch.Tensor:
    """A picture `[3, size, size]` of the reference: its middle shows `centre` (x, y), one pixel is `scale` of the reference's."""
    axis = torch.arange(size) + 0.5 - size / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    points = torch.stack([cos * x - sin * y + centre[0], sin * x + cos * y + centre[1]], -1)
    frame = torch.tensor([reference.shape[2], reference.shape[1]])
    return F.grid_sample(reference[None], (points / frame * 2 - 1)[None], align_corners=False)[0]


REFERENCE = texture(160, 180)
WHOLE = torch.ones(160, 180)
