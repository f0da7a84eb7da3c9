"""A stand-in for the parts of ComfyUI that the nodes import, so that their schemas can be read and they can run without it.

It accepts what the real one accepts (an unknown option is an error) and describes a node as `/object_info` does; the
end-to-end test holds the two against each other.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

PACK = Path(__file__).parent.parent

COMMON = {"display_name", "optional", "tooltip", "lazy", "extra_dict", "advanced"}
WIDGET = COMMON | {"default", "socketless", "force_input"}
OPTIONS = {
    "IMAGE": COMMON,
    "MASK": COMMON,
    "BOOLEAN": WIDGET | {"label_on", "label_off"},
    "INT": WIDGET | {"min", "max", "step", "control_after_generate"},
    "FLOAT": WIDGET | {"min", "max", "step", "round"},
    "STRING": WIDGET | {"multiline", "placeholder"},
    "COMBO": WIDGET | {"options", "control_after_generate"},
}


def comfy_type(io_type: str):
    class Input:
        def __init__(self, id, *, optional=False, extra_dict=None, **options):
            if unknown := set(options) - OPTIONS.get(io_type, COMMON):
                raise TypeError(f"{io_type} input {id} has no option {unknown.pop()!r}")
            self.id, self.io_type, self.optional = id, io_type, optional
            self.options = {key: value for key, value in options.items() if value is not None} | (extra_dict or {})
            if io_type == "COMBO":
                self.options["multiselect"] = False

    class Output:
        def __init__(self, id=None, *, display_name=None, tooltip=None):
            self.id, self.io_type, self.display_name, self.tooltip = id, io_type, display_name or id, tooltip

    return SimpleNamespace(io_type=io_type, Input=Input, Output=Output)


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    essentials_category: str | None = None
    is_output_node: bool = False


class ComfyNode:
    hidden = None


class ComfyExtension:
    async def on_load(self):
        pass


class NodeOutput:
    def __init__(self, *args, ui=None):
        self.args, self.ui = args, ui

    def __getitem__(self, index):
        return self.args[index]


class PreviewImage:
    """Keeps its batch `[B, H, W, C]`; `files` has every picture given away by name."""

    files: dict[str, torch.Tensor] = {}

    def __init__(self, image, cls=None):
        self.image = image

    def as_dict(self):
        names = [f"{len(self.files) + index}.png" for index in range(len(self.image))]
        self.files.update(zip(names, self.image))
        return {"images": [{"filename": name, "subfolder": "", "type": "temp"} for name in names], "animated": (False,)}


class PreviewText:
    def __init__(self, value):
        self.value = value


def object_info(node: type[ComfyNode]) -> dict:
    """What `/object_info` says of a node, but for keys that the pack has no hand in."""
    schema = node.define_schema()
    inputs = {"required": {}}
    for entry in schema.inputs:
        inputs.setdefault("optional" if entry.optional else "required", {})[entry.id] = [entry.io_type, entry.options]
    if schema.is_output_node:
        inputs["hidden"] = {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]}
    return {
        "input": inputs,
        "input_order": {kind: list(entries) for kind, entries in inputs.items()},
        "output": [output.io_type for output in schema.outputs],
        "output_name": [output.display_name or output.io_type for output in schema.outputs],
        "output_tooltips": [output.tooltip for output in schema.outputs],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "description": schema.description,
        "category": schema.category,
        "output_node": schema.is_output_node,
        "search_aliases": schema.search_aliases or None,
        "essentials_category": schema.essentials_category,
    }


class InterruptProcessingException(BaseException):
    pass


class ProgressBar:
    """Keeps every bar made, with the (value, total) pairs it was given."""

    made: list[ProgressBar] = []

    def __init__(self, total):
        self.updates = []
        ProgressBar.made.append(self)

        self.previews = []

    def update_absolute(self, value, total=None, preview=None):
        self.updates.append((value, total))
        self.previews.append(preview)


class ModelPatcher:
    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


def load_models_gpu(models, memory_required=0, force_full_load=False):
    for patcher in models:
        patcher.model.to(patcher.load_device)
        patcher.model.device = patcher.load_device  # as the real one does: fails where `device` is a property


class Sampler:
    pass


class CFGGuider:
    """One conditioning over a model with `process_latent_in`, `concat_keys` and `apply_model`; undoes `loaded` as the real one does."""

    def __init__(self, model_patcher):
        self.model_patcher, self.inner_model = model_patcher, model_patcher.model

    def set_conds(self, positive, negative):
        ((self.tokens, self.told),) = positive

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None):
        self.inner_model.loaded = True
        try:
            return sampler.sample(self, sigmas, {"model_options": {}, "seed": seed}, callback, noise, self.inner_model.process_latent_in(latent_image))
        finally:
            self.inner_model.loaded = False

    def __call__(self, x, sigma, model_options, seed):
        concat = None
        if self.inner_model.concat_keys:
            concat = torch.cat([self.told["concat_mask"], self.inner_model.process_latent_in(self.told["concat_latent_image"])], 1)
        return self.inner_model.apply_model(x, sigma, concat, self.tokens, self.model_patcher.patches)


def install() -> None:
    """Put the stand-in where the nodes will import ComfyUI from."""
    io = SimpleNamespace(Schema=Schema, ComfyNode=ComfyNode, NodeOutput=NodeOutput, Custom=comfy_type)
    for name in ("Image", "Mask", "Boolean", "Int", "Float", "String", "Combo", "Model", "Vae", "Latent", "Conditioning"):
        setattr(io, name, comfy_type(name.upper()))
    io.ClipVision = comfy_type("CLIP_VISION")
    io.BoundingBox = comfy_type("BOUNDING_BOX")
    cpu = torch.device("cpu")
    modules = {
        "comfy_api": {},
        "comfy_api.v0_0_2": {"ComfyExtension": ComfyExtension, "io": io, "ui": SimpleNamespace(PreviewImage=PreviewImage, PreviewText=PreviewText)},
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.samplers": {"Sampler": Sampler, "CFGGuider": CFGGuider},
        "comfy.cli_args": {"args": SimpleNamespace(preview_method="none", preview_size=512), "LatentPreviewMethod": SimpleNamespace(NoPreviews="none", Auto="auto")},
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
        "comfy.model_management": {
            "InterruptProcessingException": InterruptProcessingException,
            "throw_exception_if_processing_interrupted": lambda: None,
            "load_models_gpu": load_models_gpu,
            "load_model_gpu": lambda patcher: None,
            "get_torch_device": lambda: cpu,
            "unet_offload_device": lambda: cpu,
            "intermediate_device": lambda: cpu,
            "get_free_memory": lambda device: 1 << 40,
            "unet_dtype": lambda device, parameters, supported_dtypes: torch.float32,
            "should_use_fp16": lambda device, parameters: False,
        },
        "folder_paths": {"models_dir": "models", "folder_names_and_paths": {"checkpoints": (["models/checkpoints"], set())}},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    folders = sys.modules["folder_paths"]
    folders.get_folder_paths = lambda name: folders.folder_names_and_paths[name][0][:]
    folders.add_model_folder_path = lambda name, path: folders.folder_names_and_paths.setdefault(name, ([], set()))[0].append(path)


@cache
def load_pack() -> ModuleType:
    """The pack's `nodes` package over the stand-in, imported as ComfyUI does: from its folder, not from `sys.path`."""
    install()
    name = "refine_by_align_pack"
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.nodes")


def node_classes() -> dict[str, type[ComfyNode]]:
    """Node id -> class, in the order in which the extension lists them."""
    awaited = load_pack().RefineByAlignExtension().get_node_list()
    try:
        awaited.send(None)
    except StopIteration as finished:
        return {node.define_schema().node_id: node for node in finished.value}
    raise RuntimeError("get_node_list waits for something")
