"""Benchmark sets of procedural products: two views of one object, correspondence and truth known exactly.

Held out: a set has seeds, typefaces, words and patterns that training never sees.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import fft, ndimage
from torch import Tensor
from tqdm import tqdm

from ..data.artifacts import ARTIFACTS, simulate
from ..data.mixture import HELD_OUT
from ..data.scenes import SceneSampler, TextureBank, grid, rotation
from ..data.solids import Part, SolidSampler, View, around, lattice, turned
from ..data.textures import TESTING, background_texture
from ..errors import InputError
from ..geometry import Box
from ..imageio import to_bytes, write_picture

SPLITS = {"validation": 0, "test": 1}
"""The bit of a seed that tells the splits apart."""
TASKS = ("customization", "view_synthesis", "compositing", "try_on")
CAPTIONS = {
    "customization": "a photo of a printed {}", "view_synthesis": "a photo of a printed {}, seen from another side",
    "compositing": "a photo of a printed {} in another place", "try_on": "a photo of a printed {} in folds",
}  # fmt: skip
MASK_SHARE = (0.003, 0.05)
NOWHERE = 2.0
"""A coordinate out of the picture: of points that the other view does not show."""

DISPARITIES = {"easy": (0.0, 0.25), "medium": (0.25, 0.5), "hard": (0.5, 1.0)}
"""What makes customization and try-on difficult: ranges of `Pair.disparity`."""
TURNS = {"easy": (8.0, 18.0), "medium": (18.0, 32.0), "hard": (32.0, 50.0)}
"""What makes view synthesis difficult: degrees between the views."""
LIGHTS = {"easy": (0.6, 0.9), "medium": (0.9, 1.3), "hard": (1.3, 1.8)}
"""What makes compositing difficult: the difference in light and colour, in shares of the training's range."""


@dataclass(frozen=True)
class Pair:
    """A product seen twice.

    truth            `[3, S, S]` in [0, 1]
    mask             `[S, S]` in {0, 1}, M_a, on the object
    reference        `[3, S, S]` in [0, 1]
    reference_mask   `[S, S]` in {0, 1}, the object in the reference
    correspondence   `[S, S]` in {0, 1}, M_gt on the reference
    flow             `[S, S, 2]`, truth -> reference, (x, y) in [-1, 1]; NOWHERE off the object and where hidden
    disparity        how far the map from view to view is from a plain change of scale at the mask: the norm of
                     its normalised Jacobian less the identity. A turn by 20 degrees in the plane alone gives 0.49
    kind             what the product is, a noun
    """

    truth: Tensor
    mask: Tensor
    reference: Tensor
    reference_mask: Tensor
    correspondence: Tensor
    flow: Tensor
    disparity: float
    kind: str


@dataclass(frozen=True)
class Sight:
    """One view: picture `[3, S, S]` in [0, 1], the product's alpha `[S, S]`, and where each pixel's point stands in
    the other view, `[S, S, 2]` in [-1, 1], NOWHERE off the product and where hidden."""

    picture: Tensor
    alpha: Tensor
    elsewhere: Tensor


@dataclass(frozen=True)
class Sheet:
    """A thin product as a picture shows it: an invertible map between the picture and the texture's uv.

    linear            `[2, 2]`, turn and stretch
    tilt              `[2]`, perspective: how fast the depth grows along x and y
    waves             `[K, 6]`, smooth bends: amplitude, frequency, phase, how much their folds catch the light, and
                      the angles in uv of the direction they run in and of that they move points in; invertible
                      while the products of amplitude and frequency sum to less than 1
    scale, place      half side and centre `[2]` in the picture
    """

    linear: Tensor
    tilt: Tensor
    waves: Tensor
    scale: float = 1.0
    place: Tensor | float = 0.0

    def to_uv(self, points: Tensor) -> Tensor:
        """Picture `[..., 2]` -> uv, both in [-1, 1]."""
        centred = (points - self.place) / self.scale
        flat = centred / (1 + centred @ self.tilt)[..., None].clamp(min=0.1) @ self.linear.T
        return flat + self._bend(flat)[0]

    def from_uv(self, uv: Tensor) -> Tensor:
        """The way back; the bends by Newton's method."""
        flat = uv
        for _ in range(8):
            bend, slope = self._bend(flat)
            residual = flat + bend - uv
            if residual.abs().amax() < 1e-5:
                break
            a, b, c, d = (slope + torch.eye(2)).flatten(-2).unbind(-1)
            x, y = residual.unbind(-1)
            flat = flat - torch.stack([d * x - b * y, a * y - c * x], -1) / (a * d - b * c)[..., None]
        centred = flat @ torch.linalg.inv(self.linear).T
        return centred / (1 - centred @ self.tilt)[..., None].clamp(min=0.1) * self.scale + self.place

    def _bend(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """How far the bends move points `[..., 2]`, and the derivative `[..., 2, 2]`."""
        amplitude, frequency, phase, _, direction, motion = self.waves.T
        along, across = (torch.stack([angle.cos(), angle.sin()], -1) for angle in (direction, motion))
        angle = flat @ along.T * frequency + phase
        slope = torch.einsum("...k,ki,kj->...ij", amplitude * frequency * angle.cos(), across, along)
        return (amplitude * angle.sin()) @ across, slope

    def shading(self, flat: Tensor) -> Tensor:
        """Light on the folds that the bends come from, `[...]` around 1, at points `[..., 2]` of the texture."""
        amplitude, frequency, phase, lightness, direction, _ = self.waves.T
        angle = flat @ torch.stack([direction.cos(), direction.sin()]) * frequency + phase
        return 1 + (lightness * amplitude * frequency * angle.cos()).sum(-1)


class PairSampler(SceneSampler):
    """Draws `Pair`s; its children say of what.

    seed         one product and background pair a seed
    size         S, pixels a side
    task         of TASKS
    difficulty   "easy", "medium" or "hard": what it ranges over depends on the task
    light        of the difference in light and colour between the views, in shares of the full range
    photos       uint8 `[H, W, 3]`, taken as textures beside the procedural ones
    """

    textures, texture_size = 1, None

    def __init__(self, seed: int, size: int, task: str, difficulty: str, light: float = 1.0, photos=()):
        super().__init__(TextureBank(self.textures, self.texture_size or size, seed, photos, style=TESTING), seed, image_size=size)
        self.size, self.task, self.difficulty, self.light = size, task, difficulty, light
        self.rng = np.random.default_rng((seed, 2))
        self.disparities = DISPARITIES[difficulty] if task in ("customization", "try_on") else (0.0, math.inf)

    def draw(self) -> Pair | None:
        """One pair, or `None` where no mask was found that fits on the object and covers something of interest."""
        truth, reference = self.views()
        for _ in range(8):
            mask = self._mask(truth)
            if mask is None or not self.disparities[0] <= (disparity := _disparity(truth.elsewhere, mask)) < self.disparities[1]:
                continue
            reference_mask = (reference.alpha > 0.5).float()
            correspondence = (F.grid_sample(mask[None, None], reference.elsewhere[None], align_corners=False)[0, 0] > 0.5) * reference_mask
            if correspondence.sum() < 64 or not _worth_matching(truth.picture, truth.alpha > 0.5, mask > 0.5):
                continue
            return Pair(truth.picture, mask, reference.picture, reference_mask, correspondence, truth.elsewhere, disparity, self.kind)
        return None

    def views(self) -> tuple[Sight, Sight]:
        """The image without artifact and the reference."""
        raise NotImplementedError

    def _mask(self, sight: Sight) -> Tensor | None:
        """A free-form mask `[S, S]` in {0, 1} on what both views show, mostly where there is detail."""
        in_both = (sight.elsewhere.abs() < 1).all(-1)
        small = F.interpolate(sight.picture[None], scale_factor=0.125, mode="area")
        detail = (F.max_pool2d(small, 3, 1, 1) + F.max_pool2d(-small, 3, 1, 1)).amax((0, 1))
        weight = F.interpolate(in_both[None, None].float(), detail.shape, mode="area")[0, 0].square() * (0.05 + detail)
        cell = int(torch.multinomial(weight.flatten() + 1e-9, 1, generator=self.generator))
        place = torch.tensor([cell % detail.shape[1], cell // detail.shape[1]]) + self.uniform(0, 1, 2)
        centre = place / torch.tensor(detail.shape).flip(0) * 2 - 1

        on_object = sight.alpha > 0.5
        largest = max(MASK_SHARE[0], min(MASK_SHARE[1], 0.3 * float(on_object.float().mean())))
        share = MASK_SHARE[0] * (largest / MASK_SHARE[0]) ** self.uniform(0, 1, 1)
        blob = self._free_form(grid(self.size, 1), centre[None], 1.3 * share.sqrt())[0, 0]
        mask = blob * on_object
        fits = MASK_SHARE[0] <= mask.mean() <= MASK_SHARE[1] and mask.sum() > 0.9 * blob.sum() and mask.sum() < 0.4 * on_object.sum()
        return mask if fits and (mask * in_both).sum() > 0.97 * mask.sum() else None

    def _finished(self, picture: Tensor, alpha: Tensor, is_image: bool) -> Tensor:
        """`[3, S, S]`, the product, multiplied by its alpha `[S, S]`, before a background and in a light of its own."""
        backdrop = torch.from_numpy(background_texture(self.rng, self.size // 2, self.bank.photos, TESTING).copy())
        backdrop = F.interpolate(backdrop.permute(2, 0, 1)[None].float() / 255, (self.size, self.size), mode="bilinear")[0]
        picture = picture + backdrop * (1 - alpha)
        self.disparity = self.light
        if self.task == "compositing":
            self.disparity *= self._between(LIGHTS) if is_image else 0.4
        return self._photometric((picture * torch.exp(self._cast(is_image)))[None])[0]

    def _cast(self, is_image: bool) -> Tensor:
        """Colour of the light beyond the training's, as logarithms `[3, 1, 1]`: of composites only."""
        return self.around_zero(0.2, 3, 1, 1) if self.task == "compositing" and is_image else torch.zeros(3, 1, 1)

    def _between(self, ranges: dict[str, tuple[float, float]]) -> float:
        return float(self.uniform(*ranges[self.difficulty]))


class SheetSampler(PairSampler):
    """Flat and gently bent goods, and cloth in folds (task "try_on") of which the reference is laid out flat."""

    @property
    def kind(self) -> str:
        return "cloth" if self.task == "try_on" else "label"

    def views(self) -> tuple[Sight, Sight]:
        texture = self.bank.products[0].float() / 255
        occupied = grid(32, 1)[0][F.interpolate(texture[None, 3:], (32, 32), mode="area")[0, 0] > 0.5]
        while True:
            self.disparity = float(self.uniform(0.1, 1.4))
            image, reference = self._sheet(occupied, True), self._sheet(occupied, False)
            flow = reference.from_uv(image.to_uv(grid(32, 1)[0]))
            product = torch.zeros(32, 32)
            column, row = ((image.from_uv(occupied) * 0.5 + 0.5) * 32).long().clamp(0, 31).unbind(-1)
            product[row, column] = 1
            if self.disparities[0] <= _disparity(flow, product) < self.disparities[1]:
                break
        return self._sight(image, reference, texture, True), self._sight(reference, image, texture, False)

    def _sheet(self, occupied: Tensor, is_image: bool) -> Sheet:
        stretch = torch.exp(self.around_zero(0.25, 1))
        linear = rotation(self.normal(1) * (0.3 if is_image else 0.2) * self.disparity)[0] * torch.cat([stretch, 1 / stretch])
        count, steepness = (0, 0.0) if not is_image else (3, self.uniform(0.5, 0.85)) if self.task == "try_on" else (1, self.uniform(0, 0.2))
        frequency = self.uniform(3, 8, count)
        share = self.uniform(0.5, 1.5, count)
        amplitude = steepness * share / share.sum() / frequency
        angles = self.uniform(0, 6.28, 3, count)
        lightness = torch.full((count,), 0.9 if self.task == "try_on" else 0.0) * min(1.0, self.light)
        waves = torch.stack([amplitude, frequency, angles[0], lightness, angles[1], angles[2]], -1)
        sheet = Sheet(linear, self.around_zero(0.15, 2), waves)

        covered = self.uniform(*(0.3, 0.75) if is_image else (0.5, 0.9))
        middle, half = around(sheet.from_uv(occupied).T[None], torch.ones(1, len(occupied), dtype=torch.bool), torch.ones(1))
        scale = float(covered / half)
        return replace(sheet, scale=scale, place=self.uniform(-1, 1, 2) * (0.95 - covered) - middle[0] * scale)

    def _sight(self, sheet: Sheet, other: Sheet, texture: Tensor, is_image: bool) -> Sight:
        """Drawn at twice the size against jagged outlines."""
        uv = sheet.to_uv(grid(2 * self.size, 1)[0])
        texels = texture.shape[-1] / (2 * self.size) / sheet.scale
        if texels > 1:
            texture = F.interpolate(texture[None], (round(texture.shape[-1] / texels),) * 2, mode="area")[0]
        drawn = F.grid_sample(texture[None], uv[None], align_corners=False)
        picture = drawn[:, :3] * drawn[:, 3:] * sheet.shading(uv).clamp(min=0.3)
        both = F.avg_pool2d(torch.cat([picture, drawn[:, 3:]], 1), 2)[0]
        elsewhere = other.from_uv(F.avg_pool2d(uv.movedim(-1, 0), 2).movedim(0, -1))
        elsewhere = torch.where(both[3, ..., None] > 0.5, elsewhere, NOWHERE)
        return Sight(self._finished(both[:3].clamp(max=1), both[3], is_image), both[3], elsewhere)


class SolidPairSampler(PairSampler, SolidSampler):
    """Boxes, cans, bottles, mugs, toys and signs, seen turned (task "view_synthesis") or relit ("compositing")."""

    textures, texture_size = 4, 256

    def _textures(self, count: int) -> Tensor:
        """Faces that no two views show at once share a texture; others do not, or nobody could tell them apart."""
        left, right, caps, front = torch.randperm(4, generator=self.generator).tolist()
        return torch.tensor([[left, right, caps, caps, front, front]]).expand(count, 6)

    def views(self) -> tuple[Sight, Sight]:
        self.kind = self.templates[int(torch.randint(len(self.templates), (), generator=self.generator))]
        parts = getattr(self, f"_{self.kind}")(1)
        views = self._turned_views()
        windows = []
        for view, covered in zip(views, (self.uniform(0.35, 0.8, 1), self.uniform(0.5, 0.9, 1))):
            centre, half = self._frame(parts, view)
            whole = half / covered
            windows.append((centre + self.uniform(-1, 1, 1, 2) * (0.95 - covered) * whole, whole, centre, half))
        return tuple(self._sight(parts, views, windows, which) for which in (0, 1))

    def _turned_views(self) -> tuple[View, View]:
        degrees = self._between(TURNS) if self.task == "view_synthesis" else float(self.uniform(2, 10))
        side = 1.0 if self.chance(0.5, 1) else -1.0
        yaw, pitch = 0.5 * side * math.radians(degrees) + self.uniform(-0.2, 0.2, 1), self.uniform(-0.05, 0.4, 1)
        views = []
        for is_image in (True, False):
            turn = turned(2, self.normal(1) * 0.08) @ turned(0, pitch + self.normal(1).clamp(-2, 2) * 0.06) @ turned(1, yaw)
            light = torch.stack([self.uniform(-1, 1, 1), self.uniform(-1, 0.3, 1), self.uniform(-1, -0.4, 1)], -1)
            shade = self.uniform(0.4, 0.65, 1) if self.task == "compositing" and is_image else self.uniform(0.1, 0.4, 1)
            views.append(View(turn, self.uniform(3, 9, 1), F.normalize(light, dim=-1), 1 - shade * min(1.0, self.light)))
            yaw = yaw - side * math.radians(degrees)
        return views[0], views[1]

    def _sight(self, parts: list[Part], views: tuple[View, View], windows: list, which: int) -> Sight:
        """Rays are cast where the product is, a square of whole pixels."""
        view, other = views[which], views[1 - which]
        middle, whole, centre, half = windows[which]
        low, high = (((centre[0] - middle[0] + sign * half) / whole * 0.5 + 0.5) * self.size for sign in (-1, 1))
        corner = low.floor().clamp(min=0).long()
        side = int((high.ceil().long().clamp(max=self.size) - corner).amax())
        corner = corner.clamp(max=self.size - side)
        window = middle + ((corner + side / 2) / self.size * 2 - 1)[None] * whole, side / self.size * whole
        box = Box(*corner.tolist(), side, side)

        colour, alpha = self._render(parts, view, *window, side, supersample=2)
        drawn = box.paste(torch.zeros(4, self.size, self.size), torch.cat([colour * alpha, alpha], 1)[0])
        points, hit, _ = self._hit(parts, view, lattice(side, *window))
        seen = hit & self._unhidden(parts, other, points)
        middle, whole, _, _ = windows[1 - which]
        landed = torch.where(seen[:, None], (other.project(points) - middle[..., None]) / whole, NOWHERE)
        elsewhere = box.paste(torch.full((2, self.size, self.size), NOWHERE), landed.view(2, side, side))
        return Sight(self._finished(drawn[:3], drawn[3], which == 0), drawn[3], elsewhere.movedim(0, -1))


def _worth_matching(picture: Tensor, on_object: Tensor, inside: Tensor) -> bool:
    """Whether what the mask covers has detail and looks unlike every other place of the object: of one stripe
    among many nobody could tell which it is."""
    grey = picture.mean(0).numpy()
    if (grey - ndimage.gaussian_filter(grey, 4.0))[inside.numpy()].std() < 0.03:
        return False
    # half the resolution shows likeness as well, in a fifth of the time
    box = Box.around(on_object)
    layers = box.crop(torch.stack([picture.mean(0), on_object.float(), inside.float()]))
    grey, on_object, inside = F.avg_pool2d(layers, 2).numpy()
    on_object, inside = on_object > 0.5, inside > 0.5
    rows, columns = ndimage.find_objects(inside.astype(int))[0]
    shape = [fft.next_fast_len(extent + part.stop - part.start, real=True) for extent, part in zip(grey.shape, (rows, columns))]
    centred, selected, count = grey - grey[inside].mean(), inside[rows, columns].astype(np.float32), inside.sum()
    template = centred[rows, columns] * selected

    def at_each_place(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        product = fft.rfft2(values, shape) * fft.rfft2(kernel, shape).conj()
        return fft.irfft2(product, shape)[: grey.shape[0], : grey.shape[1]]

    variance = at_each_place(centred**2, selected) / count - (at_each_place(centred, selected) / count) ** 2
    alike = at_each_place(centred, template) / count / np.sqrt(np.maximum(variance, 1e-4) * centred[inside].var())
    y, x = np.mgrid[: grey.shape[0], : grey.shape[1]]
    elsewhere = np.hypot(y - rows.start, x - columns.start) > 0.4 * np.sqrt(count)
    fits = at_each_place(on_object.astype(np.float32), selected) > 0.9 * count
    return not (alike[elsewhere & fits] > 0.8).any()


def _disparity(flow: Tensor, mask: Tensor) -> float:
    known = (mask > 0.5) & (flow.abs() < 1.5).all(-1)
    position = grid(len(mask), 1)[0][known]
    if len(position) < 16:
        return math.inf
    design = torch.cat([position, torch.ones(len(position), 1)], 1)
    jacobian = torch.linalg.lstsq(design, flow[known]).solution[:2].T
    return float((jacobian / jacobian.det().abs().sqrt() - torch.eye(2)).norm())


def make_set(folder: str | Path, count: int, seed: int, split: str = "test", size: int = 384, photos=(), light: float = 1.0, workers: int = 1) -> None:
    """Write a benchmark set of `count` items; whole or not at all.

    seed      same seed, same set, whatever the workers; a longer set begins with the shorter one's items
    split     "test" or "validation": they share no seed
    size      pixels a side of every picture
    photos    uint8 `[H, W, 3]` pictures to take textures from beside the procedural ones
    light     of the difference in light and colour between the views, in shares of the full range
    workers   processes, one core each

    Tasks, difficulties and artifacts take turns. Raises `InputError` where the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError("folder", f"{folder} exists", "give a new one, or delete it first")
    if split not in SPLITS:
        raise InputError("split", f"is {split!r}", f"use {' or '.join(SPLITS)}")
    for name, value in (("count", count), ("workers", workers)):
        if value < 1:
            raise InputError(name, f"is {value}", "use 1 or more")
    if seed < 0:
        raise InputError("seed", f"is {seed}", "use 0 or more")
    if size < 128:
        raise InputError("size", f"is {size}", "use 128 or more: masks of 0.3 % need pixels")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    write = partial(_write_item, unfinished, seed=seed, split=split, size=size, photos=photos, light=light)
    threads = torch.get_num_threads()
    try:
        if workers == 1:
            torch.set_num_threads(1)  # sums over several threads round otherwise
            entries = [write(index) for index in tqdm(range(count), desc="items")]
        else:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
                entries = list(tqdm(pool.map(write, range(count)), total=count, desc="items"))
        (unfinished / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        unfinished.chmod(0o755)  # mkdtemp's folders are private
        os.replace(unfinished, folder)
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_item(folder: Path, index: int, *, seed: int, split: str, size: int, photos, light: float) -> dict:
    turn, place = divmod(index, len(TASKS))
    task, artifact = TASKS[place], list(ARTIFACTS)[(turn + place) % len(ARTIFACTS)]
    difficulty = list(DISPARITIES)[turn % 3]
    pair, image = _draw(index, seed, split, size, photos, light, task, difficulty, artifact)
    name = f"{index:05d}"
    (folder / name).mkdir()
    pictures = {"image": image, "mask": pair.mask, "truth": pair.truth, "reference": pair.reference}
    pictures |= {"reference_mask": pair.reference_mask, "correspondence": pair.correspondence}
    for key, picture in pictures.items():
        pixels = to_bytes(picture) if picture.ndim == 3 else (picture * 255).byte().numpy()
        write_picture(folder / name / f"{key}.png", Image.fromarray(pixels), compress_level=1)
    known = (pair.mask > 0.5) & (pair.flow.abs() < 1).all(-1)
    flow = torch.where(known, (pair.flow.movedim(-1, 0) + 1) * size / 2, torch.nan)
    np.savez_compressed(folder / name / "flow.npz", flow=flow.numpy())
    labels = {"subject": pair.kind, "difficulty": difficulty, "artifact": artifact, "disparity": round(pair.disparity, 3), "weak": False}
    return {"id": name, "task": task, **labels, "caption": CAPTIONS[task].format(pair.kind), **{key: f"{name}/{key}.png" for key in pictures}, "flow": f"{name}/flow.npz"}


def _draw(index: int, seed: int, split: str, size: int, photos, light: float, task: str, difficulty: str, artifact: str) -> tuple[Pair, Tensor]:
    """Products, views and masks until one is worth matching and has an artifact that shows."""
    sampler_of = SheetSampler if task in ("customization", "try_on") else SolidPairSampler
    state = np.random.SeedSequence((seed, index))
    while True:
        drawn = int(state.spawn(1)[0].generate_state(1)[0]) % 2**30
        # torch's generator takes 32 bits of a seed: the first is that of held-out ones, the second the split's
        sampler = sampler_of(HELD_OUT | SPLITS[split] << 30 | drawn, size, task, difficulty, light, photos)
        for _ in range(3):
            pair = sampler.draw()
            if pair is None:
                continue
            image = simulate(pair.truth, pair.mask, artifact, sampler.rng)
            if (image - pair.truth)[:, pair.mask > 0.5].abs().mean() > 0.05:
                return pair, image
