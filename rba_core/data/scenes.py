"""Two views of one procedural product with exact correspondence (training triples of Sec. 3.4).

All maps are explicit. The image crop is rendered through ``crop -> uv`` (a homography and a smooth bend),
the reference through ``reference -> uv`` (a homography, hence invertible), so that

    flow = (uv -> reference) o (crop -> uv)

gives, for each point of the crop, where the same physical point stands in the reference. Coordinates are
``(x, y)`` in ``[-1, 1]`` over the pixel area (``align_corners=False``).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .textures import TRAINING, Style, background_texture, product_texture

REFERENCE_FILL = 0.5


@dataclass
class Scenes:
    """A batch of training triples.

    image           `[B, 3, S, S]` in [0, 1], the crop around the artifact as it should be
    mask            `[B, 1, S, S]` in {0, 1}, M_a
    reference       `[B, 3, R, R]` in [0, 1], I_r segmented and cropped, filled with grey outside
    flow            `[B, S/4, S/4, 2]`, crop -> reference, [-1, 1]
    visible         `[B, 1, S/4, S/4]` in {0, 1}, points that the flow can speak of
    """

    image: Tensor
    mask: Tensor
    reference: Tensor
    flow: Tensor
    visible: Tensor

    def to(self, device: torch.device) -> Scenes:
        return Scenes(**{name: value.to(device) for name, value in vars(self).items()})


class TextureBank:
    """A pool of textures, of which a few are drawn anew at each training step.

    count, size   products `[count, 4, size, size]` uint8, alpha is a shape to cut out; a quarter as many
                  backgrounds `[·, 3, size / 2, size / 2]`
    photos        uint8 `[H, W, 3]`, taken as textures beside the procedural ones
    redrawn       products drawn anew a step
    style         what is printed on them

    What is drawn depends on the seed, the place and the step alone, so a resumed run sees the same.
    """

    def __init__(self, count: int, size: int, seed: int, photos=(), redrawn: int = 0, style: Style = TRAINING, device="cpu", progress=lambda items: items):
        self.size, self.seed, self.photos, self.redrawn, self.style = size, seed, photos, redrawn, style
        self.device = torch.device(device)
        self.sides = [max(1, size >> level) for level in range(4)]
        self.starts = [sum(side**2 for side in self.sides[:level]) for level in range(5)]
        self.products = torch.empty(count, 4, size, size, dtype=torch.uint8, device=device)
        self.texels = torch.zeros(count, self.starts[-1], 4, dtype=torch.uint8, device=device)  # a colour is fetched as one int32
        self.backgrounds = torch.empty(max(1, count // 4), 3, size // 2, size // 2, dtype=torch.uint8, device=device)
        self.versions = [-1] * count
        self.progress = progress
        self.at(0)
        for index in range(len(self.backgrounds)):
            picture = background_texture(np.random.default_rng((seed, 1, index)), size // 2, photos, style)
            self.backgrounds[index] = torch.from_numpy(picture.copy()).permute(2, 0, 1)

    def at(self, step: int) -> None:
        """Bring the pool to the state that belongs to a training step."""
        count = len(self.products)
        drawn = step * self.redrawn
        wanted = [(drawn - index + count - 1) // count for index in range(count)]
        stale = [index for index in range(count) if self.versions[index] != wanted[index]]
        for index in self.progress(stale) if len(stale) == count else stale:
            self._draw(index, wanted[index])

    def _draw(self, index: int, version: int) -> None:
        picture = product_texture(np.random.default_rng((self.seed, 0, index, version)), self.size, self.photos, self.style)
        self.put(index, torch.from_numpy(picture.copy()).permute(2, 0, 1))
        self.versions[index] = version

    def put(self, index: int, picture: Tensor) -> None:
        """Make uint8 `[4, size, size]` the product at a place."""
        self.products[index] = picture
        surface = self.products[index, None, :3].float()
        for level, side in enumerate(self.sides):
            small = F.interpolate(surface, (side, side), mode="area")[0]
            self.texels[index, self.starts[level] : self.starts[level + 1], :3] = small.flatten(1).mT.round().byte()

    def look_up(self, product: Tensor, level: Tensor, which: Tensor, uv: Tensor) -> Tensor:
        """Colours `[3, n]` in [0, 1] at `uv` `[2, n]` in [-1, 1] of surfaces `which` `[n]`: of these, product `[m]` and how
        often it is halved against aliasing, level `[m]` (0 to 3, clamped)."""
        level = level.clamp(0, 3).long()
        sides = torch.tensor(self.sides, dtype=torch.int32, device=uv.device)[level]
        starts = (product * self.starts[-1] + torch.tensor(self.starts, device=uv.device)[level]).int()
        side, start = sides.index_select(0, which), starts.index_select(0, which)
        last = side - 1
        place = ((uv * 0.5 + 0.5) * side - 0.5).clamp_(min=0).minimum(last)
        low = place.int()
        right, down = place - low
        left, above = low
        across = (left < last).int()
        corner = start.add_(above * side).add_(left)
        under = corner + side * (above < last)
        texels = self.texels.view(torch.int32).view(-1)
        found = torch.stack([texels.index_select(0, place) for place in (corner, corner + across, under, under + across)])
        colour = torch.empty(3, len(which), device=uv.device)
        for channel in range(3):
            ink = ((found >> 8 * channel) & 255).float()
            colour[channel] = torch.lerp(torch.lerp(ink[0], ink[1], right), torch.lerp(ink[2], ink[3], right), down)
        return colour.div_(255)

    def picture(self, product: int, level: int) -> Tensor:
        """A product's surface `[1, 3, side, side]` in [0, 1], halved `level` times (0 to 3, clamped)."""
        level = min(max(level, 0), 3)
        texels = self.texels[product, self.starts[level] : self.starts[level + 1]].float().div_(255)
        return texels.view(1, self.sides[level], self.sides[level], 4).movedim(-1, 1)[:, :3]


class SceneSampler:
    """Draws `Scenes` from a texture bank.

    mode "alignment": the reference is the whole object, for some the surroundings of M_a's counterpart; "refinement":
    only that region, cut a little generously, as a region found by alignment is not exact.
    """

    def __init__(self, bank: TextureBank, seed: int, image_size: int = 256, reference_size: int = 224):
        self.bank, self.image_size, self.reference_size = bank, image_size, reference_size
        self.disparity = 1.0  # of pose and light between the views, in shares of the full range
        self.close_ups = 0.4  # share of the references in alignment mode that show little more than the region
        self.device = bank.device
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def at(self, step: int) -> None:
        """Bring the textures to the state that belongs to a training step."""
        self.bank.at(step)

    def seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def around_zero(self, spread: float, *shape: int) -> Tensor:
        return self.uniform(-spread, spread, *shape) * self.disparity

    def chance(self, probability: float, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator) < probability

    def sample(self, batch: int, mode: str) -> Scenes:
        # a default device costs several microseconds an operation; the CPU needs none
        device = nullcontext() if self.device.type == "cpu" else self.device
        # in half precision, coordinates would be no finer than a 256th of the picture
        with device, torch.autocast(self.device.type, enabled=False):
            return self._sample(batch, mode)

    def _sample(self, batch: int, mode: str) -> Scenes:
        index = torch.randint(len(self.bank.products), (batch,), generator=self.generator)
        texture = self.bank.products[index].float() / 255
        anchor = self._anchor(texture)

        context = self.uniform(2.0, 5.0, batch) if mode == "alignment" else self.uniform(1.5, 2.6, batch)
        # the mask's half side, in uv: under 4 % of the product's square in four of five, as most real artifacts (Sec. 3.4)
        extent = 0.1 * (4.5 ** self.uniform(0, 1, batch))
        offset = self.uniform(-0.15, 0.15, batch, 2)

        supersample = self.supersample
        points = grid(supersample * self.image_size, batch)
        uv = self._crop_to_uv(points, anchor, extent * context, offset)
        sampled = self._cut_out(index, uv, footprint=2 * extent * context / points.shape[1])
        if supersample > 1:
            sampled = F.avg_pool2d(sampled, supersample)
        alpha = sampled[:, 3:]
        mask = self._free_form(grid(self.image_size, batch), offset, 1 / context) * (alpha > 0.5)
        image = sampled[:, :3] * alpha + self._background(batch) * (1 - alpha)

        cells = (self.image_size // 4,) * 2
        coarse_uv = F.interpolate(uv.movedim(-1, 1), cells, mode="area").movedim(1, -1)
        inside = F.interpolate(mask, cells, mode="area")[:, 0] > 0.3
        on_object = F.interpolate(alpha, cells, mode="area")[:, 0] > 0.5
        reference, flow, visible = self._reference(index, texture[:, 3:], coarse_uv, inside, on_object, mode)
        return Scenes(self._soften(self._photometric(image)), mask, reference, flow, visible)

    def _reference(self, index, shape: Tensor, uv: Tensor, inside: Tensor, on_object: Tensor, mode: str, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The second view: reference, flow and visibility as in `Scenes`.

        index       of the products it shows, as `_cut_out` takes them
        shape       `[B, 1, ·, ·]`, their alpha over uv
        uv          `[B, S/4, S/4, 2]`, crop -> uv; there, whether M_a is inside and the object is seen
        known       `[B]`, items whose two views share their uv, all by default; the others show the whole object and no correspondence
        """
        batch = len(uv)
        uv_to_reference = self._uv_to_reference(shape)
        margin, shift, near = self._closeness(batch, mode)
        known = torch.ones_like(near) if known is None else known
        close = fit_to_frame(uv_to_reference, uv.flatten(1, 2), inside.flatten(1), margin)
        close[:, :2] = close[:, :2] + shift[..., None] * close[:, 2:]
        uv_to_reference = torch.where((near & known)[:, None, None], close, uv_to_reference)
        flow = transform(uv_to_reference, uv)

        reference_uv = transform(torch.linalg.inv(uv_to_reference), grid(self.reference_size, batch))
        sampled = self._cut_out(index, reference_uv, footprint=(reference_uv[:, -1, -1] - reference_uv[:, 0, 0]).norm(dim=-1) / 2**0.5 / self.reference_size)
        segment = (sampled[:, 3:] > 0.5).float()
        if mode == "refinement":
            segment = segment * torch.where(known[:, None, None, None], self._region(flow, inside), 1.0)
        reference = self._photometric(sampled[:, :3]) * segment + REFERENCE_FILL * (1 - segment)

        on_reference = (flow.abs() < 1).all(-1)
        in_segment = F.grid_sample(segment, flow, mode="nearest", align_corners=False)[:, 0] > 0.5
        return reference, flow, (on_reference & in_segment & on_object & known[:, None, None]).float()[:, None]

    def _closeness(self, batch: int, mode: str) -> tuple[Tensor, Tensor, Tensor]:
        """How close the references show M_a's counterpart: the frame's side in sides of it, where its centre stands
        `[B, 2]`, and whether at all; else they show the whole object. Alignment looks again once it knows roughly where."""
        if mode == "refinement":
            return self.uniform(1.0, 1.5, batch), torch.zeros(batch, 2), torch.ones(batch, dtype=torch.bool)
        margin = 1.6 * 2.8 ** self.uniform(0, 1, batch)
        return margin, self.uniform(-0.7, 0.7, batch, 2) * (1 - 1 / margin)[:, None], self.chance(self.close_ups, batch)

    @property
    def supersample(self) -> int:
        """Drawn finer than asked for against jagged outlines, where that is cheap."""
        return 2 if self.image_size <= 160 else 1

    def _cut_out(self, index: Tensor, uv: Tensor, footprint: Tensor) -> Tensor:
        """Products `[B]` with alpha at `uv` `[B, H, W, 2]`: `[B, 4, H, W]`. footprint `[B]`, a pixel's side in uv."""
        level = (footprint * self.bank.size / 2).log2().round().long()
        colour = [
            F.grid_sample(self.bank.picture(*which), places[None], padding_mode="border", align_corners=False)
            for *which, places in zip(index.tolist(), level.tolist(), uv)
        ]
        alpha = F.grid_sample(self.bank.products[index, 3:].float() / 255, uv, align_corners=False)
        return torch.cat([torch.cat(colour), alpha], 1)

    def _anchor(self, texture: Tensor) -> Tensor:
        """A point well inside the object, mostly where there is something to get wrong: uv `[B, 2]`."""
        small = F.interpolate(texture, (24, 24), mode="area")
        inner = (-F.max_pool2d(-small[:, 3:], 3, 1, 1) > 0.9).float()
        detail = F.max_pool2d(small[:, :3], 3, 1, 1) + F.max_pool2d(-small[:, :3], 3, 1, 1)
        weight = inner * (0.05 + detail.amax(1, keepdim=True)) + 1e-6 * small[:, 3:] + 1e-9
        cell = torch.multinomial(weight.flatten(1), 1, generator=self.generator)[:, 0]
        centre = torch.stack([cell % 24, cell // 24], -1)
        return (centre + self.uniform(0, 1, len(cell), 2)) / 12 - 1

    def _crop_to_uv(self, points: Tensor, anchor: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        batch = len(points)
        angle = self.normal(batch) * 0.3 * self.disparity
        stretch = torch.exp(self.around_zero(0.25, batch))
        linear = rotation(angle) * torch.stack([scale * stretch, scale / stretch], -1)[:, None]
        centred = points - offset[:, None, None]
        tilt = self.around_zero(0.15, batch, 2)
        depth = 1 + (centred * tilt[:, None, None]).sum(-1, keepdim=True)
        uv = torch.einsum("bij,bhwj->bhwi", linear, centred / depth) + anchor[:, None, None]
        # cloth, cylinders and other bends: a smooth field added to the flat map
        phase = self.uniform(0, 6.28, batch, 1, 1, 2)
        frequency = self.uniform(1.0, 3.0, batch, 1, 1, 2)
        strength = self.uniform(0, 0.08, batch, 1, 1, 1) * self.disparity * scale[:, None, None, None]
        return uv + strength * torch.sin(frequency * centred.flip(-1) + phase)

    def _free_form(self, points: Tensor, centre: Tensor, half_side: Tensor) -> Tensor:
        """The mask generator G: star-shaped blobs of Fourier radius, some of them elongated."""
        batch = len(points)
        turn = rotation(self.uniform(0, 6.28, batch))
        flat = torch.where(self.chance(0.5, batch), self.uniform(0.35, 0.7, batch), self.uniform(0.7, 1.0, batch))
        linear = turn / half_side[:, None, None] / torch.stack([torch.ones(batch), flat], -1)[..., None]
        start = -linear @ centre[..., None]
        across, down = points.unbind(-1)
        x, y = (linear[:, i, :1, None] * across + linear[:, i, 1:, None] * down + start[:, i, :, None] for i in (0, 1))
        length = torch.hypot(x, y).clamp_(min=1e-9)
        direction = torch.complex(x / length, y / length)
        # amplitude · cos(order · angle + phase) is the real part of wave · direction ** order
        waves = [torch.polar(self.uniform(-0.25, 0.25, batch) / order**0.7, self.uniform(0, 6.28, batch))[:, None, None] for order in range(2, 8)]
        swing = waves.pop() * direction
        for wave in reversed(waves):
            swing = swing.add_(wave).mul_(direction)
        return (length < 0.85 + (swing * direction).real).float()[:, None]

    def _uv_to_reference(self, alpha: Tensor) -> Tensor:
        batch = len(alpha)
        stretch = torch.exp(self.around_zero(0.25, batch))
        linear = rotation(self.normal(batch) * 0.2 * self.disparity) * torch.stack([stretch, 1 / stretch], -1)[:, None]
        homography = torch.eye(3).repeat(batch, 1, 1)
        homography[:, :2, :2] = linear
        homography[:, 2, :2] = self.around_zero(0.15, batch, 2)
        occupied = F.interpolate(alpha, (32, 32), mode="area").flatten(1) > 0.5
        return fit_to_frame(homography, grid(32, batch).flatten(1, 2), occupied, torch.ones(batch))

    def _region(self, flow: Tensor, inside: Tensor) -> Tensor:
        """M_a carried to the reference and cut generously: `[B, 1, R, R]` in {0, 1}."""
        batch, cells = len(flow), 24
        column, row = ((flow[..., axis] * 0.5 + 0.5) * cells for axis in (0, 1))
        valid = inside & (flow.abs() < 1).all(-1)
        cell = (row.long().clamp(0, cells - 1) * cells + column.long().clamp(0, cells - 1)).flatten(1)
        counts = torch.zeros(batch, cells * cells).scatter_add_(1, cell, valid.float().flatten(1))
        region = F.max_pool2d((counts > 0).float().view(batch, 1, cells, cells), 3, 1, 1)
        wide = F.max_pool2d(region, 7, 1, 3)
        region = torch.where(self.chance(0.5, batch)[:, None, None, None], wide, region)
        return (F.interpolate(region, (self.reference_size,) * 2, mode="bilinear") > 0.5).float()

    def _background(self, batch: int) -> Tensor:
        index = torch.randint(len(self.bank.backgrounds), (batch,), generator=self.generator)
        picture = self.bank.backgrounds[index].float() / 255
        shift, zoom = self.uniform(-0.5, 0.5, batch, 1, 1, 2), self.uniform(0.3, 0.8, batch, 1, 1, 1)
        return F.grid_sample(picture, grid(self.image_size, batch) * zoom + shift, padding_mode="reflection", align_corners=False)

    def _photometric(self, picture: Tensor) -> Tensor:
        """The colour perturbation S: exposure, white balance, gamma, shading, a highlight."""
        batch, size = len(picture), picture.shape[-1]
        gamma = torch.exp(self.around_zero(0.35, batch, 1, 1, 1))
        gain = torch.exp(self.around_zero(0.25, batch, 1, 1, 1) + self.around_zero(0.08, batch, 3, 1, 1))
        slope = self.around_zero(0.25, batch, 1, 1, 2)
        axis = grid(size, 1)[0, 0, :, 0]
        shading = 1 + (axis * slope[..., :1] + axis[:, None] * slope[..., 1:])
        spot = self.uniform(-1, 1, batch, 1, 1, 2)
        width = self.uniform(0.1, 0.5, batch, 1, 1, 1)
        across, down = (torch.exp(-(((axis - spot[..., i : i + 1]) / width) ** 2)) for i in (0, 1))
        strength = self.uniform(0, 0.5, batch, 1, 1, 1) * self.disparity * self.chance(0.3, batch)[:, None, None, None]
        picture = picture.clamp(1e-4, 1).log_().mul_(gamma).exp_().mul_(gain).mul_(shading)  # faster than a power
        return picture.add_(strength * down.mT * across).clamp_(0, 1)

    def _soften(self, picture: Tensor) -> Tensor:
        """Small objects are zoomed in from few pixels: lower the resolution of some, add sensor noise."""
        size = picture.shape[-1]
        levels = torch.randint(0, 4, (len(picture),), generator=self.generator)
        softened = picture.clone()
        for level, side in ((1, size * 5 // 8), (2, size * 7 // 16)):
            chosen = (levels == level).nonzero()[:, 0]
            low = F.interpolate(picture[chosen], (side, side), mode="bilinear", antialias=True)
            softened[chosen] = F.interpolate(low, (size, size), mode="bicubic")
        sigma = self.uniform(0, 0.03, len(picture), 1, 1, 1)
        return softened.add_(self.normal(*picture.shape).mul_(sigma)).clamp_(0, 1)


def grid(size: int, batch: int) -> Tensor:
    """Centres of the pixels of a square picture, `[B, size, size, 2]` in [-1, 1]."""
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).expand(batch, size, size, 2)


def rotation(angle: Tensor) -> Tensor:
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def transform(homography: Tensor, points: Tensor) -> Tensor:
    """Apply `[B, 3, 3]` to `[B, H, W, 2]` or `[B, N, 2]`."""
    matrix = homography[:, None, None] if points.ndim == 4 else homography[:, None]
    mapped = (matrix[..., :2] @ points[..., None])[..., 0] + matrix[..., 2]
    return mapped[..., :2] / mapped[..., 2:].clamp(min=0.1)


def fit_to_frame(homography: Tensor, points: Tensor, used: Tensor, margin: Tensor) -> Tensor:
    """Shift and scale the target so that the `used` points fill the frame's larger side, times 1/margin."""
    mapped = transform(homography, points)
    low = mapped.masked_fill(~used[..., None], 1e3).amin(1)
    high = mapped.masked_fill(~used[..., None], -1e3).amax(1)
    empty = ~used.any(1)
    low[empty], high[empty] = -1.0, 1.0
    half = ((high - low).amax(-1) / 2).clamp(min=0.02) * margin
    centre = (low + high) / 2
    fit = torch.eye(3).repeat(len(points), 1, 1)
    fit[:, 0, 0] = fit[:, 1, 1] = 1 / half
    fit[:, :2, 2] = -centre / half[:, None]
    return fit @ homography
