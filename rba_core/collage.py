"""Collage: the matched region of the reference laid over the crop, as AnyDoor hints its detail.

M* says roughly where and how large. What surrounds the mask is right in both pictures, so the place is then
settled on pixels: a search over position, scale and rotation by normalised cross-correlation of the surround,
and a least-squares affine fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from .dense_correspondence import carry
from .geometry import resize, resize_mask
from .postprocessing import MatchedRegion
from .zoom_crop import ZoomCrop

COARSE = 48
"""Side of the crop during the search, pixels."""
SCALES = tuple(1.16**step for step in range(-4, 5))
ROTATIONS = tuple(math.radians(angle) for angle in range(-36, 37, 9))
REACH = 1.0
"""How far the centre may lie from M*'s, in half sides of the crop."""
CANDIDATES = 4
PREFERENCE = 0.05
"""What a place that the search found must be better by than the one that the attention agreed on: prints repeat."""
INSIDE_WEIGHT = 0.1
"""What the artifact itself counts, against 1 for the surround: its colours and layout often survive."""


@dataclass(frozen=True)
class Collage:
    """picture `[3, S, S]` in [0, 1]: the reference in the crop's frame, its tone matched to the surround
    valid        `[S, S]` in {0, 1}: where the reference shows the object
    region       `[H, W]` in {0, 1}: what of the reference lies under the mask, M* to the pixel
    confidence   normalised cross-correlation of the surround, -1 to 1
    """

    picture: Tensor
    valid: Tensor
    region: Tensor
    confidence: float


def lay_over(crop: ZoomCrop, reference: Tensor, reference_mask: Tensor, region: MatchedRegion, image: Tensor | None = None) -> Collage:
    """Register the reference `[3, H, W]` to the crop, starting from M*, and from its placement where it has one.

    image   `[3, h, w]`, the crop's own picture: the collage is then made at its full resolution, not the model's
    """
    height, width = reference.shape[-2:]
    rows, columns = region.mask.nonzero(as_tuple=True)
    centre = torch.tensor([columns.float().mean() + 0.5, rows.float().mean() + 0.5])
    half_side = 0.5 * math.sqrt(len(rows) / max(float(crop.mask.mean()), 1e-4))  # of the crop, in reference pixels

    layers, shrink = _shrunk(reference, reference_mask, COARSE / 2 / half_side)
    weight = surround(crop.mask)
    candidates = _search(crop, weight, layers, centre * shrink, half_side * shrink) / shrink
    layers, shrink = _shrunk(reference, reference_mask, crop.image.shape[-1] / 2 / half_side)
    confidence, placement = max((_fit_affine(crop, weight, layers, candidate * shrink) for candidate in candidates), key=lambda found: found[0])
    if region.placement is not None:
        attended = _fit_affine(crop, weight, layers, region.placement.over(crop.box) * shrink)
        if attended[0] > confidence - PREFERENCE:
            confidence, placement = attended
    under_mask = carry(crop.mask, placement / shrink, height, width) * reference_mask

    target, mask = crop.image, crop.mask
    if image is not None:
        target, mask = crop.box.crop(image), resize_mask(mask, crop.box.height, crop.box.width)
        layers, finer = _shrunk(reference, reference_mask, target.shape[-1] / 2 / half_side)
        placement = placement / shrink * finer
    warped = _sample(layers, placement[None], target.shape[-1])[0]
    valid = (warped[3] > 0.99).float()
    return Collage(match_tone(warped[:3], target, surround(mask) * valid), valid, under_mask, confidence)


def transfer_detail(redrawn: Tensor, collage: Collage, mask: Tensor, amount: float) -> Tensor:
    """Carry the collage's high frequencies into a redrawn crop `[3, S, S]`, under its mask and where it is valid;
    what is broader than 1/32 of the crop stays as redrawn."""
    size = collage.picture.shape[-1]
    redrawn = resize(redrawn.to(collage.picture), size, size)
    shown = resize_mask(mask, size, size) * collage.valid
    difference = (collage.picture - redrawn).numpy()
    detail = difference - gaussian_filter(difference, (0, size / 32, size / 32))
    return (redrawn + amount * shown * torch.from_numpy(detail)).clamp(0, 1)


def surround(mask: Tensor) -> Tensor:
    """How much each pixel of the crop `[S, S]` counts in the registration: most next to the mask."""
    size = mask.shape[-1]
    spread = mask[None, None]
    for _ in range(3):  # three box filters are nearly a Gaussian
        spread = F.avg_pool2d(spread, 2 * (size // 12) + 1, 1, size // 12, count_include_pad=False)
    near = spread[0, 0] / spread.max().clamp(min=1e-6)
    return torch.where(mask > 0.5, torch.tensor(INSIDE_WEIGHT), near.sqrt())


def match_tone(picture: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Gain and offset of each channel, by least squares where `weight` `[S, S]` says; the gain kept in 0.5-2."""
    total = weight.sum().clamp(min=1e-6)
    mean, wanted = ((value * weight).sum((1, 2), keepdim=True) / total for value in (picture, target))
    spread = ((picture - mean) ** 2 * weight).sum((1, 2), keepdim=True) / total
    joint = ((picture - mean) * (target - wanted) * weight).sum((1, 2), keepdim=True) / total
    gain = ((joint + 1e-3) / (spread + 1e-3)).clamp(0.5, 2.0)
    return ((picture - mean) * gain + wanted).clamp(0, 1)


def _shrunk(reference: Tensor, mask: Tensor, factor: float) -> tuple[Tensor, float]:
    """`[4, H, W]`, the picture where the object is and the object, shrunk by `factor` if that is below 1."""
    factor = min(1.0, factor)
    size = [max(8, round(extent * factor)) for extent in mask.shape]
    mask = resize(mask[None], *size)
    return torch.cat([resize(reference, *size) * mask, mask]), factor


def _sample(layers: Tensor, placement: Tensor, size: int, extent: float = 1.0) -> Tensor:
    """Layers `[4, H, W]` seen through placements `[N, 2, 3]`, crop coordinates in `[-extent, extent]` -> pixels."""
    axis = (torch.arange(size) + 0.5) / size * 2 * extent - extent
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.einsum("nij,hwj->nhwi", placement[..., :2], torch.stack([x, y], -1)) + placement[:, None, None, :, 2]
    frame = torch.tensor([layers.shape[2], layers.shape[1]])
    return F.grid_sample(layers.expand(len(placement), -1, -1, -1), points / frame * 2 - 1, align_corners=False)


def _search(crop: ZoomCrop, weight: Tensor, layers: Tensor, centre: Tensor, half_side: float) -> Tensor:
    """The best positions with their scales and rotations: placements `[CANDIDATES, 2, 3]`, crop [-1, 1] -> reference
    pixels."""
    template = resize(crop.image, COARSE, COARSE)
    weight = F.interpolate(weight[None, None], (COARSE, COARSE), mode="area")[0, 0]
    turns = [(scale, angle) for scale in SCALES for angle in ROTATIONS]
    linear = torch.stack([half_side * s * torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for s, a in turns])
    placements = torch.cat([linear, centre.expand(len(turns), 2)[..., None]], -1)
    window = _sample(layers, placements, round(COARSE * (1 + REACH)), 1 + REACH)
    shown, valid = window[:, :3], window[:, 3:]  # the picture is 0 where not valid

    def correlate(kernel: Tensor, field: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(field) * torch.fft.rfft2(kernel, s=field.shape[-2:]).conj()
        side = field.shape[-1] - COARSE + 1
        return torch.fft.irfft2(spectrum, s=field.shape[-2:])[..., :side, :side]

    covered = correlate(weight, valid).clamp(min=1e-6)
    mean_t, mean_f = correlate(weight * template, valid) / covered, correlate(weight, shown) / covered
    spread_t = correlate(weight * template**2, valid) / covered - mean_t**2
    spread_f = correlate(weight, shown**2) / covered - mean_f**2
    joint = correlate(weight * template, shown) / covered - mean_t * mean_f
    score = joint.sum(1) / ((spread_t.clamp(min=0).sum(1) + 1e-3) * (spread_f.clamp(min=0).sum(1) + 1e-3)).sqrt()
    score = score * (covered[:, 0] / weight.sum() / 0.6).clamp(max=1)
    hole = F.interpolate(crop.mask[None, None], (COARSE, COARSE), mode="area")[0, 0]
    score = score - (1 - correlate(hole, valid)[:, 0] / hole.sum())  # the object must fill what is to be redrawn

    offsets = torch.linspace(-REACH, REACH, score.shape[-1])
    distance = offsets[:, None] ** 2 + offsets[None] ** 2
    tilt = torch.tensor([0.04 * (math.log(s) / math.log(1.16) / 4) ** 2 + 0.04 * (a / 0.6) ** 2 for s, a in turns])
    score, turn = (score - 0.1 * distance - tilt[:, None, None]).max(0)
    peaks = torch.where(F.max_pool2d(score[None], 9, 1, 4)[0] == score, score, -torch.inf)
    found = []
    for place in peaks.flatten().topk(CANDIDATES).indices:
        row, column = place // len(offsets), place % len(offsets)
        chosen = linear[turn[row, column]]
        shift = chosen @ torch.stack([offsets[column], offsets[row]])
        found.append(torch.cat([chosen, (centre + shift)[:, None]], -1))
    return torch.stack(found)


def _fit_affine(crop: ZoomCrop, near: Tensor, layers: Tensor, placement: Tensor, rounds: int = 10) -> tuple[float, Tensor]:
    """Gauss-Newton on the six numbers of the placement, coarse to fine, tone refitted in each round: the score
    reached and the placement."""
    for size in (COARSE, crop.image.shape[-1]):
        target = resize(crop.image, size, size)
        base = F.interpolate(near[None, None], (size, size), mode="area")[0, 0]
        axis = (torch.arange(size) + 0.5) / size * 2 - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        ones = torch.ones_like(x)
        hole = F.interpolate(crop.mask[None, None], (size, size), mode="area")[0, 0]
        best = (-torch.inf, placement)
        for _ in range(rounds):
            nudge = torch.linalg.norm(placement[:, :2]) / size  # about half a pixel of the crop
            moved = torch.stack([placement, *(placement + torch.tensor([[0, 0, dx], [0, 0, dy]]) * nudge for dx, dy in ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)))])
            views = _sample(layers, moved, size)
            weight = base * (views[:, 3] > 0.99).all(0)
            if weight.sum() < 0.1 * base.sum():
                break
            picture = match_tone(views[0, :3], target, weight)
            filled = (views[0, 3] * hole).sum() / hole.sum()
            score = _correlation(picture, target, weight) * float((weight.sum() / base.sum() / 0.6).clamp(max=1)) - float(1 - filled)
            if score > best[0]:
                best = (score, placement)
            gain = ((picture - picture.mean((1, 2), keepdim=True)).std() / views[0, :3].std().clamp(min=1e-4)).clamp(0.5, 2)
            slope_x, slope_y = ((views[i, :3] - views[i + 1, :3]) / (2 * nudge) * gain for i in (1, 3))
            residual = target - picture
            robust = weight / (1 + (residual / 0.1).square().mean(0))
            jacobian = torch.stack([slope * value for slope in (slope_x, slope_y) for value in (x, y, ones)], -1)
            normal = torch.einsum("chwi,hw,chwj->ij", jacobian, robust, jacobian)
            step = torch.linalg.solve(normal + (0.02 * normal.diagonal().mean() + 1e-6) * torch.eye(6), torch.einsum("chwi,hw,chw->i", jacobian, robust, residual))
            placement = placement + step.view(2, 3)
        placement = best[1]
    return best


def _correlation(picture: Tensor, target: Tensor, weight: Tensor) -> float:
    total = weight.sum().clamp(min=1e-6)
    picture, target = (value - (value * weight).sum((1, 2), keepdim=True) / total for value in (picture, target))
    joint, own, other = ((a * b * weight).sum() / total for a, b in ((picture, target), (picture, picture), (target, target)))
    return float(joint / ((own + 1e-3) * (other + 1e-3)).sqrt())
