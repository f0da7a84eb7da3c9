"""Our method, its variants and its bounds: what they share is the model."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ...errors import InputError
from ...geometry import Box
from ...model import RefineByAlign
from ...pipeline import Refined, Settings, believed, grow, redraw, refine_by_align, register
from ...postprocessing import MatchedRegion
from ...reference_encoding import encode_reference
from ...registration import grid, warped
from ...zoom_crop import crop_box, crop_for, separate
from ..dataset import Item
from .outcome import Outcome, united


def detail(item: Item, model: RefineByAlign, seed: int, **settings) -> Outcome:
    """All of it: dense alignment, registration, the reference's own detail. An artifact whose alignment says nothing is
    redrawn from the whole reference."""
    settings = Settings(on_flat="single-stage", **settings)
    refined = refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed)
    found = [region for region in refined.regions if region is not None]
    collages = [match.collage for match in refined.matches if match.collage is not None]
    surest = min(collages, key=lambda collage: collage.confidence) if collages else None
    return Outcome(
        refined.image, reduce(united, found) if found else None, len(found) < len(refined.regions), _flow(item, refined, model),
        surest and surest.confidence, surest.evidence if surest else (),
    )


def _flow(item: Item, refined: Refined, model: RefineByAlign) -> Tensor | None:
    """Of the registrations, believed or not, or else of the maps that the attention agreed on."""
    flow = torch.full((2, *item.mask.shape), torch.nan)
    for artifact, match in zip(separate(item.mask), refined.matches):
        box = crop_box(artifact, model.config.context, model.stride)
        if match.collage is not None:
            laid = match.collage.flow
        elif match.region is not None and match.region.placement is not None:
            laid = warped(match.region.placement.over(box), grid(box.width)).movedim(-1, 0)
        else:
            continue
        flow = torch.where(artifact > 0.5, box.paste(flow, laid), flow)
    return None if flow.isnan().all() else flow


def paper(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """Both stages as published: M* from the masked cells' attention alone, guided by tokens alone."""
    return detail(item, model, seed, dense=False, levels=1, register=False)


def unregistered(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """As `detail`, but without a look at pixels: M* from the attention of all cells, guided by tokens alone."""
    return detail(item, model, seed, register=False)


def single_stage(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """No alignment: the whole reference guides the refinement (the paper's ablation)."""
    settings = Settings(single_stage=True)
    return Outcome(refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed).image)


def oracle(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """M_gt in place of the alignment's region, then as `detail`: what a faultless alignment would be worth."""
    if item.correspondence is None:
        raise InputError("method", f"oracle needs M_gt, which {item.id} lacks", "give a set with correspondence, or leave oracle out")
    return redrawn_from(item, model, MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence), seed)


def no_reference(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """The embedding dropped as in training, no collage: what the surroundings and the model's memory give."""
    whole = encode_reference(model, item.reference, item.object_mask)
    dropped = replace(whole, embedding=model.unconditional(whole.embedding), detail=None)
    return Outcome(redraw(model, item.image, item.mask, crop_for(model, item.image, item.mask), dropped, None, Settings(), seed))


def redrawn_from(item: Item, model: RefineByAlign, region: MatchedRegion, seed: int) -> Outcome:
    """The second stage of `refine_by_align` on a region from elsewhere; the mask as one artifact."""
    settings, crop = Settings(dense=False), crop_for(model, item.image, item.mask)
    region, collage = register(crop, item.reference, item.object_mask, region, item.image, settings)
    guide = encode_reference(model, item.reference, grow(region, settings.region_margin) * item.object_mask)
    return Outcome(redraw(model, item.image, item.mask, crop, guide, believed(collage, settings), settings, seed), region, confidence=collage.confidence)
