"""How good a refined image and a matched region are.

Pictures are `[3, H, W]` in [0, 1], masks `[H, W]` with the selection above 0.5. The pixel metrics look at the
masked part only; their windows reach over its border, where a refined image equals the truth.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..geometry import Box
from ..reference_encoding import EncodedReference

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
MARGIN = 32  # px around the mask that the windows below may read
FLAT = 0.03  # standard deviation in grey levels of range 1; print on a product has 0.1 to 0.5, sensor noise 0.01


def masked_psnr(result: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Peak signal-to-noise ratio over the masked pixels in dB, peak 1; at most 100, which equal pictures reach."""
    error = (result - truth)[:, mask > 0.5].double().square().mean()
    return float(-10 * torch.log10(error.clamp(min=1e-10)))


def masked_ssim(result: Tensor, truth: Tensor, mask: Tensor) -> float:
    """SSIM of the grey pictures (Wang et al. 2004: Gaussian window of sigma 1.5, 11 x 11), mean over the mask; -1 to 1."""
    a, b, inside = _grey_around(result, truth, mask)
    return float(_ssim_map(a, b)[inside].mean())


def hp_ssim(result: Tensor, truth: Tensor, mask: Tensor) -> float:
    """SSIM of the grey pictures less their Gaussian blur of sigma 4 px, mean over the mask; -1 to 1.

    The constants are those of pictures of range 1, so that detail fainter than 3 % of the range counts as
    none. A blurred result, good by PSNR and SSIM, is near 0 here where the truth has detail.
    """
    a, b, inside = _grey_around(result, truth, mask)
    a, b = (picture - ndimage.gaussian_filter(picture, 4.0) for picture in (a, b))
    return float(_ssim_map(a, b)[inside].mean())


def detail_ncc(result: Tensor, truth: Tensor, mask: Tensor, window: int = 9, shift: int = 4) -> float:
    """Normalised cross-correlation of `window` x `window` windows of the grey pictures, for each the best of
    the shifts up to `shift` px, mean over the mask; -1 to 1.

    Forgives a small displacement, not a missing letter. Correlation is undefined where a window is flat, so
    each window, less its mean, is divided by its norm or by that of a window of deviation 0.03, whichever is
    larger, and one more component fills it up to a unit vector. Hence two flat windows score 1, a flat one
    and a detailed one 0, and traces of the right detail too faint to see little. Visible contrast does not
    count, so a blurred edge still correlates (`hp_ssim` tells it); unrelated detail reaches 0.4 to 0.5, as the
    best of 81 shifts is taken.
    """
    a, b, inside = _grey_around(result, truth, mask)
    (mean_a, scale_a, rest_a), (mean_b, scale_b, rest_b) = (_window_moments(picture, window) for picture in (a, b))
    best = np.full(b.shape, -1.0)
    for dy in range(-shift, shift + 1):
        for dx in range(-shift, shift + 1):
            shifted, mean, scale, rest = (_shifted(values, dy, dx) for values in (a, mean_a, scale_a, rest_a))
            covariance = ndimage.uniform_filter(shifted * b, window) - mean * mean_b
            np.maximum(best, covariance / (scale * scale_b) + rest * rest_b, out=best)
    return float(best[inside].mean())


def iou(region: Tensor, correspondence: Tensor) -> float:
    """Intersection over union of two masks: M* and M_gt."""
    region, correspondence = region > 0.5, correspondence > 0.5
    return int((region & correspondence).sum()) / max(1, int((region | correspondence).sum()))


def box_iou(region: Tensor, correspondence: Tensor) -> float:
    """Intersection over union of the boxes around two masks. Raises `InputError` where one is empty."""
    a, b = Box.around(region), Box.around(correspondence)
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    shared = max(0, width) * max(0, height)
    return shared / (a.width * a.height + b.width * b.height - shared)


def soft_iou(soft: Tensor, correspondence: Tensor) -> float:
    """Sum of minima over sum of maxima of a map in [0, 1] and M_gt: what the map says before it is cut."""
    selected = (correspondence > 0.5).to(soft)
    return float(torch.minimum(soft, selected).sum() / torch.maximum(soft, selected).sum().clamp(min=1e-9))


def end_point_error(flow: Tensor, truth: Tensor, correspondence: Tensor) -> float:
    """Mean distance of two flows `[2, H, W]` over the pixels whose truth is known, in units of the region's size, the
    root of the area of M_gt; at most 1, which a flow that is missing somewhere has there."""
    known = ~truth.isnan().any(0)
    distance = (flow - truth)[:, known].norm(dim=0) / float((correspondence > 0.5).sum()) ** 0.5
    return float(distance.nan_to_num(1.0).clamp(max=1.0).mean())


def token_rounding_iou(correspondence: Tensor, reference_mask: Tensor | None = None, tokens: int = 16) -> float:
    """IoU of M_gt with itself rounded to the token grid of the reference: whole tokens, of which it covers half or more; of a
    region that covers half of none, those that it covers most."""
    grid = _token_grid(correspondence, reference_mask, tokens)
    share = grid.to_tokens((correspondence > 0.5).float())
    rounded = (share >= share.max().clamp(max=0.5)).float()
    whole = F.interpolate(rounded[None, None], (grid.box.height, grid.box.width), mode="nearest-exact")[0]
    return iou(grid.box.paste(torch.zeros(1, *correspondence.shape), whole)[0] * grid.mask, correspondence)


def token_bound_iou(correspondence: Tensor, reference_mask: Tensor | None = None, tokens: int = 16) -> float:
    """IoU of M_gt with the best that a map over the tokens of the reference can say: what a faultless alignment gets.

    Each of `tokens` x `tokens` takes the share of it that M_gt covers and goes back as M* does, bilinear and
    cut at a share of the peak, the best of 0.05 to 0.95.
    """
    grid = _token_grid(correspondence, reference_mask, tokens)
    soft = grid.to_reference(grid.to_tokens((correspondence > 0.5).float())) * grid.mask
    return max(iou((soft >= cut * soft.max()).float(), correspondence) for cut in np.linspace(0.05, 0.95, 19))


def region_tokens(correspondence: Tensor, reference_mask: Tensor | None = None, tokens: int = 16) -> float:
    """Size of M_gt, the root of its area, in sides of a token."""
    return float((correspondence > 0.5).sum()) ** 0.5 / _token_grid(correspondence, reference_mask, tokens).box.width * tokens


def _token_grid(correspondence: Tensor, reference_mask: Tensor | None, tokens: int) -> EncodedReference:
    """How `tokens` x `tokens` lie over the reference's object, or over all of it."""
    if reference_mask is None:
        reference_mask = torch.ones_like(correspondence)
    box = Box.around(reference_mask)
    return EncodedReference(torch.empty(1, tokens**2, 0), box.square(max(box.width, box.height)), (reference_mask > 0.5).float())


def outside_changed_pixels(result: Tensor, image: Tensor, mask: Tensor) -> int:
    """Pixels outside the mask that differ in 8 bits; a refined image has 0."""
    changed = ((result * 255).round() != (image * 255).round()).any(0)
    return int((changed & (mask <= 0.5)).sum())


def _grey_around(result: Tensor, truth: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Luma of both pictures and the mask, cut to the mask's box and MARGIN around it."""
    box = Box.around(mask)
    rows = slice(max(0, box.y - MARGIN), box.y + box.height + MARGIN)
    columns = slice(max(0, box.x - MARGIN), box.x + box.width + MARGIN)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    a, b = (torch.einsum("c,chw->hw", luma, picture[:, rows, columns].double()).numpy() for picture in (result, truth))
    return a, b, (mask[rows, columns] > 0.5).numpy()


def _ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def mean(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, 1.5, radius=5)

    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b, covariance = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    return luminance * (2 * covariance + SSIM_C2) / (variance_a + variance_b + SSIM_C2)


def _window_moments(picture: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each window, what its deviation is divided by, and the component that fills it up to length 1."""
    mean = ndimage.uniform_filter(picture, window)
    variance = np.maximum(ndimage.uniform_filter(picture**2, window) - mean**2, 0)
    return mean, np.sqrt(np.maximum(variance, FLAT**2)), np.sqrt(np.maximum(1 - variance / FLAT**2, 0))


def _shifted(values: np.ndarray, dy: int, dx: int) -> np.ndarray:
    height, width = values.shape
    rows, columns = (np.arange(height) + dy).clip(0, height - 1), (np.arange(width) + dx).clip(0, width - 1)
    return values[rows][:, columns]
