"""Drift: what an image editor does to all of a crop beside redrawing the masked part: a small shift, zoom and colour cast.

Around the mask the crop should have come back as it was, so the drift shows there. A cast is slope, offset and power of each
channel, as in the colour decision list of film grading (ASC CDL). What it clipped to black or white cannot come back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, optimize
from torch import Tensor

from .geometry import resize
from .registration import View, blurred, grid, shrunk

SIZES = 64, 64, 128, 256
"""Sides of the crop, pixels, at which the shift and zoom are fitted, from coarse to fine; each fit trusts what the one before
made agree, for an editor may have redrawn some of the surround, too."""
ROUNDS, CUTS = (12, 12, 8, 8), (0.2, 0.1, 0.1, 0.07)
"""Of each fit, see `View.fit`."""
CAST_SIZE = 128
"""The same for the cast: coarse enough that noise is averaged out, fine enough that the mean of a curved tone is that of the mean."""
CLIPPED = 0.3
"""Share of black or white pixels from which on a cell of that size says nothing. Lower, noise in the shadows would leave too few."""
END = 2 / 255
"""So near to black or white a colour is held, in part, for clipped."""
MARGIN = 1 / 64
"""Editors redraw a little beyond the mask; of the crop's side."""
FARTHEST = 0.06, 0.1
"""No editor's drift: a shift, in sides of the crop, and a zoom beyond these."""
BELIEVED = 0.4
"""Agreement of the surround with the original, the drift undone, from which on it is believed."""
FAINT = 1e-5
"""Variance of detail below which a surround is flat."""
NOTICED = 0.1, 0.5 / 255
"""Less than that nobody sees: displacement anywhere in the crop, pixels of a crop of 512, and difference in colour."""


@dataclass(frozen=True)
class Drift:
    """What stood at p, pixels from the middle of the crop, an editor shows at `zoom` * p + `shift`, and what had colour c
    in `gain` * c ** `gamma` + `offset`.

    shift       (x, y), pixels of the redrawn crop
    gain        of red, green and blue; offset likewise, in [-1, 1], and gamma
    black       of each channel, what the original has on average where the redrawn crop is 0: it was clipped, and what it was is lost;
                white likewise, where it is 1
    agreement   correlation of the surround's detail with the original, at most 1: as redrawn, and with the drift undone
    """

    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0
    gain: tuple[float, ...] = (1.0, 1.0, 1.0)
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    gamma: tuple[float, ...] = (1.0, 1.0, 1.0)
    black: tuple[float, ...] = (0.0, 0.0, 0.0)
    white: tuple[float, ...] = (1.0, 1.0, 1.0)
    agreement: tuple[float, float] = (0.0, 0.0)

    @property
    def moved(self) -> bool:
        return self.zoom != 1 or self.shift != (0, 0)

    @property
    def tinted(self) -> bool:
        return (self.gain, self.offset, self.gamma) != (Drift.gain, Drift.offset, Drift.gamma)


def estimate_drift(redrawn: Tensor, original: Tensor, mask: Tensor) -> Drift:
    """The drift of a redrawn crop, from what surrounds its mask; none where that can't be told: flat surroundings, or
    redrawn themselves.

    redrawn    `[3, R, R']` in [0, 1]
    original   `[3, S, S']` in [0, 1], the crop as it was given to the editor, of any resolution
    mask       `[S, S']`, above 0.5 = what the editor was to redraw
    """
    finest = SIZES[-1]
    shown, wanted = (resize(picture.cpu().float(), finest, finest) for picture in (redrawn, original))
    clipped = resize((redrawn.cpu().float() - 0.5).abs().gt(0.498).float(), finest, finest)
    hole = F.interpolate((mask.cpu() > 0.5).float()[None, None], (finest, finest), mode="bilinear", antialias=True)[0, 0]
    reach = max(1, round(MARGIN * finest))
    hole = F.max_pool2d((hole > 0).float()[None], 2 * reach + 1, 1, reach)[0]
    if (hole == 0).float().mean() < 0.02:
        return Drift()
    middle = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]) * finest / 2
    shifts_and_zoom = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0]]).float().T
    warp, trust = middle[None], torch.ones(1, 1, 1)
    for size, rounds, cut in zip(SIZES, ROUNDS, CUTS):
        view = _view(shown, wanted, hole, size)
        trusted = replace(view, near=view.near * resize(trust, size, size)[0])
        warp, _ = trusted.fit(warp, 1, rounds, cut, shifts_and_zoom)
        trust = _trust(view, warp)
    before, after = (_agreement(view, candidate) for candidate in (middle[None], warp))
    zoom, shift = float(warp[0, 0, 0]) / finest * 2, (warp[0, :, 2] - middle[:, 2]) / finest
    if not after >= BELIEVED or shift.abs().max() > FARTHEST[0] or abs(zoom - 1) > FARTHEST[1]:
        return Drift(agreement=(before, after))
    drift = Drift(agreement=(before, before))
    if (shift.abs().max() + abs(zoom - 1) / 2) * 512 > NOTICED[0] and after > before:
        x, y = shift.tolist()
        drift = Drift((x * finest, y * finest), zoom, agreement=(before, after))
        shown, clipped = undo_drift(shown, drift), undo_drift(clipped, drift)
        drift = replace(drift, shift=(x * redrawn.shape[2], y * redrawn.shape[1]))
    view = _view(shown, wanted, hole, CAST_SIZE)
    gain, offset, gamma, black, white = _cast(view, _trust(view, middle[None])[0], F.adaptive_avg_pool2d(clipped, CAST_SIZE))
    return replace(drift, gain=gain, offset=offset, gamma=gamma, black=black, white=white)


def undo_drift(redrawn: Tensor, drift: Drift) -> Tensor:
    """The redrawn crop `[3, R, R']` without its drift, the same tensor where there is none. What the drift pushed over the
    crop's border is lost: the border's own pixels are repeated."""
    undone = redrawn
    if drift.moved:
        middle = (np.array(redrawn.shape[1:]) - 1) / 2
        start = middle + np.array(drift.shift[::-1]) - drift.zoom * middle
        channels = [ndimage.affine_transform(channel, [drift.zoom] * 2, start, mode="nearest") for channel in redrawn.cpu().double().numpy()]
        undone = torch.from_numpy(np.stack(channels)).to(redrawn)
    if drift.tinted:
        casts = drift.gain, drift.offset, drift.gamma, drift.black, drift.white
        gain, offset, gamma, black, white = (torch.tensor(values).to(redrawn)[:, None, None] for values in casts)
        shown = undone.clamp(0, 1)
        dark, light, undone = (((colour - offset) / gain).clamp(min=0) ** (1 / gamma) for colour in (0, 1, shown))
        undone = undone + (1 - shown / END).clamp(min=0) * (black - dark) + (1 - (1 - shown) / END).clamp(min=0) * (white - light)
    return redrawn if undone is redrawn else undone.clamp(0, 1)


def _view(shown: Tensor, wanted: Tensor, hole: Tensor, size: int) -> View:
    """All of the surround counts alike, as zoom shows best far from the mask."""
    hole = F.adaptive_max_pool2d(hole[None], size)[0]
    return View(resize(wanted, size, size), hole, 1 - hole, *shrunk(shown, torch.ones(shown.shape[1:]), size / shown.shape[-1]))


def _trust(view: View, warp: Tensor) -> Tensor:
    """`[1, S, S]`, 0 to 1: hardly any where the editor drew something else, a little of whose windows correlates by chance."""
    return view.local_correlation(warp)[1].clamp(0, 1) ** 4


def _agreement(view: View, warp: Tensor) -> float:
    """How far the surround agrees with the original in small windows, the more its detail there, the more that counts."""
    size = view.target.shape[-1]
    weight = view.near * (view.sampled(warp, grid(size))[0, 3] > 0.99)
    near = blurred(torch.cat([view.target * weight, weight[None]]), size // 32)
    detail = ((view.target - near[:3] / near[3:].clamp(min=1e-6)) * weight).square().sum(0)
    counts = blurred(detail[None], size // 32)[0] * weight
    return float((view.local_correlation(warp)[1][0] * counts).sum() / (counts.sum() + FAINT * weight.sum()))


def _cast(view: View, trust: Tensor, clipped: Tensor) -> tuple[tuple[float, ...], ...]:
    """Gain, offset, gamma, black and white of each channel, by a fit that outliers hardly sway. Where much is `clipped`, `[3, S, S]`,
    in 0 to 1, nothing can be known of the former three. Flat areas, which earn no trust, count a little."""
    casts = []
    for drifted, given, lost in zip(view.layers, view.target, clipped):
        known = (view.near > 0) & (lost < CLIPPED)
        y, x, weight = (values[known].double().numpy() for values in (drifted, given, (0.05 + trust).sqrt()))
        gain, offset, log_gamma = 1.0, 0.0, 0.0
        if len(x) > 16:
            x = np.log(x.clip(1e-3))
            steady = 0.01 * np.linalg.norm(weight)  # keeps gain and gamma near 1 where the surround has one colour only

            def residual(fit):
                return np.append(weight * (fit[0] * np.exp(x * np.exp(fit[2])) + fit[1] - y), (steady * (fit[0] - 1), steady * fit[2]))

            gain, offset, log_gamma = optimize.least_squares(residual, (1.0, 0.0, 0.0), loss="soft_l1", f_scale=0.02).x
        gamma = np.exp(log_gamma)
        dark, light = (max(0, (end - offset) / gain) ** (1 / gamma) for end in (0, 1))
        ends = [given[(view.near > 0) & (lost > 0.9) & (drifted.round() == end)] for end in (0, 1)]
        black, white = (bound(float(end.mean()), known) if len(end) > 16 else known for bound, end, known in zip((min, max), ends, (dark, light)))
        casts.append((float(gain), float(offset), float(gamma), float(black), float(white)))
    greys = np.linspace(0, 1, 9)
    if max(np.abs(gain * greys**gamma + offset - greys).max() for gain, offset, gamma, *_ in casts) < NOTICED[1]:
        return Drift.gain, Drift.offset, Drift.gamma, Drift.black, Drift.white
    return tuple(zip(*casts))
