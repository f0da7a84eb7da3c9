"""Pictures and masks on disk, without losing what the method does not touch (alpha, colour profile, EXIF)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .errors import InputError

LOSSLESS = {".png": {}, ".webp": {"lossless": True, "exact": True}, ".tif": {}, ".tiff": {}, ".bmp": {}}
LARGEST = 16384
"""Pixels a side; beyond it a picture and its float copies would need tens of gigabytes."""
RGB_TO_YCC = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


@dataclass(frozen=True)
class Picture:
    """rgb `[3, H, W]` in [0, 1]; alpha `[H, W]` uint8 where the file has one; info kept for writing."""

    rgb: Tensor
    alpha: np.ndarray | None = None
    info: dict | None = None


def _open(path: str | Path, name: str) -> Image.Image:
    path = Path(path)
    if not path.is_file():
        raise InputError(name, f"{path} does not exist", "check the path")
    pillows_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit below is ours and has a message of its own
    try:
        picture = Image.open(path)
        if max(picture.size) > LARGEST:
            raise InputError(name, f"{path} is {picture.width} x {picture.height} pixels", f"use at most {LARGEST} a side")
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(name, f"{path} cannot be read ({error})", "give a whole PNG, JPEG, WebP or TIFF file") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillows_limit
    return picture


def _sixteen_bit(path: Path, picture: Image.Image) -> bool:
    if picture.mode.startswith(("I", "F")):
        return True
    if picture.format == "TIFF":
        return max(picture.tag_v2.get(258, (8,))) > 8
    if picture.format == "PNG":  # Pillow reads 16-bit RGB as 8-bit and does not say so
        with open(path, "rb") as file:
            return file.read(25)[24] == 16
    return False


def read_image(path: str | Path, name: str = "image") -> Picture:
    """Read an 8-bit picture, upright by its EXIF orientation; grey and palette become RGB."""
    picture = _open(path, name)
    if _sixteen_bit(Path(path), picture):
        raise InputError(name, f"{path} has 16 bits a channel, which could not be written back unchanged", "convert it to 8 bits first")
    picture = ImageOps.exif_transpose(picture)
    info = {key: picture.info[key] for key in ("icc_profile", "exif", "dpi") if picture.info.get(key)}
    alpha = None
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha = np.asarray(picture)[..., 3]
    if picture.mode == "CMYK":
        raise InputError(name, f"{path} is CMYK", "convert it to RGB first")
    rgb = np.asarray(picture.convert("RGB"))
    return Picture(torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255, alpha, info)


def read_mask(path: str | Path, name: str = "mask") -> Tensor:
    """Read a mask as `[H, W]` in {0, 1}: where any colour is above half, or, painted on a transparent layer, its alpha."""
    picture = ImageOps.exif_transpose(_open(path, name))
    if picture.mode.startswith("I"):
        return torch.from_numpy(np.asarray(picture, np.float64) > 32767).float()
    if picture.mode == "F":
        return torch.from_numpy(np.asarray(picture) > 0.5).float()
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        if alpha.min() < 128:
            return torch.from_numpy(alpha > 127).float()
    return torch.from_numpy(np.asarray(picture.convert("RGB")).max(-1) > 127).float()


def check_output(path: str | Path, lossless: bool = True) -> Path:
    """Refuse, before any work is done, a file that cannot be written or would not keep the pixels."""
    path = Path(path)
    if lossless and path.suffix.lower() not in LOSSLESS:
        raise InputError("output", f"{path.name} would be stored with loss or in an unknown format, changing pixels outside the mask", f"use one of {', '.join(LOSSLESS)}")
    if path.is_dir():
        raise InputError("output", f"{path} is a folder", "give a file")
    if not path.parent.is_dir():
        raise InputError("output", f"folder {path.parent} does not exist", "create it first")
    return path


def to_bytes(rgb: Tensor) -> np.ndarray:
    """`[3, H, W]` in [0, 1] -> uint8 `[H, W, 3]`; the exact inverse of reading 8-bit values."""
    return (rgb.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def write_image(path: str | Path, rgb: Tensor, like: Picture | None = None) -> None:
    """Write `[3, H, W]` in [0, 1] as 8 bits without loss, with the alpha and profile of `like`; whole or not at all."""
    pixels = to_bytes(rgb)
    info = dict(like.info or {}) if like else {}
    if like is not None and like.alpha is not None:
        if Path(path).suffix.lower() == ".bmp":
            raise InputError("output", f"{Path(path).name} cannot hold the picture's alpha", "use .png, .webp or .tif")
        pixels = np.concatenate([pixels, like.alpha[..., None]], -1)
    write_picture(path, Image.fromarray(pixels), **info)


def write_mask(path: str | Path, mask: Tensor) -> None:
    """Write `[H, W]` in [0, 1] as 8-bit grey."""
    write_picture(path, Image.fromarray((mask.cpu() * 255).round().byte().numpy()))


def write_picture(path: str | Path, picture: Image.Image, **info) -> None:
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        picture.save(partial, format=Image.registered_extensions()[path.suffix.lower()], **LOSSLESS.get(path.suffix.lower(), {}), **info)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
