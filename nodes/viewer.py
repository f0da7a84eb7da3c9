"""What the frontend shows beside its own pictures: the correspondence to hover over."""

from __future__ import annotations

from torch import Tensor

from ..rba_core.errors import InputError
from ..rba_core.overlay import attention_picture, outline
from .api import io, ui
from .inputs import bounding_box_input
from .types import CATEGORY, Attention, Placement, Reference, boxes_in, encoded, image_of, mask_batch, pictures, together


class CorrespondenceViewer(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_CorrespondenceViewer",
            display_name="Correspondence Viewer",
            category=CATEGORY,
            description="Crop and reference side by side: point at the crop and see where the model looks in the reference, and where the placement says it is.",
            search_aliases=["attention viewer", "cross attention", "hover attention", "explain match", "visualise correspondence", "interactive heat map"],
            is_output_node=True,
            inputs=[
                io.Image.Input("crop", tooltip="The crop that was aligned, from Zoom-in Crop."),
                Attention.Input("attention", tooltip="Where each cell of that crop looks, from Align."),
                Reference.Input("encoded_reference", tooltip="The reference that was aligned with, from Encode Reference."),
                io.Image.Input("reference", tooltip="The photo that it was encoded from."),
                io.Mask.Input("crop_mask", optional=True, tooltip="White over the wrong part of the crop, from Zoom-in Crop: drawn as an outline."),
                Placement.Input("placement", optional=True, tooltip="From Post-process: the map that all cells agree on, shown as a ring. Needs bounding_box."),
                bounding_box_input("Where the crop stands in the image, from Zoom-in Crop; needed with a placement.", optional=True),
            ],
        )

    @classmethod
    def execute(cls, crop, attention, encoded_reference, reference, crop_mask=None, placement=None, bounding_box=None) -> io.NodeOutput:
        if placement is not None and bounding_box is None:
            raise InputError("bounding box", "is not connected", "with a placement, connect bounding_box of Zoom-in Crop too")
        batch = together(
            crop=pictures(crop), attention=attention, encoded_reference=encoded_reference, reference=pictures(reference),
            crop_mask=[None] if crop_mask is None else mask_batch(crop_mask),
            placement=placement or [None], bounding_box=[None] if bounding_box is None else boxes_in(bounding_box),
        )
        shown, pages = [], []
        for cut, rows, whole, photo, hole, placed, box in batch:
            rows, square = rows.float().cpu(), encoded(whole).box
            if hole is not None:
                cut = outline(cut, hole)
            page = {"crop": saved(image_of(cut)), "reference": saved(image_of(photo)), "rows": saved(image_of(attention_picture(rows)))}
            shown += [page["crop"], page["reference"]]
            pages.append(page | {
                "peaks": [round(peak, 4) for peak in rows.amax(1).tolist()],
                "square": [square.x, square.y, square.width, square.height],
                "affine": None if placed is None else [round(value, 3) for value in placed.over(box).flatten().tolist()],
            })  # fmt: skip
        return io.NodeOutput(ui={"images": shown, "rba_correspondence": pages})


def saved(picture: Tensor) -> dict:
    """Write `[H, W, 3]` where the frontend's /view finds it until ComfyUI ends, and say where."""
    return dict(ui.PreviewImage(picture[None].contiguous()).as_dict()["images"][0])
