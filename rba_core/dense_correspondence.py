"""Dense correspondence: where each cell of the crop is seen in the reference, and the one map that explains it.

Eq. 5 adds the attention of the cells under M_a, of which the artifact makes some look astray. All cells of the crop
have attention, though, and a small part of an object is, seen twice, nearly an affine map away from itself: the map
that most cells agree on carries M_a over whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Box
from .zoom_crop import ZoomCrop

TOLERANCE = 1.5
"""How far a cell may look from where the map sends it, in tokens."""
PAIRS = 64
"""Of so many cells, those that count most, each two propose a similarity."""
SCALES, TURN = (0.1, 3.0), 1.0
"""Ranges of a similarity: sides of the crop in the reference's square, radians."""
INSIDE_WEIGHT = 0.3
"""What a cell under M_a counts, against 1 for one beside it: what it shows is wrong, but colours and layout often survive."""
REACH = 0.3
"""Decay of a cell's weight with its distance from M_a's centre, standard deviation in sides of the crop."""


@dataclass(frozen=True)
class Placement:
    """affine       `[2, 3]`, (x, y) in [-1, 1] over a crop -> pixels of the reference
    box          of the crop in its image
    agreement    how surely the cells beside the mask look where the map says: their mean share of attention that is
                 mutual and there, 0 to 1; some hundredths where the right object is found
    attention    `[d², N²]`, what it was found in; square: what of the reference the N x N tokens cover
    weight       `[d²]`, how much each cell counted
    published    `[H, W]` in {0, 1}, the reference's: Eq. 5's M*, should the map turn out wrong
    """

    affine: Tensor
    box: Box
    agreement: float
    attention: Tensor
    square: Box
    weight: Tensor
    published: Tensor | None = None

    def over(self, box: Box) -> Tensor:
        """The same map from another crop of the image, `[2, 3]`."""
        return self.affine @ torch.linalg.inv(_square(_to_pixels(self.box))) @ _square(_to_pixels(box))


def place(attention: Tensor, crop: ZoomCrop, square: Box) -> Placement | None:
    """The affine map that the attention `[d², N²]` of the crop's cells agrees on; `None` where no two of them do.

    square   what of the reference the N x N tokens cover
    """
    attention = attention.float().cpu()
    side = round(len(attention) ** 0.5)
    seen, sureness = looked_at(attention)
    cells = centres(side)
    covered = F.adaptive_avg_pool2d(crop.mask[None, None], side).flatten().numpy()
    middle = (cells * covered[:, None]).sum(0) / covered.sum()
    distance = np.linalg.norm(cells - middle, axis=1) / 2
    near = np.exp(-0.5 * (distance / REACH) ** 2) * (1 - (1 - INSIDE_WEIGHT) * covered)
    tolerance = TOLERANCE * 2 / round(attention.shape[1] ** 0.5)
    similarity = best_similarity(cells, seen, near * sureness**1.5, tolerance)
    if similarity is None:
        return None
    affine = fit_affine(cells, seen, near * sureness**1.5, tolerance, similarity)
    agreement = float((near * sureness * agreeing(affine, cells, seen, tolerance)).sum() / near.sum())
    return Placement(_to_pixels(square) @ _square(torch.from_numpy(affine).float()), crop.box, agreement, attention, square, torch.from_numpy(near).float())


def looked_at(attention: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Where each cell looks, `[d², 2]` in [-1, 1], and how surely, `[d²]` in 0 to 1.

    The mass around the strongest 3 x 3 tokens decides, not the mean, as a row may have two minds. A token that many
    cells look at tells none of them apart, hence the columns' share counts beside the rows'.
    """
    tokens = round(attention.shape[1] ** 0.5)
    mutual = attention * (attention / attention.sum(0).clamp(min=1e-9)).sqrt()
    maps = mutual.view(-1, 1, tokens, tokens)
    near = F.avg_pool2d(maps, 3, 1, 1)[:, 0].flatten(1)
    strongest = near.argmax(1)
    rows, columns = strongest // tokens, strongest % tokens
    index = torch.arange(tokens)
    window = ((index - rows[:, None]).abs() <= 1)[:, :, None] & ((index - columns[:, None]).abs() <= 1)[:, None]
    local = maps[:, 0] * window
    mass = local.sum((1, 2)).clamp(min=1e-12)
    axis = (index + 0.5) / tokens * 2 - 1
    x, y = (local.sum(1) * axis).sum(1) / mass, (local.sum(2) * axis).sum(1) / mass
    return torch.stack([x, y], -1).double().numpy(), mass.double().numpy()


def centres(side: int) -> np.ndarray:
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(axis, axis)
    return np.stack([x, y], -1).reshape(-1, 2)


def best_similarity(cells: np.ndarray, seen: np.ndarray, weight: np.ndarray, tolerance: float) -> np.ndarray | None:
    """RANSAC with every pair of the weightiest cells in place of random ones: `[2, 3]`, `None` where no pair is likely."""
    source, target = cells @ (1, 1j), seen @ (1, 1j)
    first, second = np.triu_indices(min(PAIRS, len(cells)), 1)
    order = np.argsort(-weight, kind="stable")
    first, second = order[first], order[second]
    apart = np.abs(source[second] - source[first]) > 0.2
    first, second = first[apart], second[apart]
    turn = (target[second] - target[first]) / (source[second] - source[first])
    likely = (np.abs(turn) > SCALES[0]) & (np.abs(turn) < SCALES[1]) & (np.abs(np.angle(turn)) < TURN)
    turn, first = turn[likely], first[likely]
    if not len(turn):
        return None
    shift = target[first] - turn * source[first]
    error = np.abs(turn[:, None] * source + shift[:, None] - target)
    score = (weight * np.maximum(0, 1 - (error / tolerance) ** 2)).sum(1)
    a, b = turn[score.argmax()], shift[score.argmax()]
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def fit_affine(cells: np.ndarray, seen: np.ndarray, weight: np.ndarray, tolerance: float, similarity: np.ndarray) -> np.ndarray:
    """Least squares over the cells that agree, Tukey's weights, drawn to the similarity where they say little."""
    design = np.column_stack([cells, np.ones(len(cells))])
    affine = similarity
    for _ in range(10):
        counted = weight * agreeing(affine, cells, seen, tolerance) ** 2
        prior = 0.05 * counted.sum() * np.diag([1, 1, 0.05])
        affine = np.linalg.solve((design * counted[:, None]).T @ design + prior, (design * counted[:, None]).T @ seen + prior @ similarity.T).T
    return affine


def agreeing(affine: np.ndarray, cells: np.ndarray, seen: np.ndarray, tolerance: float) -> np.ndarray:
    """1 for a cell that looks where the map says, falling to 0 at `tolerance` from there."""
    error = np.linalg.norm(cells @ affine[:, :2].T + affine[:, 2] - seen, axis=1)
    return np.maximum(0, 1 - (error / tolerance) ** 2)


def _to_pixels(box: Box) -> Tensor:
    """[-1, 1] over a box -> pixels of its picture, `[2, 3]`."""
    return torch.tensor([[box.width / 2, 0, box.x + box.width / 2], [0, box.height / 2, box.y + box.height / 2]])


def _square(affine: Tensor) -> Tensor:
    return torch.cat([affine, torch.tensor([[0.0, 0.0, 1.0]])])
