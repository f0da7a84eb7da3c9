"""Stage one, step by step: encode the reference, align, clean, register."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from comfy import model_management
from torch import Tensor

from ..rba_core.alignment import attend, correspondence
from ..rba_core.dense_correspondence import place
from ..rba_core.errors import InputError
from ..rba_core.geometry import Box, resize, resize_mask
from ..rba_core.overlay import draw_matches
from ..rba_core.pipeline import Settings, believed, best_known, carried, check_mask, close_up, grow, register
from ..rba_core.postprocessing import CleaningSettings, MatchedRegion
from ..rba_core.reference_encoding import encode_reference
from ..rba_core.zoom_crop import ZoomCrop
from .api import io
from .inputs import (
    bounding_box_input, cleaning_inputs, crop_inputs, layer_input, margin_input, min_confidence_input, noise_level_input, none_below_zero, on_flat_input,
    reference_mask_input, seed_input, timestep_input,
)
from .types import CATEGORY, Attention, BatchProgress, Model, Placement, Reference, boxes_in, boxes_out, delivered, encoded, image_of, mask_batch, masks, model_crop, object_masks, on_device, pictures, plain, together


def map_outputs(over: str = "16 x 16 tokens"):
    return [
        io.Mask.Output("correspondence_map", tooltip=f"The raw map over the reference's {over}, sum 1."),
        Attention.Output("attention", tooltip="Where each cell of the crop looks in the reference, for Post-process."),
    ]


def maps_and_attentions(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """The values of `map_outputs`, from each picture's attention `[d², N²]` and crop mask `[S, S]`."""
    maps, attentions = [], []
    for attention, mask in pairs:
        maps.append(correspondence(attention, mask))
        attentions.append(attention.to(model_management.intermediate_device()))
    return delivered(maps), attentions


class EncodeReference(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_EncodeReference",
            display_name="Encode Reference",
            category=CATEGORY,
            description="Cuts the masked part out of a reference photo and encodes it. Give it the object's mask for Align, and the matched region for Refine Crop.",
            search_aliases=["rba encode", "dinov2 encode", "reference embedding", "image embedding", "subject encode"],
            inputs=[
                Model.Input("model", tooltip="The model that will read the reference."),
                io.Image.Input("reference", tooltip="A photo of the object as it should be, of any size."),
                io.Mask.Input("mask", optional=True, tooltip="White over the part to encode. Without it the whole picture is encoded."),
            ],
            outputs=[Reference.Output("encoded_reference", tooltip="The encoded part of the reference, for Align, Post-process or Refine Crop.")],
        )

    @classmethod
    def execute(cls, model, reference, mask=None) -> io.NodeOutput:
        mask = object_masks(mask, reference)
        batch = together(reference=pictures(reference), reference_mask=mask)
        network = on_device(model)
        return io.NodeOutput([plain(encode_reference(network, picture, part)) for picture, part in batch])


class Align(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_Align",
            display_name="Align",
            category=CATEGORY,
            description="Finds where the masked part of a crop is seen in the reference, from the model's cross-attention. The raw map is noisy: connect Post-process.",
            search_aliases=["rba align", "correspondence", "cross attention map", "attention map", "match reference", "find in reference"],
            inputs=[
                Model.Input("model", tooltip="The model that encoded the reference."),
                *crop_inputs("alignment"),
                Reference.Input("encoded_reference", tooltip="The whole object, from Encode Reference."),
                layer_input(),
                timestep_input(),
                noise_level_input(),
                seed_input(),
            ],
            outputs=map_outputs(),
        )

    @classmethod
    def execute(cls, model, crop, crop_mask, encoded_reference, layer, timestep, noise_level, seed) -> io.NodeOutput:
        batch = together(crop=pictures(crop), crop_mask=masks(crop_mask, crop, "crop mask", "crop"), encoded_reference=encoded_reference)
        network = on_device(model)
        options = {"layer": none_below_zero(layer), "timestep": none_below_zero(timestep), "noise_level": none_below_zero(noise_level), "seed": seed}

        def attended():
            for picture, mask, reference in BatchProgress(len(batch)).over(batch):
                cut = model_crop(picture, mask, network)
                yield attend(network, cut, encoded(reference, network), **options), cut.mask

        return io.NodeOutput(*maps_and_attentions(attended()))


class PostProcess(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_PostProcess",
            display_name="Post-process Correspondence",
            category=CATEGORY,
            description="Turns what Align saw into the matched region of the reference: the mask carried over by the map that all cells agree on; else the raw map without border noise, its largest blob.",
            search_aliases=["rba post-process", "matched region", "clean correspondence map", "attention to mask", "largest blob", "map to bounding box"],
            inputs=[
                io.Mask.Input("correspondence_map", tooltip="The raw map, from Align."),
                Reference.Input("encoded_reference", tooltip="The reference that was aligned with."),
                *cleaning_inputs(),
                margin_input(),
                on_flat_input(),
                Attention.Input("attention", optional=True, tooltip="From Align. With it the region lies where the map that all cells agree on carries the mask; without it, or where they do not agree, the raw map decides."),
                io.Mask.Input("crop_mask", optional=True, tooltip="White over the wrong part of the crop that was aligned, from Zoom-in Crop; needed with an attention."),
                bounding_box_input("Where that crop stands in the image, from Zoom-in Crop; needed with an attention.", optional=True),
                io.Mask.Input("matched_region", optional=True, tooltip="For a close-up: the region that the Post-process before found. It stays where the cells of the close-up do not agree."),
                Placement.Input("placement", optional=True, tooltip="For a close-up: the placement that the Post-process before found."),
            ],
            outputs=[
                io.Mask.Output("matched_region", tooltip="What corresponds to the masked part, at the reference's size."),
                io.Mask.Output("guide_mask", tooltip="The same widened by margin, within the object: the mask for the Encode Reference that guides Refine Crop."),
                io.BoundingBox.Output("bounding_box", tooltip="The box around the matched region, in pixels of the reference."),
                io.Mask.Output("close_up", tooltip="The object in the region's surroundings: the mask for an Encode Reference, to align with once more."),
                Placement.Output("placement", tooltip="The map that all cells agree on, if they do: where Register starts."),
            ],
        )

    @classmethod
    def execute(
        cls, correspondence_map, encoded_reference, threshold, peak_support, flatness, margin, on_flat,
        attention=None, crop_mask=None, bounding_box=None, matched_region=None, placement=None,
    ) -> io.NodeOutput:
        if attention is not None and (crop_mask is None or bounding_box is None):
            raise InputError("crop mask" if crop_mask is None else "bounding box", "is not connected", "with an attention, connect crop mask and bounding box of Zoom-in Crop too")
        batch = together(
            correspondence_map=correspondence_map, encoded_reference=encoded_reference, attention=attention or [None],
            crop_mask=[None] if crop_mask is None else mask_batch(crop_mask),
            bounding_box=[None] if bounding_box is None else boxes_in(bounding_box),
            matched_region=[None] if matched_region is None else mask_batch(matched_region),
            placement=placement or [None],
        )
        settings = CleaningSettings(threshold, peak_support, flatness)
        regions, guides, boxes, close_ups, placements = [], [], [], [], []
        for raw, reference, rows, hole, box, before, placed in batch:
            whole, found = encoded(reference), None
            if raw.shape != (whole.tokens, whole.tokens):
                raise InputError("correspondence map", f"is {raw.shape[1]} x {raw.shape[0]}, not {whole.tokens} x {whole.tokens}", "connect the raw map of Align")
            if rows is not None:
                check_mask("crop mask", hole, "crop", hole)
                crop = ZoomCrop(hole.expand(3, -1, -1), (hole > 0.5).float(), box)  # of the picture nothing is asked
                found = carried(crop.mask, place(rows, crop, whole.box), whole.mask)
            if before is not None:
                check_mask("matched region", before, "reference", whole.mask)
                before = (before > 0.5).float()
                before = MatchedRegion(before, Box.around(before), before, placed)
            try:
                region = best_known(found, before, raw.cpu().float(), whole, settings)
            except InputError:
                if on_flat == "error":
                    raise
                region = MatchedRegion(whole.mask, Box.around(whole.mask), whole.mask)
            regions.append(region.mask)
            guides.append(grow(region, margin) * whole.mask)
            boxes.append(region.box)
            close_ups.append(close_up(region, whole.mask))
            placements.append(region.placement)
        return io.NodeOutput(delivered(regions), delivered(guides), boxes_out(boxes), delivered(close_ups), placements)


class Register(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_Register",
            display_name="Register",
            category=CATEGORY,
            description="Settles the matched region to the pixel: lays the reference over the crop so that both agree around the mask. Where they cannot, all stays as it was.",
            search_aliases=["rba register", "image registration", "collage", "warp reference", "align images", "align pictures", "homography"],
            inputs=[
                *crop_inputs("refinement"),
                bounding_box_input(),
                io.Image.Input("image", tooltip="The image that the crop was cut from."),
                io.Image.Input("reference", tooltip="The photo of the object, at its full size."),
                reference_mask_input(),
                io.Mask.Input("matched_region", tooltip="Where the search begins, from Post-process. All of the object, without a placement, is not registered."),
                min_confidence_input(),
                margin_input(),
                Placement.Input("placement", optional=True, tooltip="From Post-process: where the reference may lie, tried first."),
            ],
            outputs=[
                io.Image.Output("collage", tooltip="The reference as it lies over the crop, at the crop's own resolution; that of the largest crop in a batch. For Refine Crop and Stitch."),
                io.Mask.Output("collage_mask", tooltip="Where the collage shows the object. Black where image and reference do not agree: there is then no collage."),
                io.Mask.Output("matched_region", tooltip="What of the reference lies under the mask, to the pixel; as it came in where there is no collage."),
                io.Mask.Output("guide_mask", tooltip="The same widened by margin, within the object: the mask for the Encode Reference that guides Refine Crop."),
                io.Float.Output("confidence", tooltip="How surely the reference was laid where it belongs, 0 to 1; the lowest of the batch. For Refine Crop."),
                io.Image.Output("matches", tooltip="Crop and reference side by side, matched points in one colour; hollow where the two do not agree."),
            ],
        )

    @classmethod
    def execute(cls, crop, crop_mask, bounding_box, image, reference, matched_region, min_confidence, margin, reference_mask=None, placement=None) -> io.NodeOutput:
        object_mask = object_masks(reference_mask, reference)
        batch = together(
            crop=pictures(crop), crop_mask=masks(crop_mask, crop, "crop mask", "crop"), bounding_box=boxes_in(bounding_box), image=pictures(image),
            reference=pictures(reference), reference_mask=object_mask, matched_region=masks(matched_region, reference, "matched region", "reference"),
            placement=placement or [None],
        )
        settings = Settings(min_confidence=min_confidence, dense=placement is not None)
        laid, shown, regions, guides, confidences, drawn = [], [], [], [], [], []
        for cut, hole, box, whole, photo, thing, found, start in BatchProgress(len(batch)).over(batch):
            thing, found, collage = (thing > 0.5).float(), (found > 0.5).float(), None
            region, crop = MatchedRegion(found, Box.around(found), found, start), ZoomCrop(cut, (hole > 0.5).float(), box)
            if start is not None or not torch.equal(found, thing):  # all of it, and no placement: alignment found nothing
                region, collage = register(crop, photo, thing, region, whole, settings)
            confidences.append(0.0 if collage is None else collage.confidence)
            drawn.append(image_of(draw_matches(whole, crop, photo, collage)))
            collage = believed(collage, settings)
            laid.append(torch.zeros(3, box.height, box.width) if collage is None else collage.picture)
            shown.append(torch.zeros(box.height, box.width) if collage is None else collage.valid)
            regions.append(region.mask)
            guides.append(grow(region, margin) * thing)
        size = max(picture.shape[-1] for picture in laid)
        return io.NodeOutput(
            delivered([image_of(resize(picture, size, size)) for picture in laid]), delivered([resize_mask(valid, size, size) for valid in shown]),
            delivered(regions), delivered(guides), min(confidences), delivered(drawn),
        )
