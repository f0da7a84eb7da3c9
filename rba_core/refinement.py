"""Refinement (Sec. 3.4): inpaint the zoomed crop, guided by the matched region of the reference."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .collage import Collage
from .errors import InputError
from .geometry import resize, resize_mask
from .latent_preview import LatentPreview, Preview
from .reference_encoding import EncodedReference
from .zoom_crop import ZoomCrop

if TYPE_CHECKING:
    from .model import RefineByAlign

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
"""By their names in diffusers."""

Progress = Callable[[int, int], None]
"""Called after each step with (steps done, steps in all). Raising from it cancels."""


def make_scheduler(model, name: str):
    import diffusers  # not at the top: ComfyUI reads SCHEDULERS when it starts

    if name not in SCHEDULERS:
        raise InputError("scheduler", f"{name!r} is not known", f"use one of {', '.join(SCHEDULERS)}")
    return getattr(diffusers, SCHEDULERS[name]).from_config(model.scheduler.config)


def default_strength(model: RefineByAlign, confidence: float) -> float:
    """How far to depart from a registered reference: the less, the surer it is where it belongs."""
    return model.config.collage_strength * (1 - confidence)


@torch.no_grad()
def refine(
    model: RefineByAlign,
    crop: ZoomCrop,
    reference: EncodedReference,
    *,
    collage: Collage | None = None,
    strength: float = 1.0,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    preview: Preview | None = None,
) -> Tensor:
    """Redraw what `crop.mask` covers: `[3, S, S]` in [0, 1].

    collage    the registered reference at any resolution, shown to models that read it
    strength   share of the steps, 0 to 1, that may depart from the collage (SDEdit): before them, what it shows
               of the object is imposed like the surround; 1 = it is a hint only
    guidance   classifier-free guidance against the dropped embedding; 1 = off
    preview    is shown what each step is heading for, where there is more than one

    The known region is imposed again on the latents after each step, at that step's noise level.
    """
    steps = model.config.steps if steps is None else steps
    guidance = model.config.guidance if guidance is None else guidance
    if steps < 1:
        raise InputError("steps", f"is {steps}", "use 1 or more")
    if not 0 <= strength <= 1:
        raise InputError("strength", f"is {strength:g}", "use 0 (the collage as it is) to 1 (the collage as a hint)")
    if not math.isfinite(guidance):
        raise InputError("guidance", f"is {guidance}", "use a number, 1 = off")
    if steps > model.scheduler.config.num_train_timesteps:
        raise InputError("steps", f"is {steps}", f"use at most {model.scheduler.config.num_train_timesteps}, what the model was trained with")
    sampler = make_scheduler(model, scheduler or model.config.scheduler)
    sampler.set_timesteps(steps)

    shown, laid = crop.image, None
    if collage is not None:
        size = crop.image.shape[-1]
        laid = resize(collage.picture, size, size)[None], resize_mask(collage.valid, size, size)[None, None]
        shown = torch.where(crop.mask * laid[1][0, 0] > 0.5, laid[0][0], crop.image)
    known = model.encode_image(shown[None])
    hole, given = F.adaptive_max_pool2d(crop.mask[None, None], known.shape[-2:]).to(known), torch.zeros_like(known[:, :1])
    if laid is not None:
        given = hole * (1 - F.adaptive_max_pool2d(crop.mask * (1 - laid[1]), known.shape[-2:]).to(known))
    condition = model.inpainting_condition(crop.image[None], crop.mask[None, None], collage=laid, detail=reference.detail)
    embedding = reference.embedding
    if guidance != 1:
        condition = condition.expand(2, -1, -1, -1)
        embedding = torch.cat([model.unconditional(embedding), embedding])
    together = 1 if model.sparing else len(condition)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(known.shape, generator=generator).to(known)
    latents = noise * sampler.init_noise_sigma
    # of the schedulers, the ancestral ones draw noise in each step
    seeded = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    look = LatentPreview(model, known, hole, shown) if preview and len(sampler.timesteps) > 1 else None
    departure = round((1 - strength) * len(sampler.timesteps))
    for index, timestep in enumerate(sampler.timesteps):
        scaled = sampler.scale_model_input(latents, timestep)
        sample = model.unet_input(scaled.expand(len(condition), -1, -1, -1), condition)
        branches = zip(sample.split(together), embedding.split(together))
        prediction = torch.cat([model.unet(one, timestep.to(one.device), tokens, **model.context_residuals(one)).sample for one, tokens in branches])
        if guidance != 1:
            dropped, guided = prediction.chunk(2)
            prediction = dropped + guidance * (guided - dropped)
        if look:
            preview(look(scaled, prediction, timestep))
        latents = sampler.step(prediction, timestep, latents, return_dict=False, **seeded)[0]
        last = index + 1 == len(sampler.timesteps)
        surround = known if last else sampler.add_noise(known, noise, sampler.timesteps[index + 1 : index + 2])
        free = hole * (1 - given) if index + 1 <= departure else hole
        latents = free * latents + (1 - free) * surround.to(latents)
        if progress:
            progress(index + 1, len(sampler.timesteps))
    return model.decode_latents(latents)[0]
