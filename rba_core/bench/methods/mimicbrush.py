"""MimicBrush (Chen et al. 2024): a second U-Net reads the reference, its features join the self-attention of the first."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ...conversion.depth_anything import read_depth_anything
from ...errors import InputError
from ...geometry import resize
from ...model import RefineByAlign, quiet, read_config, read_part
from ...zoom_crop import ZoomCrop
from ..dataset import Item
from .outcome import Outcome
from .user_weights import LatentSpace, around_object, redrawn

WEIGHTS, VAE, IMAGE_ENCODER, DEPTH = "mimicbrush/mimicbrush.bin", "sd-vae-ft-mse", "image_encoder", "depth_model/depth_anything_vitb14.pth"
"""Of a folder as the authors publish it."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DEPTH_SIZE = 518
"""Side of what the depth model sees, pixels."""


class DepthGuider(nn.Module):
    """Depth `[B, 1, S, S]` -> what the U-Net is given of it, `[B, 4, S / 8, S / 8]`."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__()
        self.conv_in = nn.Conv2d(1, widths[0], 3, padding=1)
        steps = pairwise(widths)
        self.blocks = nn.ModuleList(conv for now, then in steps for conv in (nn.Conv2d(now, now, 3, padding=1), nn.Conv2d(now, then, 3, stride=2, padding=1)))
        self.conv_out = nn.Conv2d(widths[-1], 4, 3, padding=1)

    def forward(self, depth: Tensor) -> Tensor:
        features = F.silu(self.conv_in(depth))
        for block in self.blocks:
            features = F.silu(block(features))
        return self.conv_out(features)


class JoinedProcessor:
    """Self-attention that also reads what the same layer of the reference's U-Net was given: of the guided half of the batch, half
    of softmax(q [k, k_ref]ᵀ / sqrt(d)) [v, v_ref] and half of plain self-attention, by the layer's own projections.

    seen   layer -> `[1, n, C]`, filled by the reference's pass
    """

    plain = AttnProcessor2_0()

    def __init__(self, seen: dict[str, Tensor], name: str):
        self.seen, self.name = seen, name

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        own = self.plain(attn, hidden_states)
        dropped, guided = hidden_states.chunk(2)
        joined = self.plain(attn, guided, torch.cat([guided, self.seen[self.name]], 1))
        return torch.cat([own[: len(dropped)], (own[len(dropped) :] + joined) / 2])


def self_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Those of the middle and the decoder, where the two U-Nets meet."""
    blocks = {name: block for name, block in unet.named_modules() if isinstance(block, BasicTransformerBlock)}
    return {name: block.attn1 for name, block in blocks.items() if name.startswith(("mid_block", "up_blocks"))}


class MimicBrush(LatentSpace):
    """MimicBrush (Chen et al. 2024): inpainting of our crop by two U-Nets of Stable Diffusion 1.5, without its depth control, as its authors
    measure the composition of parts: the depth model sees a blank picture. 50 DDIM steps, guidance 5.

    size   side of its pictures, pixels
    """

    steps, guidance = 50, 5.0
    network = {**read_config("sd1x")["unet"], "in_channels": 13}
    """Latents, mask, latents of the picture without what the mask covers, depth."""

    def __init__(self, folder: str | Path, device: str | torch.device, dtype: torch.dtype):
        folder = Path(folder)
        if missing := [name for name in (WEIGHTS, VAE, IMAGE_ENCODER, DEPTH) if not (folder / name).exists()]:
            raise InputError("weights", f"{folder} has no {missing[0]}", f"for mimicbrush give a folder as its authors publish it, with {', '.join((WEIGHTS, VAE, IMAGE_ENCODER, DEPTH))}")
        self.device, self.dtype = device, dtype
        try:
            self.read(folder)
        except Exception as error:  # each library has its own kinds, the unpickler any
            raise InputError("weights", f"{folder} cannot be read ({' '.join(str(error).split())[:200]})", "copy the folder again, or give one that is meant for mimicbrush") from error
        self.scheduler = DDIMScheduler(**read_config("sd1x")["scheduler"])
        self.size = self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        with torch.no_grad():
            blank = torch.zeros(1, 3, DEPTH_SIZE, DEPTH_SIZE)
            depth = read_depth_anything(folder / DEPTH)(pixel_values=blank).predicted_depth[:, None]
            depth = F.interpolate(depth, (self.size, self.size), mode="bilinear", align_corners=True)
            self.depth = self.depth_guider(depth.to(device, dtype))
        self.seen: dict[str, Tensor] = {}
        for name, layer in self_attentions(self.unet).items():
            layer.set_processor(JoinedProcessor(self.seen, name))
        for name, layer in self_attentions(self.reference_unet).items():
            layer.register_forward_pre_hook(lambda layer, args, name=name: self.seen.__setitem__(name, args[0]))

    def read(self, folder: Path) -> None:
        state = torch.load(str(folder / WEIGHTS), map_location="cpu", weights_only=True, mmap=True)
        self.unet = UNet2DConditionModel(**self.network)
        self.unet.load_state_dict(state["unet"])
        self.reference_unet = UNet2DConditionModel(**self.network | {"in_channels": 4})
        last = [name for name in self_attentions(self.reference_unet) if name.startswith("up_blocks")][-1]  # what follows its input is read by none, and not in the file
        unread = ("conv_norm_out.", "conv_out.", f"{last.partition('.transformer_blocks')[0]}.proj_out.", *(f"{last}.{part}." for part in ("attn1", "norm2", "attn2", "norm3", "ff")))
        report = self.reference_unet.load_state_dict(state["referencenet"], strict=False)
        if wrong := [name for name in report.missing_keys if not name.startswith(unread)] + report.unexpected_keys:
            raise ValueError(f"referencenet: {wrong[0]} is missing or of no known use")
        self.depth_guider = DepthGuider()
        self.depth_guider.load_state_dict(state["depth_guider"])
        self.image_projection = nn.Linear(state["image_proj"]["projector.weight"].shape[1], self.network["cross_attention_dim"])
        self.image_projection.load_state_dict({name.removeprefix("projector."): value for name, value in state["image_proj"].items()})
        with quiet():
            config = CLIPVisionConfig.from_pretrained(folder / IMAGE_ENCODER, local_files_only=True)
            self.image_encoder, report = CLIPVisionModelWithProjection.from_pretrained(
                None, config=config, state_dict=state["image_encoder"], local_files_only=True, output_loading_info=True
            )
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError("image_encoder lacks weights")
        self.vae = read_part(AutoencoderKL, folder / VAE)
        for part in (self.unet, self.reference_unet, self.depth_guider, self.image_projection, self.image_encoder, self.vae):
            part.to(self.device, self.dtype).eval()

    @torch.no_grad()
    def __call__(self, item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
        reference, _, _ = around_object(item, self.size)
        context = self.tokens(reference)
        return Outcome(redrawn(item, self.size, lambda crop: self.draw(crop, reference, context, torch.Generator().manual_seed(seed))))

    def tokens(self, reference: Tensor) -> Tensor:
        """What guides, `[2, n, C]`: the projected tokens, before CLIP's last layer, of a blank and of the reference `[3, S, S]`."""
        side = self.image_encoder.config.image_size
        mean, std = (torch.tensor(value)[:, None, None] for value in (CLIP_MEAN, CLIP_STD))
        picture = (resize(reference, side, side) - mean) / std
        pictures = torch.stack([torch.zeros_like(picture), picture]).to(self.device, self.dtype)
        return self.image_projection(self.image_encoder(pictures, output_hidden_states=True).hidden_states[-2])

    def draw(self, crop: ZoomCrop, reference: Tensor, context: Tensor, generator: torch.Generator) -> Tensor:
        hole = (crop.mask > 0.5).float()
        shown = self.encode(reference[None], generator)
        latents = torch.randn(shown.shape, generator=generator)
        around = self.encode((crop.image * (1 - hole))[None], generator)
        mask = F.interpolate(hole[None, None], latents.shape[-2:])
        given = torch.cat([mask, around, self.depth.float().cpu()], 1)
        self.scheduler.set_timesteps(self.steps)
        for timestep in self.scheduler.timesteps:
            self.reference_unet(self.placed(shown), timestep, context[1:])  # fills `seen`
            sample = self.placed(torch.cat([latents, given], 1)).expand(2, -1, -1, -1)
            dropped, guided = self.unet(sample, timestep, context).sample.float().cpu().chunk(2)
            latents = self.scheduler.step(dropped + self.guidance * (guided - dropped), timestep, latents).prev_sample
        return self.decode(latents)[0]

    def placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)
