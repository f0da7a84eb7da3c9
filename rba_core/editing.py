"""What any image editor needs to be the refiner: the matched part of the reference as a picture, and the way back into the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .geometry import Box
from .pipeline import Match, Settings, best_match, checked_references, grow
from .postprocessing import MatchedRegion
from .reference_encoding import encode_reference
from .stitch import feather_inside
from .zoom_crop import ZoomCrop, crop_box, crop_for, zoom_crop

if TYPE_CHECKING:
    from .model import RefineByAlign


def find_match(
    model: RefineByAlign, image: Tensor, mask: Tensor, reference: Tensor | Sequence[Tensor], reference_mask: Tensor | Sequence[Tensor | None] | None = None, *,
    settings: Settings = Settings(), seed: int = 0,
) -> Match:  # fmt: skip
    """What `refine_by_align` finds, all of `mask` as one artifact, without redrawing it. Inputs and errors as there."""
    references, object_masks = checked_references(image, mask, reference, reference_mask)
    wholes = [encode_reference(model, picture, object_mask) for picture, object_mask in zip(references, object_masks)]
    closer = crop_for(model, image, mask, settings.context)
    return best_match(model, image, mask, closer, references, wholes, settings, seed)


def reference_crop(
    reference: Tensor, region: Tensor, size: int | None = None, *, context: float = 2.0, background: float | None = None, margin: float = Settings.region_margin, object_mask: Tensor | None = None
) -> ZoomCrop:
    """A square around M* `region` `[H, W]`, cut from `reference` `[3, H, W]`; its mask is M* within it.

    size         of a side, pixels; `None` = as large as it is in the reference
    context      side of the square in longer sides of M*
    background   grey value in [0, 1] of all that is further from M* than `margin` of its longer side, or not the object;
                 `None` = the reference as it is
    """
    if background is not None:
        kept = grow(MatchedRegion(region, Box.around(region), region), margin) * (1 if object_mask is None else object_mask)
        reference = torch.where(kept > 0.5, reference, torch.full_like(reference, background))
    return zoom_crop(reference, region, size or crop_box(region, context, 1).width, context=context, multiple=1)


def stitcher(image: Tensor, mask: Tensor, box: Box, feather: float = 1.0) -> dict[str, int | Tensor]:
    """How a crop `box` of `image` `[3, H, W]` is put back, in the terms of ComfyUI-Inpaint-CropAndStitch (its *Inpaint Stitch*).

    The canvas is the image grown to hold all of the box. The weights have the size of the box, so that its stitch does not
    resample them, and are 0 outside the mask: there the image stays bit for bit.
    """
    height, width = image.shape[-2:]
    left, top = max(0, -box.x), max(0, -box.y)
    canvas = Box(-left, -top, left + max(width, box.x + box.width), top + max(height, box.y + box.height))
    return {
        "canvas_image": canvas.crop(image).movedim(0, -1)[None],
        "canvas_to_orig_x": left, "canvas_to_orig_y": top, "canvas_to_orig_w": width, "canvas_to_orig_h": height,
        "cropped_to_canvas_x": box.x + left, "cropped_to_canvas_y": box.y + top, "cropped_to_canvas_w": box.width, "cropped_to_canvas_h": box.height,
        "cropped_mask_for_blend": feather_inside(box.crop(mask[None], fill=0)[0], feather)[None],
    }  # fmt: skip
