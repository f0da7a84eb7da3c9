"""`rba demo`: the sample that comes with the package, refined."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .geometry import resize
from .imageio import to_bytes, write_image, write_mask, write_picture
from .model import RefineByAlign
from .overlay import outline, overlay
from .pipeline import refine_by_align
from .refinement import Progress
from .shipped import read_sample
from .zoom_crop import crop_box


def run(model: RefineByAlign, folder: Path, seed: int = 0, progress: Progress | None = None) -> None:
    """Refine the sample; write the result, M*, and one picture with all of it to `folder`; print where they are."""
    image, mask, reference, reference_mask = read_sample()
    started = time.perf_counter()
    refined = refine_by_align(model, image, mask, reference, reference_mask, seed=seed, progress=progress)
    seconds = time.perf_counter() - started
    region = refined.regions[0]
    folder.mkdir(parents=True, exist_ok=True)
    write_image(folder / "result.png", refined.image)
    write_mask(folder / "correspondence.png", region.mask)
    panels = [("generated, artifact marked", outline(image, mask)), ("reference, matched region", overlay(reference, region.soft, region.mask)), ("refined", refined.image)]
    box = crop_box(mask, 1.6, 8)
    closeups = [("before", box.crop(image)), ("after", box.crop(refined.image))]
    write_picture(folder / "overview.png", overview(panels, closeups))
    print(f"refined in {seconds:.1f} s, confidence {refined.confidences[0]:.2f}; pictures in {folder.resolve()}:")
    for name, meaning in (("overview.png", "everything at a glance"), ("result.png", "the refined image"), ("correspondence.png", "M*, the region found in the reference")):
        print(f"  {folder / name}  {meaning}")


def overview(panels: list[tuple[str, Tensor]], closeups: list[tuple[str, Tensor]], height: int = 384) -> Image.Image:
    """Panels of one height side by side with captions, the close-ups stacked at the right."""
    half = (height - 28) // 2
    tiles = [(label, Image.fromarray(to_bytes(resize(p, height, round(p.shape[2] * height / p.shape[1]))))) for label, p in panels]
    small = [(label, Image.fromarray(to_bytes(resize(p, half, half)))) for label, p in closeups]
    gap, caption = 8, 28
    width = sum(tile.width + gap for _, tile in tiles) + half
    canvas = Image.new("RGB", (width, height + caption), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    x = 0
    for label, tile in tiles:
        canvas.paste(tile, (x, caption))
        draw.text((x + 4, 5), label, fill="black", font=font)
        x += tile.width + gap
    for (label, tile), y in zip(small, (0, half + caption)):
        canvas.paste(tile, (x, y + caption))
        draw.text((x + 4, y + 5), label, fill="black", font=font)
    return canvas
