"""The methods a benchmark compares: each takes an item, a model and a seed, and gives an `Outcome`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..alignment import correspondence
from ..errors import InputError
from ..geometry import Box, resize
from ..model import RefineByAlign
from ..pipeline import Refined, Settings, believed, grow, redraw, refine_by_align, register
from ..postprocessing import MatchedRegion, clean
from ..reference_encoding import encode_reference, segment
from ..registration import grid, warped
from ..zoom_crop import ZoomCrop, crop_box, separate, zoom_crop
from .dataset import Item

SHAVED = 3
"""Pixels that OpenCV's seamlessClone takes off a mask's border."""
TEMPERATURE = 0.05
"""Of the softmax over cosines in `features`: a token that is nearer by 0.05 counts e times as much."""


@dataclass(frozen=True)
class Outcome:
    """image        `[3, H, W]`
    region       M* over all artifacts of the mask, `None` from a method that does not align or where alignment found nothing
    fell_back    an artifact was redrawn from the whole reference for that
    flow         `[2, H, W]`, where in the reference each masked pixel is held to be seen; NaN elsewhere
    confidence   of the registration, the lowest of all artifacts
    evidence     that it was computed from, of that artifact
    """

    image: Tensor
    region: MatchedRegion | None = None
    fell_back: bool = False
    flow: Tensor | None = None
    confidence: float | None = None
    evidence: tuple[float, ...] = ()


def detail(item: Item, model: RefineByAlign, seed: int, **settings) -> Outcome:
    """All of it: dense alignment, registration, the reference's own detail. An artifact whose alignment says nothing is
    redrawn from the whole reference."""
    settings = Settings(on_flat="single-stage", **settings)
    refined = refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed)
    found = [region for region in refined.regions if region is not None]
    collages = [match.collage for match in refined.matches if match.collage is not None]
    surest = min(collages, key=lambda collage: collage.confidence) if collages else None
    return Outcome(
        refined.image, reduce(_united, found) if found else None, len(found) < len(refined.regions), _flow(item, refined, model),
        surest and surest.confidence, surest.evidence if surest else (),
    )


def _flow(item: Item, refined: Refined, model: RefineByAlign) -> Tensor | None:
    """Of the registrations, believed or not, or else of the maps that the attention agreed on."""
    flow = torch.full((2, *item.mask.shape), torch.nan)
    for artifact, match in zip(separate(item.mask), refined.matches):
        box = crop_box(artifact, model.config.context, model.stride)
        if match.collage is not None:
            laid = match.collage.flow
        elif match.region is not None and match.region.placement is not None:
            laid = warped(match.region.placement.over(box), grid(box.width)).movedim(-1, 0)
        else:
            continue
        flow = torch.where(artifact > 0.5, box.paste(flow, laid), flow)
    return None if flow.isnan().all() else flow


def paper(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """Both stages as published: M* from the masked cells' attention alone, guided by tokens alone."""
    return detail(item, model, seed, dense=False, levels=1, register=False)


def unregistered(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """As `detail`, but without a look at pixels: M* from the attention of all cells, guided by tokens alone."""
    return detail(item, model, seed, register=False)


def single_stage(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """No alignment: the whole reference guides the refinement (the paper's ablation)."""
    settings = Settings(single_stage=True)
    return Outcome(refine_by_align(model, item.image, item.mask, item.reference, item.reference_mask, settings=settings, seed=seed).image)


def oracle(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """M_gt in place of the alignment's region, then as `detail`: what a faultless alignment would be worth."""
    if item.correspondence is None:
        raise InputError("method", f"oracle needs M_gt, which {item.id} lacks", "give a set with correspondence, or leave oracle out")
    return _redrawn(item, model, MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence), seed)


@torch.no_grad()
def features(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """The encoder alone aligns, by the likeness of its tokens of the crop and of the reference; then as `detail`."""
    whole = encode_reference(model, item.reference, item.object_mask)
    crop = zoom_crop(item.image, item.mask, model.config.image_size, context=model.config.alignment_context, multiple=model.stride)
    square, _ = segment(item.reference, item.object_mask, model.config.reference_fill)
    side = model.encoder_size
    query, key = F.normalize(model.tokens(torch.stack([resize(picture, side, side) for picture in (crop.image, square)])).float(), dim=-1)
    attention = (query @ key.T / TEMPERATURE).softmax(-1)
    try:
        region = clean(correspondence(attention, crop.mask), whole)
    except InputError:
        return replace(single_stage(item, model, seed), fell_back=True)
    return _redrawn(item, model, region, seed)


def no_reference(item: Item, model: RefineByAlign, seed: int) -> Outcome:
    """The embedding dropped as in training, no collage: what the surroundings and the model's memory give."""
    whole = encode_reference(model, item.reference, item.object_mask)
    dropped = replace(whole, embedding=torch.zeros_like(whole.embedding))
    return Outcome(redraw(model, item.image, item.mask, _crop(item, model), dropped, None, Settings(), seed))


def none(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """The image with its artifact: what a method has to beat."""
    return Outcome(item.image)


def telea(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """Inpainting from the surroundings alone (Telea 2004, radius 5), without model or reference."""
    cv2 = _opencv("telea")
    return Outcome(_masked(item, cv2.inpaint(_bytes(item.image), np.uint8(item.mask > 0.5) * 255, 5, cv2.INPAINT_TELEA)))


def sift_warp(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """Without a model: a homography by RANSAC over SIFT matches of the image's surroundings of the mask with the reference's
    object (ratio test at 0.8), the warped reference put in by Poisson blending. Where there is none, the image as it is."""
    cv2 = _opencv("sift-warp")
    cv2.setRNGSeed(seed)
    sift, box = cv2.SIFT_create(), Box.around(item.mask)
    around = box.square(3 * max(box.width, box.height))
    near = around.paste(torch.zeros(1, *item.mask.shape), torch.ones(1, around.height, around.width))[0]
    points, found = sift.detectAndCompute(_bytes(item.image), np.uint8((near > 0.5) & (item.mask < 0.5)))
    others, sought = sift.detectAndCompute(_bytes(item.reference), np.uint8(item.object_mask > 0.5))
    if found is None or sought is None or len(sought) < 2:
        return Outcome(item.image, fell_back=True)
    pairs = [best for best, second in cv2.BFMatcher().knnMatch(found, sought, k=2) if best.distance < 0.8 * second.distance]
    if len(pairs) < 4:
        return Outcome(item.image, fell_back=True)
    here, there = (np.float32([keypoints[index].pt for index in chosen]) for keypoints, chosen in ((points, [p.queryIdx for p in pairs]), (others, [p.trainIdx for p in pairs])))
    homography, _ = cv2.findHomography(here, there, cv2.RANSAC, 5.0)
    if homography is None or abs(np.linalg.det(homography)) < 1e-6:
        return Outcome(item.image, fell_back=True)
    height, width = item.mask.shape
    laid = cv2.warpPerspective(_bytes(item.reference), homography, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    flow = cv2.perspectiveTransform(np.float32(np.stack([x, y], -1)), homography) + 0.5  # OpenCV counts from a pixel's centre
    covered = cv2.warpPerspective(np.uint8(item.mask > 0.5), homography, item.reference.shape[:0:-1], flags=cv2.INTER_NEAREST)
    covered = torch.from_numpy(covered).float() * item.object_mask
    region = MatchedRegion(covered, Box.around(covered), covered) if covered.any() else None
    flow = torch.where(item.mask > 0.5, torch.from_numpy(flow).movedim(-1, 0), torch.nan)
    return Outcome(_masked(item, _poisson_blended(cv2, laid, item)), region, region is None, flow)


def oracle_warp(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """Without a model: the reference warped by the true correspondence, put in by Poisson blending."""
    cv2 = _opencv("oracle-warp")
    if item.flow is None:
        raise InputError("method", f"oracle-warp needs the true flow, which {item.id} lacks", "give a set with flow, say one of `rba bench make`, or leave oracle-warp out")
    places = _continued(item.flow).movedim(0, -1).numpy() - 0.5
    laid = cv2.remap(_bytes(item.reference), places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return Outcome(_masked(item, _poisson_blended(cv2, laid, item)), MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence), False, item.flow)


METHODS = {
    "detail": detail, "unregistered": unregistered, "paper": paper, "oracle": oracle, "features": features, "single-stage": single_stage, "no-reference": no_reference,
    "none": none, "telea": telea, "sift-warp": sift_warp, "oracle-warp": oracle_warp,
}  # fmt: skip
NEED_MODEL = set(METHODS) - {"none", "telea", "sift-warp", "oracle-warp"}


def _crop(item: Item, model: RefineByAlign) -> ZoomCrop:
    return zoom_crop(item.image, item.mask, model.config.image_size, context=model.config.context, multiple=model.stride)


def _redrawn(item: Item, model: RefineByAlign, region: MatchedRegion, seed: int) -> Outcome:
    """The second stage of `refine_by_align` on a region from elsewhere; the mask as one artifact."""
    settings, crop = Settings(), _crop(item, model)
    region, collage = register(crop, item.reference, item.object_mask, region, item.image, settings)
    guide = encode_reference(model, item.reference, grow(region, settings.region_margin) * item.object_mask)
    return Outcome(redraw(model, item.image, item.mask, crop, guide, believed(collage, settings), settings, seed), region, confidence=collage.confidence)


def _united(a: MatchedRegion, b: MatchedRegion) -> MatchedRegion:
    mask = torch.maximum(a.mask, b.mask)
    return MatchedRegion(mask, Box.around(mask), torch.maximum(a.soft, b.soft))


def _opencv(method: str):
    try:
        import cv2
    except ImportError as error:
        raise InputError("method", f"{method} needs OpenCV", 'pip install "refine-by-align[bench]"') from error
    return cv2


def _bytes(picture: Tensor) -> np.ndarray:
    """`[3, H, W]` in [0, 1] -> uint8 `[H, W, 3]`"""
    return (picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _masked(item: Item, filled: np.ndarray) -> Tensor:
    """The image with what its mask covers taken from uint8 `[H, W, 3]`."""
    return torch.where(item.mask > 0.5, torch.from_numpy(filled).permute(2, 0, 1).float() / 255, item.image)


def _poisson_blended(cv2, laid: np.ndarray, item: Item) -> np.ndarray:
    """Gradients of `laid` under the mask (Pérez et al. 2003). OpenCV's shaves three pixels off the mask, needs a border
    around it, and puts the middle of its box where told."""
    border = SHAVED + 1
    around = tuple(np.pad(picture, ((border, border), (border, border), (0, 0)), mode="edge") for picture in (laid, _bytes(item.image)))
    selected = cv2.dilate(np.pad(np.uint8(item.mask > 0.5) * 255, border), np.ones((3, 3), np.uint8), iterations=SHAVED)
    x, y, width, height = cv2.boundingRect(selected)
    return cv2.seamlessClone(*around, selected, (x + width // 2, y + height // 2), cv2.NORMAL_CLONE)[border:-border, border:-border]


def _continued(flow: Tensor) -> Tensor:
    """A flow `[2, H, W]` with its gaps filled: the affine map nearest to it, and the nearest pixel's departure from that."""
    known = ~flow.isnan().any(0)
    y, x = torch.meshgrid(*(torch.arange(float(extent)) for extent in flow.shape[1:]), indexing="ij")
    design = torch.stack([x, y, torch.ones_like(x)], -1)
    affine = (design @ torch.linalg.lstsq(design[known], flow[:, known].T).solution).movedim(-1, 0)
    row, column = ndimage.distance_transform_edt(~known.numpy(), return_distances=False, return_indices=True)
    return affine + (flow - affine)[:, torch.from_numpy(row), torch.from_numpy(column)]
