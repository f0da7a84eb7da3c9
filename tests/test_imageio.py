import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from rba_core import imageio
from rba_core.errors import InputError
from rba_core.imageio import check_output, read_image, read_mask, write_image, write_mask

ORIENTATION = 0x0112
ARTIST = 0x013B


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG by hand: Pillow writes no 16-bit RGB and no false sizes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sixteen_bit_png(pixels: np.ndarray) -> bytes:
    """uint16 `[H, W]`, `[H, W, 3]` or `[H, W, 4]`."""
    colour_type = {1: 0, 3: 2, 4: 6}[pixels[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, colour_type, rows)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)


def bytes_of(rgb: torch.Tensor) -> np.ndarray:
    return (rgb * 255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".tiff", ".bmp"])
def test_what_is_read_and_written_keeps_every_byte(tmp_path, pixels, suffix):
    Image.fromarray(pixels).save(tmp_path / "in.png")
    picture = read_image(tmp_path / "in.png")
    assert picture.rgb.shape == (3, 20, 31) and picture.rgb.dtype == torch.float32 and picture.alpha is None
    write_image(tmp_path / f"out{suffix}", picture.rgb, like=picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"out{suffix}").convert("RGB")), pixels)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_is_kept_with_the_colours_under_it(tmp_path, pixels, suffix):
    alpha = np.random.default_rng(1).integers(0, 256, (20, 31, 1), np.uint8)
    alpha[:5] = 0
    rgba = np.concatenate([pixels, alpha], -1)
    Image.fromarray(rgba).save(tmp_path / "in.png")
    picture = read_image(tmp_path / "in.png")
    assert np.array_equal(picture.alpha, alpha[..., 0]) and np.array_equal(bytes_of(picture.rgb), pixels)
    write_image(tmp_path / f"out{suffix}", picture.rgb, like=picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"out{suffix}").convert("RGBA")), rgba)


def test_a_format_without_alpha_is_refused_for_a_picture_that_has_it(tmp_path, pixels):
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "in.png")
    picture = read_image(tmp_path / "in.png")
    with pytest.raises(InputError, match="output: out.bmp .*alpha"):
        write_image(tmp_path / "out.bmp", picture.rgb, like=picture)
    assert not (tmp_path / "out.bmp").exists()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_colour_profile_and_exif_are_kept(tmp_path, pixels, suffix):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ARTIST] = "somebody"
    Image.fromarray(pixels).save(tmp_path / "in.png", icc_profile=profile, exif=exif)
    picture = read_image(tmp_path / "in.png")
    write_image(tmp_path / f"out{suffix}", picture.rgb, like=picture)
    written = Image.open(tmp_path / f"out{suffix}")
    assert written.info["icc_profile"] == profile
    assert written.getexif()[ARTIST] == "somebody"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_read_upright_and_not_turned_again_by_what_is_written(tmp_path, orientation):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:4, :6] = (255, 0, 0)  # a mark at the top left
    back = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM, 5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(back[orientation])
    exif = Image.Exif()
    exif[ORIENTATION], exif[ARTIST] = orientation, "somebody"
    stored.save(tmp_path / "in.png", exif=exif)
    picture = read_image(tmp_path / "in.png")
    assert np.array_equal(bytes_of(picture.rgb), upright)
    write_image(tmp_path / "out.png", picture.rgb, like=picture)
    written = Image.open(tmp_path / "out.png")
    assert written.getexif().get(ORIENTATION, 1) == 1 and written.getexif()[ARTIST] == "somebody"
    assert np.array_equal(np.asarray(written), upright)
    stored.convert("L").point(lambda v: 255 * (v > 50)).save(tmp_path / "mask.png", exif=exif)
    assert torch.equal(read_mask(tmp_path / "mask.png"), torch.from_numpy(upright[..., 0] > 0).float())


def test_a_grey_picture_becomes_rgb(tmp_path, pixels):
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    picture = read_image(tmp_path / "grey.png")
    assert np.array_equal(bytes_of(picture.rgb), np.repeat(pixels[..., :1], 3, -1)) and picture.alpha is None


def test_grey_with_alpha_becomes_rgb_with_alpha(tmp_path, pixels):
    Image.fromarray(pixels[..., :2]).save(tmp_path / "grey.png")
    picture = read_image(tmp_path / "grey.png")
    assert np.array_equal(bytes_of(picture.rgb), np.repeat(pixels[..., :1], 3, -1))
    assert np.array_equal(picture.alpha, pixels[..., 1])


def test_a_palette_picture_becomes_rgb(tmp_path, pixels):
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(tmp_path / "palette.png")
    picture = read_image(tmp_path / "palette.png")
    assert np.array_equal(bytes_of(picture.rgb), np.asarray(palette.convert("RGB"))) and picture.alpha is None


def test_a_palette_picture_with_a_transparent_colour_keeps_its_alpha(tmp_path, pixels):
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(tmp_path / "palette.png", transparency=3)
    picture = read_image(tmp_path / "palette.png")
    assert np.array_equal(picture.alpha, np.where(np.asarray(palette) == 3, 0, 255))


def test_a_black_and_white_picture_becomes_rgb(tmp_path):
    Image.fromarray(np.eye(20, dtype=bool)).save(tmp_path / "bits.png")
    assert torch.equal(read_image(tmp_path / "bits.png").rgb, torch.eye(20).expand(3, 20, 20))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_16_bit_png_is_refused_as_an_image(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 65536, (20, 20, channels), np.uint16)
    (tmp_path / "deep.png").write_bytes(sixteen_bit_png(values.squeeze(-1) if channels == 1 else values))
    with pytest.raises(InputError, match="image: .*deep.png has 16 bits a channel"):
        read_image(tmp_path / "deep.png")


def test_a_16_bit_grey_tiff_is_refused_as_an_image(tmp_path):
    Image.fromarray(np.full((20, 20), 40000, np.uint16)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match="16 bits"):
        read_image(tmp_path / "deep.tif")


def test_a_16_bit_rgb_tiff_is_refused_as_an_image(tmp_path):
    """Pillow reads it as 8-bit without a word, like the PNG."""
    strip = np.random.default_rng(0).integers(0, 65536, (20, 20, 3), np.uint16).astype("<u2").tobytes()
    tags = [(256, 20), (257, 20), (258, None), (259, 1), (262, 2), (273, None), (277, 3), (278, 20), (279, len(strip))]
    after = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 3, 3, after) if tag == 258 else struct.pack("<HHII", tag, 4, 1, after + 6 if tag == 273 else value)
        for tag, value in tags
    )
    header = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "deep.tif").write_bytes(header + struct.pack("<3H", 16, 16, 16) + strip)
    assert Image.open(tmp_path / "deep.tif").mode == "RGB"  # the file is a good one
    with pytest.raises(InputError, match="16 bits"):
        read_image(tmp_path / "deep.tif")


@pytest.fixture
def selection() -> np.ndarray:
    mask = np.zeros((20, 31), bool)
    mask[3:9, 4:20] = True
    return mask


def agrees(path: Path, selection: np.ndarray) -> bool:
    mask = read_mask(path)
    return mask.dtype == torch.float32 and torch.equal(mask, torch.from_numpy(selection).float())


def test_masks_are_read_from_every_kind_of_grey(tmp_path, selection):
    Image.fromarray(selection).save(tmp_path / "bits.png")
    Image.fromarray(np.where(selection, 255, 0).astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.where(selection, 128, 127).astype(np.uint8)).save(tmp_path / "near the middle.png")
    Image.fromarray(np.where(selection[..., None], 255, 0).astype(np.uint8).repeat(3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(np.where(selection, 255, 0).astype(np.uint8)).save(tmp_path / "lossy.jpg", quality=95)
    for path in tmp_path.iterdir():
        assert agrees(path, selection), path.name


def test_16_bit_masks_are_read(tmp_path, selection):
    values = np.where(selection, 65535, 0).astype(np.uint16)
    (tmp_path / "grey.png").write_bytes(sixteen_bit_png(values))
    (tmp_path / "rgb.png").write_bytes(sixteen_bit_png(values[..., None].repeat(3, -1)))
    Image.fromarray(values).save(tmp_path / "grey.tif")
    (tmp_path / "near the middle.png").write_bytes(sixteen_bit_png(np.where(selection, 32768, 32767).astype(np.uint16)))
    for path in tmp_path.iterdir():
        assert agrees(path, selection), path.name


def test_a_dark_16_bit_mask_selects_nothing(tmp_path):
    (tmp_path / "dark.png").write_bytes(sixteen_bit_png(np.full((20, 20), 200, np.uint16)))
    assert not read_mask(tmp_path / "dark.png").any()


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (255, 0, 255), (0, 255, 0), (255, 255, 0)])
def test_a_mask_painted_in_a_colour_on_black_is_read(tmp_path, selection, colour):
    Image.fromarray(np.where(selection[..., None], colour, (0, 0, 0)).astype(np.uint8)).save(tmp_path / "painted.png")
    assert agrees(tmp_path / "painted.png", selection)


def test_a_mask_painted_on_a_transparent_layer_is_read_from_its_alpha(tmp_path, selection):
    for name, colour in (("black", 0), ("white", 255)):
        rgba = np.full((20, 31, 4), colour, np.uint8)
        rgba[..., 3] = np.where(selection, 255, 0)
        Image.fromarray(rgba).save(tmp_path / f"{name}.png")
        assert agrees(tmp_path / f"{name}.png", selection), name


def test_an_opaque_mask_with_an_alpha_channel_is_read_from_its_grey(tmp_path, selection):
    rgba = np.full((20, 31, 4), 255, np.uint8)
    rgba[~selection, :3] = 0
    Image.fromarray(rgba).save(tmp_path / "mask.png")
    assert agrees(tmp_path / "mask.png", selection)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_a_file_cut_short_anywhere_is_one_line_that_names_it(tmp_path, pixels, read):
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for length in [*range(0, 60, 3), *range(60, len(whole) - 16, 331)]:
        (tmp_path / "cut.png").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut.png cannot be read") as caught:
            read(tmp_path / "cut.png", "reference")
        assert caught.value.name == "reference" and "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_other_formats_cut_short_are_refused_too(tmp_path, pixels, format):
    Image.fromarray(pixels).save(tmp_path / "whole", format)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path / "cut")


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture\n")
    with pytest.raises(InputError, match="notes.png cannot be read"):
        read_image(tmp_path / "notes.png")


@pytest.mark.parametrize("name", ["missing.png", "."])
def test_a_missing_file_or_a_folder_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="image: .* does not exist"):
        read_image(tmp_path / name)


def test_a_huge_picture_is_refused_from_its_header(tmp_path):
    (tmp_path / "huge.png").write_bytes(png(50000, 50000, 8, 2, b"\0"))
    with pytest.raises(InputError, match="huge.png is 50000 x 50000 pixels"):
        read_image(tmp_path / "huge.png")


def test_reading_leaves_pillows_own_limit_alone(tmp_path, pixels, monkeypatch):
    """It guards whatever else runs in the process."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 123)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    assert read_image(tmp_path / "in.png").rgb.shape == (3, 20, 31)
    assert Image.MAX_IMAGE_PIXELS == 123


def test_cmyk_is_refused(tmp_path):
    Image.new("CMYK", (20, 20)).save(tmp_path / "print.jpg")
    with pytest.raises(InputError, match="print.jpg is CMYK"):
        read_image(tmp_path / "print.jpg")


@pytest.mark.parametrize("name", ["out.jpg", "out.JPEG", "out.gif", "out", "out.png.txt"])
def test_an_output_that_would_lose_pixels_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"output: {name} would be stored with loss"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("name", ["out.png", "OUT.PNG", "out.webp", "out.tif", "out.tiff", "out.bmp"])
def test_a_lossless_output_is_accepted(tmp_path, name):
    assert check_output(tmp_path / name) == tmp_path / name
    write_image(tmp_path / name, torch.rand(3, 16, 16))
    assert (tmp_path / name).is_file()


def test_an_output_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="output: folder .*nowhere does not exist"):
        check_output(tmp_path / "nowhere" / "out.png")


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(InputError, match="output"):
        check_output(tmp_path / "out.png")


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    write_image(tmp_path / "out.png", torch.zeros(3, 16, 16))
    before = (tmp_path / "out.png").read_bytes()

    def full_disk(self, path, **kwargs):
        Path(path).write_bytes(b"half a pict")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises((OSError, InputError)):
        write_image(tmp_path / "out.png", torch.ones(3, 16, 16))
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]
    assert (tmp_path / "out.png").read_bytes() == before


def test_a_write_that_is_interrupted_before_it_is_put_in_place_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(tmp_path / "out.png", torch.ones(3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_a_mask_written_and_read_is_the_same(tmp_path, selection):
    write_mask(tmp_path / "mask.png", torch.from_numpy(selection).float())
    assert Image.open(tmp_path / "mask.png").mode == "L"
    assert set(np.unique(np.asarray(Image.open(tmp_path / "mask.png")))) == {0, 255}
    assert agrees(tmp_path / "mask.png", selection)


def test_values_out_of_range_are_clipped_and_do_not_wrap_around(tmp_path):
    write_image(tmp_path / "out.png", torch.tensor([-0.2, 1.3])[None, None].expand(3, 16, 2))
    assert np.asarray(Image.open(tmp_path / "out.png"))[0, :, 0].tolist() == [0, 255]


def test_bytes_are_the_exact_inverse_of_reading():
    values = torch.arange(256).float() / 255
    assert imageio.to_bytes(values.expand(3, 1, 256))[0, :, 1].tolist() == list(range(256))
