"""Benchmark sets of procedural products: two views of one object, correspondence and truth known exactly.

Held out: a set has seeds, typefaces, words and patterns that training never sees.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.interpolate import LinearNDInterpolator
from torch import Tensor
from tqdm import tqdm

from ..data.artifacts import ARTIFACTS, simulate
from ..data.scenes import SceneSampler, TextureBank, grid, transform
from ..data.textures import TESTING, background_texture
from ..errors import InputError
from ..imageio import write_image, write_mask

HELD_OUT = 2**31
MASK_SHARE = (0.003, 0.05)
DIFFICULTIES = {"easy": (0.0, 0.25), "medium": (0.25, 0.5), "hard": (0.5, 1.0)}
"""Ranges of `Pair.disparity`."""


@dataclass(frozen=True)
class Pair:
    """A product seen twice.

    truth            `[3, S, S]` in [0, 1]
    mask             `[S, S]` in {0, 1}, M_a, on the object
    reference        `[3, S, S]` in [0, 1]
    reference_mask   `[S, S]` in {0, 1}, the object in the reference
    correspondence   `[S, S]` in {0, 1}, M_gt on the reference
    flow             `[S, S, 2]`, truth -> reference, (x, y) in [-1, 1]; meant for the object only
    disparity        how far the map from view to view is from a plain change of scale at the mask: the norm of
                     its normalised Jacobian less the identity. A turn by 20 degrees alone gives 0.49
    """

    truth: Tensor
    mask: Tensor
    reference: Tensor
    reference_mask: Tensor
    correspondence: Tensor
    flow: Tensor
    disparity: float


class PairSampler(SceneSampler):
    """Draws whole pictures of one product by the maps that `SceneSampler` draws crops with.

    seed    one product and background pair a seed
    size    S, pixels a side
    """

    def __init__(self, seed: int, size: int, photos=()):
        super().__init__(TextureBank(1, size, seed, photos, style=TESTING), seed, image_size=2 * size)
        self.size = size
        self.rng = np.random.default_rng((seed, 2))

    def draw(self, light: float = 1.0) -> Pair | None:
        """One pair, or `None` where the mask drawn does not fit on the object or covers nothing of interest.

        light   of the difference in light and colour between the views, in shares of the full range
        """
        texture = self.bank.products.float() / 255
        alpha = texture[0, 3]
        rows, columns = (alpha > 0.5).any(1).nonzero(), (alpha > 0.5).any(0).nonzero()
        extent = torch.cat([columns[-1:] - columns[:1], rows[-1:] - rows[:1]]).amax() / len(alpha)
        anchor = self._anchor(texture)

        self.disparity = float(self.uniform(0, 1.2))
        covered = self.uniform(0.25, 0.7, 1)
        place = self.uniform(-1, 1, 1, 2) * (0.9 - covered).clamp(max=0.5)
        fine_uv = self._crop_to_uv(grid(self.image_size, 1), torch.zeros(1, 2), extent / covered, place)
        uv = F.interpolate(fine_uv.movedim(-1, 1), (self.size, self.size), mode="area").movedim(1, -1)

        covered = self.uniform(0.45, 0.9, 1)
        shrink = torch.eye(3)[None] * torch.stack([covered, covered, torch.ones(1)], -1)[:, None]
        shrink[:, :2, 2] = self.uniform(-1, 1, 1, 2) * (0.95 - covered)
        uv_to_reference = shrink @ self._uv_to_reference(texture[:, 3:])
        flow = transform(uv_to_reference, uv)

        share = MASK_SHARE[0] * (MASK_SHARE[1] / MASK_SHARE[0]) ** self.uniform(0, 1, 1)
        centre = grid(self.size, 1).flatten(1, 2)[:, (uv - anchor).norm(dim=-1).argmin()]
        blob = self._free_form(grid(self.size, 1), centre, 1.6 * share.sqrt())[0, 0]
        on_object = F.grid_sample(texture, uv, align_corners=False)[0, 3] > 0.5
        mask = blob * on_object
        drawn_share = mask.mean()
        disparity = _disparity(flow[0], mask)
        if not MASK_SHARE[0] <= drawn_share <= MASK_SHARE[1] or mask.sum() < 0.9 * blob.sum() or drawn_share > 0.4 * on_object.float().mean():
            return None

        truth, _ = self._picture(texture, fine_uv)
        if not _worth_matching(truth[0].mean(0).numpy(), on_object.numpy(), mask.numpy() > 0.5):
            return None
        reference_uv = transform(torch.linalg.inv(uv_to_reference), grid(self.image_size, 1))
        reference, reference_alpha = self._picture(texture, reference_uv)
        reference_mask = (reference_alpha > 0.5).float()
        self.disparity = light
        truth, reference = self._photometric(truth)[0], self._photometric(reference)[0]

        points = transform(torch.linalg.inv(uv_to_reference), grid(self.size, 1))[0]
        correspondence = carried(mask, uv[0], points) * reference_mask
        return Pair(truth, mask, reference, reference_mask, correspondence, flow[0], disparity)

    def _picture(self, texture: Tensor, uv: Tensor) -> tuple[Tensor, Tensor]:
        """The product before a new background, drawn at twice the size against aliasing: `[1, 3, S, S]`, alpha `[S, S]`."""
        sampled = F.grid_sample(texture, uv, align_corners=False)
        alpha = sampled[:, 3:]
        picture = sampled[:, :3] * alpha + self._background(1) * (1 - alpha)
        both = F.interpolate(torch.cat([picture, alpha], 1), (self.size, self.size), mode="area")
        return both[:, :3], both[0, 3]

    def _background(self, batch: int) -> Tensor:
        picture = background_texture(self.rng, self.size, self.bank.photos, TESTING)
        return F.interpolate(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255, (self.image_size,) * 2, mode="bilinear")


def carried(mask: Tensor, uv: Tensor, points: Tensor) -> Tensor:
    """A mask `[S, S]` seen through `uv` `[S, S, 2]`, as it lies at other `points` `[h, w, 2]` of the same surface.

    The map from pixels to uv has no closed inverse where it bends: interpolated between its pixels."""
    near = torch.from_numpy(ndimage.binary_dilation(mask.numpy() > 0.5, iterations=3))
    position = LinearNDInterpolator(uv[near].numpy(), grid(len(mask), 1)[0][near].numpy(), fill_value=2.0)(points.numpy())
    found = F.grid_sample(mask[None, None], torch.from_numpy(position).float()[None], align_corners=False)
    return (found[0, 0] > 0.5).float()


def _worth_matching(grey: np.ndarray, on_object: np.ndarray, inside: np.ndarray) -> bool:
    """Whether what the mask covers has detail and looks unlike every other place of the object: of one stripe
    among many nobody could tell which it is."""
    if (grey - ndimage.gaussian_filter(grey, 4.0))[inside].std() < 0.03:
        return False
    template = np.where(inside, grey - grey[inside].mean(), 0.0)
    spectrum, selected = np.fft.rfft2(template).conj(), np.fft.rfft2(inside.astype(float)).conj()

    def at_each_shift(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return np.fft.irfft2(np.fft.rfft2(values) * kernel, inside.shape)

    count, centred = inside.sum(), grey - grey[inside].mean()
    variance = at_each_shift(centred**2, selected) / count - (at_each_shift(centred, selected) / count) ** 2
    alike = at_each_shift(centred, spectrum) / count / np.sqrt(np.maximum(variance, 1e-4) * template[inside].var())
    dy, dx = (np.minimum(np.arange(extent), extent - np.arange(extent)) for extent in inside.shape)
    elsewhere = np.hypot(dy[:, None], dx) > 0.4 * np.sqrt(count)
    fits = at_each_shift(on_object.astype(float), selected) > 0.9 * count
    return not (alike[elsewhere & fits] > 0.8).any()


def _disparity(flow: Tensor, mask: Tensor) -> float:
    position = grid(len(mask), 1)[0][mask > 0.5]
    if len(position) < 16:
        return float("inf")
    design = torch.cat([position, torch.ones(len(position), 1)], 1)
    jacobian = torch.linalg.lstsq(design, flow[mask > 0.5]).solution[:2].T
    return float((jacobian / jacobian.det().abs().sqrt() - torch.eye(2)).norm())


def make_set(folder: str | Path, count: int, seed: int, size: int = 512, photos=(), light: float = 1.0) -> None:
    """Write a benchmark set of `count` items; whole or not at all.

    seed     same seed, same set; a longer set begins with the shorter one's items
    size     pixels a side of every picture
    photos   uint8 `[H, W, 3]` pictures to take textures from beside the procedural ones
    light    of the difference in light and colour between the views, in shares of the full range

    Difficulties and artifacts take turns. Raises `InputError` where the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError("folder", f"{folder} exists", "give a new one, or delete it first")
    if count < 1:
        raise InputError("count", f"is {count}", "use 1 or more")
    if size < 128:
        raise InputError("size", f"is {size}", "use 128 or more: masks of 0.3 % need pixels")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        entries = [_write_item(partial, index, seed, size, photos, light) for index in tqdm(range(count), desc="items")]
        (partial / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        partial.chmod(0o755)  # mkdtemp's folders are private
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_item(folder: Path, index: int, seed: int, size: int, photos, light: float) -> dict:
    kind = list(ARTIFACTS)[index % 4]
    difficulty = list(DIFFICULTIES)[index // 4 % 3]
    pair, image = _draw(index, seed, size, photos, light, kind, DIFFICULTIES[difficulty])
    name = f"{index:05d}"
    (folder / name).mkdir()
    pictures = {"image": image, "mask": pair.mask, "truth": pair.truth, "reference": pair.reference}
    pictures |= {"reference_mask": pair.reference_mask, "correspondence": pair.correspondence}
    for key, picture in pictures.items():
        (write_image if picture.ndim == 3 else write_mask)(folder / name / f"{key}.png", picture)
    labels = {"subject": "procedural", "difficulty": difficulty, "artifact": kind, "disparity": round(pair.disparity, 3), "weak": False}
    return {"id": name, "task": "customization", **labels, **{key: f"{name}/{key}.png" for key in pictures}}


def _draw(index: int, seed: int, size: int, photos, light: float, kind: str, disparities: tuple[float, float]) -> tuple[Pair, Tensor]:
    """Products and masks until one has the disparity asked for and an artifact that shows."""
    state = np.random.SeedSequence((seed, index))
    while True:
        child = state.spawn(1)[0]
        # torch's generator takes 32 bits of a seed
        sampler = PairSampler(HELD_OUT | int(child.generate_state(1)[0]), size, photos)
        for _ in range(20):
            pair = sampler.draw(light)
            if pair is None or not disparities[0] <= pair.disparity < disparities[1]:
                continue
            image = simulate(pair.truth, pair.mask, kind, sampler.rng)
            if (image - pair.truth)[:, pair.mask > 0.5].abs().mean() > 0.04:
                return pair, image
