"""Stable Diffusion inpainting by text (Rombach et al. 2022)."""

from __future__ import annotations

from pathlib import Path

import torch

from ...model import RefineByAlign, quiet
from ..dataset import Item
from .outcome import Outcome
from .user_weights import PARTS, TEXT, picture_size, prompt, read_parts, redrawn


class StableDiffusionInpainting:
    """Stable Diffusion inpainting of our crop by the item's caption, without reference, as PAL refines; 50 DDIM steps, guidance 7.5."""

    steps, guidance = 50, 7.5

    def __init__(self, folder: str | Path, device: str | torch.device, dtype: torch.dtype):
        with quiet():
            from diffusers import StableDiffusionInpaintPipeline

        parts = read_parts("sd-inpainting", folder, PARTS | TEXT, 9, device, dtype)
        self.pipeline = StableDiffusionInpaintPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.size = picture_size(parts)

    def __call__(self, item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
        def draw(crop):
            return self.pipeline(
                prompt(item), image=crop.image[None], mask_image=crop.mask[None, None], height=self.size, width=self.size, num_inference_steps=self.steps,
                guidance_scale=self.guidance, generator=torch.Generator().manual_seed(seed), output_type="pt",
            ).images[0]  # fmt: skip

        return Outcome(redrawn(item, self.size, draw))
