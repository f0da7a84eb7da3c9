"""What the baselines on the user's own weights share: a diffusers folder is read, each artifact is redrawn in a crop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from ...errors import InputError
from ...geometry import Box, resize, resize_mask
from ...imageio import to_bytes
from ...model import quiet, read_part
from ...stitch import stitch
from ...zoom_crop import ZoomCrop, separate, zoom_crop
from ..dataset import Item

PARTS = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "scheduler": DDIMScheduler}
TEXT = {"tokenizer": CLIPTokenizer, "text_encoder": CLIPTextModel}


def read_parts(method: str, folder: str | Path, kinds: dict[str, type], channels: int, device: str | torch.device, dtype: torch.dtype) -> dict:
    """Parts of a diffusers folder by the names of their folders. DDIM reads the schedule of any sampler.

    channels   that the U-Net must take: 4, or 9 for inpainting
    Raises `InputError` where one is missing, lacks weights, or they do not fit each other.
    """
    folder = Path(folder)
    if missing := [name for name in kinds if not (folder / name).is_dir()]:
        raise InputError("weights", f"{folder} has no folder {missing[0]}", f"for {method} give a folder in the layout of diffusers, with {', '.join(kinds)}")
    try:
        with quiet():
            parts = {
                name: read_part(kind, folder / name).to(device, dtype) if issubclass(kind, nn.Module) else kind.from_pretrained(folder / name, local_files_only=True)
                for name, kind in kinds.items()
            }
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError("weights", f"{folder} cannot be read ({reason})", f"copy the folder again, or give one that is meant for {method}") from error
    parts["scheduler"] = DDIMScheduler.from_config(parts["scheduler"].config, clip_sample=False, set_alpha_to_one=False)  # DDIM's defaults are pixels'
    taken, context = parts["unet"].config.in_channels, parts["unet"].config.cross_attention_dim
    if taken != channels:
        raise InputError("weights", f"the U-Net in {folder} takes {taken} channels, {method} needs {channels}", "give inpainting weights where 9 are needed, plain ones for 4")
    if "text_encoder" in parts and parts["text_encoder"].config.hidden_size != context:
        raise InputError("weights", f"the U-Net in {folder} reads {context} channels of text, its text encoder has others", "give Stable Diffusion 1.x or 2.x")
    return parts


class LatentSpace:
    """A VAE's latents, scaled, float32 on the CPU; what has `vae`, `device` and `dtype` gets them here."""

    vae: AutoencoderKL
    device: str | torch.device
    dtype: torch.dtype

    def encode(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, 3, S, S]` in [0, 1] -> latents: the mode, or a sample where a generator is given."""
        latents = self.vae.encode((pictures * 2 - 1).to(self.device, self.dtype)).latent_dist
        noise = 0 if generator is None else latents.std.float().cpu() * torch.randn(latents.mean.shape, generator=generator)
        return (latents.mean.float().cpu() + noise) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """The way back, clamped."""
        return (self.vae.decode(latents.to(self.device, self.dtype) / self.vae.config.scaling_factor).sample.float().cpu() / 2 + 0.5).clamp(0, 1)


class StableDiffusion(LatentSpace):
    """Stable Diffusion 1.x or 2.x, plain, for what no pipeline of diffusers does.

    size   side of its pictures, pixels
    """

    def __init__(self, method: str, folder: str | Path, device: str | torch.device, dtype: torch.dtype):
        parts = read_parts(method, folder, PARTS | TEXT, 4, device, dtype)
        self.vae, self.unet, self.scheduler, self.tokenizer, self.text_encoder = parts.values()
        self.device, self.dtype = device, dtype
        self.size = picture_size(parts)

    def text(self, prompts: list[str]) -> Tensor:
        """`[B, 77, C]`"""
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    def predict(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """What the U-Net makes of noisy latents `[B, 4, h, w]`, float32 on the CPU."""
        return self.unet(latents.to(self.device, self.dtype), timestep, text).sample.float().cpu()


def picture_size(parts: dict) -> int:
    """Side of the pictures that a U-Net was trained on, pixels."""
    return parts["unet"].config.sample_size * 2 ** (len(parts["vae"].config.block_out_channels) - 1)


def prompt(item: Item) -> str:
    """The item's caption, else one made of its subject."""
    return item.caption or f"a photo of a {item.labels.get('subject', 'product')}"


def around_object(item: Item, size: int) -> tuple[Tensor, Tensor, Box]:
    """The square of the reference around its object `[3, S, S]`, its background left in, the object in it `[S, S]`, and where it stands."""
    box = Box.around(item.object_mask)
    box = box.square(max(box.width, box.height))
    return resize(box.crop(item.reference), size, size), resize_mask(box.crop(item.object_mask[None], fill=0)[0], size, size), box


def to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(to_bytes(picture))


def redrawn(item: Item, size: int, draw: Callable[[ZoomCrop], Tensor]) -> Tensor:
    """The image with each artifact redrawn by `draw` in a crop of our own, twice the mask's longer side at `size` pixels, and
    put back as ours is."""
    result = item.image
    for artifact in separate(item.mask):
        crop = zoom_crop(result, artifact, size)
        result = stitch(result, artifact, draw(crop).float().cpu(), crop.box)
    return result
