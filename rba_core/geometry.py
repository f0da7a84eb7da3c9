"""Boxes, and the resampling that goes with them. Pixel (x, y) covers [x, x+1) x [y, y+1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Box:
    """A rectangle in whole pixels; may reach over the border of the picture it belongs to."""

    x: int
    y: int
    width: int
    height: int

    @staticmethod
    def around(mask: Tensor) -> Box:
        """The smallest box that holds every set pixel of a mask `[H, W]`."""
        rows, columns = (mask > 0.5).any(1).nonzero(), (mask > 0.5).any(0).nonzero()
        if len(rows) == 0:
            raise InputError("mask", "is empty", "paint over at least one pixel (white = selected)")
        y, x = int(rows[0]), int(columns[0])
        return Box(x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1)

    def square(self, side: int) -> Box:
        """The square of that side with the same centre, rounded down to whole pixels."""
        return Box(self.x + (self.width - side) // 2, self.y + (self.height - side) // 2, side, side)

    def clamped(self, height: int, width: int) -> Box:
        """Moved into a picture of that size as far as it fits; centred on an axis where it does not."""

        def place(start: int, extent: int, limit: int) -> int:
            return min(max(start, 0), limit - extent) if extent <= limit else (limit - extent) // 2

        return Box(place(self.x, self.width, width), place(self.y, self.height, height), self.width, self.height)

    def crop(self, picture: Tensor, fill: float | None = None) -> Tensor:
        """Cut from `[C, H, W]`. Beyond the border: `fill`, or the border's own pixels repeated."""
        height, width = picture.shape[-2:]
        rows = torch.arange(self.y, self.y + self.height, device=picture.device)
        columns = torch.arange(self.x, self.x + self.width, device=picture.device)
        cut = picture[:, rows.clamp(0, height - 1)][:, :, columns.clamp(0, width - 1)]
        if fill is not None:
            inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
            cut = torch.where(inside, cut, torch.full_like(cut, fill))
        return cut

    def paste(self, picture: Tensor, cut: Tensor) -> Tensor:
        """A copy of `[C, H, W]` with `cut` in this box; what reaches over the border is dropped."""
        height, width = picture.shape[-2:]
        top, left = max(0, self.y), max(0, self.x)
        bottom, right = min(height, self.y + self.height), min(width, self.x + self.width)
        pasted = picture.clone()
        pasted[:, top:bottom, left:right] = cut[:, top - self.y : bottom - self.y, left - self.x : right - self.x]
        return pasted


def resize(picture: Tensor, height: int, width: int) -> Tensor:
    """Resample `[C, H, W]` (bicubic, low-pass filtered when shrinking), kept in [0, 1]."""
    if picture.shape[-2:] == (height, width):
        return picture
    resampled = F.interpolate(picture[None].float(), (height, width), mode="bicubic", antialias=True)[0]  # no half on a CPU
    return resampled.clamp(0, 1).to(picture.dtype)


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resample `[H, W]` to {0, 1}; a pixel is set where at least half of it is covered."""
    if mask.shape == (height, width):
        return (mask > 0.5).float()
    return (F.interpolate(mask[None, None].float(), (height, width), mode="bilinear", antialias=True)[0, 0] >= 0.5).float()
