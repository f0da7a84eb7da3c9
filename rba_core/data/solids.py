"""Solid products seen from two sides: boxes, cans, bottles, mugs, toys and signs, ray-cast in closed form.

A product is a handful of boxes, frustums and ellipsoids in its own frame (x right, y down, z away from the
viewer). A view turns it, and a window of the image plane is the picture. The plane stands at the product's
centre, its units are the product's. A point hit in one view, projected to the other and found unhidden there,
gives the exact correspondence. Points and rays are `[g, 3, N]`, component first: on a CPU that is twice as fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .scenes import REFERENCE_FILL, Scenes, SceneSampler, grid

BOX, FRUSTUM, ELLIPSOID = "box", "frustum", "ellipsoid"


@dataclass
class Part:
    """One convex piece of `g` products.

    centre, half    `[g, 3]`, half sides before turning
    turn            `[g, 3, 3]`, the piece's frame -> the product's
    taper           `[g]`, radius of a frustum's upper end in shares of its lower
    textures        `[g, 6]` indices into the bank: a box's faces; front, back, top and bottom of the others
    """

    kind: str
    centre: Tensor
    half: Tensor
    turn: Tensor
    taper: Tensor
    textures: Tensor


@dataclass
class View:
    """turn `[g, 3, 3]`, product -> camera; distance `[g]` of the camera from the product's centre; light `[g, 3]`,
    a direction in the camera's frame, and ambient `[g]`, its share that comes from everywhere."""

    turn: Tensor
    distance: Tensor
    light: Tensor
    ambient: Tensor

    @property
    def origin(self) -> Tensor:
        """Where the camera stands, `[g, 3, 1]` in the product's frame."""
        return -self.turn[:, 2, :, None] * self.distance[:, None, None]

    def rays(self, plane: Tensor) -> Tensor:
        """Directions `[g, 3, N]` through points `[g, 2, N]` of the image plane; they reach it at t = 1."""
        depth = self.distance[:, None, None].expand(-1, 1, plane.shape[2])
        return self.turn.mT @ torch.cat([plane, depth], 1)

    def project(self, points: Tensor) -> Tensor:
        """`[g, 3, N]` of the product -> `[g, 2, N]` of the image plane."""
        seen = self.turn @ points
        depth = (seen[:, 2:] + self.distance[:, None, None]).clamp(min=0.1)
        return seen[:, :2] / depth * self.distance[:, None, None]


class SolidSampler(SceneSampler):
    """Draws `Scenes` of solid products; the interface of `SceneSampler`."""

    templates = ("box", "can", "bottle", "mug", "toy", "sign")

    def _sample(self, batch: int, mode: str) -> Scenes:
        template = torch.randint(len(self.templates), (batch,), generator=self.generator)
        counts = torch.bincount(template, minlength=len(self.templates)).tolist()
        groups = [self._group(name, count, mode) for name, count in zip(self.templates, counts) if count]
        return Scenes(*(torch.cat(maps) for maps in zip(*(vars(group).values() for group in groups))))

    def _group(self, template: str, count: int, mode: str) -> Scenes:
        parts = getattr(self, f"_{template}")(count)
        image_view, reference_view = self._views(count)
        anchor = self._anchor_on(parts, image_view, reference_view)

        context = self.uniform(2.0, 5.0, count) if mode == "alignment" else self.uniform(1.5, 2.6, count)
        half = 0.1 * 4.5 ** self.uniform(0, 1, count) * context
        offset = self.uniform(-0.15, 0.15, count, 2)
        centre = anchor - offset * half[:, None]

        picture, alpha = self._render(parts, image_view, centre, half, self.image_size, self.supersample)
        mask = self._free_form(grid(self.image_size, count), offset, 1 / context) * (alpha > 0.5)
        image = picture * alpha + self._background(count) * (1 - alpha)

        cells = self.image_size // 4
        plane = lattice(cells, centre, half)
        points, hit, _ = self._hit(parts, image_view, plane)
        landed = reference_view.project(points)
        seen = hit & self._unhidden(parts, reference_view, points)
        inside = (F.interpolate(mask, (cells, cells), mode="area")[:, 0] > 0.3) & seen.view(-1, cells, cells)
        margin, shift, near = self._closeness(count, mode)
        middle, reach = around(landed, inside.flatten(1), margin)
        whole = self._frame(parts, reference_view)
        window = torch.where(near[:, None], middle - shift * reach[:, None], whole[0]), torch.where(near, reach, whole[1])
        flow = ((landed - window[0][..., None]) / window[1][:, None, None]).mT.reshape(count, cells, cells, 2)

        reference, segment = self._render(parts, reference_view, *window, self.reference_size)
        segment = (segment > 0.5).float()
        if mode == "refinement":
            segment = segment * self._region(flow, inside)
        reference = self._photometric(reference) * segment + REFERENCE_FILL * (1 - segment)
        image = self._soften(self._photometric(image))

        in_segment = F.grid_sample(segment, flow, mode="nearest", align_corners=False)[:, 0] > 0.5
        visible = seen.view(-1, cells, cells) & (flow.abs() < 1).all(-1) & in_segment
        return Scenes(image, mask, reference, flow, visible.float()[:, None])

    def _views(self, count: int) -> tuple[View, View]:
        yaw, pitch = self.uniform(-0.7, 0.7, count), self.uniform(-0.15, 0.5, count)
        views = []
        for spread in (0.0, self.disparity):
            around_y = yaw + spread * (self.normal(count) * 0.35).clamp(-0.9, 0.9)
            around_x = pitch + spread * (self.normal(count) * 0.15).clamp(-0.4, 0.4)
            roll = self.normal(count) * 0.15 * self.disparity
            light = torch.stack([self.uniform(-1, 1, count), self.uniform(-1, 0.3, count), self.uniform(-1, -0.4, count)], -1)
            turn = turned(2, roll) @ turned(0, around_x) @ turned(1, around_y)
            views.append(View(turn, self.uniform(3, 9, count), F.normalize(light, dim=-1), self.uniform(0.45, 0.95, count)))
        return views[0], views[1]

    def _frame(self, parts: list[Part], view: View) -> tuple[Tensor, Tensor]:
        """The square window around the product: centre `[g, 2]`, half side `[g]`."""
        plane = lattice(48, view.turn.new_zeros(len(view.turn), 2), 1.5 * torch.ones(len(view.turn)))
        return around(plane, self._hit(parts, view, plane)[1], self.uniform(1.02, 1.1, len(plane)))

    def _anchor_on(self, parts: list[Part], image_view: View, reference_view: View) -> Tensor:
        """A point of the image plane `[g, 2]` on the product, in sight of both cameras, mostly where there is detail."""
        side = 32
        plane = lattice(side, torch.zeros(len(image_view.turn), 2), 1.3 * torch.ones(len(image_view.turn)))
        points, hit, part = self._hit(parts, image_view, plane)
        both = hit & self._unhidden(parts, reference_view, points)
        colour = self._colour(parts, image_view, points, part, torch.full_like(image_view.distance, 2.6 / side), lit=False)
        colour = colour.unflatten(-1, (side, side))
        detail = (F.max_pool2d(colour, 3, 1, 1) + F.max_pool2d(-colour, 3, 1, 1)).amax(1).flatten(1)
        weight = both * (0.05 + detail) + 1e-5 * hit + 1e-9
        return plane.gather(2, torch.multinomial(weight, 1, generator=self.generator)[:, None].expand(-1, 2, -1))[..., 0]

    def _render(self, parts: list[Part], view: View, centre: Tensor, half: Tensor, size: int, supersample: int = 1) -> tuple[Tensor, Tensor]:
        """A window of the image plane as a picture `[g, 3, size, size]` and the product's alpha `[g, 1, size, size]`."""
        fine = size * supersample
        points, hit, part = self._hit(parts, view, lattice(fine, centre, half))
        colour = self._colour(parts, view, points, part, 2 * half / fine)
        both = torch.cat([colour, hit[:, None].float()], 1).unflatten(-1, (fine, fine))
        if supersample > 1:
            both = F.avg_pool2d(both, supersample)
        return both[:, :3] / both[:, 3:].clamp(min=1e-3), both[:, 3:]

    def _hit(self, parts: list[Part], view: View, plane: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is first met through points of the image plane: points `[g, 3, N]` of the product, whether any, and which part."""
        rays = view.rays(plane)
        nearest, part = first(parts, view.origin, rays)
        hit = nearest < math.inf
        return view.origin + torch.where(hit, nearest, 1.0)[:, None] * rays, hit, part

    def _unhidden(self, parts: list[Part], view: View, points: Tensor) -> Tensor:
        nearest, _ = first(parts, view.origin, points - view.origin)
        return nearest > 1 - 0.02 / view.distance[:, None]

    def _colour(self, parts: list[Part], view: View, points: Tensor, part: Tensor, footprint: Tensor, lit: bool = True) -> Tensor:
        """Colour `[g, 3, N]` in [0, 1], 0 where no part is; in the view's light or as printed. footprint: `[g]`, a pixel's
        side in the product's units."""
        count, _, rays = points.shape
        colour = torch.zeros(3, count * rays, device=points.device)
        by_component = points.transpose(0, 1).reshape(3, -1)
        for index, piece in enumerate(parts):
            here = part == index
            counts, place = here.sum(1), here.flatten().nonzero()[:, 0]
            item = torch.arange(count, device=points.device).repeat_interleave(counts)
            into = (piece.turn / piece.half[:, None]).mT
            start = -into @ piece.centre[..., None]
            of_items = by_component.index_select(1, place).split(counts.tolist(), 1)
            local = torch.cat([torch.addmm(*affine) for affine in zip(start, into, of_items)], 1)
            slot, uv, outward = SURFACES[piece.kind](local, piece.taper.index_select(0, item))

            which = item * 6 + slot
            extent = EXTENTS[piece.kind](piece.half)
            longer = extent.amax(-1)
            level = (footprint[:, None] * self.bank.size / 2 / longer).log2().round()
            uv = uv * (extent / longer[..., None]).flatten(0, 1).mT.index_select(1, which)
            found = self.bank.look_up(piece.textures.flatten(), level.flatten(), which, uv)
            if lit:
                light = piece.turn.mT @ view.turn.mT @ view.light[..., None]
                normal = outward / piece.half.mT.index_select(1, item)
                lambert = (normal * light[..., 0].mT.index_select(1, item)).sum(0) / normal.square().sum(0).sqrt_()
                ambient = view.ambient.index_select(0, item)
                found = found.mul_(ambient + 1.3 * (1 - ambient) * lambert.clamp_(min=0)).clamp_(max=1)
            colour.index_copy_(1, place, found)
        return colour.view(3, count, rays).transpose(0, 1)

    # -- what there is to see

    def _part(self, kind: str, centre, half, textures: Tensor, turn: Tensor | None = None, taper: Tensor | float = 1.0) -> Part:
        count = len(textures)
        centre, half = (torch.stack([torch.as_tensor(value, dtype=torch.float32).expand(count) for value in triple], -1) for triple in (centre, half))
        turn = torch.eye(3).expand(count, 3, 3) if turn is None else turn
        return Part(kind, centre, half, turn, torch.as_tensor(taper, dtype=torch.float32).expand(count), textures)

    def _textures(self, count: int) -> Tensor:
        return torch.randint(len(self.bank.products), (count, 6), generator=self.generator)

    def _box(self, count: int) -> list[Part]:
        return [self._part(BOX, (0, 0, 0), self.uniform(0.35, 0.8, 3, count), self._textures(count))]

    def _sign(self, count: int) -> list[Part]:
        width, height = self.uniform(0.5, 0.9, 2, count)
        return [self._part(BOX, (0, 0, 0), (width, height, 0.03), self._textures(count))]

    def _can(self, count: int) -> list[Part]:
        radius, height, textures = self.uniform(0.35, 0.6, count), self.uniform(0.4, 0.8, count), self._textures(count)
        rim = self._part(FRUSTUM, (0, -height - 0.04, 0), (radius, 0.04, radius), textures.roll(2, 1), taper=self.uniform(0.8, 0.95, count))
        return [self._part(FRUSTUM, (0, 0, 0), (radius, height, radius), textures), rim]

    def _bottle(self, count: int) -> list[Part]:
        radius, height, neck = self.uniform(0.25, 0.42, count), self.uniform(0.35, 0.6, count), self.uniform(0.3, 0.6, count)
        shoulder, stalk, textures = self.uniform(0.05, 0.2, count), self.uniform(0.08, 0.2, count), self._textures(count)
        top, plain, low = -height - 2 * shoulder, textures[:, 4:5].expand(-1, 6), 0.25
        return [
            self._part(FRUSTUM, (0, low, 0), (radius, height, radius), textures),
            self._part(FRUSTUM, (0, low - height - shoulder, 0), (radius, shoulder, radius), plain, taper=neck),
            self._part(FRUSTUM, (0, low + top - stalk, 0), (radius * neck, stalk, radius * neck), plain),
            self._part(FRUSTUM, (0, low + top - 2 * stalk - 0.06, 0), (radius * neck * 1.15, 0.06, radius * neck * 1.15), textures.roll(1, 1)),
        ]

    def _mug(self, count: int) -> list[Part]:
        radius, height, textures = self.uniform(0.4, 0.6, count), self.uniform(0.4, 0.65, count), self._textures(count)
        side = torch.where(self.chance(0.5, count), 1.0, -1.0)
        bar, plain = self.uniform(0.05, 0.09, count), textures[:, 5:].expand(-1, 6)
        reach, lift = self.uniform(0.12, 0.2, count), height * 0.55
        return [
            self._part(FRUSTUM, (0, 0, 0), (radius, height, radius), textures, taper=self.uniform(0.9, 1.15, count)),
            *(self._part(BOX, (side * (radius + reach), sign * lift, 0), (reach, bar, bar), plain) for sign in (-1, 1)),
            self._part(BOX, (side * (radius + 2 * reach), 0, 0), (bar, lift + bar, bar), plain),
        ]

    def _toy(self, count: int) -> list[Part]:
        coat, belly, eye = (texture[:, :1].expand(-1, 6) for texture in (self._textures(count), self._textures(count), self._textures(count)))
        front = torch.cat([belly[:, :1], coat[:, 1:]], 1)
        head, body = self.uniform(0.3, 0.42, count), self.uniform(0.32, 0.45, count)
        stretch, ear = self.uniform(0.8, 1.2, count), self.uniform(0.1, 0.2, count)
        limb, spread = self.uniform(0.1, 0.16, count), self.uniform(0.2, 1.2, count)
        neck = 0.35 - body * stretch
        parts = [
            self._part(ELLIPSOID, (0, 0.3, 0), (body, body * stretch, body * 0.85), front),
            self._part(ELLIPSOID, (0, neck - 0.6 * head, -0.05), (head, head * 0.9, head * 0.9), coat),
            self._part(ELLIPSOID, (0, neck - 0.45 * head, -0.05 - 0.8 * head), (head * 0.4, head * 0.3, head * 0.35), belly),
        ]
        for sign in (-1, 1):
            parts += [
                self._part(ELLIPSOID, (sign * 0.75 * head, neck - 1.35 * head, 0), (ear, ear * stretch**2, ear * 0.5), coat),
                self._part(ELLIPSOID, (sign * 0.38 * head, neck - 0.8 * head, -0.05 - 0.78 * head), (head * 0.14,) * 3, eye),
                self._part(ELLIPSOID, (sign * (body + 0.6 * limb), 0.2, -0.1), (limb, limb * 2.4, limb), coat, turned(2, -sign * spread)),
                self._part(ELLIPSOID, (sign * 0.6 * body, 0.3 + body * stretch, -0.2), (limb * 1.2, limb, limb * 2), coat),
            ]
        return parts


def turned(axis: int, angle: Tensor) -> Tensor:
    """Rotations `[g, 3, 3]` about a coordinate axis, radians."""
    cos, sin = angle.cos(), angle.sin()
    a, b = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = torch.eye(3, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, a, a] = matrix[:, b, b] = cos
    matrix[:, a, b], matrix[:, b, a] = -sin, sin
    return matrix


def around(points: Tensor, used: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """The square around the `used` `[g, N]` of `points` `[g, 2, N]`: centre `[g, 2]` and half side `[g]`, times
    `margin`; around the middle where none is used."""
    low = points.masked_fill(~used[:, None], math.inf).amin(2)
    high = points.masked_fill(~used[:, None], -math.inf).amax(2)
    some = used.any(1)
    low, high = torch.where(some[:, None], low, -1.0), torch.where(some[:, None], high, 1.0)
    return (low + high) / 2, ((high - low).amax(-1) / 2).clamp(min=0.02) * margin


def lattice(size: int, centre: Tensor, half: Tensor) -> Tensor:
    """Centres of the pixels of a window of the image plane, `[g, 2, size²]`; centre `[g, 2]`, half side `[g]`."""
    return centre[..., None] + grid(size, len(half)).flatten(1, 2).mT * half[:, None, None]


def first(parts: list[Part], origin: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays `[g, 3, N]` from `origin` `[g, 3, 1]` first enter a part: t `[g, N]`, infinite for none, and its index."""
    nearest = torch.full_like(rays[:, 0], math.inf)
    index = torch.full_like(nearest, -1)
    for number, part in enumerate(parts):
        into = (part.turn / part.half[:, None]).mT
        start, along = into @ (origin - part.centre[..., None]), into @ rays
        t = ENTRIES[part.kind](start, along, part.taper[:, None])
        closer = t < nearest
        nearest, index = torch.where(closer, t, nearest), torch.where(closer, number, index)
    return nearest, index


def enter_box(start: Tensor, along: Tensor, taper: Tensor) -> Tensor:
    inverse = 1 / torch.where(along.abs() < 1e-9, 1e-9, along)
    middle, reach = -start * inverse, inverse.abs()
    near, far = (middle - reach).amax(1), (middle + reach).amin(1)
    return torch.where((near < far) & (near > 0), near, math.inf)


def enter_ellipsoid(start: Tensor, along: Tensor, taper: Tensor) -> Tensor:
    a, b, c = (along * along).sum(1), (start.mT @ along)[:, 0], (start * start).sum(1) - 1
    root = b * b - a * c
    t = (-b - root.clamp(min=0).sqrt()) / a
    return torch.where((root > 0) & (t > 0), t, math.inf)


def enter_frustum(start: Tensor, along: Tensor, taper: Tensor) -> Tensor:
    """The radius runs from 1 at y = 1 to `taper` at y = -1."""
    middle, slope = (1 + taper) / 2, (1 - taper) / 2
    (ox, oy, oz), (dx, dy, dz) = start.unbind(1), along.unbind(1)
    radius = middle + slope * oy
    a = dx * dx + dz * dz - slope**2 * dy * dy
    b = ox * dx + oz * dz - slope * dy * radius
    c = ox**2 + oz**2 - radius**2
    root = b * b - a * c
    side = (-b - root.clamp(min=0).sqrt()) / torch.where(a.abs() < 1e-9, 1e-9, a)
    height = oy + side * dy
    t = torch.where((root > 0) & (side > 0) & (height.abs() <= 1), side, math.inf)
    for end, limit in ((1, 1.0), (-1, taper)):
        cap = (end - oy) / torch.where(dy.abs() < 1e-9, 1e-9, dy)
        within = (ox + cap * dx).square() + (oz + cap * dz).square() <= limit**2
        t = torch.where((cap > 0) & within & (cap < t), cap, t)
    return t


def box_surface(local: Tensor, taper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of points `[3, n]` on the unit piece: which texture `[n]`, where on it `[2, n]` in [-1, 1], and outward `[3, n]`."""
    size = local.abs()
    x, y, z = local
    on_x, on_y = (size[0] >= size[1]) & (size[0] >= size[2]), size[1] >= size[2]  # an argmax, several times as fast
    axis = torch.where(on_x, 0, torch.where(on_y, 1, 2))
    along = local.gather(0, axis[None])
    uv = torch.stack([torch.where(on_x, z, x), torch.where(~on_x & on_y, z, y)])
    return axis * 2 + (along[0] > 0), uv, torch.zeros_like(local).scatter_(0, axis[None], along.sign())


def ellipsoid_surface(local: Tensor, taper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slot, u = _half_turn(local)
    return slot, torch.stack([u, local[1].clamp(-1, 1).asin() / (math.pi / 2)]), local


def frustum_surface(local: Tensor, taper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slot, u = _half_turn(local)
    x, y, z = local
    slope = (1 - taper) / 2
    cap = y.abs() > 0.999
    slot = torch.where(cap, 2 + (y > 0).long(), slot)
    uv = torch.stack([torch.where(cap, x, u), torch.where(cap, z, y)])
    side = -slope * ((1 + taper) / 2 + slope * y)
    return slot, uv, torch.stack([torch.where(cap, 0.0, x), torch.where(cap, y, side), torch.where(cap, 0.0, z)])


def _half_turn(local: Tensor) -> tuple[Tensor, Tensor]:
    """Front or back (0, 1), and the place along its half turn in [-1, 1]."""
    angle = torch.atan2(local[0], -local[2]) / math.pi
    back = angle.abs() > 0.5
    return back.long(), 2 * torch.where(back, angle - angle.sign(), angle)


def box_extents(half: Tensor) -> Tensor:
    """Half the sides of the six textures of pieces, `[g, 3]` -> `[g, 6, 2]`."""
    return half[:, [[2, 1], [2, 1], [0, 2], [0, 2], [0, 1], [0, 1]]]


def ellipsoid_extents(half: Tensor) -> Tensor:
    return (half[:, None, :2] * math.pi / 2).expand(-1, 6, 2)


def frustum_extents(half: Tensor) -> Tensor:
    around, cap = half[:, :2] * torch.tensor([math.pi / 2, 1.0], device=half.device), half[:, [0, 2]]
    return torch.stack([around, around, cap, cap, cap, cap], 1)


ENTRIES = {BOX: enter_box, FRUSTUM: enter_frustum, ELLIPSOID: enter_ellipsoid}
SURFACES = {BOX: box_surface, FRUSTUM: frustum_surface, ELLIPSOID: ellipsoid_surface}
EXTENTS = {BOX: box_extents, FRUSTUM: frustum_extents, ELLIPSOID: ellipsoid_extents}
