"""Alignment by the likeness of the encoder's tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from ...alignment import correspondence
from ...errors import InputError
from ...geometry import resize
from ...model import RefineByAlign
from ...postprocessing import clean
from ...reference_encoding import encode_reference, segment
from ...zoom_crop import crop_for
from ..dataset import Item
from .ours import redrawn_from, single_stage
from .outcome import Outcome

TEMPERATURE = 0.05
"""Of the softmax over cosines: a token that is nearer by 0.05 counts e times as much."""


@torch.no_grad()
def features(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """The encoder alone aligns, by the likeness of its tokens of the crop and of the reference; then as `detail`."""
    whole = encode_reference(model, item.reference, item.object_mask)
    crop = crop_for(model, item.image, item.mask, model.config.alignment_context)
    square, _ = segment(item.reference, item.object_mask, model.config.reference_fill, model.config.reference_margin)
    side = model.encoder_size
    query, key = F.normalize(model.tokens(torch.stack([resize(picture, side, side) for picture in (crop.image, square)])).float(), dim=-1)
    attention = (query @ key.T / TEMPERATURE).softmax(-1)
    try:
        region = clean(correspondence(attention, crop.mask), whole)
    except InputError:
        return replace(single_stage(item, model, seed), fell_back=True)
    return redrawn_from(item, model, region, seed)
