"""One refined image measured as the benchmark does, without a set: against the truth, its image, its reference, whichever is at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InputError
from . import metrics
from .dataset import Item
from .judges import load_judges
from .methods.outcome import Outcome
from .run import HEADINGS, PIXEL_METRICS, figure

SCORES = (*PIXEL_METRICS, "outside_changed_pixels", "kgain")


@dataclass(frozen=True)
class Score:
    """figures   of SCORES, those that could be measured
    before    the pixel metrics of the image with its artifact
    missing   why the others could not, by name
    """

    figures: dict[str, float]
    before: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def score(
    refined: Tensor, mask: Tensor, *, truth: Tensor | None = None, image: Tensor | None = None, reference: Tensor | None = None, reference_mask: Tensor | None = None
) -> Score:
    """refined, truth, image   `[3, H, W]` in [0, 1]: the result, what it should be, the image with its artifact
    mask                    `[H, W]`, above 0.5 = the artifact
    reference, its mask     `[3, h, w]`, `[h, w]`: for KGain, which needs OpenCV

    Raises `InputError` where the sizes differ.
    """
    for name, picture in (("truth", truth), ("image", image), ("mask", mask)):
        if picture is not None and picture.shape[-2:] != refined.shape[-2:]:
            sizes = [" x ".join(map(str, reversed(shape.shape[-2:]))) for shape in (picture, refined)]
            raise InputError(name, f"is {sizes[0]}, the refined image {sizes[1]}", "give both in one size")
    figures, before, missing = {}, {}, {}
    if truth is None:
        missing |= dict.fromkeys(PIXEL_METRICS, "connect truth")
    else:
        figures |= {name: getattr(metrics, name)(refined, truth, mask) for name in PIXEL_METRICS}
        if image is not None:
            before = {name: getattr(metrics, name)(image, truth, mask) for name in PIXEL_METRICS}
    if image is None:
        missing |= {"outside_changed_pixels": "connect image", "kgain": "connect image and reference"}
    else:
        figures["outside_changed_pixels"] = metrics.outside_changed_pixels(refined, image, mask)
        if reference is None:
            missing["kgain"] = "connect reference"
        else:
            judges, unavailable = load_judges({"kgain": None})
            missing |= unavailable
            for judge in judges.values():
                found = judge(Item("", "", {}, image, mask, reference, reference_mask), Outcome(refined))
                figures |= {name: found[name] for name in ("kgain",) if name in found}
                if not found:
                    missing["kgain"] = "the reference has no keypoints"
    return Score(figures, before, missing)


def mean(scores: Sequence[Score], name: str, which: str = "figures") -> float:
    """NaN where none of them has the figure."""
    values = [getattr(one, which)[name] for one in scores if name in getattr(one, which)]
    return sum(values) / len(values) if values else math.nan


def described(scores: Sequence[Score]) -> str:
    """A line a figure, means of the batch: the refined image's, and that of the image with its artifact."""
    lines = [f"mean of {len(scores)} images"] if len(scores) > 1 else []
    for name in SCORES:
        value, before = mean(scores, name), mean(scores, name, "before")
        if math.isnan(value):
            lines.append(f"{HEADINGS[name]}: not available, {scores[0].missing.get(name, 'nothing to measure')}")
        else:
            lines.append(f"{HEADINGS[name]}: {figure(name, value)}" + ("" if math.isnan(before) else f" (before: {figure(name, before)})"))
    return "\n".join(lines)
