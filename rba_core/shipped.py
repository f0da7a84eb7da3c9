"""What comes with the package."""

from __future__ import annotations

from pathlib import Path

PRETRAINED = Path(__file__).parent / "pretrained"
"""Folders of models."""
SAMPLE = Path(__file__).parent / "sample"
"""image.png, mask.png, reference.png, reference_mask.png."""
