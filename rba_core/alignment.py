"""Alignment (Eq. 4-5, Alg. 1): the cross-attention of one partial U-Net pass points at the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from .errors import InputError
from .reference_encoding import EncodedReference
from .zoom_crop import ZoomCrop

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


class _Reached(Exception):
    """Raised inside the U-Net when the wanted layer has been read, so that nothing after it runs."""

    def __init__(self, attention: Tensor):
        self.attention = attention


def attention_at(
    unet: UNet2DConditionModel, layer: int, queries: Tensor, sample: Tensor, timestep: Tensor, context: Tensor, **residuals
) -> Tensor:
    """A = softmax(q kᵀ / sqrt(d)) of one layer, mean over heads, for some queries only.

    queries   weights `[h, w]` at any resolution, resized to the layer's grid; cells of weight 0 are not computed
    returns   `[Q, N²]` and the queries' weights `[Q]`, joined as `[Q, N² + 1]`
    """
    layers = cross_attentions(unet)
    if not 0 <= layer < len(layers):
        raise InputError("layer", f"is {layer}", f"this model has cross-attention layers 0 to {len(layers) - 1}")

    def read(attn: Attention, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        height, width = sample.shape[-2:]
        shrink = round((height * width / hidden.shape[1]) ** 0.5)
        weights = F.adaptive_avg_pool2d(queries[None, None].float(), (height // shrink, width // shrink)).flatten().to(hidden.device)
        chosen = weights > 0
        q = attn.head_to_batch_dim(attn.to_q(hidden[:, chosen]))
        k = attn.head_to_batch_dim(attn.to_k(kwargs["encoder_hidden_states"]))
        probabilities = (q.float() @ k.float().mT * attn.scale).softmax(-1).mean(0)
        raise _Reached(torch.cat([probabilities, weights[chosen, None]], -1))

    handle = layers[layer].register_forward_pre_hook(read, with_kwargs=True)
    try:
        unet(sample, timestep, context, **residuals)
    except _Reached as reached:
        return reached.attention
    finally:
        handle.remove()
    raise RuntimeError(f"cross-attention layer {layer} did not run")


def correspondence(attention: Tensor) -> Tensor:
    """Eq. 5: M^(t,l) = sum_ij M_a[i,j] A[i,j,:], normalised to sum 1, as `[N, N]`."""
    rows, weights = attention[:, :-1], attention[:, -1:]
    summed = (rows * weights).sum(0) / weights.sum()
    side = round(len(summed) ** 0.5)
    return summed.view(side, side).cpu()


@torch.no_grad()
def align(
    model,
    crop: ZoomCrop,
    reference: EncodedReference,
    *,
    layer: int | None = None,
    timestep: int | None = None,
    noise_level: float | None = None,
    seed: int = 0,
) -> Tensor:
    """The raw correspondence map M^(t,l) over the reference's tokens, `[N, N]`, sum 1.

    layer         cross-attention layer by execution, 0-15; default: the model's (9)
    timestep      t, a step of the 50-step sampler, 0 = the noisiest; default: the model's (0)
    noise_level   instead of t: the standard deviation of the noise in z_t, sqrt(1 - alpha_bar), 0 to 1
    """
    layer = model.config.alignment_layer if layer is None else layer
    step = model.noise_step(model.config.alignment_timestep if timestep is None else timestep, noise_level)
    latents = model.encode_image(crop.image[None])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy = model.add_noise(latents, noise, step)
    sample = model.unet_input(noisy, model.inpainting_condition(crop.image[None], crop.mask[None, None], seen=crop.image[None]))
    residuals = model.context_residuals(sample)
    return correspondence(attention_at(model.unet, layer, crop.mask, sample, step.to(sample.device), reference.embedding, **residuals))
