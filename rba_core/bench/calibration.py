"""The confidence of a registration, fitted: to items of the validation split with their own references and with ones made to
fail, as they are and as if both pictures had been taken anew."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import optimize, special
from scipy.ndimage import gaussian_filter
from torch import Tensor

from ..errors import InputError
from ..imageio import to_bytes
from ..model import RefineByAlign
from ..pipeline import Settings, best_match
from ..reference_encoding import encode_reference
from ..refinement import Progress
from ..zoom_crop import crop_for
from .dataset import BenchmarkSet, Item
from .doubt import KINDS, each_kind, with_another
from .metrics import end_point_error

RIGHT, WRONG = 0.12, 0.25
"""End-point errors up to which a registration counts as right, and from which as wrong; those between are left out."""
BARS = (0.02, 0.05, 0.1, 0.2, 0.5)
TAKES = None, (1.0, 0.6, 3.0), (1.5, 1.2, 8.0)
"""Of each item: as it is, and taken anew, twice: the harshness of what is done to the image and to the reference, and how far,
in pixels, the reference's product may be bent besides: products are not rigid, and their parts lie at different depths."""


def calibrate(sets: Sequence[str | Path], model: RefineByAlign, limit: int | None = None, seed: int = 0, progress: Progress | None = None) -> dict:
    """Weigh the evidence for a registration anew, see `registration.CALIBRATION`.

    sets      with flow: of the validation split, `rba bench make --split validation`, better also ones with photos
    limit     items of each set
    returns   {"weights", "constant", "below": {bar: {kind: share of confidences below it}}, "rows": [...]}; "right" are those
              of the right reference that lie right
    """
    opened = [BenchmarkSet(folder) for folder in sets]
    chosen = [(items, of, index) for items in opened for of in [items.having("flow", limit)] for index in range(len(of))]
    rows = []
    for done, (items, of, index) in enumerate(chosen, 1):
        own, other = with_another(items, of, index)
        for take, harshness in enumerate(TAKES):
            item = taken_anew(own, np.random.default_rng((seed, index, take)), *harshness) if harshness else own
            for kind, failing in each_kind(item, other):
                found = evidence(failing, model, seed)
                if found is not None:
                    rows.append({"id": item.id, "set": items.folder.name, "take": take, "kind": kind, "evidence": found[0], "error": found[1]})
        if progress:
            progress(done, len(chosen))
    weights, constant = fit(rows)
    confidences = {
        kind: np.array([special.expit(np.dot(row["evidence"], weights) + constant) for row in rows if row["kind"] == kind and (kind != "right" or row["error"] <= RIGHT)])
        for kind in KINDS
    }  # fmt: skip
    below = {bar: {kind: float((values < bar).mean()) for kind, values in confidences.items()} for bar in BARS}
    return {"weights": weights, "constant": constant, "below": below, "rows": rows}


def evidence(item: Item, model: RefineByAlign, seed: int) -> tuple[tuple[float, ...], float] | None:
    """What a registration's confidence is computed from, and its end-point error; `None` where nothing was aligned."""
    crop = crop_for(model, item.image, item.mask)
    whole = encode_reference(model, item.reference, item.object_mask)
    collage = best_match(model, item.image, item.mask, crop, [item.reference], [whole], Settings(on_flat="single-stage"), seed).collage
    if collage is None:
        return None
    flow = crop.box.paste(torch.full_like(item.flow, torch.nan), collage.flow)
    return collage.evidence, end_point_error(flow, item.flow, item.correspondence)


def fit(rows: Sequence[dict]) -> tuple[list[float], float]:
    """Weights and constant of a logistic regression on the evidence, with a prior of deviation 1.4 over the spread of each.
    Rows as in `calibrate`: "kind", "evidence" and, of right references, "error"."""
    known = [row for row in rows if row["kind"] != "right" or not RIGHT < row["error"] < WRONG]
    right = np.array([row["kind"] == "right" and row["error"] <= RIGHT for row in known], dtype=bool)
    if not right.any():
        raise InputError("set", "has no registration that is known to be right", "give sets with flow, say ones of `rba bench make --split validation`")
    seen, signs = np.array([row["evidence"] for row in known]), np.where(right, 1.0, -1.0)
    middle, spread = seen.mean(0), seen.std(0) + 1e-9
    design = np.column_stack([(seen - middle) / spread, np.ones(len(seen))])

    def loss(weights: np.ndarray) -> float:
        return -special.log_expit(signs * (design @ weights)).sum() + 0.25 * (weights[:-1] ** 2).sum()

    found = optimize.minimize(loss, np.zeros(design.shape[1])).x
    weights = found[:-1] / spread
    return weights.tolist(), float(found[-1] - weights @ middle)


def taken_anew(item: Item, rng: np.random.Generator, of_image: float, of_reference: float, bent_by: float) -> Item:
    """The item with both pictures in other light, softer and grainier, and the reference's product a little bent, see `TAKES`."""
    image = torch.where(item.mask > 0.5, item.image, photographed(item.image, rng, of_image))
    layers = torch.cat([photographed(item.reference, rng, of_reference), item.object_mask[None]])
    _, height, width = layers.shape
    shift = _cloud(rng, 6, height, width, 2) * rng.uniform(0, bent_by)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack([(columns + shift[0]) / width * 2 - 1, (rows + shift[1]) / height * 2 - 1], -1)
    bent = F.grid_sample(layers[None], points[None], align_corners=False, padding_mode="border")[0]
    return replace(item, image=image, reference=bent[:3], reference_mask=(bent[3] > 0.5).float())


def photographed(picture: Tensor, rng: np.random.Generator, harshness: float) -> Tensor:
    """`[3, H, W]` as another camera in other light might have it: exposure, cast, uneven light, highlights, grain, blur, JPEG."""
    _, height, width = picture.shape
    picture = picture.clamp(1e-3, 1) ** float(np.exp(rng.normal(0, 0.25 * harshness)))
    cast = torch.from_numpy(rng.normal(0, 0.15 * harshness, (3, 1, 1))).float()
    picture = picture * torch.exp(cast + 0.3 * harshness * _cloud(rng, 4, height, width))
    for _ in range(rng.integers(0, 3)):
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        distance = (torch.arange(height)[:, None] - y) ** 2 + (torch.arange(width) - x) ** 2
        picture = picture + 0.4 * harshness * torch.exp(-distance / (2 * rng.uniform(0.015, 0.065) ** 2 * height * width))
    grain = gaussian_filter(rng.normal(0, 1, (height, width)), rng.uniform(0.8, 2.5))
    picture = picture + torch.from_numpy(grain / grain.std() * rng.uniform(0, 0.06) * harshness).float()
    softened = gaussian_filter(picture.numpy(), (0, *(rng.uniform(0, 1.5) * harshness,) * 2))
    stored = io.BytesIO()
    Image.fromarray(to_bytes(torch.from_numpy(softened).clamp(0, 1))).save(stored, "JPEG", quality=int(rng.integers(40, 90)))
    return torch.from_numpy(np.array(Image.open(stored))).permute(2, 0, 1).float() / 255


def _cloud(rng: np.random.Generator, cells: int, height: int, width: int, channels: int = 1) -> Tensor:
    """Smooth noise of unit deviation at its knots, `[channels, height, width]`."""
    knots = torch.from_numpy(rng.normal(0, 1, (1, channels, cells, cells))).float()
    return F.interpolate(knots, (height, width), mode="bicubic", align_corners=True)[0]
