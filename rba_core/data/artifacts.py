"""Simulated artifacts: what image generators get wrong inside an object, for test sets.

Each takes a picture `[3, H, W]` in [0, 1], a mask `[H, W]` and a generator, and returns new content for a
square around the mask; `simulate` blends it in.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage
from torch import Tensor

from ..errors import InputError
from ..geometry import Box
from ..stitch import feather_inside


def simulate(image: Tensor, mask: Tensor, kind: str, rng: np.random.Generator, feather: float = 1.5) -> Tensor:
    """`image` with an artifact where `mask` is above 0.5, and unchanged, bit for bit, elsewhere.

    image     `[3, H, W]` in [0, 1]
    mask      `[H, W]`
    kind      "garble", "smear", "swap", "invent" or "recolour"
    feather   width in pixels of the blend, inside the mask
    """
    if kind not in ARTIFACTS:
        raise InputError("artifact", f"{kind!r} is not known", f"use one of {', '.join(ARTIFACTS)}")
    box = Box.around(mask)
    box = box.square(2 * max(box.width, box.height))
    picture = box.crop(image).permute(1, 2, 0).double().numpy()
    inside = box.crop(mask[None], fill=0.0)[0].numpy() > 0.5
    drawn = torch.from_numpy(ARTIFACTS[kind](picture, inside, rng)).permute(2, 0, 1).clamp(0, 1).to(image)
    weight = feather_inside(mask, feather)
    return torch.where(weight > 0, image + weight * (box.paste(image, drawn) - image), image)


def garble(picture: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The right ink in the wrong places: a strong smooth displacement over a few displaced blocks."""
    size = np.sqrt(inside.sum())
    block = max(3, int(size * rng.uniform(0.18, 0.3)))
    y, x = np.mgrid[: inside.shape[0], : inside.shape[1]]
    cell = (y // block) * (inside.shape[1] // block + 1) + x // block
    moved = rng.uniform(size=cell.max() + 1) < 0.5
    offset = rng.normal(0, 0.16 * size, (2, cell.max() + 1)) * moved
    displacement = [ndimage.gaussian_filter(axis[cell], 0.12 * block) for axis in offset]
    for sigma, strength in ((size / 7, 0.13 * size), (max(1.5, size / 18), 0.045 * size)):
        displacement = [axis + strength * _smooth_noise(inside.shape, sigma, rng) for axis in displacement]
    return _sampled(picture, _kept_inside(y + displacement[0], x + displacement[1], inside))


def smear(picture: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Detail lost to a strong blur, longer in one direction."""
    size, angle = np.sqrt(inside.sum()), rng.uniform(0, np.pi)
    along, across = size * rng.uniform(0.12, 0.3), max(1.5, size * rng.uniform(0.03, 0.08))
    y, x = np.mgrid[: inside.shape[0], : inside.shape[1]].astype(float)
    steps = np.linspace(-2, 2, 25)
    weights = np.exp(-(steps**2) / 2)
    smeared = sum(
        w * _sampled(picture, _kept_inside(y + s * along * np.sin(angle), x + s * along * np.cos(angle), inside)) for s, w in zip(steps, weights)
    )
    return ndimage.gaussian_filter(smeared / weights.sum(), (across, across, 0))


def swap(picture: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another part of the object where this one belongs, turned or mirrored: of some places nearby the one
    that is closest in colour and has detail."""
    size = np.sqrt(inside.sum())
    y, x = np.mgrid[: inside.shape[0], : inside.shape[1]].astype(float)
    centre = np.array(ndimage.center_of_mass(inside))
    own = picture[inside].mean(0)
    candidates = []
    for _ in range(24):
        angle = rng.uniform(0, 2 * np.pi)
        shift = rng.uniform(0.6, 1.3) * size * np.array([np.sin(angle), np.cos(angle)])
        turn = rng.uniform(-0.6, 0.6) + np.pi * rng.integers(2)
        mirror = rng.choice([-1.0, 1.0])
        dy, dx = y - centre[0], (x - centre[1]) * mirror
        points = np.stack([np.cos(turn) * dy - np.sin(turn) * dx + centre[0] + shift[0], np.sin(turn) * dy + np.cos(turn) * dx + centre[1] + shift[1]])
        found = _sampled(picture, points)
        content = found[inside]
        candidates.append((np.abs(content.mean(0) - own).mean() - 0.5 * content.std(0).mean(), found))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def invent(picture: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Patches and strokes that mean nothing, in the region's colours."""
    size = np.sqrt(inside.sum())
    content = picture[inside]
    ranked = content[np.argsort(content.mean(1))]
    palette = ranked[(np.array([0.05, 0.35, 0.65, 0.95]) * len(ranked)).astype(int)]
    rng.shuffle(palette)
    drawn = np.broadcast_to(palette[0], picture.shape)
    for colour in palette[1 : rng.integers(2, 4)]:
        field = _smooth_noise(inside.shape, size * rng.uniform(0.07, 0.16), rng) - rng.uniform(-0.1, 0.8)
        drawn = np.where(ndimage.gaussian_filter((field > 0).astype(float), 0.8)[..., None] > 0.5, colour, drawn)
    strokes = Image.fromarray((drawn * 255).astype(np.uint8))
    draw = ImageDraw.Draw(strokes)
    spots = np.argwhere(inside)
    for _ in range(rng.integers(3, 9)):
        start = spots[rng.integers(len(spots))][::-1]
        heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.45, 14))
        path = start + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], -1) * size * 0.035, 0)
        ink = tuple(int(value) for value in palette[rng.integers(len(palette))] * 255)
        draw.line([tuple(point) for point in path], fill=ink, width=max(1, int(size * rng.uniform(0.02, 0.06))), joint="curve")
    return ndimage.gaussian_filter(np.asarray(strokes) / 255, (0.7, 0.7, 0))


def recolour(picture: np.ndarray, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The right drawing in the wrong colours: hues turned, the whole tinted, for grey has no hue to turn."""
    turn, tint = rng.uniform(np.pi / 2, 1.5 * np.pi), rng.uniform(0, 2 * np.pi)
    mean = picture[inside].mean(0)
    luma, first, second = np.moveaxis((picture - mean) @ OPPONENT.T, -1, 0)
    base = mean @ OPPONENT.T
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    shift = 0.22 * np.array([np.cos(tint), np.sin(tint)])
    if shift @ (base[1] * (along - [1, 0]) + base[2] * (across - [0, 1])) < 0:
        shift = -shift  # the tint would undo the turn
    chroma = (base[1] + first)[..., None] * along + (base[2] + second)[..., None] * across + shift
    return np.concatenate([(base[0] + luma)[..., None], chroma], -1) @ np.linalg.inv(OPPONENT).T


OPPONENT = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
"""RGB -> luma and two axes of hue, YIQ."""

ARTIFACTS = {"garble": garble, "smear": smear, "swap": swap, "invent": invent, "recolour": recolour}


def _smooth_noise(shape: tuple[int, int], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit deviation with features of about `sigma` pixels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return noise / noise.std()


def _kept_inside(y: np.ndarray, x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Points `[2, H, W]`, those that leave the mask moved to its nearest pixel, so that no surroundings come in."""
    rows, columns = (axis.clip(0, extent - 1) for axis, extent in zip((y, x), inside.shape))
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    at = rows.round().astype(int), columns.round().astype(int)
    outside = ~inside[at]
    return np.where(outside, nearest[:, at[0], at[1]], np.stack([rows, columns]))


def _sampled(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    return np.stack([ndimage.map_coordinates(channel, points, order=1, mode="mirror") for channel in np.moveaxis(picture, -1, 0)], -1)
