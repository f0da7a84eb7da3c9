"""AnyDoor's checkpoint as a model of ours."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

from torch import Tensor

from ..detail_encoder import DetailEncoder
from ..errors import InputError
from ..model import RefineByAlign
from .dinov2 import layout
from .stable_diffusion import BESIDES, counted, ldm_shape, new_folder, unet_names, vae_names
from .weights import check_layout, open_weights, write_model

CONTROL, ENCODER, PROJECTOR = "control_model.", "cond_stage_model.model.", "cond_stage_model.projector."
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
    del tensors

    def opened(part: str) -> dict[str, Tensor]:
        like = getattr(model, part).state_dict() if part in ("unet", "vae", "detail_encoder") else {}
        tensors = open_weights("checkpoint", checkpoint)  # anew: what was read of a mapped file stays in memory as long as it is open
        state = {key: _taken(tensors[name], third) for key, (name, third, _) in parts[part].items()}
        return {key: value.reshape(like[key].shape) if key in like else value for key, value in state.items()}

    write_model(model, folder, {part: partial(opened, part) for part in parts})
    return counted(aside)


def _taken(tensor: Tensor, third: int | None) -> Tensor:
    return tensor if third is None else tensor.chunk(3)[third]

