"""Stable Diffusion 1.x as the start of a model of ours, and a model of ours as ComfyUI and others read Stable Diffusion."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InputError
from ..model import ModelConfig, RefineByAlign, quiet, read_config
from .dinov2 import HEAD_WIDTH, KINDS, open_dinov2
from .weights import check_layout, open_weights, write_model

UNET, VAE = "model.diffusion_model.", "first_stage_model."
BESIDES = (
    "model_ema.", "first_stage_model.loss.",
    "betas", "alphas_cumprod", "sqrt_", "log_one_minus_alphas_cumprod", "posterior_", "logvar", "lvlb_weights", "scale_factor",
)  # fmt: skip
"""No network of use: the average of the U-Net's weights, the autoencoder's discriminator, the noise schedule's tables."""
ASIDE = ("cond_stage_model.", *BESIDES)
"""And the text encoder."""

FORMER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the autoencoder's attention in folders that an early diffusers wrote."""

BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)\.(weight|bias)")
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
AUTOENCODER = [
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


def unet_names(unet: UNet2DConditionModel | ControlNetModel, prefix: str = UNET) -> dict[str, str]:
    """Of each tensor in diffusers' layout its name in LDM's, where blocks are not grouped by level but counted through. Of a ControlNet
    what is like a U-Net's."""
    names, a_level = [key for key in unet.state_dict() if not key.startswith("controlnet_")], unet.config.layers_per_block + 1
    attending = {key.split(".")[1] for key in names if key.startswith("up_blocks.") and ".attentions." in key}

    def renamed(key: str) -> str:
        found = BLOCK.fullmatch(key)
        if not found:
            name, _, end = key.rpartition(".")
            return f"{ENDS[name]}.{end}"
        side, level, kind, index, name, end = found.groups()
        first, index = int(level or 0) * a_level, int(index)
        if kind == "downsamplers":
            return f"input_blocks.{first + a_level}.0.op.{end}"
        if kind == "upsamplers":
            return f"output_blocks.{first + a_level - 1}.{2 if level in attending else 1}.conv.{end}"
        name, step = (RESNET[name], 0) if kind == "resnets" else (name, 1)
        block = {"down": f"input_blocks.{first + index + 1}.{step}", "mid": f"middle_block.{step or 2 * index}", "up": f"output_blocks.{first + index}.{step}"}[side]
        return f"{block}.{name}.{end}"

    return {key: prefix + renamed(key) for key in names}


def vae_names(vae: AutoencoderKL) -> dict[str, str]:
    """The same for the autoencoder, whose decoder counts its levels from the finest."""
    last = len(vae.config.block_out_channels) - 1

    def renamed(key: str) -> str:
        key = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{last - int(found[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", key)
        for pattern, replacement in AUTOENCODER:
            key = re.sub(pattern, replacement, key)
        return VAE + key

    return {key: renamed(key) for key in vae.state_dict()}


def ldm_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The autoencoder's attention consists of 1 x 1 convolutions there, of linear layers in diffusers."""
    return (*tensor.shape, 1, 1) if name.startswith(VAE) and ".attn_1." in name and tensor.ndim == 2 else tuple(tensor.shape)


def import_sd15(checkpoint: str | Path, folder: str | Path, dinov2: str | Path, *, mlp: str | Path | None = None, config: str | dict = "sd1x", seed: int = 0) -> Counter:
    """Make a model folder, from which training starts, of Stable Diffusion 1.5 or its inpainting version and of DINOv2.

    checkpoint  a file with the names of LDM, `.safetensors` or `.ckpt`, or a folder of diffusers with `unet/` and `vae/`
    folder      to be written, in float32, whole or not at all; must not exist, or be empty
    dinov2      as `open_dinov2` takes it
    mlp         what `export_ldm` wrote beside a model: its MLP, settings and noise schedule come with it. Without: an MLP with
                random weights by `seed`, settings and schedule by `config`
    config      a config of `configs/`, by its name or as `read_config` gives it; its sizes must be those of the checkpoint

    The U-Net's first convolution takes 4 or 9 channels (latents; mask, masked latents) there, and keeps them in that order, which is
    ours, with the same meaning: 1 where to redraw, grey where masked. Further channels of ours begin at zero. Returns how many
    tensors were left aside, by the first part of their names. Raises InputError, which names the first tensor that is missing, unknown or of another shape.
    """
    checkpoint, folder = Path(checkpoint), new_folder(folder)
    parts = read_config(config) if isinstance(config, str) else config
    with torch.device("meta"):
        unet = UNet2DConditionModel(**parts["unet"])
        vae = AutoencoderKL(**{key: value for key, value in parts["vae"].items() if key != "_class_name"})
    settings, scheduler, projector = ModelConfig(**parts["model"]), DDIMScheduler(**parts["scheduler"]), None
    if mlp is not None:
        settings, scheduler, projector = read_mlp(Path(mlp))

    names, aside = _names(checkpoint, unet, vae)
    sizes = open_dinov2(dinov2)[0]
    with torch.device("meta"):
        encoder = KINDS[type(sizes)](sizes)
    encoder.config.dtype = "float32"  # a folder's may tell of half, to which transformers would then round what is read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RefineByAlign(settings, vae, unet, encoder, scheduler)
    own = model.own_state()
    if projector is not None:
        check_layout("mlp", mlp, projector, {key: value.shape for key, value in own.items() if key.startswith("projector.")})
        own |= projector

    def opened(part: nn.Module) -> dict[str, Tensor]:
        sources = _opened(checkpoint)  # anew: what was read of a mapped file stays in memory as long as it is open
        state = {key: sources[name] for key, name in names[part].items()}
        if part is unet:
            state["conv_in.weight"] = nn.functional.pad(state["conv_in.weight"], (0, 0, 0, 0, 0, unet.config.in_channels - state["conv_in.weight"].shape[1]))
        return {key: state[key].reshape(tensor.shape) for key, tensor in part.state_dict().items()}

    parts = {"unet": lambda: opened(unet), "vae": lambda: opened(vae), "encoder": lambda: open_dinov2(dinov2)[1], "projector": lambda: own}
    write_model(model, folder, parts, torch.float32)
    return counted(aside)


def counted(names: list[str]) -> Counter:
    """By the first part of each name, of the autoencoder's the first two."""
    return Counter(".".join(key.split(".")[:2]) if key.startswith(VAE) else key.split(".")[0] for key in names)


def new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError("output", f"{folder} exists", "give a new folder")
    if not folder.absolute().parent.is_dir():
        raise InputError("output", f"folder {folder.parent} does not exist", "create it first")
    return folder


def _opened(checkpoint: Path) -> dict[str, Tensor]:
    """The mapped tensors of a file, or of a folder of diffusers with what LDM puts before each part's names."""
    if not checkpoint.is_dir():
        return open_weights("checkpoint", checkpoint)
    tensors = {}
    for prefix, name in ((UNET, "unet"), (VAE, "vae")):
        files = [checkpoint / name / f"diffusion_pytorch_model{suffix}" for suffix in (".safetensors", ".fp16.safetensors", ".bin")]
        found = next(([file] for file in files if file.is_file()), None) or sorted((checkpoint / name).glob("diffusion_pytorch_model-*.safetensors"))
        if not found:
            raise InputError("checkpoint", f"{checkpoint} has no {name}/{files[0].name}", "give a folder of diffusers with unet/ and vae/")
        tensors |= {prefix + _present(key): value for key, value in open_weights("checkpoint", *found).items()}
    return tensors


def _names(checkpoint: Path, unet: UNet2DConditionModel, vae: AutoencoderKL) -> tuple[dict[nn.Module, dict[str, str]], list[str]]:
    """Of each tensor of U-Net and autoencoder its name in the checkpoint, which has them all in the right shapes; the names of those that are of no use."""
    if not checkpoint.exists():
        raise InputError("checkpoint", f"{checkpoint} does not exist", "give a file or a folder of Stable Diffusion 1.5")
    sources, wanted = _opened(checkpoint), {}
    if checkpoint.is_dir():
        names = {part: {key: prefix + key for key in part.state_dict()} for prefix, part in ((UNET, unet), (VAE, vae))}
    else:
        names = {unet: unet_names(unet), vae: vae_names(vae)}
    for part, renamed in names.items():
        for key, tensor in part.state_dict().items():
            wanted[renamed[key]] = tuple(tensor.shape) if checkpoint.is_dir() else ldm_shape(renamed[key], tensor)
    first, own = names[unet]["conv_in.weight"], unet.config.in_channels
    if first in sources and sources[first].ndim == 4:
        if (channels := sources[first].shape[1]) not in (4, 9, own) or channels > own:
            raise InputError("checkpoint", f"its U-Net takes {channels} channels", "give Stable Diffusion 1.5 (4 channels) or its inpainting version (9)")
        wanted[first] = (wanted[first][0], channels, *wanted[first][2:])
    return names, check_layout("checkpoint", checkpoint, sources, wanted, () if checkpoint.is_dir() else ASIDE)


def _present(key: str) -> str:
    *front, last, end = key.rsplit(".", 2)
    return ".".join([*front, FORMER_ATTENTION[last], end]) if "attentions" in key and last in FORMER_ATTENTION else key


def read_mlp(file: Path) -> tuple[ModelConfig, DDIMScheduler, dict[str, Tensor]]:
    """Settings, noise schedule and the MLP's tensors, as `export_ldm` wrote them."""
    tensors = open_weights("mlp", file)
    try:
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        return ModelConfig(**json.loads(told["model"])), DDIMScheduler.from_config(json.loads(told["scheduler"])), tensors
    except Exception as error:  # safetensors' own, or settings of another version
        raise InputError("mlp", f"{file} does not tell the model's settings", "give the .mlp.safetensors that `rba convert to-ldm` wrote") from error


def export_ldm(model: RefineByAlign, file: str | Path) -> list[Path]:
    """Write U-Net and autoencoder to one file with the names of LDM, which ComfyUI and others load as Stable Diffusion, and
    beside it `<stem>.dinov2.safetensors`, DINOv2 in the layout of transformers and of ComfyUI's CLIP_VISION, and
    `<stem>.mlp.safetensors`, the MLP, with settings and noise schedule in its metadata. Returns the three paths.

    Each is written whole or not at all, the first one last. Raises InputError for a model with parts that LDM has none of.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise InputError("output", f"{file.name} is no safetensors file", "give a name that ends with .safetensors")
    if not file.absolute().parent.is_dir():
        raise InputError("output", f"folder {file.parent} does not exist", "create it first")
    foreign = {
        "an autoencoder of its own": not isinstance(model.vae, AutoencoderKL),
        "context features": model.config.context_features > 0,
        "a convolutional stem": model.stem is not None,
        "a detail encoder": model.detail_encoder is not None,
        "registers in DINOv2": hasattr(model.encoder.config, "num_register_tokens"),
        f"attention heads of DINOv2 that have not {HEAD_WIDTH} channels": model.encoder.config.hidden_size != HEAD_WIDTH * model.encoder.config.num_attention_heads,
    }
    if found := [what for what, has in foreign.items() if has]:
        raise InputError("model", f"has {', '.join(found)}, which this layout has no place for", "give a model of the config sd1x")
    state = {}
    for part, names in ((model.unet, unet_names(model.unet)), (model.vae, vae_names(model.vae))):
        state |= {names[key]: tensor.reshape(ldm_shape(names[key], tensor)).contiguous() for key, tensor in part.state_dict().items()}
    told = {"format": "pt", "model": json.dumps(asdict(model.config)), "scheduler": json.dumps(dict(model.scheduler.config))}
    dinov2, mlp = (file.with_name(f"{file.stem}.{name}.safetensors") for name in ("dinov2", "mlp"))
    partial = file.with_name(f".{file.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with quiet():
            model.encoder.save_pretrained(partial, max_shard_size="1TB")
        save_file({key: value.contiguous() for key, value in model.projector.state_dict(prefix="projector.").items()}, partial / "mlp.safetensors", told)
        save_file(state, partial / "ldm.safetensors", {"format": "pt"})
        for written, path in (("model", dinov2), ("mlp", mlp), ("ldm", file)):
            (partial / f"{written}.safetensors").chmod(0o644)  # safetensors writes 0600, unreadable for a server under another user
            os.replace(partial / f"{written}.safetensors", path)
    except OSError as error:
        raise InputError("output", f"{file} cannot be written ({error.strerror or error})", "make room there, or give another name") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [file, dinov2, mlp]
