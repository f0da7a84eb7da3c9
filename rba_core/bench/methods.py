"""The methods a benchmark compares: each takes an item, a model and a seed, and gives an `Outcome`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..geometry import Box
from ..model import RefineByAlign
from ..pipeline import Settings, refine_by_align
from ..postprocessing import MatchedRegion
from .dataset import Item


@dataclass(frozen=True)
class Outcome:
    """image `[3, H, W]`; region, M* over all artifacts of the mask, `None` from a method that does not align
    or where alignment found nothing; fell_back, an artifact was redrawn from the whole reference for that."""

    image: Tensor
    region: MatchedRegion | None = None
    fell_back: bool = False


def refine(item: Item, model: RefineByAlign, seed: int, register: bool = True) -> Outcome:
    """Both stages; an artifact whose alignment says nothing is redrawn from the whole reference."""
    settings = Settings(on_flat="single-stage", register=register)
    refined = refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed)
    found = [region for region in refined.regions if region is not None]
    return Outcome(refined.image, reduce(_united, found) if found else None, len(found) < len(refined.regions))


def paper(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """Both stages without registration: M* as attention gives it, guided by tokens alone."""
    return refine(item, model, seed, register=False)


def single_stage(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """No alignment: the whole reference guides the refinement (the paper's ablation)."""
    settings = Settings(single_stage=True)
    return Outcome(refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed).image)


def none(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """The image with its artifact: what a method has to beat."""
    return Outcome(item.image)


def telea(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """Inpainting from the surroundings alone (Telea 2004, radius 5), without model or reference."""
    try:
        import cv2
    except ImportError as error:
        raise InputError("method", "telea needs OpenCV", 'pip install "refine-by-align[bench]"') from error
    eight_bit = (item.image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    filled = cv2.inpaint(eight_bit, np.uint8(item.mask > 0.5) * 255, 5, cv2.INPAINT_TELEA)
    filled = torch.from_numpy(filled).permute(2, 0, 1).float() / 255
    return Outcome(torch.where(item.mask > 0.5, filled, item.image))


METHODS = {"refine": refine, "paper": paper, "single-stage": single_stage, "none": none, "telea": telea}
NEED_MODEL = {"refine", "paper", "single-stage"}


def _united(a: MatchedRegion, b: MatchedRegion) -> MatchedRegion:
    mask = torch.maximum(a.mask, b.mask)
    return MatchedRegion(mask, Box.around(mask), torch.maximum(a.soft, b.soft))
