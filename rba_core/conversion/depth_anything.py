"""Depth Anything (Yang et al. 2024) from its own layout: a DINOv2 under `pretrained.`, a DPT head under `depth_head.`."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from ..errors import InputError
from ..model import quiet
from .dinov2 import layout, sizes
from .weights import check_layout, open_weights

HEAD = (
    (r"projects\.(\d)", lambda found: f"neck.reassemble_stage.layers.{found[1]}.projection"),
    (r"resize_layers\.(\d)", lambda found: f"neck.reassemble_stage.layers.{found[1]}.resize"),
    (r"scratch\.layer(\d)_rn", lambda found: f"neck.convs.{int(found[1]) - 1}"),
    (r"scratch\.refinenet(\d)", lambda found: f"neck.fusion_stage.layers.{4 - int(found[1])}"),
    (r"\.out_conv", lambda found: ".projection"),
    (r"resConfUnit(\d)\.conv(\d)", lambda found: f"residual_layer{found[1]}.convolution{found[2]}"),
    (r"scratch\.output_conv1", lambda found: "head.conv1"),
    (r"scratch\.output_conv2\.(\d)", lambda found: f"head.conv{2 + int(found[1]) // 2}"),
)
"""Names in the DPT head, and what transformers calls them."""


def read_depth_anything(source: str | Path) -> DepthAnythingForDepthEstimation:
    """Depth Anything of any size, in float32, from `depth_anything_vit*14.pth`. Raises `InputError`."""
    source = Path(source)
    tensors = open_weights("depth anything", source)
    backbone = {key.removeprefix("pretrained."): value for key, value in tensors.items() if key.startswith("pretrained.")}
    head = {key.removeprefix("depth_head."): value for key, value in tensors.items() if key.startswith("depth_head.")}
    config, wanted, state = Dinov2Config(**sizes(source, backbone, original=True)), {}, {}
    for ours, theirs, third, shape in layout(config):
        wanted[theirs] = (3 * shape[0], *shape[1:]) if third is not None else shape
    check_layout("depth anything", source, backbone, wanted)
    for ours, theirs, third, _ in layout(config):
        state[f"backbone.{ours}"] = backbone[theirs] if third is None else backbone[theirs].chunk(3)[third]
    for key, value in head.items():
        for old, new in HEAD:
            key = re.sub(old, new, key)
        state[key] = value
    config.out_indices = [*range(config.num_hidden_layers - 3, config.num_hidden_layers + 1)]
    config.apply_layernorm, config.reshape_hidden_states = True, False
    config = DepthAnythingConfig(
        backbone_config=config, patch_size=config.patch_size, reassemble_hidden_size=config.hidden_size,
        neck_hidden_sizes=[len(head[f"projects.{level}.bias"]) for level in range(4) if f"projects.{level}.bias" in head],
        fusion_hidden_size=len(head.get("scratch.layer1_rn.weight", ())),
    )  # fmt: skip
    try:
        with quiet():
            network, report = DepthAnythingForDepthEstimation.from_pretrained(
                None, config=config, state_dict={key: value.float() for key, value in state.items()}, local_files_only=True, output_loading_info=True
            )
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError("depth anything", f"{source.name} has no head of DPT's", "give depth_anything_vitb14.pth, whole") from error
    if wrong := [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]]:
        raise InputError("depth anything", f"{source.name} does not fit ({wrong[0]})", "give depth_anything_vitb14.pth, whole")
    return network.eval()
