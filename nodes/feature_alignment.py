"""Stage one without weights trained for it: by DINOv2's patches, or by the features of a native diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..rba_core.alignment import Reached
from ..rba_core.errors import InputError
from ..rba_core.feature_alignment import DINOV2_TOKENS, FeatureAligner, Features, check_ensemble, combined, ensemble_mean, model_aligner, patch_features
from ..rba_core.geometry import Box, resize
from ..rba_core.refinement import Progress
from ..rba_core.zoom_crop import ZoomCrop
from .alignment import map_outputs, maps_and_attentions
from .api import io
from .inputs import seed_input
from .native_call import Look, looked_into
from .types import NATIVE, BatchProgress, Model, Reference, image_of, masks, object_masks, on_device, pictures, plain, square_side, together

PATCHES = {"dinov2": 14, "dinov3": 16}
"""Side of a patch in pixels, of the CLIP_VISION models whose patches can be told apart by what they show."""


def pair_inputs():
    return [
        io.Image.Input("crop", tooltip="The crop around the wrong part, square, from Zoom-in Crop (purpose: alignment) or of any larger size."),
        io.Mask.Input("crop_mask", tooltip="White over the wrong part of the crop; same size."),
        io.Image.Input("reference", tooltip="A photo of the object as it should be, of any size."),
        io.Mask.Input("reference_mask", optional=True, tooltip="White over the object in the reference, or the close_up of Post-process. Without it the whole picture counts as the object."),
    ]


def temperature_input():
    return io.Float.Input(
        "temperature", default=0.0, min=0.0, max=1.0, step=0.001, advanced=True,
        tooltip="Of the softmax over cosine similarities: lower, and each cell decides for fewer places of the reference. 0: 0.02, and on 16 x 16 cells 0.05.",
    )


def match_outputs():
    return [
        *map_outputs("square"),
        Reference.Output("encoded_reference", tooltip="What of the reference the map covers, for Post-process and Correspondence Preview. It holds no tokens to redraw from."),
    ]


class AlignDINOv2(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_AlignDINOv2",
            display_name="Align (DINOv2)",
            category=NATIVE,
            description="Finds where the masked part of a crop is seen in the reference, by the likeness of DINOv2's patches; no Refine-by-Align weights are needed. The raw map is noisy: connect Post-process.",
            search_aliases=["rba align dino", "patch matching", "semantic correspondence", "feature matching", "clip vision align"],
            inputs=[
                *pair_inputs(),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="DINOv2 or DINOv3 from Load CLIP Vision."),
                Model.Input("model", optional=True, tooltip="Instead: a Refine-by-Align model, of which the encoder is used."),
                io.Int.Input(
                    "tokens", default=0, min=0, max=64, advanced=True,
                    tooltip="Patches along a side. More tell finer places apart and take longer. 0: 37 with CLIP_VISION, what DINOv2 was trained with, and 16 with a Refine-by-Align model.",
                ),
                temperature_input(),
            ],
            outputs=match_outputs(),
        )  # fmt: skip

    @classmethod
    def execute(cls, crop, crop_mask, reference, tokens, temperature, reference_mask=None, clip_vision=None, model=None) -> io.NodeOutput:
        if clip_vision is not None:
            aligner = FeatureAligner(vision_features(clip_vision, tokens or DINOV2_TOKENS), temperature or None)
        elif model is not None:
            aligner = replace(model_aligner(on_device(model), tokens or 16), temperature=temperature or None)
        else:
            raise InputError("clip vision", "is not connected", "connect Load CLIP Vision with DINOv2, or a Refine-by-Align model")
        return matched(lambda report: aligner, crop, crop_mask, reference, reference_mask)


class AlignDIFT(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_AlignDIFT",
            display_name="Align (DIFT, native model)",
            category=NATIVE,
            description=(
                "Finds where the masked part of a crop is seen in the reference, by what the U-Net of Stable Diffusion 1.x, 2.x or SDXL makes of both pictures (DIFT), "
                "if wished together with DINOv2. The raw map is noisy: connect Post-process."
            ),
            search_aliases=["rba align dift", "diffusion features", "semantic correspondence", "feature matching", "sd dino"],
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or SDXL."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                *pair_inputs(),
                io.Conditioning.Input("conditioning", optional=True, tooltip="A prompt that names the object, as \"a photo of a mug\". Without it zeros."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="DINOv2 or DINOv3: its patches are compared, too."),
                io.Int.Input("size", default=512, min=256, max=1536, step=64, tooltip="Side that both pictures are scaled to for the model: 512 for Stable Diffusion 1.5, 768 for 2.1, 1024 for SDXL."),
                io.Int.Input("timestep", default=261, min=0, max=999, advanced=True, tooltip="How noisy the pictures are made, 0 (clean) to 999."),
                io.Int.Input("up_block", default=1, min=0, max=2, advanced=True, tooltip="Block of the U-Net's decoder that is read, 0 the coarsest. SDXL has 0 and 1."),
                io.Int.Input("ensemble", default=8, min=1, max=64, advanced=True, tooltip="How many noises are averaged. Fewer are faster and less sure."),
                seed_input("Seed of the noises."),
                io.Float.Input("weight", default=0.5, min=0.0, max=1.0, step=0.05, advanced=True, tooltip="With clip_vision: the share of the diffusion features, 0 (DINOv2 alone) to 1."),
                temperature_input(),
            ],
            outputs=match_outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, vae, crop, crop_mask, reference, size, timestep, up_block, ensemble, seed, weight, temperature, reference_mask=None, conditioning=None, clip_vision=None
    ) -> io.NodeOutput:
        check_ensemble(ensemble)
        patcher, conditioning = stopped_after(model, up_block), conditioning or no_prompt(model)

        def aligner(report: Progress) -> FeatureAligner:
            def diffusion(picture: Tensor, which: int) -> Tensor:
                latents = vae.encode(image_of(resize(picture, size, size))[None])
                sigma = model.get_model_object("model_sampling").sigmas[timestep]

                def mean(look: Look, clean: Tensor) -> Tensor:
                    return ensemble_mean(lambda clean, noise: look(clean, noise).mean(0), clean, which, ensemble, seed, report)

                return looked_into(patcher, conditioning, latents, sigma, mean, f"up block {up_block}").to(model_management.intermediate_device())

            features = diffusion if clip_vision is None else combined(diffusion, vision_features(clip_vision, DINOV2_TOKENS), weight)
            return FeatureAligner(features, temperature or None)

        return matched(aligner, crop, crop_mask, reference, reference_mask)


def matched(aligner: Callable[[Progress], FeatureAligner], crop: Tensor, crop_mask: Tensor, reference: Tensor, reference_mask: Tensor | None) -> io.NodeOutput:
    """The outputs for a batch. `aligner` makes a `FeatureAligner` that reports how far it is with one picture."""
    side = square_side("crop", crop, "connect Zoom-in Crop")
    object_mask = object_masks(reference_mask, reference)
    batch = together(crop=pictures(crop), crop_mask=masks(crop_mask, crop, "crop mask", "crop"), reference=pictures(reference), reference_mask=object_mask)
    progress = BatchProgress(2 * len(batch))
    grids = []

    def attended():
        for index, (picture, hole, photo, thing) in enumerate(batch):
            cut = ZoomCrop(picture, (hole > 0.5).float(), Box(0, 0, side, side))
            seen = aligner(progress.of(2 * index)).encode(photo, thing)
            progress.of(2 * index)(1, 1)
            attention = aligner(progress.of(2 * index + 1)).attend(cut, seen)
            progress.of(2 * index + 1)(1, 1)
            grids.append(plain(replace(seen, embedding=seen.embedding[..., :0])))  # what it was found with is no U-Net's to read
            yield attention, cut.mask

    return io.NodeOutput(*maps_and_attentions(attended()), grids)


def vision_features(clip_vision, tokens: int) -> Features:
    """The last layer's patches of a CLIP_VISION, `tokens` along a side."""
    if clip_vision.model_type not in PATCHES:
        raise InputError("clip vision", "is not DINOv2: its patches do not tell places apart", "load DINOv2 (large or giant) by Load CLIP Vision")

    def encode(pixels: Tensor) -> Tensor:
        model_management.load_model_gpu(clip_vision.patcher)
        mean, std = (pixels.new_tensor(value)[:, None, None] for value in (clip_vision.image_mean, clip_vision.image_std))
        given = ((pixels - mean) / std).to(clip_vision.load_device)
        return clip_vision.model(pixel_values=given)[0][:, -(tokens**2) :].float().to(model_management.intermediate_device())

    return patch_features(encode, tokens * PATCHES[clip_vision.model_type])


def stopped_after(model: ModelPatcher, up_block: int) -> ModelPatcher:
    """A clone whose U-Net raises `Reached` with what an up block gives, after which nothing runs."""
    levels = getattr(model.get_model_object("diffusion_model"), "num_res_blocks", None)
    if levels is None:
        raise InputError("model", "is no U-Net with up blocks", "connect Stable Diffusion 1.x, 2.x or SDXL")
    if up_block > len(levels) - 2:
        raise InputError("up block", f"is {up_block}", f"of this model 0 to {len(levels) - 2} can be read")
    following = sum(count + 1 for count in levels[::-1][: up_block + 1])

    def read(hidden: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        if options["block"] == ("output", following):
            raise Reached(hidden)
        return hidden, skip

    patcher = model.clone()
    patcher.set_model_output_block_patch(read)
    return patcher


def no_prompt(model: ModelPatcher) -> list:
    """Zeros in the place of a prompt's tokens and, for SDXL, of its pooled embedding."""
    return [[torch.zeros(1, 77, model.model.model_config.unet_config["context_dim"]), {"pooled_output": torch.zeros(1, 1280)}]]
