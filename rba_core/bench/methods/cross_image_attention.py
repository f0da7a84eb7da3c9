"""Cross-Image Attention (Alaluf et al. 2024): the reference's keys and values in the self-attention of the image's denoising."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ...model import RefineByAlign
from ...zoom_crop import ZoomCrop
from ..dataset import Item
from .outcome import Outcome
from .user_weights import StableDiffusion, around_object, prompt, redrawn

OUT, APPEARANCE, STRUCTURE = 0, 1, 2
"""Places in the batch that is denoised together."""
INVERSION_GUIDANCE = 3.5
APPEARANCE_GUIDANCE = 3.5
"""At the first step; half of it at the last."""
CONTRAST = 1.67
FINE, COARSE = range(10, 90), range(10, 70)
"""Steps at which the decoder's self-attention at the latents' side, and at half of it, looks across."""
ADAIN = range(20, 100)
FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


class CrossImageProcessor:
    """Self-attention in which the output's queries meet another picture's keys and values:
    softmax(Q_out K_appᵀ / sqrt(d)) V_app, its map sharpened about its mean, A <- (A - mean) CONTRAST + mean in [0, 1].
    Every fifth of the first 40 steps the structure's keys and values stand in.

    side   of the latents, cells
    step   of the denoising, set before each pass; `None` = plain self-attention
    """

    def __init__(self, side: int):
        self.ranges = {side**2: FINE, (side // 2) ** 2: COARSE}
        self.step: int | None = None

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, temb=None) -> Tensor:
        query, key, value = (project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project in (attn.to_q, attn.to_k, attn.to_v))
        mixed = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        cells = hidden_states.shape[1]
        if self.step is not None and self.step in self.ranges.get(cells, ()):
            other = STRUCTURE if self.step % 5 == 0 and self.step < 40 else APPEARANCE
            attention = (query[OUT] @ key[other].mT * attn.scale).softmax(-1)
            mixed[OUT] = ((attention - 1 / cells) * CONTRAST + 1 / cells).clamp(0, 1) @ value[other]
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


class CrossImageAttention:
    """Cross-Image Attention (Alaluf et al. 2024): our crop's structure with the appearance of the reference's object, by the attention of Stable Diffusion 1.5.

    Both are inverted (edit-friendly DDPM, Huberman-Spiegelglas et al. 2024) and denoised side by side from step 32 of 100. Of
    the authors' program the segmentation of both objects by attention is left out: AdaIN takes the reference's object by its
    mask, and all of the crop. FreeU is diffusers' own.
    """

    steps, skipped = 100, 32

    def __init__(self, folder: str | Path, device: str | torch.device, dtype: torch.dtype):
        self.diffusion = StableDiffusion("cross-image-attention", folder, device, dtype)
        unet = self.diffusion.unet
        unet.enable_freeu(**FREEU)
        self.processor = CrossImageProcessor(unet.config.sample_size)
        for layer in unet.up_blocks.modules():
            if isinstance(layer, BasicTransformerBlock):
                layer.attn1.set_processor(self.processor)

    @torch.no_grad()
    def __call__(self, item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
        appearance, object_mask, _ = around_object(item, self.diffusion.size)

        def draw(crop: ZoomCrop) -> Tensor:
            latents = self.diffusion.encode(torch.stack([appearance, crop.image]))
            return self.transfer(latents, object_mask, prompt(item), torch.Generator().manual_seed(seed))

        return Outcome(redrawn(item, self.diffusion.size, draw))

    def transfer(self, latents: Tensor, object_mask: Tensor, words: str, generator: torch.Generator) -> Tensor:
        """Latents of appearance and structure `[2, 4, h, w]`, the object in the former `[S, S]` -> picture `[3, S, S]`."""
        on_object = F.adaptive_max_pool2d(object_mask[None, None], latents.shape[-2:])[0, 0] > 0.5
        plain, text = self.diffusion.text(["", words]).chunk(2)
        self.processor.step = None
        start, residuals, timesteps = self.invert(latents, plain, text, generator)
        order = [1, 0, 1]  # the output starts as the structure
        denoised, text = start[order], text.expand(3, -1, -1)
        guidance = torch.linspace(APPEARANCE_GUIDANCE, max(APPEARANCE_GUIDANCE / 2, 1), len(timesteps))
        for step, timestep in enumerate(timesteps):
            self.processor.step = None
            noise = self.diffusion.predict(denoised, timestep, text)
            if step in FINE or step in COARSE:
                self.processor.step = step
                crossed = self.diffusion.predict(denoised, timestep, text)
                noise = noise + guidance[step] * (crossed - noise)
            denoised = self.mean(noise, timestep, denoised) + residuals[step][order]
            if step in ADAIN:
                denoised[OUT] = adain(denoised[OUT], denoised[APPEARANCE][:, on_object])
        return self.diffusion.decode(denoised[OUT : OUT + 1])[0]

    def invert(self, latents: Tensor, plain: Tensor, text: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor], Tensor]:
        """Edit-friendly DDPM inversion: each x_t is noised on its own, and what the sampler's mean lacks to the next one is kept.

        latents   `[B, 4, h, w]`
        returns   x_t at the first step that is not skipped, for each step what to add to its mean, the steps
        """
        scheduler = self.diffusion.scheduler
        scheduler.set_timesteps(self.steps)
        timesteps = scheduler.timesteps[self.skipped :]
        path = [scheduler.add_noise(latents, torch.randn(latents.shape, generator=generator), timestep) for timestep in timesteps] + [latents]
        text = torch.cat([plain.expand(len(latents), -1, -1), text.expand(len(latents), -1, -1)])
        residuals = []
        for timestep, noisy, cleaner in zip(timesteps, path, path[1:]):
            without, given = self.diffusion.predict(torch.cat([noisy, noisy]), timestep, text).chunk(2)
            residuals.append(cleaner - self.mean(without + INVERSION_GUIDANCE * (given - without), timestep, noisy))
        residuals[-1] = torch.zeros_like(latents)
        return path[0], residuals, timesteps

    def mean(self, noise: Tensor, timestep: Tensor, noisy: Tensor) -> Tensor:
        """Of DDPM's step, which is DDIM's with eta = 1."""
        return self.diffusion.scheduler.step(noise, timestep, noisy, eta=1.0, variance_noise=torch.zeros_like(noisy)).prev_sample


def adain(content: Tensor, style: Tensor) -> Tensor:
    """Latents `[4, h, w]` with each channel's mean and deviation those of `style` `[4, n]`."""
    mean, std = content.mean((1, 2), keepdim=True), content.std((1, 2), keepdim=True)
    return (content - mean) / std * style.std(1, correction=0)[:, None, None] + style.mean(1)[:, None, None]
