"""The methods a benchmark compares, one module each: called with an item, a model and a seed, they give an `Outcome`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ...errors import InputError
from . import features, oracle_warp, sift_warp, telea
from .anydoor import AnyDoor
from .cross_image_attention import CrossImageAttention
from .dift import Dift
from .mimicbrush import MimicBrush
from .ours import detail, no_reference, oracle, paper, single_stage, unregistered
from .outcome import Method, Outcome
from .paint_by_example import PaintByExample
from .sd_inpainting import StableDiffusionInpainting

__all__ = ["METHODS", "NEED_MODEL", "NEED_WEIGHTS", "Method", "Outcome", "load_methods"]

METHODS: dict[str, Method] = {
    "detail": detail, "unregistered": unregistered, "paper": paper, "oracle": oracle, "features": features.features, "single-stage": single_stage,
    "no-reference": no_reference, "none": telea.none, "telea": telea.telea, "sift-warp": sift_warp.sift_warp, "oracle-warp": oracle_warp.oracle_warp,
}  # fmt: skip
NEED_MODEL = set(METHODS) - {"none", "telea", "sift-warp", "oracle-warp"}
NEED_WEIGHTS = {
    "paint-by-example": PaintByExample, "anydoor": AnyDoor, "mimicbrush": MimicBrush, "sd-inpainting": StableDiffusionInpainting,
    "cross-image-attention": CrossImageAttention, "dift": Dift,
}  # fmt: skip
"""Classes, made with a folder of weights, a device and a dtype; their objects are methods."""


def load_methods(
    names: Iterable[str], weights: Mapping[str, str] | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Method]:
    """Methods by name, those of NEED_WEIGHTS read from the folders that `weights` gives by name; nothing is downloaded.

    Raises `InputError` for an unknown name, and for weights that are missing or are another model's.
    """
    names, weights = list(names), weights or {}
    if unknown := [name for name in names if name not in METHODS and name not in NEED_WEIGHTS]:
        raise InputError("methods", f"{unknown[0]!r} is not known", f"use some of {', '.join((*METHODS, *NEED_WEIGHTS))}")
    if unknown := [name for name in weights if name not in NEED_WEIGHTS]:
        raise InputError("weights", f"{unknown[0]!r} takes none", f"give them for {', '.join(NEED_WEIGHTS)}")
    if missing := [name for name in names if name in NEED_WEIGHTS and name not in weights]:
        raise InputError("weights", f"are missing for {missing[0]}", f"give them by --weights {missing[0]}=FOLDER")
    return {name: METHODS[name] if name in METHODS else NEED_WEIGHTS[name](weights[name], device, dtype) for name in names}
