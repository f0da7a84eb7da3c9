"""Where models and the sample come from."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher

from ..rba_core.shipped import PRETRAINED, read_sample
from .api import io
from .types import CATEGORY, Model, RefineByAlignModel, delivered, image_of

if TYPE_CHECKING:
    from ..rba_core.model import RefineByAlign

FOLDER = "refine_by_align"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
# a model is a folder, as in core's "diffusers"; without this entry every file in it would be listed as one
folder_paths.folder_names_and_paths[FOLDER] = (folder_paths.get_folder_paths(FOLDER), {"folder"})


def model_folders() -> dict[str, str]:
    """Name -> folder of every model: the shipped ones, then those under `models/refine_by_align`."""
    found = {}
    for root in [str(PRETRAINED), *folder_paths.get_folder_paths(FOLDER)]:
        for config in sorted(glob.glob("*/config.json", root_dir=root)):
            name = os.path.dirname(config)
            found.setdefault(name, os.path.join(root, name))
    return found


def patcher_of(network: RefineByAlign, dtype: torch.dtype | None = None, device: str = "default") -> ModelPatcher:
    """The network where ComfyUI keeps models, in a precision; default: fp16 where the device is faster with it, else fp32."""
    load_device, offload_device = model_management.get_torch_device(), model_management.unet_offload_device()
    if device == "cpu":
        load_device = offload_device = torch.device("cpu")
    if dtype is None:
        parameters = sum(weight.numel() for weight in network.parameters())
        # not bf16: its 8 bits of mantissa show in decoded pixels
        dtype = model_management.unet_dtype(load_device, parameters, supported_dtypes=[torch.float16, torch.float32])
        if dtype not in DTYPES.values():  # --fp8_e4m3fn-unet and its like are for weights that core casts layer by layer
            dtype = torch.float16 if model_management.should_use_fp16(load_device, parameters) else torch.float32
    network.to(offload_device, dtype)
    return ModelPatcher(RefineByAlignModel(network), load_device=load_device, offload_device=offload_device)


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_LoadModel",
            display_name="Load Refine-by-Align Model",
            category=CATEGORY,
            description="Loads a Refine-by-Align model: rba-tiny, which comes with the pack, or a model folder from models/refine_by_align.",
            search_aliases=["rba", "refine by align loader", "load rba", "reference repair model", "rba-tiny", "checkpoint loader"],
            inputs=[
                io.Combo.Input("model_name", options=list(model_folders()), tooltip="rba-tiny comes with the pack. Other models are folders with a config.json in models/refine_by_align."),
                io.Combo.Input(
                    "dtype", options=["auto", *DTYPES], default="auto", advanced=True,
                    tooltip="Precision of the weights and the computation. auto: fp16 where the device is faster with it, else fp32.",
                ),
                io.Combo.Input("device", options=["default", "cpu"], default="default", advanced=True, tooltip="default: the device that ComfyUI computes on."),
            ],
            outputs=[Model.Output("model", tooltip="The model, for Refine by Align and the nodes of its steps. Most nodes for native models take ComfyUI's own MODEL instead.")],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, dtype, device):
        """A model whose files changed under the same name is read again."""
        files = sorted(path for path in Path(model_folders()[model_name]).rglob("*") if path.is_file())
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]

    @classmethod
    def execute(cls, model_name, dtype, device) -> io.NodeOutput:
        from ..rba_core.model import RefineByAlign  # with diffusers and transformers, which take seconds: not when ComfyUI starts

        network = RefineByAlign.load(model_folders()[model_name], dtype=DTYPES.get(dtype, torch.float32))
        return io.NodeOutput(patcher_of(network, DTYPES.get(dtype), device))


class Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RBA_Sample",
            display_name="Refine-by-Align Sample",
            category=CATEGORY,
            description="The sample that comes with the pack, to try the nodes without pictures of your own.",
            search_aliases=["rba sample", "example image", "demo"],
            outputs=[
                io.Image.Output("image", tooltip="A picture with a part that came out wrong."),
                io.Mask.Output("mask", tooltip="White over the wrong part."),
                io.Image.Output("reference", tooltip="A photo of the same object as it should be."),
                io.Mask.Output("reference_mask", tooltip="White over the object in the reference."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        image, mask, reference, reference_mask = read_sample()
        return io.NodeOutput(*(delivered([pixels]) for pixels in (image_of(image), mask, image_of(reference), reference_mask)))
