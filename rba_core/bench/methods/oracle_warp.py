"""The reference warped by the true correspondence: what is left for blending to lose."""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor

from ...errors import InputError
from ...geometry import Box
from ...imageio import to_bytes
from ...model import RefineByAlign
from ...postprocessing import MatchedRegion
from ..dataset import Item
from .opencv import masked, opencv, poisson_blended
from .outcome import Outcome


def oracle_warp(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """Without a model: the reference warped by the true correspondence, put in by Poisson blending."""
    cv2 = opencv("oracle-warp")
    if item.flow is None:
        raise InputError("method", f"oracle-warp needs the true flow, which {item.id} lacks", "give a set with flow, say one of `rba bench make`, or leave oracle-warp out")
    places = _continued(item.flow).movedim(0, -1).numpy() - 0.5
    laid = cv2.remap(to_bytes(item.reference), places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return Outcome(masked(item, poisson_blended(cv2, laid, item)), MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence), False, item.flow)


def _continued(flow: Tensor) -> Tensor:
    """A flow `[2, H, W]` with its gaps filled: the affine map nearest to it, and the nearest pixel's departure from that."""
    known = ~flow.isnan().any(0)
    y, x = torch.meshgrid(*(torch.arange(float(extent)) for extent in flow.shape[1:]), indexing="ij")
    design = torch.stack([x, y, torch.ones_like(x)], -1)
    affine = (design @ torch.linalg.lstsq(design[known], flow[:, known].T).solution).movedim(-1, 0)
    row, column = ndimage.distance_transform_edt(~known.numpy(), return_distances=False, return_indices=True)
    return affine + (flow - affine)[:, torch.from_numpy(row), torch.from_numpy(column)]
