"""Paint-by-Example (Yang et al. 2023)."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch

from ...model import RefineByAlign, quiet
from ..dataset import Item
from .outcome import Outcome
from .user_weights import PARTS, around_object, picture_size, read_parts, redrawn, to_pil


class PaintByExample:
    """Paint-by-Example (Yang et al. 2023): inpainting of our crop, guided by one CLIP token of the reference's object; 50 DDIM steps, guidance 5."""

    steps, guidance = 50, 5.0

    def __init__(self, folder: str | Path, device: str | torch.device, dtype: torch.dtype):
        with quiet():
            from diffusers import PaintByExamplePipeline
            from transformers import CLIPImageProcessor

        encoder = inspect.getmodule(PaintByExamplePipeline).PaintByExampleImageEncoder  # its module moves from version to version
        parts = read_parts("paint-by-example", folder, PARTS | {"image_encoder": encoder, "feature_extractor": CLIPImageProcessor}, 9, device, dtype)
        with quiet():
            self.pipeline = PaintByExamplePipeline(**parts, safety_checker=None)
        self.pipeline.set_progress_bar_config(disable=True)
        self.size = picture_size(parts)

    def __call__(self, item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
        example = to_pil(around_object(item, self.size)[0])

        def draw(crop):
            return self.pipeline(
                image=crop.image[None] * 2 - 1, mask_image=crop.mask[None, None], example_image=example, num_inference_steps=self.steps, guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(seed), output_type="pt",
            ).images[0]  # fmt: skip

        return Outcome(redrawn(item, self.size, draw))
