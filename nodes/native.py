"""The method over ComfyUI's own MODEL, VAE and samplers, of a checkpoint that `rba convert to-ldm` wrote."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..rba_core.alignment import Reached, mean_attention, noise_like
from ..rba_core.errors import InputError
from ..rba_core.native import LAYERS, MLP, inpainting, noise_sigma
from .alignment import map_outputs, maps_and_attentions
from .api import io
from .inputs import crop_inputs, noise_level_input, none_below_zero, seed_input
from .loading import FOLDER, patcher_of
from .native_call import looked_into
from .types import NATIVE, BatchProgress, Model, Reference, encoded, image_of, masks, pictures, square_side, together


def encoder_files() -> dict[str, Path]:
    """Name -> `NAME.mlp.safetensors`, of those in models/refine_by_align and beside the checkpoints."""
    roots = [Path(root) for folder in (FOLDER, "checkpoints") for root in folder_paths.get_folder_paths(folder)]
    found = [(file.relative_to(root).as_posix().removesuffix(MLP), file) for root in roots for file in sorted(root.rglob(f"*{MLP}"))]
    return dict(reversed(found))  # of two of one name, the first


class LoadReferenceEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_LoadReferenceEncoder",
            display_name="Load Reference Encoder",
            category=NATIVE,
            description="Loads what reads reference photos for a native model: DINOv2 and the MLP that `rba convert to-ldm` wrote beside its checkpoint. The U-Net is not loaded a second time.",
            search_aliases=["rba encoder", "load dinov2", "load mlp", "native reference encoder"],
            inputs=[
                io.Combo.Input(
                    "encoder_name", options=sorted(encoder_files()),
                    tooltip="NAME of NAME.mlp.safetensors and NAME.dinov2.safetensors, both in models/refine_by_align or beside the checkpoint in models/checkpoints.",
                ),
            ],
            outputs=[Model.Output("model", tooltip="For Encode Reference and Zoom-in Crop. It has no U-Net: align and redraw with the native model.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, encoder_name) -> io.NodeOutput:
        from ..rba_core.conversion import ReferenceEncoder  # as in Load Refine-by-Align Model

        return io.NodeOutput(patcher_of(ReferenceEncoder.load(encoder_files()[encoder_name])))


class ReferenceConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_ReferenceConditioning",
            display_name="Reference Conditioning",
            category=NATIVE,
            description="An encoded reference in the place of a text prompt, for KSampler and other samplers.",
            search_aliases=["rba conditioning", "reference prompt", "image prompt", "dinov2 conditioning"],
            inputs=[Reference.Input("encoded_reference", tooltip="The matched region, from Encode Reference with the guide mask of Register or Post-process.")],
            outputs=[
                io.Conditioning.Output("positive", tooltip="The tokens of the reference."),
                io.Conditioning.Output("negative", tooltip="What the model was trained with where there is no reference: zeros. For classifier-free guidance."),
            ],
        )

    @classmethod
    def execute(cls, encoded_reference) -> io.NodeOutput:
        tokens = torch.cat([encoded(reference).embedding.float() for reference in encoded_reference])
        return io.NodeOutput([[tokens, {}]], [[torch.zeros_like(tokens), {}]])


class InpaintingCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_InpaintingCondition",
            display_name="Inpainting Condition",
            category=NATIVE,
            description=(
                "What an inpainting U-Net is told of the crop, as it was trained: every latent cell that the mask touches is redrawn. "
                "Core's InpaintModelConditioning leaves out cells whose middle is not masked, and with them a rim of the wrong part."
            ),
            search_aliases=["rba inpaint", "inpaint model conditioning", "nine channels", "masked latent"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="From Reference Conditioning."),
                io.Conditioning.Input("negative", tooltip="From Reference Conditioning."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                *crop_inputs("refinement"),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="For the sampler."),
                io.Conditioning.Output("negative", tooltip="For the sampler."),
                io.Latent.Output("latent", tooltip="The crop's latents with the mask of what is to be redrawn, for the sampler. U-Nets without inpainting channels need only this."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, vae, crop, crop_mask) -> io.NodeOutput:
        batch = together(crop=pictures(crop), crop_mask=masks(crop_mask, crop, "crop mask", "crop"))
        crops, holes = (torch.stack(part) for part in zip(*batch))
        told = inpainting_options(vae, crops, holes)
        conditions = [[[tokens, {**options, **told}] for tokens, options in condition] for condition in (positive, negative)]
        return io.NodeOutput(*conditions, {"samples": vae.encode(crops.movedim(1, -1)), "noise_mask": told["concat_mask"]})


class AlignNative(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_AlignNative",
            display_name="Align (native model)",
            category=NATIVE,
            description=(
                "Align with ComfyUI's own MODEL, Stable Diffusion 1.x or 2.x, with its LoRAs, patches and precision: one call of the U-Net, "
                "stopped at the layer that is read. The raw map is noisy: connect Post-process."
            ),
            search_aliases=["rba align native", "correspondence", "cross attention map", "match reference", "attn2"],
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x or 2.x MODEL that reads the reference's tokens, such as a checkpoint that rba convert to-ldm wrote."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                *crop_inputs("alignment"),
                Reference.Input("encoded_reference", tooltip="The whole object, from Encode Reference."),
                io.Int.Input("layer", default=9, min=0, max=len(LAYERS) - 1, advanced=True, tooltip="Cross-attention layer to read, 0 to 15 in the order in which they run; 9 is the block output 5."),
                io.Int.Input("timestep", default=0, min=0, max=49, advanced=True, tooltip="Noise on the image while aligning, as a step of a 50-step sampler: 0 is the noisiest, 49 the cleanest."),
                noise_level_input(),
                seed_input(),
            ],
            outputs=map_outputs(),
        )

    @classmethod
    def execute(cls, model, vae, crop, crop_mask, encoded_reference, layer, timestep, noise_level, seed) -> io.NodeOutput:
        batch = together(crop=pictures(crop), crop_mask=masks(crop_mask, crop, "crop mask", "crop"), encoded_reference=encoded_reference)
        square_side("crop", crop, "connect Zoom-in Crop")
        check_unet(model)
        sigma = noise_sigma(model.get_model_object("model_sampling").sigmas, timestep, none_below_zero(noise_level))

        def attended():
            for picture, mask, reference in BatchProgress(len(batch)).over(batch):
                mask = (mask > 0.5).float()
                tokens = encoded(reference).embedding.float()
                if tokens.shape[-1] != (width := model.model.model_config.unet_config["context_dim"]):
                    raise InputError("reference", f"was encoded for another model, {tokens.shape[-1]} channels a token, not {width}", "encode it with the encoder of this checkpoint")
                condition = inpainting_options(vae, picture[None], mask[None]) if model.model.concat_keys else {}
                yield attend(model, [[tokens, condition]], vae.encode(image_of(picture)[None]), layer, sigma, seed), mask

        return io.NodeOutput(*maps_and_attentions(attended()))


def inpainting_options(vae, crops: Tensor, holes: Tensor) -> dict[str, Tensor]:
    """What a conditioning tells of the crops `[B, 3, S, S]`: latents of them blanked, and which of those are redrawn; core orders and scales them."""
    blanked, redrawn = inpainting(crops, (holes > 0.5).float())
    return {"concat_latent_image": vae.encode(blanked.movedim(1, -1)), "concat_mask": redrawn}


def cross_attentions(unet) -> list[tuple[str, int]]:
    """Part and block of each cross-attention layer of a native U-Net, in the order in which they run; none of a transformer."""
    parts = {"input": getattr(unet, "input_blocks", ()), "middle": [getattr(unet, "middle_block", None) or ()], "output": getattr(unet, "output_blocks", ())}
    return [(part, number) for part, blocks in parts.items() for number, block in enumerate(blocks) for layer in block for _ in getattr(layer, "transformer_blocks", ())]


def check_unet(model: ModelPatcher) -> None:
    if cross_attentions(model.get_model_object("diffusion_model")) != LAYERS:
        raise InputError("model", "is not Stable Diffusion 1.x or 2.x: its cross-attention layers are not where theirs are", "load a checkpoint that `rba convert to-ldm` wrote")
    if (channels := model.model.model_config.unet_config["in_channels"]) not in (4, 9):
        raise InputError("model", f"takes {channels} input channels, of which ComfyUI fills 4 or 9", "use Align and Refine Crop with the model folder")


def attend(model: ModelPatcher, condition: list, latents: Tensor, layer: int, sigma: Tensor, seed: int) -> Tensor:
    """`[d², N²]`, as of the library's own `attend`."""

    def read(queries: Tensor, keys: Tensor, _, options: dict) -> Tensor:
        raise Reached(mean_attention(queries, keys, options["n_heads"]).mean(0))

    patcher = model.clone()
    patcher.set_model_attn2_replace(read, *LAYERS[layer], 0)
    return looked_into(patcher, condition, latents, sigma, lambda look, clean: look(clean, noise_like(clean, seed)), f"cross-attention layer {layer}")
