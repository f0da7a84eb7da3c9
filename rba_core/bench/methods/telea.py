"""Neither model nor reference: the image as it is, and inpainting from the surroundings."""

from __future__ import annotations

import numpy as np

from ...imageio import to_bytes
from ...model import RefineByAlign
from ..dataset import Item
from .opencv import masked, opencv
from .outcome import Outcome


def none(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """The image with its artifact: what a method has to beat."""
    return Outcome(item.image)


def telea(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """Inpainting from the surroundings alone (Telea 2004, radius 5), without model or reference."""
    cv2 = opencv("telea")
    return Outcome(masked(item, cv2.inpaint(to_bytes(item.image), np.uint8(item.mask > 0.5) * 255, 5, cv2.INPAINT_TELEA)))
