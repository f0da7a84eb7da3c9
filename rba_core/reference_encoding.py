"""Reference encoding (Eq. 3): E = MLP(phi(I_r)), with the geometry that leads from tokens back to pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .detail_map import high_frequency_map
from .geometry import Box, resize, resize_mask


@dataclass(frozen=True)
class EncodedReference:
    """A segmented reference as the U-Net reads it.

    embedding   E `[1, N², C]`, N x N tokens in rows, class token dropped; before them where the model reads it
    box         the square of the reference picture that the token grid covers
    mask        the segment, `[H, W]` in {0, 1} at the reference's own size
    detail      its high-frequency map `[3, 256, 256]`, for a model with a detail encoder
    """

    embedding: Tensor
    box: Box
    mask: Tensor
    detail: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N, tokens along a side."""
        return round(self.embedding.shape[1] ** 0.5)

    def to_reference(self, token_map: Tensor) -> Tensor:
        """Carry a map over the tokens `[N, N]` to the reference's pixels `[H, W]`, bilinear between token
        centres, 0 outside the square. Token (row, column) covers side/N pixels from the square's corner."""
        height, width = self.mask.shape
        x = (torch.arange(width) + 0.5 - self.box.x) / self.box.width * 2 - 1
        y = (torch.arange(height) + 0.5 - self.box.y) / self.box.height * 2 - 1
        points = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]
        sampled = F.grid_sample(token_map[None, None].float().cpu(), points, padding_mode="border", align_corners=False)[0, 0]
        return sampled * (points[0].abs() <= 1).all(-1)

    def to_tokens(self, pixel_map: Tensor) -> Tensor:
        """The mean of a map over the reference's pixels `[H, W]` in each token `[N, N]`; the way back."""
        square = self.box.crop(pixel_map[None].float(), fill=0.0)
        return F.interpolate(square[None], (self.tokens,) * 2, mode="area")[0, 0]


def segment(reference: Tensor, mask: Tensor, fill: float, margin: float = 1.0) -> tuple[Tensor, Box]:
    """I_r ⊗ M: `[3, H, W]` with `fill` outside the mask `[H, W]`, cut to the mask's box and padded to a square, `margin` times its longer side."""
    box = Box.around(mask)
    box = box.square(round(margin * max(box.width, box.height)))
    segmented = torch.where(mask > 0.5, reference, torch.full_like(reference, fill))
    return box.crop(segmented, fill=fill), box


@torch.no_grad()
def encode_reference(model, reference: Tensor, mask: Tensor) -> EncodedReference:
    """Segment, crop, pad to a square, resize to the encoder's input (224 px for 16 x 16 tokens), embed.

    reference   `[3, H, W]` in [0, 1]
    mask        `[H, W]`, the object or the part of it to look at
    """
    size = model.encoder_size
    square, box = segment(reference, mask, model.config.reference_fill, model.config.reference_margin)
    seen = resize(square, size, size)
    detail = high_frequency_map(seen, resize_mask(box.crop(mask[None], fill=0)[0], size, size)) if model.config.detail_encoder else None
    return EncodedReference(model.embed(seen[None]), box, (mask > 0.5).float(), detail)
