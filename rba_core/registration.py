"""Registration: the warp that lays the reference over the crop, settled on the pixels around the mask.

Attention says roughly where, how large and how turned. What surrounds the mask is right in both pictures, so the rest
is settled there: a search by normalised cross-correlation, Gauss-Newton on an affine map from coarse to fine, the best of
which are tried again stretched and turned, and then the simplest of MODELS that explains the surround: perspective and
curved surfaces need a richer one than a flat print seen from the front. What lies under the mask has no say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense_correspondence import Placement, centres
from .geometry import Box, resize

SEARCH, COARSE, MIDDLE, FINE, FINEST = 48, 32, 64, 128, 192
"""Sides of the crop, pixels: while searching, and while fitting."""
SCALES = tuple(1.13**step for step in range(-4, 5))
ROTATIONS = tuple(math.radians(angle) for angle in range(-36, 37, 9))
REACH = 1.0
"""How far the centre may lie from where attention has it, in half sides of the crop."""
CANDIDATES = 16
KEPT = 6, 2
"""Candidates that go on from COARSE to MIDDLE, and to FINE."""
PARENTS, STRETCH, TURN = 4, 1.4, 0.3
"""Of the fitted candidates the best few are tried again stretched by this factor, which a view from the side asks for and the
search, over similarities, has not, and turned by this angle, radians."""
SAME = 0.04
"""Candidates no farther apart than this, in half sides, say the same: one of them goes on."""
PRIOR = 0.03
SPREAD = 0.15, 0.15, 0.12
"""What attention errs by: shift in half sides, logarithm of the scale, radians. Its 60th to 75th percentiles on the
synthetic validation split."""
LOOSER = 2.0
"""How much more M* may err where no map came with it."""
CURVATURE = 1e-3
"""Stiffness of the terms beyond the affine ones, in shares of what the pixels say of those."""
MODELS = {"similarity": 1, "affine": 1, "homography": 2, "quadratic": 2, "cubic": 3}
"""From simple to rich, with their degrees."""
DEGREES = {3: 1, 6: 2, 10: 3}
"""Of a warp, by its number of terms."""
EXPLAINS = 0.02
"""A richer model must explain this share of what the simpler one leaves unexplained, and so must a fit in which faint print
counts as much as strong edges."""
FAINTEST = 3e-3
"""Variance below which print counts no more than this there: it may be grain."""
DETAIL, ATTENTION = 1.3, 0.2
"""What local correlation and attention count against 1 for the correlation, where candidates compete."""
UNLIKELY = 0.03, 0.1
"""What departure from the start and stretch count against a candidate."""
WINDOW, FAINT = 11, 3e-4
"""Of the local correlation: side in pixels of FINE, and the variance below which a window is flat."""
UNLIKE = 0.25, 0.3
"""Apart from the best candidate by this shift, in half sides, or log scale, another one is a rival."""
CALIBRATION = (10.46, 11.28, 1.06, 2.34, -3.69, -0.55, -3.25, -3.97), -13.72
"""Log-odds that a registration is right: what each of `Registration.evidence` counts, and the constant. A logistic regression
(`rba bench calibrate --limit 26`) over two sets of the validation split, seeds 5 and 7, the second with photos for textures and
light 1.5; right references and ones made to fail, as they are and taken anew twice: other light, softer, grainier, bent."""
UNKNOWN = 1.2
"""For the attention's evidence where it was not asked."""


@dataclass(frozen=True)
class Registration:
    """warp         `[2, K]`, K = 3, 6 or 10: (x, y) in [-1, 1] over the crop -> pixels of the reference, over `polynomials`
    agreement    `[FINE, FINE]`, local correlation of crop and reference, 0 to 1; under the mask that of its surround
    evidence     correlation, mean agreement of the surround, attention there, lead over the best rival, lead of the mirrored
                 reference, and what is less likely the larger it is: departure from the start, stretch, bending
    confidence   that it is right, 0 to 1
    """

    warp: Tensor
    agreement: Tensor
    evidence: tuple[float, ...]
    confidence: float


def register(
    picture: Tensor, mask: Tensor, reference: Tensor, reference_mask: Tensor, start: Tensor, placement: Placement | None = None, box: Box | None = None, *, disagreed: bool = False
) -> Registration:
    """Register a reference `[3, H, W]` to a square crop.

    picture     `[3, S, S]` in [0, 1], the crop
    mask        `[S', S']` in {0, 1}, M_a in it
    start       `[2, 3]`, (x, y) in [-1, 1] over the crop -> pixels of the reference, roughly
    placement   what attention saw, if it is to have a say; box: of the crop in the image
    disagreed   there is none because its cells agreed on no place: evidence against
    """
    half_side = float(torch.linalg.det(start[:, :2]).abs().sqrt())
    looser = LOOSER if placement is None else 1.0

    @cache
    def view(size: int) -> View:
        return View.of(picture, mask, reference, reference_mask, size, half_side)

    def total(seen: View, warps: Tensor, score: Tensor) -> Tensor:
        departure = _departure(warps, start, looser)
        said = -PRIOR * departure if placement is None else ATTENTION * attention_at(placement, box, warps)
        return score + DETAIL * seen.local_correlation(warps)[0] + said - UNLIKELY[0] * departure - UNLIKELY[1] * _stretch(warps)

    warps = _search(view(SEARCH), start, looser)
    if placement is not None:
        warps = torch.cat([warps, _variations(start)])
    lead = 0.0
    for size, kept, rounds, cut in ((COARSE, KEPT[0], 12, 0.2), (MIDDLE, KEPT[1], 8, 0.1)):
        seen = view(size)
        warps, score = seen.fit(warps, 1, rounds, cut)
        score = total(seen, warps, score)
        if size == COARSE:
            parents = warps[_distinct(warps, score, PARENTS, half_side)]
            children, theirs = seen.fit((parents[:, None] @ _stretches()).flatten(0, 1), 1, rounds, cut)
            warps, score = torch.cat([warps, children]), torch.cat([score, total(seen, children, theirs)])
            lead = _lead(warps, score, half_side)
        warps = warps[_distinct(warps, score, kept, half_side)]
    seen = view(FINE)
    warps, _ = seen.fit(warps, 1, 8, 0.1)
    bent, score = seen.fit(warps, 2, 10, 0.07)
    best = int(total(seen, bent, score).argmax())
    model, warp, correlation = _simplest(seen, warps[best : best + 1], bent[best : best + 1])
    freedom = _freedom(model, warp[0])
    evenly, _ = seen.evened().fit(warp, MODELS[model], 10, 0.07, freedom)
    if even := seen.unexplained(evenly) < (1 - EXPLAINS) * seen.unexplained(warp):
        warp = evenly
    if picture.shape[-1] > FINE:
        last = view(min(FINEST, picture.shape[-1]))
        warp, _ = (last.evened() if even else last).fit(warp, MODELS[model], 6, 0.07, freedom)
    _, agreement = seen.local_correlation(warp)
    agreeing = float((agreement[0] * seen.near).sum() / seen.near.sum())  # where nothing shows, or is to be compared, nothing agrees
    support = (0.0 if disagreed else UNKNOWN) if placement is None else float(attention_at(placement, box, warp)[0])
    evidence = correlation, agreeing, support, min(lead, 0.3), _mirrored_lead(view, warp[..., :3], start), *_implausible(warp, start, looser, half_side)
    weights, constant = CALIBRATION
    log_odds = constant + sum(weight * value for weight, value in zip(weights, evidence))
    return Registration(warp[0], seen.carried_under_the_mask(agreement[0]), evidence, 1 / (1 + math.exp(-log_odds)))


def polynomials(points: Tensor, degree: int) -> Tensor:
    """Products of Legendre polynomials of (x, y), `[..., 2]` -> `[..., K]`: x, y, 1, from degree 2 those of x², xy, y², for
    degree 3 also of x³, x²y, xy², y³."""
    x, y = points.unbind(-1)
    terms = [x, y, torch.ones_like(x)]
    if degree > 1:
        square_x, square_y = (3 * x * x - 1) / 2, (3 * y * y - 1) / 2
        terms += [square_x, x * y, square_y]
    if degree > 2:
        terms += [(5 * x * x - 3) * x / 2, square_x * y, x * square_y, (5 * y * y - 3) * y / 2]
    return torch.stack(terms, -1)


def slopes(points: Tensor, degree: int) -> tuple[Tensor, Tensor]:
    """Of `polynomials` in x and in y, each `[..., K]`."""
    x, y = points.unbind(-1)
    one, nil = torch.ones_like(x), torch.zeros_like(x)
    in_x, in_y = [one, nil, nil], [nil, one, nil]
    if degree > 1:
        in_x, in_y = in_x + [3 * x, y, nil], in_y + [nil, x, 3 * y]
    if degree > 2:
        square_x, square_y = (3 * x * x - 1) / 2, (3 * y * y - 1) / 2
        in_x, in_y = in_x + [5 * square_x + 1, 3 * x * y, square_y, nil], in_y + [nil, square_x, 3 * x * y, 5 * square_y + 1]
    return torch.stack(in_x, -1), torch.stack(in_y, -1)


def warped(warp: Tensor, points: Tensor) -> Tensor:
    """Points `[..., 2]` of the crop in [-1, 1] -> pixels of the reference; of warps `[N, 2, K]`: `[N, ..., 2]`."""
    basis = polynomials(points, DEGREES[warp.shape[-1]])
    return torch.einsum("...k,nik->n...i", basis, warp) if warp.ndim == 3 else basis @ warp.T


def grid(size: int) -> Tensor:
    """Centres of a crop's pixels, `[size, size, 2]` in [-1, 1]."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1)


def carry_back(mask: Tensor, warp: Tensor, height: int, width: int) -> Tensor:
    """A crop's mask `[S, S]` as it lies on the reference, `[height, width]` in {0, 1}; the warp is inverted by Newton's method."""
    carried = torch.zeros(height, width)
    landed = warped(warp, grid(mask.shape[-1])[mask > 0.5])
    steepest = torch.stack(slopes(torch.ones(2), DEGREES[warp.shape[1]])).amax(0)
    half_pixel = warp.abs() @ steepest / mask.shape[-1]  # at most
    low, high = (landed.amin(0) - half_pixel).floor().long() - 2, (landed.amax(0) + half_pixel).ceil().long() + 2
    columns, rows = (torch.arange(extent)[max(0, int(a)) : max(0, int(b))] for a, b, extent in zip(low, high, (width, height)))
    if not len(columns) or not len(rows):
        return carried
    wanted = torch.stack(torch.meshgrid(columns + 0.5, rows + 0.5, indexing="xy"), -1)
    points = (wanted - warp[:, 2]) @ torch.linalg.inv(warp[:, :2]).T
    if warp.shape[1] > 3:
        for _ in range(6):
            points = points.clamp(-2, 2)
            a, b = ((slope @ warp.T).movedim(-1, 0) for slope in slopes(points, DEGREES[warp.shape[1]]))
            determinant = a[0] * b[1] - a[1] * b[0]
            missing = wanted - warped(warp, points)
            step = torch.stack([b[1] * missing[..., 0] - b[0] * missing[..., 1], a[0] * missing[..., 1] - a[1] * missing[..., 0]], -1)
            points = points + step / torch.where(determinant.abs() < 1e-6, 1e-6, determinant)[..., None]
    seen = F.grid_sample(mask[None, None].float(), points[None], align_corners=False)[0, 0]
    carried[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = (seen > 0.5).float()
    return carried


def attention_at(placement: Placement, box: Box, warps: Tensor) -> Tensor:
    """How much more than evenly the cells of the placement's crop look where warps `[N, 2, K]` send them: mean
    logarithm, `[N]`. About 2 where it is right, 0 by chance."""
    side, tokens = (round(extent**0.5) for extent in placement.attention.shape)
    cells = torch.from_numpy(centres(side)).float()
    frame = placement.box
    pixels = cells * torch.tensor([frame.width, frame.height]) / 2 + torch.tensor([frame.x + frame.width / 2, frame.y + frame.height / 2])
    points = (pixels - torch.tensor([box.x + box.width / 2, box.y + box.height / 2])) / torch.tensor([box.width, box.height]) * 2
    square = placement.square
    sent = warped(warps[..., :3], points) - torch.tensor([square.x + square.width / 2, square.y + square.height / 2])
    sent = sent / torch.tensor([square.width, square.height]) * 2
    maps = placement.attention.float().cpu().view(-1, 1, tokens, tokens) * tokens**2
    shares = F.grid_sample(maps, sent.movedim(0, 1)[:, :, None], align_corners=False)[:, 0, :, 0]
    near = placement.weight / placement.weight.sum()
    return near @ torch.log(0.3 + shares)


@dataclass(frozen=True)
class View:
    """The crop at one size, and the reference at the size that it then has."""

    target: Tensor
    hole: Tensor
    near: Tensor
    layers: Tensor
    shrink: float

    @staticmethod
    def of(picture: Tensor, mask: Tensor, reference: Tensor, reference_mask: Tensor, size: int, half_side: float) -> View:
        hole = F.adaptive_avg_pool2d(mask[None, None].float(), size)[0, 0] if mask.shape[-1] >= size else resize(mask[None].float(), size, size)[0]
        layers, shrink = shrunk(reference, reference_mask, size / 2 / half_side)
        return View(resize(picture, size, size), hole, nearness(hole), layers, shrink)

    def sampled(self, warps: Tensor, points: Tensor) -> Tensor:
        """The layers where warps `[N, 2, K]` send points `[h, w, 2]`, `[N, 4, h, w]`."""
        return _sample(self.layers, warped(warps, points) * self.shrink)

    def fit(self, warps: Tensor, degree: int, rounds: int, cut: float, freedom: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gauss-Newton, tone refitted in each round, residuals beyond `cut` held for outliers: the best of each warp's
        rounds and their scores `[N]`. freedom `[2 * K, F]`: how alone the warps may change; default: at will."""
        size, count = self.target.shape[-1], len(warps)
        points = grid(size)
        basis = polynomials(points, degree).movedim(-1, 0)
        terms = len(basis)
        warps = F.pad(warps, (0, terms - warps.shape[-1])) * self.shrink
        stiffness = torch.zeros(2, terms)
        stiffness[:, 3:] = CURVATURE
        best, best_score = warps, torch.full((count,), -torch.inf)
        for turn in range(rounds + 1):
            places = warped(warps, points)
            shown = _sample(self.layers, places)
            weight = self.near * (shown[:, 3] > 0.99)
            toned, gain = _toned(shown[:, :3], self.target, weight, points)
            score = self._score(toned, shown[:, 3], weight)
            better = score > best_score
            best, best_score = torch.where(better[:, None, None], warps, best), torch.where(better, score, best_score)
            if turn == rounds:
                break
            nudge = torch.linalg.matrix_norm(warps[..., :2])[:, None, None, None] / size  # about half a pixel of the crop
            offsets = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
            beside = _sample(self.layers, (places[:, None] + offsets[:, None, None] * nudge[..., None]).flatten(0, 1)).unflatten(0, (count, 4))
            slope_x, slope_y = ((beside[:, i, :3] - beside[:, i + 1, :3]) / (2 * nudge) * gain[..., None, None] for i in (0, 2))
            residual = self.target - toned
            robust = weight * (beside[:, :, 3] > 0.99).all(1) / (1 + (residual / cut).square().mean(1))
            jacobian = torch.cat([slope_x[:, :, None] * basis, slope_y[:, :, None] * basis], 2).transpose(1, 2).flatten(2)
            weighted = jacobian * robust[:, None].expand(-1, 3, -1, -1).flatten(1)[:, None]
            normal, pull = weighted @ jacobian.mT, (weighted @ residual.flatten(1)[..., None])[..., 0]
            known = normal.diagonal(dim1=1, dim2=2)
            stiff = stiffness.flatten() * known[:, :3].mean(1, keepdim=True)
            damping = (0.02 * known.mean(1, keepdim=True) + 1e-6).expand_as(known)
            system, pull = normal + torch.diag_embed(stiff + damping), pull - stiff * warps.flatten(1)
            if freedom is None:
                step = torch.linalg.solve(system, pull)
            else:
                step = torch.linalg.solve(freedom.T @ system @ freedom, pull @ freedom) @ freedom.T
            warps = warps + step.view(count, 2, terms)
        return best / self.shrink, best_score

    def _score(self, toned: Tensor, valid: Tensor, weight: Tensor) -> Tensor:
        """Correlation of the surround `[N]`, less where the object does not show there, or does not fill the hole."""
        covered, filled = weight.sum((1, 2)) / self.near.sum(), (valid * self.hole).sum((1, 2)) / self.hole.sum()
        score = _correlation(toned, self.target, weight) * (covered / 0.6).clamp(max=1) - (1 - filled)
        return torch.where(covered < 0.1, -2.0, score)

    def local_correlation(self, warps: Tensor) -> tuple[Tensor, Tensor]:
        """Correlation in small windows, all channels: the mean over the surround where the crop has detail `[N]`, and
        the map `[N, S, S]`. Likeness of broad colours counts for nothing here."""
        size = self.target.shape[-1]
        shown = self.sampled(warps, grid(size))
        valid = ((shown[:, 3:] > 0.99) & (self.hole < 0.5)).float()
        share = windowed(valid).clamp(min=1e-3)
        picture, target = shown[:, :3] * valid, self.target * valid
        own, other = windowed(picture) / share, windowed(target) / share
        variances = [_variance(values, middle, share) + FAINT for values, middle in ((picture, own), (target, other))]
        joint = (windowed(picture * target) / share - own * other).sum(1)
        correlation = joint / (variances[0] * variances[1]).sqrt()
        weight = self.near * valid[:, 0] * variances[1].sqrt()
        return (correlation * weight).sum((1, 2)) / (weight.sum((1, 2)) + 1e-6), correlation

    def unexplained(self, warp: Tensor) -> float:
        """What local correlation lacks to 1 of one warp `[1, 2, K]`."""
        return 1 - float(self.local_correlation(warp)[0])

    def evened(self) -> View:
        """The same view, in which each pixel counts the less the stronger the contrast about it: squares of residuals would
        give an edge of the object, perhaps at another depth, all the say over the faint print on it."""
        beside = (self.hole < 0.5).float()[None]
        share, shown = windowed(beside).clamp(min=1e-3), self.target * beside
        near = self.near / (_variance(shown, windowed(shown) / share, share) + FAINTEST)
        return replace(self, near=near / near.max())

    def carried_under_the_mask(self, agreement: Tensor) -> Tensor:
        """A map `[S, S]` with what is known beside the mask spread under it, 0 to 1."""
        size = agreement.shape[-1]
        beside = self.near * (self.hole < 0.5)
        spread = blurred(torch.stack([agreement.clamp(min=0) * beside, beside]), size // 8)
        return torch.where(self.hole < 0.5, agreement, spread[0] / spread[1].clamp(min=1e-6)).clamp(0, 1)


def windowed(values: Tensor) -> Tensor:
    """Means over windows as local correlation takes them, `[..., C, S, S]`."""
    window = (WINDOW * values.shape[-1] // FINE) | 1
    return F.avg_pool2d(values, window, 1, window // 2, count_include_pad=False)


def _variance(values: Tensor, middle: Tensor, share: Tensor) -> Tensor:
    """Over windows, all channels, `[..., S, S]`, of values `[..., C, S, S]` of which those count that are not 0: `share` of each
    window, and `middle` their mean."""
    return (windowed(values**2) / share - middle**2).clamp(min=0).sum(-3)


def nearness(hole: Tensor) -> Tensor:
    """How much each pixel of the crop `[S, S]` counts: most next to the mask, nothing under it."""
    small = hole if hole.shape[-1] <= FINEST else F.adaptive_avg_pool2d(hole[None], FINEST)[0]
    near = blurred(small[None], small.shape[-1] // 12)
    near = F.interpolate(near[None], hole.shape, mode="bilinear")[0, 0]
    return torch.where(hole > 0.5, 0.0, (near / near.max().clamp(min=1e-6)).sqrt())


def shrunk(reference: Tensor, mask: Tensor, factor: float) -> tuple[Tensor, float]:
    """`[4, H, W]`, the picture where the object is and the object, shrunk by `factor` if that is below 1."""
    factor = min(1.0, factor)
    size = [max(8, round(extent * factor)) for extent in mask.shape]
    mask = resize(mask[None], *size)
    return torch.cat([resize(reference, *size) * mask, mask]), factor


def blurred(values: Tensor, reach: int) -> Tensor:
    """Three box filters, nearly a Gaussian, over `[C, S, S]`; deviation about `reach` pixels."""
    for _ in range(3):
        values = F.avg_pool2d(values, 2 * reach + 1, 1, reach, count_include_pad=False)
    return values


def _sample(layers: Tensor, places: Tensor) -> Tensor:
    """Layers `[C, H, W]` at pixels `[N, h, w, 2]` of them, `[N, C, h, w]`."""
    frame = torch.tensor([layers.shape[2], layers.shape[1]])
    rows = (places / frame * 2 - 1).flatten(0, 1)[None]
    return F.grid_sample(layers[None], rows, align_corners=False)[0].unflatten(1, places.shape[:2]).movedim(1, 0)


def _toned(shown: Tensor, target: Tensor, weight: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures `[N, 3, S, S]` in the target's tone, and each channel's gain `[N, 3]` in 0.5-2: least squares over a gain
    and an offset that changes linearly over the crop, as light does."""
    total = weight.sum((1, 2))[:, None, None, None].clamp(min=1e-6)
    centred = shown - (shown * weight[:, None]).sum((2, 3), keepdim=True) / total
    plane = polynomials(points, 1).movedim(-1, 0).expand(*shown.shape[:2], -1, -1, -1)
    design = torch.cat([plane, centred[:, :, None]], 2).flatten(3)
    weighted = design * weight.flatten(1)[:, None, None]
    prior = 1e-3 * total * torch.tensor([1.0, 1.0, 0.0, 1.0]) + 1e-6
    pull = (weighted @ target.flatten(1)[..., None])[..., 0] + 1e-3 * total[..., 0] * torch.tensor([0.0, 0.0, 0.0, 1.0])
    found = torch.linalg.solve(weighted @ design.mT + torch.diag_embed(prior[:, :, 0]), pull)
    gain = found[..., 3].clamp(0.5, 2)
    fitted = torch.cat([found[..., :3], gain[..., None]], -1)
    return (fitted[..., None] * design).sum(2).view_as(shown).clamp(0, 1), gain


def _correlation(pictures: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Of pictures `[N, 3, S, S]` with the target, all channels, `[N]`."""
    weight = weight[:, None]
    total = weight.sum((1, 2, 3), keepdim=True).clamp(min=1e-6)
    pictures, target = (values - (values * weight).sum((2, 3), keepdim=True) / total for values in (pictures, target))
    joint, own, other = ((a * b * weight).sum((1, 2, 3)) / total.flatten() for a, b in ((pictures, target), (pictures, pictures), (target, target)))
    return joint / ((own + 1e-3) * (other + 1e-3)).sqrt()


def _search(seen: View, start: Tensor, looser: float) -> Tensor:
    """The best shifts, scales and rotations about a start: `[CANDIDATES, 2, 3]`."""
    turns = [(scale, angle) for scale in SCALES for angle in ROTATIONS]
    similarities = torch.stack([scale * _rotation(angle) for scale, angle in turns])
    linear = start[:, :2] @ similarities
    placements = torch.cat([linear, start[:, 2].expand(len(turns), 2)[..., None]], -1)
    window = seen.sampled(placements, grid(round(SEARCH * (1 + REACH))) * (1 + REACH))
    shown, valid = window[:, :3], window[:, 3:]  # the picture is 0 where not valid

    def correlate(kernel: Tensor, field: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(field) * torch.fft.rfft2(kernel, s=field.shape[-2:]).conj()
        side = field.shape[-1] - SEARCH + 1
        return torch.fft.irfft2(spectrum, s=field.shape[-2:])[..., :side, :side]

    weight, template = seen.near, seen.target
    covered = correlate(weight, valid).clamp(min=1e-6)
    mean_t, mean_f = correlate(weight * template, valid) / covered, correlate(weight, shown) / covered
    spread_t = correlate(weight * template**2, valid) / covered - mean_t**2
    spread_f = correlate(weight, shown**2) / covered - mean_f**2
    joint = correlate(weight * template, shown) / covered - mean_t * mean_f
    score = joint.sum(1) / ((spread_t.clamp(min=0).sum(1) + 1e-3) * (spread_f.clamp(min=0).sum(1) + 1e-3)).sqrt()
    score = score * (covered[:, 0] / weight.sum() / 0.6).clamp(max=1)
    score = score - (1 - correlate(seen.hole, valid)[:, 0] / seen.hole.sum())  # the object must fill what is to be redrawn

    offsets = torch.linspace(-REACH, REACH, score.shape[-1])
    shifts = torch.stack(torch.meshgrid(offsets, offsets, indexing="xy"), -1)
    scales, angles = torch.tensor(turns).T[..., None, None]
    strayed = (scales * shifts.norm(dim=-1) / SPREAD[0]) ** 2 + (scales.log() / SPREAD[1]) ** 2 + (angles / SPREAD[2]) ** 2
    score = score - PRIOR * torch.log1p(strayed / looser**2)
    # a peak is highest among its neighbours in position, scale and rotation
    around = F.max_pool2d(score[:, None], 5, 1, 2).view(1, 1, len(SCALES), len(ROTATIONS), -1)
    around = F.max_pool3d(around, (3, 3, 1), 1, (1, 1, 0)).view_as(score)
    best = torch.where(score >= around, score, -torch.inf).flatten().topk(CANDIDATES).indices
    turn, place = best // len(offsets) ** 2, best % len(offsets) ** 2
    moved = start[:, 2] + (linear[turn] @ shifts.flatten(0, 1)[place][..., None])[..., 0]
    return torch.cat([linear[turn], moved[..., None]], -1)


def _variations(start: Tensor) -> Tensor:
    """A start and what it may have missed by: `[N, 2, 3]`."""
    scales = torch.tensor([[0.8, 0.8], [1.25, 1.25], [0.9, 1.12], [1.12, 0.9]])
    shifts = [[0.0, 0.0], [0.25, 0.0], [-0.25, 0.0], [0.0, 0.25], [0.0, -0.25]]
    moves = torch.stack([torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]]) for x, y in shifts])
    return start @ torch.cat([moves, _about_the_centre(torch.cat([torch.diag_embed(scales), _rotation(-0.25)[None], _rotation(0.25)[None]]))])


def _stretches() -> Tensor:
    """STRETCH along four axes, areas kept, and TURN either way: `[6, 3, 3]`, to be applied in the crop's frame."""
    angles = torch.arange(4) * math.pi / 4
    axes = torch.stack([angles.cos(), angles.sin()], -1)
    stretched = (torch.eye(2) + (STRETCH - 1) * axes[:, :, None] * axes[:, None]) / math.sqrt(STRETCH)
    return _about_the_centre(torch.cat([stretched, _rotation(TURN)[None], _rotation(-TURN)[None]]))


def _rotation(angle: float) -> Tensor:
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _about_the_centre(linear: Tensor) -> Tensor:
    """Linear maps `[N, 2, 2]` as affine ones without a shift, `[N, 3, 3]`."""
    return F.pad(linear, (0, 1, 0, 1)) + torch.diag(torch.tensor([0.0, 0.0, 1.0]))


def _distinct(warps: Tensor, score: Tensor, count: int, half_side: float) -> Tensor:
    """Indices of the best warps, `count` at most, of which none says the SAME as a better one."""
    places = warped(warps[..., :3], grid(4)).flatten(1, 2)
    chosen = []
    for index in score.argsort(descending=True).tolist():
        if all((places[index] - places[better]).norm(dim=1).mean() > SAME * half_side for better in chosen):
            chosen.append(index)
        if len(chosen) == count:
            break
    return torch.tensor(chosen)


def _departure(warps: Tensor, start: Tensor, looser: float) -> Tensor:
    """Logarithm of how far affine warps `[N, 2, K]` lie from a start, in what attention errs by, `[N]`."""
    back = torch.linalg.inv(start[:, :2])
    linear, shift = back @ warps[..., :2], (warps[..., 2] - start[:, 2]) @ back.T
    scale = 0.5 * torch.linalg.det(linear).clamp(min=1e-3).log()
    angle = torch.atan2(linear[:, 1, 0] - linear[:, 0, 1], linear[:, 0, 0] + linear[:, 1, 1])
    strayed = shift.square().sum(1) / SPREAD[0] ** 2 + (scale / SPREAD[1]) ** 2 + (angle / SPREAD[2]) ** 2
    return torch.log1p(strayed / looser**2)


def _implausible(warp: Tensor, start: Tensor, looser: float, half_side: float) -> tuple[float, float, float]:
    """Of one warp `[1, 2, K]` its departure from the start, its stretch, and how far its terms beyond the affine ones go, in half
    sides: much of any is seldom right."""
    return float(_departure(warp, start, looser)[0]), float(_stretch(warp)[0]), float(warp[0, :, 3:].norm() / half_side)


def _stretch(warps: Tensor) -> Tensor:
    """Logarithm of the longer axis of warps `[N, 2, K]` over the shorter one, `[N]`."""
    axes = torch.linalg.svdvals(warps[..., :2]).clamp(min=1e-6)
    return (axes[:, 0] / axes[:, 1]).log()


def _simplest(seen: View, affine: Tensor, quadratic: Tensor) -> tuple[str, Tensor, float]:
    """The simplest of MODELS that explains the surround: its name, warp and score. The quadratic one `[1, 2, 6]` is
    fitted already; the cubic one starts from it, the others from the affine one `[1, 2, 3]`."""
    chosen, least = None, torch.inf
    for model, degree in MODELS.items():
        start = quadratic if model in ("quadratic", "cubic") else affine
        freedom = _freedom(model, start[0])
        if model == "similarity":
            start = (start.flatten() @ torch.linalg.pinv(freedom).T @ freedom.T).view_as(start)
        warp, score = seen.fit(start, degree, 0 if model == "quadratic" else 10, 0.07, freedom)
        unexplained = seen.unexplained(warp)
        if unexplained < (1 - EXPLAINS) * least:
            chosen, least = (model, warp, float(score)), unexplained
    return chosen


def _freedom(model: str, warp: Tensor) -> Tensor | None:
    """The ways in which a warp `[2, K]` may change, `[2 * K', F]`; `None`: at will. A homography is one to second order: it
    maps p to Ap (1 - g · p), two terms more than an affine map."""
    if model == "similarity":
        return torch.tensor([[1.0, 0, 0, 0, 1, 0], [0, 1, 0, -1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).T
    if model != "homography":
        return None
    nil, (a, b) = torch.zeros(2), warp[:, :2].T
    tilts = [torch.stack([nil, nil, nil, 2 / 3 * a, b, nil], 1), torch.stack([nil, nil, nil, nil, a, 2 / 3 * b], 1)]
    return torch.cat([torch.eye(12)[[0, 1, 2, 6, 7, 8]], torch.stack(tilts).flatten(1)]).T


def _lead(warps: Tensor, score: Tensor, half_side: float) -> float:
    """How far the best warp is ahead of those that say something else."""
    best = int(score.argmax())
    shift = (warps[..., 2] - warps[best, :, 2]).norm(dim=1) / half_side
    sizes = torch.linalg.det(warps[..., :2]).abs().clamp(min=1e-6).log() / 2
    rivals = score[(shift > UNLIKE[0]) | ((sizes - sizes[best]).abs() > UNLIKE[1])]
    return float(score[best] - rivals.max()) if len(rivals) else 1.0


def _mirrored_lead(view, found: Tensor, start: Tensor) -> float:
    """How much better the mirrored reference fits than what was found, at most 0.5 either way. Right and left of a logo
    decide; of a plain symmetrical part nobody could tell."""
    flip = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    mirrored = torch.cat([_variations(start @ flip), found @ flip])
    seen = view(COARSE)
    mirrored, score = seen.fit(mirrored, 1, 12, 0.2)
    best = (score + DETAIL * seen.local_correlation(mirrored)[0]).topk(2).indices
    seen = view(MIDDLE)
    warps, score = seen.fit(torch.cat([mirrored[best], found]), 1, 8, 0.1)
    score = score + DETAIL * seen.local_correlation(warps)[0]
    return float((score[:2].max() - score[2]).clamp(-0.5, 0.5))
