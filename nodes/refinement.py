"""Stage two, step by step, and both stages in one node."""

from __future__ import annotations

import torch

from ..rba_core.collage import transfer_detail
from ..rba_core.drift import estimate_drift, undo_drift
from ..rba_core.errors import InputError
from ..rba_core.pipeline import ALIGNERS, Settings, refine_by_align
from ..rba_core.postprocessing import CleaningSettings
from ..rba_core.refinement import default_strength, refine
from ..rba_core.stitch import stitch
from ..rba_core.zoom_crop import zoom_crop
from .api import io
from .inputs import (
    bounding_box_input, cleaning_inputs, collage_inputs, context_input, crop_inputs, detail_transfer_input, layer_input, margin_input, min_confidence_input,
    noise_level_input, none_below_zero, on_flat_input, reference_mask_input, sampling, sampling_inputs, stitching_inputs, strength_input, timestep_input,
)
from .types import (
    CATEGORY, BatchProgress, Model, Reference, boxes_in, collages, crops_out, delivered, encoded, image_of, mask_batch, masks, model_crop, object_masks, on_device, pictures, put_back, together,
)


class ZoomCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_ZoomCrop",
            display_name="Zoom-in Crop",
            category=CATEGORY,
            description="Cuts a square around the mask and scales it to the model's resolution, so that a small part is seen large.",
            search_aliases=["rba crop", "crop around mask", "crop by mask", "zoom in", "inpaint crop", "mask bounding box crop"],
            inputs=[
                Model.Input("model", tooltip="Sets the resolution of the crop."),
                io.Image.Input("image", tooltip="The image with the wrong part."),
                io.Mask.Input("mask", tooltip="White over the wrong part; same size as the image."),
                io.Combo.Input("purpose", options=["refinement", "alignment"], tooltip="What the crop is for: the model has a context of its own for each."),
                context_input(),
            ],
            outputs=[
                io.Image.Output("crop", tooltip="The crop at the model's resolution."),
                io.Mask.Output("crop_mask", tooltip="The mask in the crop."),
                io.BoundingBox.Output("bounding_box", tooltip="Where the crop stands in the image, in pixels; may reach over its border. For Stitch."),
            ],
        )

    @classmethod
    def execute(cls, model, image, mask, purpose, context) -> io.NodeOutput:
        network = model.model.network
        context = context or (network.config.context if purpose == "refinement" else network.config.alignment_context)
        batch = together(image=pictures(image), mask=masks(mask, image))
        crops = [zoom_crop(picture, part, network.config.image_size, context=context, multiple=network.stride) for picture, part in batch]
        return io.NodeOutput(*crops_out(crops))


class Refine(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_Refine",
            display_name="Refine Crop",
            category=CATEGORY,
            description="Redraws the masked part of a crop from the matched region of the reference.",
            search_aliases=["rba refine", "reference inpaint", "redraw crop", "inpaint with reference image", "fix crop"],
            inputs=[
                Model.Input("model", tooltip="The model that encoded the reference."),
                *crop_inputs("refinement"),
                Reference.Input("encoded_reference", tooltip="The matched region, from Encode Reference with the guide mask of Register or Post-process."),
                *sampling_inputs(),
                strength_input(),
                *collage_inputs(),
                io.Float.Input("confidence", optional=True, tooltip="How sure the registration is, from Register; sets the strength of -1. Without it: not sure.", extra_dict={"forceInput": True}),
            ],
            outputs=[io.Image.Output("redrawn", tooltip="The crop with the masked part redrawn, for Stitch.")],
        )

    @classmethod
    def execute(cls, model, crop, crop_mask, encoded_reference, seed, steps, guidance, scheduler, strength, collage=None, collage_mask=None, confidence=None) -> io.NodeOutput:
        batch = together(
            crop=pictures(crop), crop_mask=masks(crop_mask, crop, "crop mask", "crop"), encoded_reference=encoded_reference,
            collage=collages(collage, collage_mask),
        )
        network = on_device(model)
        if strength < 0:
            strength = default_strength(network, confidence or 0.0)
        progress = BatchProgress(len(batch))
        redrawn = [
            refine(
                network, model_crop(picture, mask, network), encoded(reference, network), collage=laid, strength=strength, **sampling(steps, guidance, scheduler),
                seed=seed, progress=progress.of(index), preview=progress.preview(),
            )
            for index, (picture, mask, reference, laid) in enumerate(batch)
        ]
        return io.NodeOutput(delivered([image_of(picture) for picture in redrawn]))


class Stitch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_Stitch",
            display_name="Stitch",
            category=CATEGORY,
            description="Puts a redrawn crop back into its image. Not one pixel outside the mask changes.",
            search_aliases=["rba stitch", "paste back", "inpaint stitch", "uncrop", "composite crop", "undo crop", "merge crop"],
            inputs=[
                io.Image.Input("image", tooltip="The image that the crop was cut from."),
                io.Mask.Input("mask", tooltip="White over the wrong part; same size as the image."),
                io.Image.Input("redrawn", tooltip="The redrawn crop, from Refine Crop or any editor; any size, it is resampled to the box."),
                bounding_box_input(),
                detail_transfer_input(),
                *stitching_inputs(),
                *collage_inputs(),
                io.Mask.Input("crop_mask", optional=True, tooltip="White over the wrong part of the crop, from Zoom-in Crop; needed with a collage."),
                io.Boolean.Input(
                    "drift_correction", default=False, optional=True,
                    tooltip=(
                        "For crops redrawn by FLUX Kontext, Qwen-Image-Edit, SDXL inpainting and other editors that shift, zoom and tint all of a crop "
                        "a little: undoes that, as measured around the mask. Not needed after Refine Crop."
                    ),
                ),
            ],
            outputs=[io.Image.Output("refined", tooltip="The image with the masked part replaced.")],
        )

    @classmethod
    def execute(
        cls, image, mask, redrawn, bounding_box, detail_transfer, feather, colour_match, collage=None, collage_mask=None, crop_mask=None, drift_correction=False,
    ) -> io.NodeOutput:
        if collage is not None and crop_mask is None:
            raise InputError("crop mask", "is not connected", "with a collage, connect the crop mask of Zoom-in Crop too")
        holes = [None] if crop_mask is None else mask_batch(crop_mask)
        batch = together(
            image=image, mask=masks(mask, image), redrawn=pictures(redrawn), bounding_box=boxes_in(bounding_box),
            collage=collages(collage, collage_mask), crop_mask=holes,
        )
        stitched = []
        for whole, part, crop, box, laid, hole in batch:
            picture = pictures(whole[None])[0]
            if drift_correction:
                crop = undo_drift(crop, estimate_drift(crop, box.crop(picture), box.crop(part[None])[0]))
            if laid is not None:
                crop = transfer_detail(crop, laid, hole, detail_transfer)
            stitched.append(put_back(stitch(picture, part, crop, box, feather=feather, colour_match=colour_match), part, whole))
        return io.NodeOutput(delivered(stitched, image.dtype))


class RefineByAlign(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_RefineByAlign",
            display_name="Refine by Align",
            category=CATEGORY,
            essentials_category="Image Tools",
            description=(
                "Puts right what an image generator got wrong - logos, printed text, badges, patterns - from a reference photo: "
                "finds the part of the reference that corresponds to the mask and redraws only what is masked."
            ),
            search_aliases=[
                "rba", "fix logo", "fix text", "repair label", "restore print", "correct typography", "artifact repair", "artifact removal", "fix details", "detail restore",
                "reference inpaint", "reference guided inpainting", "inpaint from reference", "detailer", "product photo", "object consistency",
            ],
            inputs=[
                Model.Input("model", tooltip="From Load Refine-by-Align Model."),
                io.Image.Input("image", tooltip="The image with the wrong part. Alpha and everything outside the mask stay as they are."),
                io.Mask.Input("mask", tooltip="White over the wrong part; same size as the image. Parts that lie apart are redrawn one by one."),
                io.Image.Input("reference", tooltip="A photo of the object as it should be, of any size. One for all images, or one for each."),
                reference_mask_input(),
                *sampling_inputs(),
                detail_transfer_input(),
                on_flat_input(),
                io.Boolean.Input("single_stage", default=False, advanced=True, tooltip="Skip the alignment: the whole reference guides the redrawing."),
                io.Boolean.Input("one_crop", default=False, advanced=True, tooltip="Redraw parts of the mask that lie apart in one crop, not one by one."),
                layer_input(),
                timestep_input(),
                noise_level_input(),
                *cleaning_inputs(),
                io.Boolean.Input("register", default=Settings().register, advanced=True, tooltip="Settle the matched region to the pixel, by what surrounds the mask. Off: the model's attention alone, as in the paper."),
                min_confidence_input(),
                strength_input(),
                margin_input(),
                context_input("alignment_context", "crop that is aligned"),
                context_input("context", "crop that is redrawn"),
                *stitching_inputs(),
                io.Boolean.Input("dense", default=Settings().dense, advanced=True, tooltip="Find the region by what the attention of the whole crop agrees on. Off: by that of the masked part alone, as in the paper."),
                io.Int.Input("levels", default=Settings().levels, min=1, max=3, advanced=True, tooltip="Passes of the alignment at most, each closer to the region that the one before found. 1: as in the paper."),
                io.Combo.Input("aligner", options=[*ALIGNERS], default=Settings().aligner, advanced=True, tooltip="What finds the region: the model's cross-attention, as in the paper, or the likeness of its encoder's tokens."),
                io.Image.Input("more_references", optional=True, tooltip="Further photos of the same object, as a batch, for all images. Each wrong part is redrawn from the photo that it is found in most surely."),
                io.Mask.Input("more_reference_masks", optional=True, tooltip="White over the object in each of them. Without it the whole pictures count."),
            ],
            outputs=[
                io.Image.Output("refined", tooltip="The image with the masked part replaced."),
                io.Mask.Output("matched_region", tooltip="What the model found in the reference, at the reference's size; all of the object where it was used whole. Parts found in one of more_references are left out."),
                io.Float.Output("confidence", tooltip="How surely the reference was laid where it belongs, 0 to 1; the lowest of all parts. Below min_confidence a part was redrawn without its pixels: look at it."),
            ],
        )

    @classmethod
    def execute(
        cls, model, image, mask, reference, seed, steps, guidance, scheduler, detail_transfer, on_flat, single_stage, one_crop, layer, timestep, noise_level,
        threshold, peak_support, flatness, register, min_confidence, strength, margin, alignment_context, context, feather, colour_match, dense, levels, aligner, reference_mask=None,
        more_references=None, more_reference_masks=None,
    ) -> io.NodeOutput:
        reference_mask = object_masks(reference_mask, reference)
        batch = together(image=image, mask=masks(mask, image), reference=pictures(reference), reference_mask=reference_mask)
        more = list(pictures(more_references)) if more_references is not None else []
        more_masks = [None] * len(more)
        if more and more_reference_masks is not None:
            selected = masks(more_reference_masks, more_references, "more reference masks", "more references")
            more_masks = [mask for _, mask in together(more_references=more, more_reference_masks=selected)]
        settings = Settings(
            single_stage=single_stage, on_flat=on_flat, one_crop=one_crop,
            layer=none_below_zero(layer), timestep=none_below_zero(timestep), noise_level=none_below_zero(noise_level),
            cleaning=CleaningSettings(threshold, peak_support, flatness), alignment_context=alignment_context or None,
            aligner=aligner, dense=dense, levels=levels, register=register, min_confidence=min_confidence, strength=none_below_zero(strength), detail_transfer=detail_transfer, region_margin=margin,
            **sampling(steps, guidance, scheduler), context=context or None, feather=feather, colour_match=colour_match,
        )
        network = on_device(model)
        progress = BatchProgress(len(batch))
        refined, matched, confidences = [], [], []
        for index, (whole, part, guide, object_mask) in enumerate(batch):
            result = refine_by_align(
                network, pictures(whole[None])[0], part, [guide, *more], [object_mask, *more_masks], settings=settings, seed=seed,
                progress=progress.of(index), preview=progress.preview(),
            )  # fmt: skip
            refined.append(put_back(result.image, part, whole))
            found = [object_mask if match.region is None else match.region.mask for match in result.matches if match.reference == 0]
            matched.append(torch.stack([torch.zeros_like(object_mask), *found]).amax(0))
            confidences += [confidence or 0.0 for confidence in result.confidences]
        return io.NodeOutput(delivered(refined, image.dtype), delivered(matched), min(confidences))
