"""Collage: the matched region of the reference laid over the crop, as AnyDoor hints its detail, in the crop's tone and
as sharp as its surround."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from .geometry import Box, resize, resize_mask
from .imageio import RGB_TO_YCC
from .postprocessing import MatchedRegion
from .registration import blurred, carry_back, grid, nearness, register, shrunk, warped
from .zoom_crop import ZoomCrop

TONE = 48
"""Pixels a side in which the fields of tone are computed: they are low-frequency."""
BRIGHTNESS = 0.2, 0.65
"""Its share in the gain of luma and of colour, the rest is contrast's. On the synthetic validation split hp-SSIM is highest at
0.2 for luma; for colour 0.65 costs 0.2 dB of PSNR there, but yellow on red in a darker picture stays yellow."""
LUMA = torch.tensor(RGB_TO_YCC[0])
BLURS = (0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2)
"""Standard deviations, in pixels of the collage, that a reference may be softened by."""


@dataclass(frozen=True)
class Collage:
    """picture `[3, S, S]` in [0, 1]: the reference in the crop's frame, its tone and sharpness matched to the surround
    valid        `[S, S]` in {0, 1}: where the reference shows the object
    region       `[H, W]` in {0, 1}: what of the reference lies under the mask, M* to the pixel
    confidence   that it lies where it belongs, 0 to 1; 0 where it shows nothing under the mask
    flow         `[2, S, S]`, the dense correspondence: where in the reference each pixel's centre is seen, (x, y) in pixels
    sureness     `[S, S]`, how well crop and reference agree there, 0 to 1, times the confidence
    evidence     what the confidence was computed from, see `Registration`
    """

    picture: Tensor
    valid: Tensor
    region: Tensor
    confidence: float
    flow: Tensor | None = None
    sureness: Tensor | None = None
    evidence: tuple[float, ...] = ()


def lay_over(crop: ZoomCrop, reference: Tensor, reference_mask: Tensor, region: MatchedRegion, image: Tensor | None = None, *, disagreed: bool = False) -> Collage:
    """Register the reference `[3, H, W]` to the crop, starting from M*, and from its placement where it has one.

    image       `[3, h, w]`, the crop's own picture: the collage is then made at its full resolution, not the model's
    disagreed   M* has no placement because the attention's cells agreed on none
    """
    height, width = reference.shape[-2:]
    target = crop.image if image is None else crop.box.crop(image)
    size = target.shape[-1]
    mask = resize_mask(crop.mask, size, size)
    if region.placement is not None:
        start = region.placement.over(crop.box)
    else:
        rows, columns = region.mask.nonzero(as_tuple=True)
        half_side = 0.5 * math.sqrt(len(rows) / max(float(crop.mask.mean()), 1e-4))  # of the crop, in reference pixels
        start = torch.tensor([[half_side, 0, columns.float().mean() + 0.5], [0, half_side, rows.float().mean() + 0.5]])
    found = register(target, crop.mask, reference, reference_mask, start, region.placement, crop.box, disagreed=disagreed)

    layers, shrink = shrunk(reference, reference_mask, size / 2 / float(torch.linalg.det(found.warp[:, :2]).abs().sqrt().clamp(min=1e-3)))
    flow = warped(found.warp, grid(size))
    frame = torch.tensor([width, height])
    seen = F.grid_sample(layers[None], (flow / frame * 2 - 1)[None], align_corners=False)[0]
    valid = (seen[3] > 0.99).float()
    weight = nearness(mask) * valid
    picture = match_tone(seen[:3], target, weight)
    picture = match_tone(match_sharpness(picture, target, weight), target, weight)
    under_mask = carry_back(crop.mask, found.warp, height, width) * reference_mask
    confidence = found.confidence if under_mask.any() else 0.0
    sureness = resize(found.agreement[None], size, size)[0] * confidence
    return Collage(picture, valid, under_mask, confidence, flow.movedim(-1, 0), sureness, found.evidence)


def in_the_image(collage: Collage, box: Box, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The reference in the frame of a picture of that size, for any editor: `[3, height, width]`, black where it does not
    show the object, and where it does, `[height, width]` in {0, 1}. The collage must be at its box's own resolution."""
    shown = box.paste(torch.zeros(4, height, width), torch.cat([collage.picture * collage.valid, collage.valid[None]]))
    return shown[:3], shown[3]


def transfer_detail(redrawn: Tensor, collage: Collage, mask: Tensor, amount: float) -> Tensor:
    """Carry the collage's high frequencies into a redrawn crop `[3, S, S]`, under its mask and where it is valid;
    what is broader than 1/32 of the crop stays as redrawn."""
    size = collage.picture.shape[-1]
    redrawn = resize(redrawn.to(collage.picture), size, size)
    shown = resize_mask(mask, size, size) * collage.valid
    difference = (collage.picture - redrawn).numpy()
    detail = difference - gaussian_filter(difference, (0, size / 32, size / 32))
    return (redrawn + amount * shown * torch.from_numpy(detail)).clamp(0, 1)


def match_tone(picture: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`[3, S, S]` with the brightness, colour and contrast that the target has nearby, where `weight` `[S, S]` says:
    low-frequency fields of mean and deviation.

    One gain for luma and one for colour, in 0.5-2: what contrast says, and what brightness says, as light multiplies, see
    BRIGHTNESS. Contrast by deviations, not by least squares: where detail is a little off place a fitted gain shrinks, and
    the print would come out pale.
    """
    size = picture.shape[-1]
    small = min(size, TONE)
    total = weight.sum().clamp(min=1e-6)

    def nearby(values: Tensor) -> Tensor:
        """Mean over the surroundings; far from all weight, that of the whole."""
        whole = (values * weight).sum((1, 2), keepdim=True) / total
        spread = blurred(F.adaptive_avg_pool2d(torch.cat([values * weight, weight[None]]), small), small // 6)
        field = (spread[:-1] + 1e-4 * whole) / (spread[-1:] + 1e-4)
        return F.interpolate(field[None], (size, size), mode="bilinear")[0]

    mean, wanted = nearby(picture), nearby(target)
    own, other = ((nearby(values**2) - middle**2).clamp(min=0).mean(0, keepdim=True) for values, middle in ((picture, mean), (target, wanted)))
    brighter = (wanted.mean(0, keepdim=True) + 0.05) / (mean.mean(0, keepdim=True) + 0.05)
    contrast = ((other + 1e-3) / (own + 1e-3)).sqrt()
    of_luma, of_colour = ((contrast ** (1 - share) * brighter**share).clamp(0.5, 2.0) for share in BRIGHTNESS)
    detail = picture - mean
    luma = torch.einsum("c,chw->hw", LUMA, detail)
    return (luma * of_luma + (detail - luma) * of_colour + wanted).clamp(0, 1)


def match_sharpness(picture: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`[3, S, S]` softened by the narrowest of `BLURS` with which it has no more fine detail than the target, where
    `weight` `[S, S]` says. What is already softer than the target stays so."""

    def fineness(values) -> float:
        grey = values.mean(0)
        return float(((grey - gaussian_filter(grey, 2.0)) ** 2 * weight.numpy()).sum())

    wanted, softer = fineness(target.numpy()), picture.numpy()
    for blur in BLURS:
        if fineness(softer) <= wanted:
            break
        softer = gaussian_filter(picture.numpy(), (0, blur, blur))
    return torch.from_numpy(softer)
