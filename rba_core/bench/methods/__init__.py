"""The methods a benchmark compares, one module each: called with an item, a model and a seed, they give an `Outcome`."""

from __future__ import annotations

from . import features, oracle_warp, sift_warp, telea
from .ours import detail, no_reference, oracle, paper, single_stage, unregistered
from .outcome import Method, Outcome

METHODS: dict[str, Method] = {
    "detail": detail, "unregistered": unregistered, "paper": paper, "oracle": oracle, "features": features.features, "single-stage": single_stage,
    "no-reference": no_reference, "none": telea.none, "telea": telea.telea, "sift-warp": sift_warp.sift_warp, "oracle-warp": oracle_warp.oracle_warp,
}  # fmt: skip
NEED_MODEL = set(METHODS) - {"none", "telea", "sift-warp", "oracle-warp"}
