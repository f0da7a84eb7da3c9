"""Third leg: U-Net and MLP (Sec. 3.4), in alignment and refinement mode with the same weights.

Eq. 2 on the latents, weighted up under the mask, which is all that is kept. A small model seeing few samples
also gets told where to look: some cross-attention layers are pulled to the known correspondence. The paper
trains on millions of views and needs no such help; `attention_weight = 0` is its objective.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..alignment import cross_attentions, mean_attention
from ..collage import match_tone
from ..data.scenes import Scenes, grid
from ..model import RefineByAlign
from .encoder import damage, token_targets


@dataclass(frozen=True)
class RefinerSettings:
    """drop          share of dropped embeddings (classifier-free guidance)
    mask_weight      weight of Eq. 2 under the mask, 1 elsewhere
    attention_weight weight of the correspondence terms; layers: where they apply
    """

    drop: float = 0.1
    mask_weight: float = 20.0
    attention_weight: float = 0.05
    layers: tuple[int, ...] = (5, 9, 12, 14)


class RefinerObjective(nn.Module):
    def __init__(self, model: RefineByAlign, settings: RefinerSettings = RefinerSettings()):
        super().__init__()
        model.vae.requires_grad_(False)
        model.encoder.requires_grad_(False)
        if model.stem is not None:
            model.stem.requires_grad_(False)
        self.model, self.settings = model, settings
        self.hidden: dict[int, Tensor] | None = None
        self.attention_layers = cross_attentions(model.unet)
        if settings.attention_weight:
            for layer in settings.layers:
                self.attention_layers[layer].register_forward_pre_hook(self._keep(layer), with_kwargs=True)

    def _keep(self, layer: int):
        def hook(attn, args, kwargs):
            if self.hidden is not None:  # not in validation's passes, nor when gradient checkpointing runs a block again
                self.hidden[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def forward(self, scenes: Scenes, mode: str, generator: torch.Generator) -> dict[str, Tensor]:
        """The terms of the loss. What is random comes from `generator`, the CPU's, wherever the model is."""
        model, settings = self.model, self.settings
        batch = len(scenes.image)
        with torch.no_grad():
            latents = model.encode_image(scenes.image).float()
        seen = damage(scenes, generator, shares=(0.25, 0.25, 0.2, 0.3)) if mode == "alignment" else None
        with torch.autocast(scenes.image.device.type, enabled=False):  # half precision would lay it jaggedly
            collage = imperfect_collage(scenes, generator) if mode == "refinement" and model.config.collage else None
        condition = model.inpainting_condition(scenes.image, scenes.mask, seen=seen, collage=collage)
        kept = (torch.rand(batch, generator=generator) >= settings.drop).to(latents)
        embedding = model.embed(scenes.reference) * kept[:, None, None]

        last = model.scheduler.config.num_train_timesteps
        timestep = torch.randint(last, (batch,), generator=generator)
        if mode == "alignment":  # read at the noisiest steps, so learnt mostly there
            noisiest = torch.randint(last - last // 10, last, (batch,), generator=generator)
            timestep = torch.where(torch.rand(batch, generator=generator) < 0.5, noisiest, timestep)
        timestep = timestep.to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = model.add_noise(latents, noise, timestep)
        target = noise if model.scheduler.config.prediction_type == "epsilon" else model.scheduler.get_velocity(latents, noise, timestep)
        sample = model.unet_input(noisy, condition)
        self.hidden = {}
        prediction = model.unet(sample, timestep, embedding, **model.context_residuals(sample)).sample.float()
        hidden, self.hidden = self.hidden, None

        hole = F.adaptive_max_pool2d(scenes.mask, latents.shape[-2:])
        weight = 1 + (settings.mask_weight - 1) * hole
        terms = {"denoise": ((prediction - target) ** 2 * weight).sum() / weight.expand_as(target).sum()}
        if settings.attention_weight:
            visible = scenes.visible * kept[:, None, None, None]
            for layer in settings.layers:
                terms[f"attend{layer}"] = settings.attention_weight * self._attention_loss(layer, hidden[layer], scenes, visible, embedding)
        return terms

    def _attention_loss(self, layer: int, hidden: Tensor, scenes: Scenes, visible: Tensor, embedding: Tensor) -> Tensor:
        """Cross-entropy of each cell's attention, and of Eq. 5's sum over the mask, to the known flow."""
        attn = self.attention_layers[layer]
        attention = mean_attention(attn.to_q(hidden), attn.to_k(embedding), attn.heads)
        side = round(hidden.shape[1] ** 0.5)
        target = token_targets(scenes.flow, visible, side)
        cells = -(target * (attention + 1e-6).log()).sum() / target.sum().clamp(min=1)

        mask = F.interpolate(scenes.mask, visible.shape[-2:], mode="area")
        wanted = token_targets(scenes.flow, visible * mask, 1)[:, 0]
        present = wanted.sum(-1) > 1e-4
        wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-4)
        weights = F.adaptive_avg_pool2d(scenes.mask, side).flatten(1)
        summed = torch.einsum("bq,bqn->bn", weights, attention) / weights.sum(1, keepdim=True).clamp(min=1e-6)
        region = -(wanted * (summed + 1e-6).log()).sum(-1)
        return cells + (region * present).sum() / present.sum().clamp(min=1)


def imperfect_collage(scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The reference laid over the crop by the known flow, a little off place and tone, for some items not at all."""
    batch, size = len(scenes.image), scenes.image.shape[-1]
    flow = F.interpolate(scenes.flow.movedim(-1, 1), (size, size), mode="bilinear").movedim(1, -1)
    slope = (flow[:, 1:, 1:] - flow[:, :-1, :-1]).abs().mean((1, 2, 3)) * size / 2  # reference units in half a crop
    error = (torch.randn(batch, 2, 3, generator=generator) * torch.tensor([0.02, 0.02, 0.012])).to(flow)
    places = torch.cat([grid(size, batch).to(flow), torch.ones_like(flow[..., :1])], -1)
    moved = flow + torch.einsum("bij,bhwj->bhwi", error, places) * slope[:, None, None, None]
    laid = F.grid_sample(scenes.reference, moved, align_corners=False)
    valid = F.interpolate(scenes.visible, (size, size)) * (moved.abs() < 1).all(-1)[:, None]
    near = F.avg_pool2d(scenes.mask, size // 8 + 1, 1, size // 16, count_include_pad=False)
    weight = (near > 0.02).float() * valid * (0.1 + 0.9 * (1 - scenes.mask))
    toned = torch.stack([match_tone(*item) for item in zip(laid, scenes.image, weight[:, 0])])
    laid = torch.where((weight * (1 - scenes.mask)).sum((1, 2, 3), keepdim=True) > 20, toned, laid)
    given = (torch.rand(batch, 1, 1, 1, generator=generator) < 0.75).to(valid)
    return laid, valid * given
