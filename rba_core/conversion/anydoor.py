"""AnyDoor's checkpoint as a model of ours."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..detail_encoder import DetailEncoder
from ..errors import InputError
from ..model import RefineByAlign, written_whole
from .dinov2 import layout
from .stable_diffusion import BESIDES, counted, ldm_shape, new_folder, unet_names, vae_names
from .weights import check_layout, open_weights

CONTROL, ENCODER, PROJECTOR = "control_model.", "cond_stage_model.model.", "cond_stage_model.projector."
LARGEST_FILE = 2**30
"""Bytes of a file that is written; each is made in memory."""
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "detail_encoder": "diffusion_pytorch_model", "encoder": "model"}
DETAIL = [
    (r"controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
    (r"controlnet_cond_embedding\.blocks\.(\d+)", lambda found: f"input_hint_block.{2 * int(found[1]) + 2}"),
    (r"controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"),
    (r"controlnet_mid_block", "middle_block_out.0"),
]


def detail_encoder_names(part: DetailEncoder) -> dict[str, str]:
    """Of each tensor its name in AnyDoor's checkpoint: of blocks LDM's, of the hint's convolutions those of a list with activations."""
    names, last = unet_names(part, CONTROL), 2 * len(part.controlnet_cond_embedding.blocks) + 2
    for key in part.state_dict().keys() - names.keys():
        name = key.replace("controlnet_cond_embedding.conv_out", f"input_hint_block.{last}")
        for pattern, replacement in DETAIL:
            name = re.sub(pattern, replacement, name)
        names[key] = CONTROL + name
    return names


def published(model: RefineByAlign) -> dict[str, dict[str, tuple[str, int | None, tuple[int, ...]]]]:
    """Of each part, of each tensor in our folder: its name in AnyDoor's checkpoint, which third of that one it is (DINOv2's queries,
    keys and values are stacked there), and that one's shape."""
    names = {"unet": unet_names(model.unet), "vae": vae_names(model.vae), "detail_encoder": detail_encoder_names(model.detail_encoder)}
    found = {}
    for part, own in names.items():
        state = getattr(model, part).state_dict()
        found[part] = {key: (name, None, ldm_shape(name, state[key])) for key, name in own.items()}
    found["encoder"] = {ours: (ENCODER + theirs, third, shape if third is None else (3 * shape[0], *shape[1:])) for ours, theirs, third, shape in layout(model.encoder.config)}
    found["projector"] = {f"projector.{key}": (PROJECTOR + key, None, tuple(value.shape)) for key, value in model.projector.state_dict().items()}
    return found


def import_anydoor(checkpoint: str | Path, folder: str | Path, *, config: str | dict = "anydoor") -> Counter:
    """Make a model folder of AnyDoor's checkpoint: Stable Diffusion 2.1's U-Net and autoencoder, DINOv2-giant, the projector, and the
    detail encoder.

    checkpoint  one file with the published names, `.ckpt` with or without the optimizer's state, or `.safetensors`. It is mapped, not
                read: no more than `LARGEST_FILE` of it is held in memory
    folder      to be written, in the checkpoint's own precision, whole or not at all; must not exist, or be empty
    config      a config of `configs/`, by its name or as `read_config` gives it; its sizes must be those of the checkpoint

    Returns how many tensors were left aside, by the first part of their names. Raises InputError, which names the first tensor that is
    missing, unknown or of another shape.
    """
    checkpoint, folder = Path(checkpoint), new_folder(folder)
    if not checkpoint.is_file():
        raise InputError("checkpoint", f"{checkpoint} does not exist", "give AnyDoor's .ckpt or .safetensors")
    model = RefineByAlign.from_config(config, device="meta")
    parts, tensors = published(model), open_weights("checkpoint", checkpoint)
    aside = check_layout("checkpoint", checkpoint, tensors, {name: shape for own in parts.values() for name, _, shape in own.values()}, BESIDES)
    try:
        with written_whole(folder) as partial:
            model.config.write(partial)
            model.scheduler.save_pretrained(partial / "scheduler")
            model.encoder.config.save_pretrained(partial / "encoder")
            for part in ("unet", "vae", "detail_encoder"):
                getattr(model, part).save_config(partial / part)
            for part, file in FILES.items():
                like = {} if part == "encoder" else getattr(model, part).state_dict()
                state = {key: _taken(tensors[name], third) for key, (name, third, _) in parts[part].items()}
                write_files(partial / part / file, {key: value.reshape(like[key].shape) if key in like else value for key, value in state.items()})
            write_files(partial / "projector", {key: tensors[name] for key, (name, _, _) in parts["projector"].items()})
    except OSError as error:
        raise InputError("output", f"{folder} cannot be written ({error.strerror or error})", "make room there, or give another folder") from error
    return counted(aside)


def _taken(tensor: Tensor, third: int | None) -> Tensor:
    return tensor if third is None else tensor.chunk(3)[third]


def write_files(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors as `path.safetensors`, or above `LARGEST_FILE` as several files with an index, as diffusers and transformers read them."""
    groups, held = [{}], 0
    for key, tensor in tensors.items():
        if held and held + tensor.nbytes > LARGEST_FILE:
            groups.append({})
            held = 0
        groups[-1][key] = tensor
        held += tensor.nbytes
    several = [f"{path.name}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    names = several if len(groups) > 1 else [f"{path.name}.safetensors"]
    for name, group in zip(names, groups):
        save_file({key: tensor.contiguous() for key, tensor in group.items()}, path.with_name(name), {"format": "pt"})
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": {key: name for name, group in zip(names, groups) for key in group}}
        path.with_name(f"{path.name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
