"""DINOv2 from the layouts that it goes about in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from ..errors import InputError
from ..model import quiet
from .weights import check_layout, open_weights

HEAD_WIDTH = 64
"""Channels of an attention head, in every published size."""

KINDS = {Dinov2Config: Dinov2Model, Dinov2WithRegistersConfig: Dinov2WithRegistersModel}

ASIDE = ("naf.",)
"""A feature upsampler that ComfyUI takes from the same file."""


def layout(config: Dinov2Config | Dinov2WithRegistersConfig) -> Iterator[tuple[str, str, int | None, tuple[int, ...]]]:
    """Of each tensor: its name at transformers' hub (and in ComfyUI's CLIP_VISION files), its name in the original
    repository, which third of that one it is (queries, keys and values are stacked there), and its shape."""
    width, patch = config.hidden_size, config.patch_size
    hidden = int(width * config.mlp_ratio)
    yield "embeddings.cls_token", "cls_token", None, (1, 1, width)
    yield "embeddings.mask_token", "mask_token", None, (1, width)
    if isinstance(config, Dinov2WithRegistersConfig):
        yield "embeddings.register_tokens", "register_tokens", None, (1, config.num_register_tokens, width)
    yield "embeddings.position_embeddings", "pos_embed", None, (1, (config.image_size // patch) ** 2 + 1, width)
    yield "embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight", None, (width, config.num_channels, patch, patch)
    yield "embeddings.patch_embeddings.projection.bias", "patch_embed.proj.bias", None, (width,)
    if config.use_swiglu_ffn:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        mlp = [("weights_in", "w12", 2 * hidden, width), ("weights_out", "w3", width, hidden)]
    else:
        mlp = [("fc1", "fc1", hidden, width), ("fc2", "fc2", width, hidden)]
    for number in range(config.num_hidden_layers):
        ours, theirs = f"encoder.layer.{number}", f"blocks.{number}"
        for third, part in enumerate(("query", "key", "value")):
            yield f"{ours}.attention.attention.{part}.weight", f"{theirs}.attn.qkv.weight", third, (width, width)
            yield f"{ours}.attention.attention.{part}.bias", f"{theirs}.attn.qkv.bias", third, (width,)
        for part, original, *shape in [("attention.output.dense", "attn.proj", width, width), *((f"mlp.{part}", f"mlp.{original}", *shape) for part, original, *shape in mlp)]:
            yield f"{ours}.{part}.weight", f"{theirs}.{original}.weight", None, tuple(shape)
            yield f"{ours}.{part}.bias", f"{theirs}.{original}.bias", None, tuple(shape[:1])
        for side in (1, 2):
            yield f"{ours}.norm{side}.weight", f"{theirs}.norm{side}.weight", None, (width,)
            yield f"{ours}.norm{side}.bias", f"{theirs}.norm{side}.bias", None, (width,)
            yield f"{ours}.layer_scale{side}.lambda1", f"{theirs}.ls{side}.gamma", None, (width,)
    yield "layernorm.weight", "norm.weight", None, (width,)
    yield "layernorm.bias", "norm.bias", None, (width,)


def read_dinov2(source: str | Path) -> Dinov2Model | Dinov2WithRegistersModel:
    """DINOv2 of any size, in float32, as `open_dinov2` takes it."""
    config, state = open_dinov2(source)
    with quiet():
        return KINDS[type(config)].from_pretrained(None, config=config, state_dict={key: value.float() for key, value in state.items()}, local_files_only=True).eval()


def open_dinov2(source: str | Path) -> tuple[Dinov2Config | Dinov2WithRegistersConfig, dict[str, Tensor]]:
    """The config and the mapped tensors, by transformers' names, of a DINOv2 of any size, with registers or without: from a folder of
    transformers, or from one file in the layout of transformers, of ComfyUI's CLIP_VISION (the same) or of the original repository.

    A file tells its sizes by its tensors; its attention heads have `HEAD_WIDTH` channels. Raises InputError, which names the first
    tensor that is missing, unknown or of another shape.
    """
    source = Path(source)
    if source.is_dir():
        files = sorted(source.glob("model*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
        if not files or not (source / "config.json").is_file():
            raise InputError("dinov2", f"{source} has no config.json with model.safetensors", "give a folder in the layout of transformers, or a file")
    else:
        files = [source]
    tensors = open_weights("dinov2", *files)
    kind = Dinov2WithRegistersConfig if any(key.endswith("register_tokens") for key in tensors) else Dinov2Config
    original = any(key.startswith("blocks.") for key in tensors)
    try:
        config = kind.from_pretrained(source, local_files_only=True) if source.is_dir() else kind(**sizes(source, tensors, original))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError("dinov2", f"{source / 'config.json'} cannot be read ({' '.join(str(error).split())[:120]})", "copy the folder again") from error
    wanted, state = {}, {}
    for ours, theirs, third, shape in layout(config):
        wanted[theirs if original else ours] = (3 * shape[0], *shape[1:]) if original and third is not None else shape
    check_layout("dinov2", source, tensors, wanted, ASIDE)
    for ours, theirs, third, _ in layout(config):
        tensor = tensors[theirs if original else ours]
        state[ours] = tensor.chunk(3)[third] if original and third is not None else tensor
    return config, state


def sizes(source: Path, tensors: dict[str, Tensor], original: bool) -> dict:
    """The arguments of `Dinov2Config` that a file's tensors tell of, under the names of the original repository or of transformers. Raises `InputError`."""
    embeddings, block = ("", "blocks") if original else ("embeddings.", "encoder.layer")
    table, projection = (f"{embeddings}{name}" for name in (("pos_embed", "patch_embed.proj.weight") if original else ("position_embeddings", "patch_embeddings.projection.weight")))
    for key, axes in ((table, 3), (projection, 4)):
        if key not in tensors or tensors[key].ndim != axes:
            raise InputError("dinov2", f"in {source.name} {key} is missing or of no such shape", "give DINOv2 itself, without a head and without a prefix")
    width, patch = tensors[table].shape[-1], tensors[projection].shape[-1]
    registers = next(({"num_register_tokens": tensor.shape[1]} for key, tensor in tensors.items() if key.endswith("register_tokens")), {})
    return dict(
        registers,
        hidden_size=width,
        num_hidden_layers=1 + max((int(found[1]) for key in tensors if (found := re.match(rf"{block}\.(\d+)\.", key))), default=0),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        use_swiglu_ffn=any(key.endswith(("mlp.w12.weight", "mlp.weights_in.weight")) for key in tensors),
        image_size=round((tensors[table].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
    )
