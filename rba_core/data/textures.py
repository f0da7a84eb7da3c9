"""Textures of procedural products: labels, logos, patterns and photo crops on shapes with an alpha channel."""

from __future__ import annotations

import string
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from ..errors import InputError


@dataclass(frozen=True)
class Style:
    """What is printed on products, and what they stand in front of.

    typefaces    files among matplotlib's fonts; "" is Pillow's own
    words        to print; none = random letters
    surfaces     families of patterns
    """

    typefaces: tuple[str, ...]
    words: tuple[str, ...]
    surfaces: tuple[str, ...]


TRAINING = Style(
    ("", "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-BoldItalic"),
    (),
    ("solid", "gradient", "noise", "stripes", "checks", "leaves"),
)
TESTING = Style(
    ("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "cmss10", "cmtt10", "cmb10"),
    tuple("ALPINE coffee ROAST 250g Original fresh Milk TEA No.7 Organic BERRY 33cl Classic sport RUN extra mild 100% SOAP Lemon Oat bar ZERO star".split()),
    ("solid", "gradient", "weave", "cells", "rings"),
)
"""Typefaces, words and patterns that training never sees."""

PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


LARGEST, SMALLEST = 1536, 32
"""Pixels: a photo is reduced to the first along its longer side, and of no use with fewer than the second along its shorter."""


def load_photos(folder: str | Path) -> list[np.ndarray]:
    """Every photo of a folder as uint8 `[H, W, 3]`, in the order of the file names; the masks among them are left
    out. Files that are broken or tiny are skipped with a warning; `InputError` where nothing is left."""
    photos = []
    for path in photo_paths(folder):
        try:
            photos.append(read_photo(path))
        except InputError as error:
            warnings.warn(f"{error.name}: {error.problem}; skipped", stacklevel=2)
    if not photos:
        raise InputError("photos", f"{folder} holds no readable picture", f"put whole JPEG, PNG or WebP files in it, {SMALLEST} pixels or more a side")
    return photos


def photo_paths(folder: str | Path) -> list[Path]:
    """The pictures directly in a folder, by name, without NAME_mask.png where there is a photo of that NAME."""
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file() and path.suffix.lower() in PHOTO_SUFFIXES)
    stems = {path.stem for path in paths}
    return [path for path in paths if not (path.stem.endswith("_mask") and path.stem.removesuffix("_mask") in stems)]


def read_photo(path: Path, largest: int = LARGEST) -> np.ndarray:
    """One photo upright by its EXIF orientation, uint8 `[H, W, 3]`, `largest` pixels along its longer side at most.
    `InputError` where it cannot be read or is tiny."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (largest, largest))  # a JPEG is then never decoded at full size
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("photos", f"{path} cannot be read ({error})", "give a whole JPEG, PNG or WebP file") from error
    if picture.mode[0] in "IF":  # which Pillow would turn white
        raise InputError("photos", f"{path} has more than 8 bits a channel", "convert it to 8 bits")
    picture = ImageOps.exif_transpose(picture).convert("RGB")
    if min(picture.size) < SMALLEST:
        raise InputError("photos", f"{path} is {picture.width} x {picture.height} pixels", f"use {SMALLEST} or more a side")
    picture.thumbnail((largest, largest))
    return np.asarray(picture)


def product_texture(rng: np.random.Generator, size: int, photos: list[np.ndarray] = (), style: Style = TRAINING) -> np.ndarray:
    """One product seen flat: RGBA uint8 `[size, size, 4]`, alpha is the object's shape."""
    from_photo = len(photos) > 0 and rng.random() < 0.4
    surface = _photo_crop(rng, size, photos) if from_photo else _base(rng, size, style)
    if not from_photo or rng.random() < 0.3:
        for _ in range(rng.integers(2, 9)):
            _decal(rng, surface, style)
    surface.putalpha(_shape(rng, size))
    return np.asarray(surface)


def background_texture(rng: np.random.Generator, size: int, photos: list[np.ndarray] = (), style: Style = TRAINING) -> np.ndarray:
    """Something to stand in front of: RGB uint8 `[size, size, 3]`."""
    picture = _photo_crop(rng, size, photos) if len(photos) and rng.random() < 0.4 else _base(rng, size, style)
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(1, 6))))
    return np.asarray(picture)


def _colour(rng) -> tuple[int, int, int]:
    if rng.random() < 0.3:  # printed goods are often white, black or grey
        return (int(rng.choice([0, 20, 60, 128, 200, 235, 255])),) * 3
    return tuple(int(c) for c in rng.integers(0, 256, 3))


def _contrasting(rng, other) -> tuple[int, int, int]:
    colours = [_colour(rng) for _ in range(4)]
    return max(colours, key=lambda c: abs(np.dot(np.subtract(c, other), (0.3, 0.59, 0.11))))


def _photo_crop(rng, size, photos) -> Image.Image:
    photo = photos[rng.integers(len(photos))]
    side = int(min(photo.shape[:2]) * rng.uniform(0.35, 1.0))
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    crop = photo[y : y + side, x : x + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return Image.fromarray(np.ascontiguousarray(crop)).resize((size, size), Image.BICUBIC)


def _power_noise(rng, size, exponent) -> np.ndarray:
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / frequency**exponent
    noise = np.fft.irfft2(spectrum, (size, size))
    return (noise - noise.min()) / (np.ptp(noise) + 1e-9)


SHARES = {"solid": 0.24, "gradient": 0.16, "noise": 0.2, "stripes": 0.12, "checks": 0.1, "leaves": 0.18, "weave": 0.2, "cells": 0.2, "rings": 0.15}


def _base(rng, size, style) -> Image.Image:
    first, second = np.array(_colour(rng), float), np.array(_colour(rng), float)
    y, x = np.mgrid[0:size, 0:size] / size
    angle = rng.uniform(0, np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    shares = np.array([SHARES[kind] for kind in style.surfaces])
    kind = rng.choice(style.surfaces, p=shares / shares.sum())
    if kind == "leaves":
        return _dead_leaves(rng, size)
    if kind == "solid":
        blend = np.zeros((size, size))
    elif kind == "gradient":
        blend = (along - along.min()) / np.ptp(along)
    elif kind == "noise":
        blend = _power_noise(rng, size, rng.uniform(0.8, 2.0))
    elif kind == "stripes":
        blend = (np.sin(along * rng.uniform(20, 120)) > rng.uniform(-0.6, 0.6)).astype(float)
    elif kind == "checks":
        count = rng.uniform(4, 20)
        blend = ((np.floor(along * count) + np.floor(across * count)) % 2).astype(float)
    elif kind == "weave":
        pitch = rng.uniform(60, 160)
        blend = (np.sin(along * pitch) * np.sin(across * pitch) + rng.uniform(0.2, 1) * np.sin(along * pitch / 7)) / 4 + 0.5
    elif kind == "cells":
        distance = ((np.stack([x, y], -1)[None] - rng.uniform(0, 1, (24, 1, 1, 2))) ** 2).sum(-1)
        blend = rng.uniform(0, 1, 24)[distance.argmin(0)]
    else:
        blend = (np.sin(np.hypot(x - rng.uniform(), y - rng.uniform()) * rng.uniform(20, 90)) > 0).astype(float)
    pixels = first + blend[..., None] * (second - first)
    pixels += (_power_noise(rng, size, 1.0)[..., None] - 0.5) * rng.uniform(0, 40)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _dead_leaves(rng, size) -> Image.Image:
    picture = Image.new("RGB", (size, size), _colour(rng))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(20, 90)):
        radius = size * min(0.3, 0.02 / rng.uniform(0.05, 1.0))
        x, y = rng.uniform(0, size, 2)
        draw.regular_polygon((x, y, radius), int(rng.integers(3, 9)), rotation=int(rng.integers(360)), fill=_colour(rng))
    return picture


@cache
def _typeface(name: str, size: int) -> ImageFont.FreeTypeFont:
    if not name:
        return ImageFont.load_default(size)
    if find_spec("matplotlib") is None:
        raise InputError("textures", "the typefaces are matplotlib's, which is not installed", 'pip install "refine-by-align[train]"')
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _font(rng, style, size: float) -> ImageFont.FreeTypeFont:
    return _typeface(style.typefaces[rng.integers(len(style.typefaces))], max(8, int(size)))


def _word(rng, style) -> str:
    if style.words:
        return str(rng.choice(style.words))
    alphabet = [string.ascii_uppercase, string.ascii_letters, string.digits, string.ascii_uppercase + string.digits]
    letters = list(alphabet[rng.integers(len(alphabet))])
    return "".join(rng.choice(letters, rng.integers(1, 9)))


def _decal(rng, surface: Image.Image, style: Style) -> None:
    size = surface.width
    extent = int(size * rng.uniform(0.12, 0.6))
    x, y = (int(v) for v in rng.uniform(-0.1, 0.85, 2) * size)
    under = surface.getpixel((min(max(x + extent // 2, 0), size - 1), min(max(y + extent // 2, 0), size - 1)))
    fill = _contrasting(rng, under)
    decal = Image.new("RGBA", (extent, extent), fill + (0,))
    draw = ImageDraw.Draw(decal)
    kind = rng.choice(["text", "lines", "logo", "face", "barcode", "dots", "panel"], p=[0.32, 0.12, 0.26, 0.08, 0.06, 0.08, 0.08])
    if kind == "text":
        word = _word(rng, style)
        font = _font(rng, style, 1.5 * extent / max(len(word), 2))
        draw.text((extent / 2, extent / 2), word, fill=fill, font=font, anchor="mm", stroke_width=int(rng.integers(0, 3)))
    elif kind == "lines":
        font = _font(rng, style, extent / 7)
        text = "\n".join(" ".join(_word(rng, style) for _ in range(2)) for _ in range(rng.integers(2, 5)))
        draw.multiline_text((extent / 2, extent / 2), text, fill=fill, font=font, anchor="mm", align="center")
    elif kind == "logo":
        _logo(rng, draw, extent, fill, style)
    elif kind == "face":
        _face(rng, draw, extent, fill)
    elif kind == "barcode":
        draw.rectangle((0, 0, extent, extent * 0.6), fill=(255, 255, 255))
        x_bar = 3
        while x_bar < extent - 4:
            width = int(rng.integers(1, 5))
            draw.rectangle((x_bar, 3, x_bar + width - 1, extent * 0.55), fill=(0, 0, 0))
            x_bar += width + int(rng.integers(1, 5))
    elif kind == "dots":
        step = max(4, extent // int(rng.integers(4, 12)))
        for cy in range(step // 2, extent, step):
            for cx in range(step // 2, extent, step):
                draw.circle((cx, cy), step * 0.3, fill=fill)
    else:
        corner = int(extent * rng.uniform(0, 0.4))
        draw.rounded_rectangle((0, extent * 0.2, extent - 1, extent * 0.8), corner, fill=fill, outline=_colour(rng), width=2)
    if rng.random() < 0.5:
        decal = decal.rotate(float(rng.normal(0, 25)), resample=Image.BICUBIC)
    surface.paste(decal, (x, y), decal)


def _logo(rng, draw, extent, fill, style) -> None:
    centre, radius = extent / 2, extent * 0.46
    accent = _contrasting(rng, fill)
    for layer in range(rng.integers(1, 4)):
        colour = fill if layer % 2 == 0 else accent
        kind = rng.integers(4)
        if kind == 0:
            draw.circle((centre, centre), radius, fill=colour, outline=accent, width=max(1, extent // 30))
        elif kind == 1:
            draw.regular_polygon((centre, centre, radius), int(rng.integers(3, 7)), rotation=int(rng.integers(360)), fill=colour)
        elif kind == 2:
            points, inner = int(rng.integers(4, 9)), rng.uniform(0.3, 0.7)
            angles = np.arange(2 * points) * np.pi / points + rng.uniform(0, 6)
            lengths = np.where(np.arange(2 * points) % 2, inner, 1.0) * radius
            draw.polygon([(centre + r * np.cos(a), centre + r * np.sin(a)) for a, r in zip(angles, lengths)], fill=colour)
        else:
            start = int(rng.integers(360))
            draw.pieslice((centre - radius, centre - radius, centre + radius, centre + radius), start, start + int(rng.integers(60, 300)), fill=colour)
        radius *= rng.uniform(0.45, 0.8)
    if rng.random() < 0.5:
        font = _font(rng, style, radius * 1.6)
        draw.text((centre, centre), _word(rng, style)[:2], fill=accent, font=font, anchor="mm")


def _face(rng, draw, extent, fill) -> None:
    ink = _contrasting(rng, fill)
    draw.ellipse((extent * 0.05, extent * 0.1, extent * 0.95, extent * 0.9), fill=fill)
    eye = extent * rng.uniform(0.05, 0.11)
    for side in (-1, 1):
        cx, cy = extent * (0.5 + side * 0.19), extent * 0.4
        draw.circle((cx, cy), eye * 1.5, fill=(255, 255, 255))
        draw.circle((cx + eye * rng.uniform(-0.4, 0.4), cy), eye, fill=ink)
    draw.arc((extent * 0.3, extent * 0.45, extent * 0.7, extent * 0.78), 15, 165, fill=ink, width=max(2, extent // 22))


def _shape(rng, size) -> Image.Image:
    alpha = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(alpha)
    half_width, half_height = rng.uniform(0.5, 0.95, 2) * size / 2
    centre = size / 2
    box = (centre - half_width, centre - half_height, centre + half_width, centre + half_height)
    kind = rng.integers(4)
    if kind == 0:
        draw.rounded_rectangle(box, min(half_width, half_height) * rng.uniform(0, 0.7), fill=255)
    elif kind == 1:
        draw.ellipse(box, fill=255)
    elif kind == 2:  # a bottle: a body with a narrower neck
        draw.rounded_rectangle((box[0], centre - half_height * 0.4, box[2], box[3]), half_width * 0.3, fill=255)
        draw.rectangle((centre - half_width * 0.35, box[1], centre + half_width * 0.35, centre), fill=255)
    else:
        angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        radius = 1 + sum(rng.uniform(-0.3, 0.3) / k * np.cos(k * angles + rng.uniform(0, 6)) for k in range(2, 7))
        radius *= size * 0.48 / radius.max()
        draw.polygon([(centre + r * np.cos(a), centre + r * np.sin(a)) for a, r in zip(angles, radius)], fill=255)
    return alpha
