"""What the methods on OpenCV share. Pictures are uint8 `[H, W, 3]`, as `imageio.to_bytes` gives them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from ...imageio import to_bytes
from ..dataset import Item

SHAVED = 3
"""Pixels that OpenCV's seamlessClone takes off a mask's border."""


def opencv(method: str):
    """The module. Raises `InputError` where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise InputError("method", f"{method} needs OpenCV", 'pip install "refine-by-align[bench]"') from error
    return cv2


def masked(item: Item, filled: np.ndarray) -> Tensor:
    """The image with what its mask covers taken from `filled`."""
    return torch.where(item.mask > 0.5, torch.from_numpy(filled).permute(2, 0, 1).float() / 255, item.image)


def poisson_blended(cv2, laid: np.ndarray, item: Item) -> np.ndarray:
    """Gradients of `laid` under the mask (Pérez et al. 2003). OpenCV's shaves three pixels off the mask, needs a border
    around it, and puts the middle of its box where told."""
    border = SHAVED + 1
    around = tuple(np.pad(picture, ((border, border), (border, border), (0, 0)), mode="edge") for picture in (laid, to_bytes(item.image)))
    selected = cv2.dilate(np.pad(np.uint8(item.mask > 0.5) * 255, border), np.ones((3, 3), np.uint8), iterations=SHAVED)
    x, y, width, height = cv2.boundingRect(selected)
    return cv2.seamlessClone(*around, selected, (x + width // 2, y + height // 2), cv2.NORMAL_CLONE)[border:-border, border:-border]
