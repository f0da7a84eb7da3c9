"""What the model found, to look at."""

from __future__ import annotations

from ..rba_core.errors import InputError
from ..rba_core.overlay import overlay
from .api import io, ui
from .types import CATEGORY, Reference, delivered, encoded, image_of, mask_batch, pictures, together


class CorrespondencePreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_CorrespondencePreview",
            display_name="Correspondence Preview",
            category=CATEGORY,
            description="Draws the matched region, or the raw map of Align, over the reference.",
            search_aliases=["rba preview", "heat map", "show correspondence", "overlay mask"],
            is_output_node=True,
            inputs=[
                io.Image.Input("reference", tooltip="The reference photo."),
                io.Mask.Input("matched_region", tooltip="The matched region, or the raw map of Align together with encoded_reference."),
                Reference.Input("encoded_reference", optional=True, tooltip="Needed for a raw map: says which part of the reference the map covers."),
            ],
            outputs=[io.Image.Output("overlay", tooltip="The reference with the region marked.")],
        )

    @classmethod
    def execute(cls, reference, matched_region, encoded_reference=None) -> io.NodeOutput:
        drawn = []
        for picture, region, whole in together(reference=pictures(reference), matched_region=mask_batch(matched_region), encoded_reference=encoded_reference or [None]):
            if region.shape != picture.shape[1:]:
                if whole is None:
                    raise InputError(
                        "matched region", f"is {region.shape[1]} x {region.shape[0]}, the reference {picture.shape[2]} x {picture.shape[1]}",
                        "connect the region of this reference, or encoded_reference to show a raw map",
                    )
                region = encoded(whole).to_reference(region)
                region = region / region.max()
            drawn.append(image_of(overlay(picture, region)))
        image = delivered(drawn)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
