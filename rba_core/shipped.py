"""What comes with the package."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .imageio import read_image, read_mask

PRETRAINED = Path(__file__).parent / "pretrained"
"""Folders of models."""
SAMPLE = Path(__file__).parent / "sample"
"""image.png, mask.png, reference.png, reference_mask.png."""


def read_sample() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sample's image `[3, H, W]` and mask `[H, W]`, reference and reference mask."""
    image, reference = (read_image(SAMPLE / f"{name}.png").rgb for name in ("image", "reference"))
    mask, reference_mask = (read_mask(SAMPLE / f"{name}.png") for name in ("mask", "reference_mask"))
    return image, mask, reference, reference_mask
