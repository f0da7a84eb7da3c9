"""Alignment (Eq. 4-5, Alg. 1): the cross-attention of one partial U-Net pass points at the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .reference_encoding import EncodedReference, encode_reference
from .zoom_crop import ZoomCrop

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

    from .model import RefineByAlign

SAMPLER_STEPS = 50
"""The paper counts t in steps of a 50-step DDIM sampler."""


def cross_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """The cross-attention layers in the order in which they run: down, middle, up.

    `unet.attn_processors` lists the middle block last, hence not usable for counting.
    """
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [
        layer.attn2
        for block in blocks
        for transformer in getattr(block, "attentions", None) or ()
        for layer in transformer.transformer_blocks
        if layer.attn2 is not None
    ]


class Reached(Exception):
    """Raised inside a U-Net when what is wanted of it, `value`, has been read, so that nothing after it runs."""

    def __init__(self, value: Tensor):
        self.value = value


def probabilities(attn: Attention, args: tuple, kwargs: dict) -> Tensor:
    """The attention of a layer that is called with these arguments, of one picture, `[d², N²]`."""
    return mean_attention(attn.to_q(args[0] if args else kwargs["hidden_states"]), attn.to_k(kwargs["encoder_hidden_states"]), attn.heads)[0]


def mean_attention(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """A = softmax(q kᵀ / sqrt(c)), mean over heads: queries `[B, d², heads c]`, keys `[B, N², heads c]` -> `[B, d², N²]`."""
    q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2).float() for part in (queries, keys))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)


def attention_at(unet: UNet2DConditionModel, layer: int, sample: Tensor, timestep: Tensor, context: Tensor, **residuals) -> Tensor:
    """`probabilities` of one layer. Nothing after the layer runs. A compiled U-Net runs as it was: no hook leaves a graph half way."""
    unet = getattr(unet, "_orig_mod", unet)
    layers = cross_attentions(unet)
    if not 0 <= layer < len(layers):
        raise InputError("layer", f"is {layer}", f"this model has cross-attention layers 0 to {len(layers) - 1}")

    def read(attn: Attention, args: tuple, kwargs: dict) -> None:
        raise Reached(probabilities(attn, args, kwargs))

    handle = layers[layer].register_forward_pre_hook(read, with_kwargs=True)
    try:
        (unet._call_impl if getattr(unet, "_compiled_call_impl", None) else unet)(sample, timestep, context, **residuals)
    except Reached as reached:
        return reached.value
    finally:
        handle.remove()
    raise RuntimeError(f"cross-attention layer {layer} did not run")


def over_patches(attention: Tensor) -> Tensor:
    """Attention `[d², T]` over the patches alone, `[d², N²]`: without a class token before them, rows again of sum 1."""
    count = math.isqrt(attention.shape[1]) ** 2
    return attention if count == attention.shape[1] else F.normalize(attention[:, -count:], p=1, dim=1)


def correspondence(attention: Tensor, mask: Tensor) -> Tensor:
    """Eq. 5: M^(t,l) = sum_ij M_a[i,j] A[i,j,:], normalised to sum 1, as `[N, N]`; M_a `[S, S]` resized to d x d."""
    weights = F.adaptive_avg_pool2d(mask[None, None].float(), round(len(attention) ** 0.5)).flatten().to(attention)
    summed = weights @ attention / weights.sum()
    side = round(len(summed) ** 0.5)
    return summed.view(side, side).cpu()


def check_noise(timestep: int, noise_level: float | None) -> None:
    if noise_level is not None:
        if not 0 <= noise_level <= 1:
            raise InputError("noise level", f"is {noise_level:g}", "use 0 (the image as it is) to 1 (pure noise)")
    elif not 0 <= timestep < SAMPLER_STEPS:
        raise InputError("timestep", f"is {timestep}", f"use 0 (the noisiest) to {SAMPLER_STEPS - 1}")


def noise_like(latents: Tensor, seed: int) -> Tensor:
    """The noise that `attend` and `refine` draw for these latents."""
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)


def noised(model, crop: ZoomCrop, step: Tensor, seed: int) -> Tensor:
    """The U-Net's input while aligning: z_t of the crop with its artifact, and what it knows of the crop."""
    latents = model.encode_image(crop.image[None])
    noisy = model.add_noise(latents, noise_like(latents, seed), step)
    return model.unet_input(noisy, model.inpainting_condition(crop.image[None], crop.mask[None, None], seen=crop.image[None]))


@torch.no_grad()
def attend(
    model,
    crop: ZoomCrop,
    reference: EncodedReference,
    *,
    layer: int | None = None,
    timestep: int | None = None,
    noise_level: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Where each of the crop's d x d cells looks in the reference, `[d², N²]`, rows of sum 1.

    layer         cross-attention layer by execution, 0-15; default: the model's
    timestep      t, a step of the 50-step sampler, 0 = the noisiest; default: the model's
    noise_level   instead of t: the standard deviation of the noise in z_t, sqrt(1 - alpha_bar), 0 to 1
    """
    layer = model.config.alignment_layer if layer is None else layer
    step = model.noise_step(model.config.alignment_timestep if timestep is None else timestep, noise_level)
    sample = noised(model, crop, step, seed)
    residuals = model.context_residuals(sample)
    return over_patches(attention_at(model.unet, layer, sample, step.to(sample.device), reference.embedding, **residuals))


def align(model, crop: ZoomCrop, reference: EncodedReference, **options) -> Tensor:
    """The raw correspondence map M^(t,l) over the reference's tokens, `[N, N]`, sum 1. Options as of `attend`."""
    return correspondence(attend(model, crop, reference, **options), crop.mask)


class Aligner(Protocol):
    """What finds, for the cells of a crop, where in the reference they are seen."""

    def encode(self, reference: Tensor, mask: Tensor) -> EncodedReference:
        """The reference `[3, H, W]` under its mask `[H, W]`, on a square grid of N x N."""

    def attend(self, crop: ZoomCrop, reference: EncodedReference) -> Tensor:
        """`[d², N²]`, rows of sum 1."""


@dataclass(frozen=True)
class CrossAttention:
    """The model's own cross-attention as aligner, the paper's. Options as of `attend`."""

    model: RefineByAlign
    layer: int | None = None
    timestep: int | None = None
    noise_level: float | None = None
    seed: int = 0

    def encode(self, reference: Tensor, mask: Tensor) -> EncodedReference:
        return encode_reference(self.model, reference, mask)

    def attend(self, crop: ZoomCrop, reference: EncodedReference) -> Tensor:
        return attend(self.model, crop, reference, layer=self.layer, timestep=self.timestep, noise_level=self.noise_level, seed=self.seed)
