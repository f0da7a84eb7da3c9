"""What every method of the benchmark gives, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry import Box
from ...model import RefineByAlign
from ...postprocessing import MatchedRegion
from ..dataset import Item


@dataclass(frozen=True)
class Outcome:
    """image        `[3, H, W]`, outside the mask the item's bit for bit
    region       M* over all artifacts of the mask, `None` from a method that does not align or where alignment found nothing
    fell_back    an artifact was redrawn from the whole reference for that
    flow         `[2, H, W]`, where in the reference each masked pixel is held to be seen; NaN elsewhere
    confidence   of the registration, the lowest of all artifacts
    evidence     that it was computed from, of that artifact
    """

    image: Tensor
    region: MatchedRegion | None = None
    fell_back: bool = False
    flow: Tensor | None = None
    confidence: float | None = None
    evidence: tuple[float, ...] = ()


Method = Callable[[Item, RefineByAlign | None, int], Outcome]
"""Item, model (`None` where the method needs none), seed."""


def united(a: MatchedRegion, b: MatchedRegion) -> MatchedRegion:
    mask = torch.maximum(a.mask, b.mask)
    return MatchedRegion(mask, Box.around(mask), torch.maximum(a.soft, b.soft))
