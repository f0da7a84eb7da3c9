"""A look into the U-Net of a native MODEL that a patch of it ends early, by `Reached`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy import samplers
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..rba_core.alignment import Reached
from ..rba_core.errors import InputError

Look = Callable[[Tensor, Tensor], Tensor]
"""Latents and noise -> what was reached of the U-Net at the first sigma."""


class Looks(samplers.Sampler):
    """Instead of a sampling: what `collect` makes of a `Look` and the latents is `found`. place: what is to be read, for the error."""

    def __init__(self, collect: Callable[[Look, Tensor], Tensor], place: str):
        self.collect, self.place, self.found = collect, place, None

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False):
        def look(latents: Tensor, noise: Tensor) -> Tensor:
            try:
                model_wrap(model_wrap.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latents), sigmas[:1], **extra_args)
            except Reached as reached:
                return reached.value
            raise InputError("model", f"did not come to its {self.place}", "take off patches that skip or replace blocks of the U-Net")

        self.found = self.collect(look, latent_image)
        return latent_image


def looked_into(patcher: ModelPatcher, condition: list, latents: Tensor, sigma: Tensor, collect: Callable[[Look, Tensor], Tensor], place: str) -> Tensor:
    """Through core's guider, which loads the model with its patches, LoRAs and hooks, and puts back whatever it changed, also after
    an exception; what the caller patched goes with its clone."""
    sampler, guider = Looks(collect, place), samplers.CFGGuider(patcher)
    guider.set_conds(condition, condition)
    guider.sample(torch.zeros_like(latents), latents, sampler, torch.stack([sigma.cpu(), torch.zeros(())]), disable_pbar=True)
    return sampler.found
