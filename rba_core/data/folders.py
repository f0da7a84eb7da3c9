"""Photos of a user's own objects as training triples (Sec. 3.4): one photo perturbed, or two photos of one object.

In a folder, each photo NAME.jpg shows an object, with a mask of it beside it, NAME_mask.png or masks/NAME.png (white
= object, as large as the photo or in its proportions); without a mask the whole picture is the object. Each of its
sub-folders holds photos of one and the same object, with masks likewise.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..geometry import Box, resize_mask
from ..imageio import read_mask
from .scenes import Scenes, SceneSampler, grid
from .textures import SMALLEST, photo_paths, read_photo

LARGEST = 1024
"""Pixels of a photo's longer side, to which it is reduced: crops of the objects are a quarter of that."""
KEPT = 256
"""Photos held in memory, 4 MB each; the others are read when their turn comes."""


@dataclass
class Photo:
    """levels        uint8 `[4, H, W]`, the picture and its object; each half as large as the one before
    centre, half     of the square around the object, in pixels of the first level: `[2]` and a number. This square is
                     uv, [-1, 1] both ways
    """

    levels: list[Tensor]
    centre: Tensor
    half: float

    def look_up(self, uv: Tensor, footprint: float) -> Tensor:
        """Picture and object `[4, H, W]` in [0, 1] at `uv` `[H, W, 2]`; no object beyond the border. footprint: a pixel's side in uv."""
        level = min(max(round(math.log2(footprint * self.half)), 0), len(self.levels) - 1)
        extent = torch.tensor(self.levels[0].shape[:0:-1], device=uv.device)
        places = (uv * self.half + self.centre) / extent
        picture = self.levels[level]
        size = torch.tensor(picture.shape[:0:-1], device=uv.device)
        low, high = ((value * size).long() for value in (places.amin((0, 1)), places.amax((0, 1))))
        low, high = (low - 1).clamp(min=0).minimum(size - 1), (high + 2).clamp(min=1).minimum(size)
        window = picture[:, low[1] : high[1], low[0] : high[0]]  # of a large photo little is looked at
        within = (places * size - low) / (high - low) * 2 - 1
        found = F.grid_sample(window[None].float() / 255, within[None], padding_mode="border", align_corners=False)[0]
        inside = ((places >= 0) & (places <= 1)).all(-1)
        return torch.cat([found[:3], found[3:] * inside])


class PhotoBank:
    """The readable photos of some folders; those that are not, are named in a warning.

    partners    of each photo, the others of the same object
    """

    def __init__(self, folders: list[Path], device="cpu", progress=lambda items: items):
        self.device = torch.device(device)
        self.photo = lru_cache(KEPT)(self._read)
        self.paths: list[tuple[Path, bool]] = []
        self.partners: list[list[int]] = []
        for folder in folders:
            groups = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "masks" and not path.name.startswith("."))
            before = len(self.paths)
            for group in [folder, *progress(groups)]:
                start = len(self.paths)
                for path in photo_paths(group):
                    self._add(path, eroded=group != folder)
                places = range(start, len(self.paths))
                self.partners += [[other for other in places if other != place] if group != folder else [] for place in places]
            if len(self.paths) == before:
                raise InputError("folders", f"{folder} holds no readable picture", f"put JPEG, PNG or WebP files in it or its sub-folders, objects of {SMALLEST} pixels or more")

    def at(self, step: int) -> None:
        """Photos are the same at each training step."""

    def _add(self, path: Path, eroded: bool) -> None:
        self.paths.append((path, eroded))
        try:
            self.photo(len(self.paths) - 1)
        except InputError as error:
            self.paths.pop()
            warnings.warn(f"{error.name}: {error.problem}; skipped", stacklevel=4)

    def _read(self, index: int) -> Photo:
        path, eroded = self.paths[index]
        picture = torch.from_numpy(read_photo(path, LARGEST).copy()).permute(2, 0, 1)
        mask = object_mask(path, *picture.shape[1:])
        if eroded:  # masks are often a little too large, and what is around the object differs between the two photos
            reach = max(1, round(0.02 * max(Box.around(mask).width, Box.around(mask).height)))
            mask = -F.max_pool2d(-mask[None], 2 * reach + 1, 1, reach)[0]
        box = Box.around(mask) if mask.any() else Box(0, 0, 0, 0)
        if min(box.width, box.height) < SMALLEST:
            raise InputError("folders", f"{path} shows an object of {box.width} x {box.height} pixels", f"use {SMALLEST} or more a side")
        levels = [torch.cat([picture, (mask * 255)[None].byte()]).to(self.device)]
        while min(levels[-1].shape[1:]) >= 2 * SMALLEST:
            size = [extent // 2 for extent in levels[-1].shape[1:]]
            levels.append(F.interpolate(levels[-1][None].float(), size, mode="area")[0].round().byte())
        centre = torch.tensor([box.x + box.width / 2, box.y + box.height / 2], device=self.device)
        return Photo(levels, centre, max(box.width, box.height) / 2)


def object_mask(path: Path, height: int, width: int) -> Tensor:
    """The mask that belongs to a photo, `[H, W]` in {0, 1}; all of the picture where there is none."""
    candidates = path.with_name(f"{path.stem}_mask.png"), path.parent / "masks" / f"{path.stem}.png"
    for candidate in candidates:
        if candidate.is_file():
            mask = read_mask(candidate)
            if abs(mask.shape[1] / mask.shape[0] * height / width - 1) > 0.02:
                raise InputError("folders", f"{candidate} has not the proportions of {path.name}", "draw it on the photo as it is shown upright")
            if not mask.any():
                raise InputError("folders", f"{candidate} is empty", "paint the object white")
            return resize_mask(mask, height, width)
    return torch.ones(height, width)


class FolderSampler(SceneSampler):
    """Draws `Scenes` of photos; the interface of `SceneSampler`.

    The image is a crop of a photo as it is. The reference is the same photo's object (alignment) or its region
    (refinement), cut out, moved, tilted and changed in colour. Of an object with several photos, half of the references
    are the whole object in another of them, in either mode; what corresponds is then not known: `visible` is 0,
    `flow` a guess.
    """

    pairs = 0.5  # share of these, where there is another photo

    def _sample(self, batch: int, mode: str) -> Scenes:
        index = torch.randint(len(self.bank.paths), (batch,), generator=self.generator).tolist()
        chosen, paired = torch.rand(batch, generator=self.generator).tolist(), self.chance(self.pairs, batch).tolist()
        others = [self.bank.partners[i] if pair else [] for i, pair in zip(index, paired)]
        photos = [self.bank.photo(i) for i in index]
        referred = [self.bank.photo(of[int(place * len(of))]) if of else photo for photo, of, place in zip(photos, others, chosen)]
        known = torch.tensor([not of for of in others])

        overview = self._cut_out(photos, grid(48, batch), torch.full((batch,), 2 / 48))
        anchor = self._anchor(overview)
        context = self.uniform(2.0, 5.0, batch) if mode == "alignment" else self.uniform(1.5, 2.6, batch)
        scale = torch.tensor([photo.half for photo in photos])
        centre = torch.stack([photo.centre for photo in photos])
        size = torch.tensor([photo.levels[0].shape[:0:-1] for photo in photos])
        # like the zoom-in crop: never larger than the photo, nor a mask larger than the crop; and not of a few pixels
        largest, smallest = size.amin(-1) / 2 / scale, SMALLEST / 2 / scale
        extent = (0.1 * 4.5 ** self.uniform(0, 1, batch)).minimum(largest / 1.5)
        half = (extent * context).maximum(smallest).minimum(largest)
        low, high = -centre / scale[:, None] + half[:, None], (size - centre) / scale[:, None] - half[:, None]
        middle = (anchor - self.uniform(-0.15, 0.15, batch, 2) * half[:, None]).clamp(low, high)

        def window(side: int) -> Tensor:
            return middle[:, None, None] + grid(side, batch) * half[:, None, None, None]

        fine = self.image_size * self.supersample
        sampled = self._cut_out(photos, window(fine), 2 * half / fine)
        if self.supersample > 1:
            sampled = F.avg_pool2d(sampled, self.supersample)
        image, alpha = sampled[:, :3], sampled[:, 3:]
        mask = self._free_form(grid(self.image_size, batch), (anchor - middle) / half[:, None], extent / half) * (alpha > 0.5)

        cells = (self.image_size // 4,) * 2
        inside, on_object = (F.interpolate(maps, cells, mode="area")[:, 0] > share for maps, share in ((mask, 0.3), (alpha, 0.5)))
        shape = self._cut_out(referred, grid(48, batch), torch.full((batch,), 2 / 48))[:, 3:]
        reference, flow, visible = self._reference(referred, shape, window(cells[0]), inside, on_object, mode, known)
        return Scenes(image, mask, reference, flow, visible)

    def _cut_out(self, photos: list[Photo], uv: Tensor, footprint: Tensor) -> Tensor:
        """Photos with the object as alpha at `uv` `[B, H, W, 2]`: `[B, 4, H, W]`."""
        return torch.stack([photo.look_up(places, side) for photo, places, side in zip(photos, uv, footprint.tolist())])
