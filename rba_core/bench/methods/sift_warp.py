"""Keypoints, a homography and Poisson blending."""

from __future__ import annotations

import numpy as np
import torch

from ...geometry import Box
from ...imageio import to_bytes
from ...model import RefineByAlign
from ...postprocessing import MatchedRegion
from ..dataset import Item
from .opencv import masked, opencv, poisson_blended
from .outcome import Outcome


def sift_warp(item: Item, model: RefineByAlign | None, seed: int) -> Outcome:
    """Without a model: a homography by RANSAC over SIFT matches of the image's surroundings of the mask with the reference's
    object (ratio test at 0.8), the warped reference put in by Poisson blending. Where there is none, the image as it is."""
    cv2 = opencv("sift-warp")
    cv2.setRNGSeed(seed)
    sift, box = cv2.SIFT_create(), Box.around(item.mask)
    around = box.square(3 * max(box.width, box.height))
    near = around.paste(torch.zeros(1, *item.mask.shape), torch.ones(1, around.height, around.width))[0]
    points, found = sift.detectAndCompute(to_bytes(item.image), np.uint8((near > 0.5) & (item.mask < 0.5)))
    others, sought = sift.detectAndCompute(to_bytes(item.reference), np.uint8(item.object_mask > 0.5))
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
    laid = cv2.warpPerspective(to_bytes(item.reference), homography, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    flow = cv2.perspectiveTransform(np.float32(np.stack([x, y], -1)), homography) + 0.5  # OpenCV counts from a pixel's centre
    covered = cv2.warpPerspective(np.uint8(item.mask > 0.5), homography, item.reference.shape[:0:-1], flags=cv2.INTER_NEAREST)
    covered = torch.from_numpy(covered).float() * item.object_mask
    region = MatchedRegion(covered, Box.around(covered), covered) if covered.any() else None
    flow = torch.where(item.mask > 0.5, torch.from_numpy(flow).movedim(-1, 0), torch.nan)
    return Outcome(masked(item, poisson_blended(cv2, laid, item)), region, region is None, flow)
