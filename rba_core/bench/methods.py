"""The methods a benchmark compares: each takes an item, a model and a seed, and gives an `Outcome`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..alignment import correspondence
from ..errors import InputError
from ..geometry import Box, resize
from ..model import RefineByAlign
from ..pipeline import Settings, grow, redraw, refine_by_align, register
from ..postprocessing import MatchedRegion, clean
from ..reference_encoding import encode_reference, segment
from ..zoom_crop import ZoomCrop, zoom_crop
from .dataset import Item

TEMPERATURE = 0.05
"""Of the softmax over cosines in `features`: a token that is nearer by 0.05 counts e times as much."""


@dataclass(frozen=True)
class Outcome:
    """image `[3, H, W]`; region, M* over all artifacts of the mask, `None` from a method that does not align
    or where alignment found nothing; fell_back, an artifact was redrawn from the whole reference for that."""

    image: Tensor
    region: MatchedRegion | None = None
    fell_back: bool = False


def refine(item: Item, model: RefineByAlign, seed: int, **settings) -> Outcome:
    """Both stages; an artifact whose alignment says nothing is redrawn from the whole reference. settings: of `Settings`."""
    settings = Settings(on_flat="single-stage", **settings)
    refined = refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed)
    found = [region for region in refined.regions if region is not None]
    return Outcome(refined.image, reduce(_united, found) if found else None, len(found) < len(refined.regions))


def paper(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """Both stages as published: M* from the masked cells' attention alone, guided by tokens alone."""
    return refine(item, model, seed, dense=False, levels=1, register=False)


def unregistered(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """As `refine`, but without a look at pixels: M* from the attention of all cells, guided by tokens alone."""
    return refine(item, model, seed, register=False)


def single_stage(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """No alignment: the whole reference guides the refinement (the paper's ablation)."""
    settings = Settings(single_stage=True)
    return Outcome(refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed).image)


def oracle(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """M_gt in place of the alignment's region, then as `refine`: what a faultless alignment would be worth."""
    if item.correspondence is None:
        raise InputError("method", f"oracle needs M_gt, which {item.id} lacks", "give a set with correspondence, or leave oracle out")
    return _redrawn(item, model, MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence), seed)


@torch.no_grad()
def features(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """The encoder alone aligns, by the likeness of its tokens of the crop and of the reference; then as `refine`."""
    whole = encode_reference(model, item.reference, item.object_mask)
    crop = zoom_crop(item.image, item.mask, model.config.image_size, context=model.config.alignment_context, multiple=model.stride)
    square, _ = segment(item.reference, item.object_mask, model.config.reference_fill)
    side = model.encoder_size
    query, key = F.normalize(model.tokens(torch.stack([resize(picture, side, side) for picture in (crop.image, square)])).float(), dim=-1)
    attention = (query @ key.T / TEMPERATURE).softmax(-1)
    try:
        region = clean(correspondence(attention, crop.mask), whole)
    except InputError:
        return replace(single_stage(item, model, seed), fell_back=True)
    return _redrawn(item, model, region, seed)


def no_reference(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """The embedding dropped as in training, no collage: what the surroundings and the model's memory give."""
    whole = encode_reference(model, item.reference, item.object_mask)
    dropped = replace(whole, embedding=torch.zeros_like(whole.embedding))
    return Outcome(redraw(model, item.image, item.mask, _crop(item, model), dropped, None, Settings(), seed))


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


METHODS = {
    "refine": refine, "unregistered": unregistered, "paper": paper, "oracle": oracle, "features": features, "single-stage": single_stage, "no-reference": no_reference,
    "none": none, "telea": telea,
}  # fmt: skip
NEED_MODEL = set(METHODS) - {"none", "telea"}


def _crop(item: Item, model: RefineByAlign) -> ZoomCrop:
    return zoom_crop(item.image, item.mask, model.config.image_size, context=model.config.context, multiple=model.stride)


def _redrawn(item: Item, model: RefineByAlign, region: MatchedRegion, seed: int) -> Outcome:
    """The second stage of `refine_by_align` on a region from elsewhere; the mask as one artifact."""
    settings, crop = Settings(), _crop(item, model)
    region, collage = register(crop, item.reference, item.object_mask, region, item.image, settings)
    guide = encode_reference(model, item.reference, grow(region, settings.region_margin) * item.object_mask)
    return Outcome(redraw(model, item.image, item.mask, crop, guide, collage, settings, seed), region)


def _united(a: MatchedRegion, b: MatchedRegion) -> MatchedRegion:
    mask = torch.maximum(a.mask, b.mask)
    return MatchedRegion(mask, Box.around(mask), torch.maximum(a.soft, b.soft))
