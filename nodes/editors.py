"""Any editor as the refiner: what it is given, before Stitch takes over again."""

from __future__ import annotations

from ..rba_core.editing import find_match, reference_crop, stitcher
from ..rba_core.pipeline import Settings
from ..rba_core.zoom_crop import crop_box, zoom_crop
from .api import io
from .inputs import on_flat_input, reference_mask_input, seed_input
from .types import CATEGORY, BatchProgress, Model, crops_out, delivered, masks, object_masks, on_device, pictures, together

EDITORS = f"{CATEGORY}/editors"
BACKGROUNDS = {"as it is": None, "white": 1.0, "grey": 0.5, "black": 0.0}

Stitcher = io.Custom("STITCHER")
"""Of ComfyUI-Inpaint-CropAndStitch: a dict of lists, one entry a picture of the batch."""


def size_input(crop: str):
    return io.Int.Input("size", default=1024, min=0, max=4096, step=8, tooltip=f"Side of the {crop} in pixels. Most editors work best at about one megapixel. 0: as large as it is.")


def context_input(of: str):
    return io.Float.Input("context", default=2.0, min=1.0, max=20.0, step=0.1, tooltip=f"Side of the crop in sides of {of}: 2 shows as much again around it.")


class FindRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_FindRegion",
            display_name="Find Matching Region",
            category=EDITORS,
            description="Finds the part of the reference that corresponds to the mask, as Refine by Align does, and redraws nothing: for any other editor.",
            search_aliases=["rba find", "match reference", "align only", "correspondence", "locate part"],
            inputs=[
                Model.Input("model", tooltip="From Load Refine-by-Align Model."),
                io.Image.Input("image", tooltip="The image with the wrong part."),
                io.Mask.Input("mask", tooltip="White over the wrong part; same size as the image. Taken as one part."),
                io.Image.Input("reference", tooltip="A photo of the object as it should be, of any size. One for all images, or one for each."),
                reference_mask_input(),
                on_flat_input(),
                seed_input(),
            ],
            outputs=[
                io.Mask.Output("matched_region", tooltip="What corresponds to the masked part, at the reference's size; all of the object where nothing stands out and on_flat allows it."),
                io.Float.Output("confidence", tooltip="How surely the reference was laid where it belongs, 0 to 1; the lowest of the batch. Below one half, look twice."),
            ],
        )

    @classmethod
    def execute(cls, model, image, mask, reference, on_flat, seed, reference_mask=None) -> io.NodeOutput:
        object_mask = object_masks(reference_mask, reference)
        batch = together(image=pictures(image), mask=masks(mask, image), reference=pictures(reference), reference_mask=object_mask)
        network = on_device(model)
        regions, confidences = [], []
        for picture, part, guide, thing in BatchProgress(len(batch)).over(batch):
            match = find_match(network, picture, part, guide, thing, settings=Settings(on_flat=on_flat), seed=seed)
            regions.append((thing > 0.5).float() if match.region is None else match.region.mask)
            confidences.append(match.collage.confidence if match.collage else 0.0)
        return io.NodeOutput(delivered(regions), min(confidences))


class EditorCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_EditorCrop",
            display_name="Crop for Editor",
            category=EDITORS,
            description="Cuts a square around the mask at an editor's resolution: for FLUX, Qwen-Image-Edit, SDXL or any other sampler. Stitch puts back what it redrew.",
            search_aliases=["rba editor crop", "inpaint crop", "crop around mask", "crop and stitch", "zoom in"],
            inputs=[
                io.Image.Input("image", tooltip="The image with the wrong part."),
                io.Mask.Input("mask", tooltip="White over the wrong part; same size as the image."),
                context_input("the mask"),
                size_input("crop"),
                io.Float.Input(
                    "feather", default=Settings().feather, min=0.0, max=100.0, step=0.5, advanced=True,
                    tooltip="Width of the blend of the stitcher at the mask's edge, in pixels of the image, inside the mask. Stitch has its own.",
                ),
            ],
            outputs=[
                io.Image.Output("crop", tooltip="The crop, for the editor."),
                io.Mask.Output("crop_mask", tooltip="The mask in the crop."),
                io.BoundingBox.Output("bounding_box", tooltip="Where the crop stands in the image, in pixels; may reach over its border. For Stitch."),
                Stitcher.Output("stitcher", tooltip="For Inpaint Stitch of ComfyUI-Inpaint-CropAndStitch, instead of Stitch."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, context, size, feather) -> io.NodeOutput:
        batch = together(image=pictures(image), mask=masks(mask, image))
        size = size or max(crop_box(part, context, 8).width for _, part in batch)
        crops = [zoom_crop(picture, part, size, context=context) for picture, part in batch]
        back = [stitcher(picture, part, crop.box, feather) for crop, (picture, part) in zip(crops, batch)]
        algorithms = {"downscale_algorithm": "bicubic", "upscale_algorithm": "bicubic", "blend_pixels": feather}
        return io.NodeOutput(*crops_out(crops), algorithms | {key: [one[key] for one in back] for key in back[0]})


class ReferenceCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_ReferenceCrop",
            display_name="Reference Crop",
            category=EDITORS,
            description="Cuts the matched part out of the reference: the second picture for an editor, an IP-Adapter or a style model.",
            search_aliases=["rba reference crop", "crop matched region", "second image", "reference picture", "redux image"],
            inputs=[
                io.Image.Input("reference", tooltip="The photo of the object, at its full size."),
                io.Mask.Input("matched_region", tooltip="What corresponds to the wrong part, from Find Matching Region, Register or Post-process; or painted by hand."),
                io.Mask.Input("reference_mask", optional=True, tooltip="White over the object in the reference; only of use where the background is filled."),
                context_input("the matched region"),
                size_input("crop"),
                io.Combo.Input("background", options=list(BACKGROUNDS), default="as it is", tooltip="What surrounds the matched region: the photo as it is, or one colour, so that the editor sees that part alone."),
                io.Float.Input(
                    "margin", default=Settings().region_margin, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="How far around the matched region the background is left as it is, in shares of the region's longer side.",
                ),
            ],
            outputs=[
                io.Image.Output("reference_crop", tooltip="The matched part of the reference."),
                io.Mask.Output("crop_mask", tooltip="The matched region in the crop."),
                io.BoundingBox.Output("bounding_box", tooltip="Where the crop stands in the reference, in pixels; may reach over its border."),
            ],
        )

    @classmethod
    def execute(cls, reference, matched_region, context, size, background, margin, reference_mask=None) -> io.NodeOutput:
        object_mask = object_masks(reference_mask, reference)
        batch = together(reference=pictures(reference), matched_region=masks(matched_region, reference, "matched region", "reference"), reference_mask=object_mask)
        size = size or max(crop_box(region, context, 1).width for _, region, _ in batch)
        crops = [
            reference_crop(picture, region, size, context=context, background=BACKGROUNDS[background], margin=margin, object_mask=thing) for picture, region, thing in batch
        ]
        return io.NodeOutput(*crops_out(crops))
