"""Contact sheets of a benchmark run, for the eye: tiles are kept item by item, a sheet is put together from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import InputError
from ..geometry import Box, resize
from ..imageio import to_bytes, write_picture
from ..overlay import outline, overlay
from .dataset import Item
from .methods import Outcome

GREEN = (0.1, 1.0, 0.3)
TILE = 176
"""Side of a tile, pixels."""
GAP, CAPTION, HEADING = 6, 18, 22


def surroundings(mask: Tensor) -> Box:
    """A square half as large again as what a mask `[H, W]` selects, to look at enlarged; inside the picture where it fits."""
    box = Box.around(mask)
    return box.square(round(max(box.width, box.height) * 1.5)).clamped(*mask.shape)


def save_tiles(folder: Path, item: Item, outcomes: dict[str, Outcome]) -> None:
    """Write what a sheet shows of an item, each as `<name>.jpg` of TILE pixels: its image with the mask outlined, its reference
    with M_gt, its truth; a method's result and M* on the reference. `zoom-…`, the mask's surroundings enlarged, as artifacts
    are small."""
    box = surroundings(item.mask)
    marked = item.reference if item.correspondence is None else outline(item.reference, item.correspondence, GREEN)
    tiles = {"image": outline(item.image, item.mask), "reference": marked, "zoom-image": box.crop(item.image, fill=0.5)}
    if item.truth is not None:
        tiles["zoom-truth"] = box.crop(item.truth, fill=0.5)
    for name, outcome in outcomes.items():
        tiles |= {f"result-{name}": outcome.image, f"zoom-{name}": box.crop(outcome.image, fill=0.5)}
        if outcome.region is not None:
            found = overlay(item.reference, outcome.region.soft, outcome.region.mask)
            tiles[f"found-{name}"] = found if item.correspondence is None else outline(found, item.correspondence, GREEN)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in tiles.items():
        write_picture(folder / f"{name}.jpg", _fitted(picture), quality=90)


def columns(methods: Sequence[str]) -> dict[str, str]:
    """Headings and names of a row's tiles, left to right; the method that M* and the whole result are of is `detail`, or
    else the last."""
    shown = "detail" if "detail" in methods else methods[-1]
    zoomed = ["image", *[shown] * (shown != "none"), "truth", *(name for name in methods if name not in ("none", shown))]
    return {"image": "image", f"M* of {shown}": f"found-{shown}", shown: f"result-{shown}"} | {f"zoom: {name}": f"zoom-{name}" for name in zoomed}


def caption(rows: dict[str, dict]) -> str:
    """One item in words, from its figures by method."""
    own = rows["detail"] if "detail" in rows else list(rows.values())[-1]
    parts = [own["id"], *(str(own[name]) for name in ("difficulty", "artifact") if name in own)]
    if "iou" in own:
        parts.append(f"IoU {own['iou']:.2f}" + (" (fell back)" if own["fell_back"] else ""))
    if "hp_ssim" in own:
        parts.append("hp-SSIM " + ", ".join(f"{name} {values['hp_ssim']:.2f}" for name, values in rows.items()))
    return "   ".join(parts)


def contact_sheet(rows: Sequence[tuple[Path, str]], methods: Sequence[str]) -> Image.Image:
    """A picture with a row for each folder of tiles, and its caption. Raises `InputError` where there is none."""
    if not rows:
        raise InputError("sheet", "has no rows", "run at least one item")
    shown = columns(methods)
    sheet = Image.new("RGB", ((TILE + GAP) * len(shown), HEADING + (TILE + CAPTION + GAP) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(shown):
        draw.text((column * (TILE + GAP) + 2, 3), heading, fill="black", font=ImageFont.load_default(14))
    for row, (folder, words) in enumerate(rows):
        y = HEADING + row * (TILE + CAPTION + GAP)
        draw.text((2, y + 1), words, fill="black", font=ImageFont.load_default(13))
        for column, name in enumerate(shown.values()):
            tile = tile_of(folder, name)
            if tile is not None:
                sheet.paste(Image.open(tile), (column * (TILE + GAP), y + CAPTION))
    return sheet


def tile_of(folder: Path, name: str) -> Path | None:
    """A tile's file; the bare reference where a method found nothing, `None` where the item or the run has no such tile."""
    path = folder / f"{name}.jpg"
    if not path.exists() and name.startswith("found-"):
        path = folder / "reference.jpg"
    return path if path.exists() else None


def _fitted(picture: Tensor) -> Image.Image:
    height, width = picture.shape[-2:]
    scale = TILE / max(height, width)
    small = to_bytes(resize(picture, max(1, round(height * scale)), max(1, round(width * scale))))
    square = np.full((TILE, TILE, 3), 255, np.uint8)
    square[: small.shape[0], : small.shape[1]] = small
    return Image.fromarray(square)
