"""AnyDoor's detail encoder (Chen et al. 2024, Sec. 3.3): high-frequency maps of the reference, laid where the object is to stand, as
residuals of the U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from torch import Tensor

from .geometry import Box, resize

MAP_SIZE = 256
"""Side of a high-frequency map, pixels."""
THRESHOLD = 50
"""Of 255: weaker edges are left out."""
BOX_MARGIN = 1.1
"""Sides of the map's place in the hint, in those of the mask's box."""


class DetailEncoder(ControlNetModel):
    """The encoder half of the U-Net, with a convolution after each block, in the layout of a ControlNet. Unlike one it never sees z_t:
    what it makes of the hint takes the place of its first block's output, so that block, `conv_in`, has weights but no use."""

    def forward(self, hint: Tensor, timestep: Tensor, context: Tensor) -> dict:
        """Hint `[B, 4, S, S]`, timestep `[1]` or `[B]`, tokens `[B, T, C]` -> what `UNet2DConditionModel` takes as a ControlNet's output."""
        time = self.time_embedding(self.time_proj(timestep.expand(len(hint))).to(hint))
        hidden = self.controlnet_cond_embedding(hint)
        outputs = [hidden]
        for block in self.down_blocks:
            attends = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
            hidden, own = block(hidden, time, **attends)
            outputs += own
        middle = self.mid_block(hidden, time, encoder_hidden_states=context)
        residuals = [convolution(output) for convolution, output in zip(self.controlnet_down_blocks, outputs, strict=True)]
        return {"down_block_additional_residuals": residuals, "mid_block_additional_residual": self.controlnet_mid_block(middle)}


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
