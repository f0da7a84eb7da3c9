"""A contact sheet of a benchmark run, for the eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import InputError
from ..geometry import Box, resize
from ..imageio import to_bytes, write_picture
from ..overlay import overlay, outline
from .dataset import Item
from .methods import Outcome

GREEN = (0.1, 1.0, 0.3)
GAP, CAPTION, HEADING = 6, 18, 22


def surroundings(mask: Tensor) -> Box:
    """A square half as large again as what a mask `[H, W]` selects, to look at enlarged; inside the picture where it fits."""
    box = Box.around(mask)
    return box.square(round(max(box.width, box.height) * 1.5)).clamped(*mask.shape)


class ContactSheet:
    """A row an item: image, mask, reference with M* (white) and M_gt (green), result and truth, then the
    mask's surroundings enlarged, as artifacts are small: image, every method's result, truth.

    tile   side of a picture on the sheet, pixels
    """

    def __init__(self, tile: int = 192):
        self.tile = tile
        self.rows: list[Image.Image] = []
        self.headings: list[str] = []

    def add(self, item: Item, outcomes: dict[str, Outcome], figures: dict[str, dict]) -> None:
        """One item's outcomes and figures by method; the result shown is `detail`'s, or else the last method's."""
        shown = "detail" if "detail" in outcomes else list(outcomes)[-1]
        result, region = outcomes[shown].image, outcomes[shown].region
        reference = item.reference if region is None else overlay(item.reference, region.soft, region.mask)
        if item.correspondence is not None:
            reference = outline(reference, item.correspondence, GREEN)
        tiles = {"image": item.image, "mask": item.mask.expand(3, -1, -1), "reference": reference, shown: result}
        if item.truth is not None:
            tiles["truth"] = item.truth
        box = surroundings(item.mask)
        tiles["zoom: image"] = box.crop(item.image, fill=0.5)
        for name in sorted(set(outcomes) - {"none", shown}) + [shown]:
            tiles[f"zoom: {name}"] = box.crop(outcomes[name].image, fill=0.5)
        if item.truth is not None:
            tiles["zoom: truth"] = box.crop(item.truth, fill=0.5)
        self.headings = max(self.headings, list(tiles), key=len)

        row = Image.new("RGB", ((self.tile + GAP) * len(tiles), self.tile + CAPTION + GAP), "white")
        for column, picture in enumerate(tiles.values()):
            row.paste(self._fitted(picture), (column * (self.tile + GAP), CAPTION))
        ImageDraw.Draw(row).text((2, 1), self._caption(item, shown, figures), fill="black", font=ImageFont.load_default(13))
        self.rows.append(row)

    def save(self, path: str | Path) -> None:
        """Write the sheet; the suffix must be one that Pillow knows. Raises `InputError` where nothing was added."""
        if not self.rows:
            raise InputError("sheet", "has no rows", "run at least one item")
        sheet = Image.new("RGB", (max(row.width for row in self.rows), HEADING + sum(row.height for row in self.rows)), "white")
        draw = ImageDraw.Draw(sheet)
        for column, heading in enumerate(self.headings):
            draw.text((column * (self.tile + GAP) + 2, 3), heading, fill="black", font=ImageFont.load_default(14))
        y = HEADING
        for row in self.rows:
            sheet.paste(row, (0, y))
            y += row.height
        write_picture(path, sheet)

    def _caption(self, item: Item, shown: str, figures: dict[str, dict]) -> str:
        parts = [item.id, *(str(item.labels[name]) for name in ("difficulty", "artifact") if name in item.labels)]
        if "iou" in figures[shown]:
            parts.append(f"IoU {figures[shown]['iou']:.2f}" + (" (fell back)" if figures[shown]["fell_back"] else ""))
        if "hp_ssim" in figures[shown]:
            parts.append("hp-SSIM " + ", ".join(f"{name} {values['hp_ssim']:.2f}" for name, values in figures.items()))
        return "   ".join(parts)

    def _fitted(self, picture: Tensor) -> Image.Image:
        height, width = picture.shape[-2:]
        scale = self.tile / max(height, width)
        small = to_bytes(resize(picture, max(1, round(height * scale)), max(1, round(width * scale))))
        square = np.full((self.tile, self.tile, 3), 255, np.uint8)
        square[: small.shape[0], : small.shape[1]] = small
        return Image.fromarray(square)
