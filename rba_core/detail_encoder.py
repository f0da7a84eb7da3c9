"""AnyDoor's detail encoder (Chen et al. 2024, Sec. 3.3): what `detail_map` shows, as residuals of the U-Net."""

from __future__ import annotations

from diffusers import ControlNetModel
from torch import Tensor


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
