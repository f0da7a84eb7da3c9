"""Post-processing of the correspondence map (A.4): noise filter by peak detection, clustering, largest blob."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .dense_correspondence import Placement
from .errors import InputError
from .geometry import Box
from .reference_encoding import EncodedReference


@dataclass(frozen=True)
class CleaningSettings:
    """How a raw map becomes a region.

    threshold      share of the map's peak that a pixel needs to belong to the region, 0 to 1
    peak_support   a peak at the border of the grid stays only if its neighbours reach this share of it; noise
                   of vision transformers sits in single tokens there (Darcet et al. 2023)
    flatness       the map's peak must be this many times its mean over the object, or it says nothing
    """

    threshold: float = 0.4
    peak_support: float = 0.25
    flatness: float = 1.5

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise InputError("threshold", f"is {self.threshold:g}", "use a share of the peak, above 0 and up to 1")


@dataclass(frozen=True)
class MatchedRegion:
    """M*: `mask` `[H, W]` in {0, 1} at the reference's size, its box, the cleaned map at that size, and the map that
    carries M_a there, where the attention agreed on one."""

    mask: Tensor
    box: Box
    soft: Tensor
    placement: Placement | None = None


def remove_border_peaks(token_map: np.ndarray, peak_support: float) -> np.ndarray:
    """Replace lone peaks on the outermost tokens `[N, N]` by the median of their neighbours."""
    neighbours = np.ones((3, 3), bool)
    neighbours[1, 1] = False
    around = ndimage.maximum_filter(token_map, footprint=neighbours, mode="constant")
    border = np.ones_like(token_map, bool)
    border[1:-1, 1:-1] = False
    lone = border & (token_map > around) & (around < peak_support * token_map)
    return np.where(lone, ndimage.median_filter(token_map, footprint=neighbours, mode="nearest"), token_map)


def largest_blob(soft: np.ndarray, level: float) -> np.ndarray:
    """Of the connected areas at or above `level`, the one that holds most of the map's mass."""
    labels, count = ndimage.label(soft >= level, structure=np.ones((3, 3)))
    masses = ndimage.sum_labels(soft, labels, np.arange(1, count + 1))
    return labels == 1 + int(np.argmax(masses))


def clean(raw: Tensor, reference: EncodedReference, settings: CleaningSettings = CleaningSettings()) -> MatchedRegion:
    """M^(t,l) `[N, N]` -> M*. Raises `InputError` where the map is empty or flat."""
    if not torch.isfinite(raw).all() or raw.amax() <= 0:
        raise InputError("alignment", "gave an empty map", "check that the mask lies on the object, or align another layer or timestep")
    coverage = reference.to_tokens(reference.mask)
    token_map = remove_border_peaks((raw * coverage).numpy(), settings.peak_support)
    on_object = coverage.numpy() > 0.1 * float(coverage.max())
    if token_map.max() <= 0:
        raise InputError("alignment", "gave an empty map: nothing but noise at the border", "check that the mask lies on the object, or align another layer or timestep")
    if token_map.max() < settings.flatness * token_map[on_object].mean():
        raise InputError(
            "alignment",
            f"gave a flat map (peak below {settings.flatness:g} times the mean): nothing in the reference stands out",
            "give a reference that shows the masked part, paint a smaller mask, or refine from the whole reference (single-stage)",
        )
    soft = reference.to_reference(torch.from_numpy(token_map)) * reference.mask
    blob = torch.from_numpy(largest_blob(soft.numpy(), settings.threshold * float(soft.max()))).float()
    return MatchedRegion(blob, Box.around(blob), soft / soft.max())
