"""What users get wrong: one line that names the input, exit code 2 and nothing written, or the right result."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rba_core import cli
from rba_core.errors import InputError
from rba_core.imageio import write_image, write_mask
from rba_core.pipeline import refine_by_align

REPOSITORY = Path(__file__).parents[1]
HEIGHT, WIDTH = 96, 130


def png16(pixels: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    colour_type = 2 if pixels.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_png() -> bytes:
    """A few bytes that say 50000 x 50000."""
    small = bytearray(png16(np.zeros((1, 1), np.uint16)))
    small[16:24] = struct.pack(">II", 50000, 50000)
    small[29:33] = struct.pack(">I", zlib.crc32(bytes(small[12:29])))
    return bytes(small)


@pytest.fixture
def place(tmp_path, scene, model_folder, monkeypatch):
    """A folder with good inputs and a model to damage, the working directory of the command."""
    monkeypatch.chdir(tmp_path)
    write_image("image.png", scene.image)
    write_mask("mask.png", scene.mask)
    write_image("reference.png", scene.reference)
    write_mask("reference_mask.png", scene.reference_mask)
    shutil.copytree(model_folder, "model")
    return tmp_path


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refine(*options: str, output: str = "out.png") -> int:
    model = [] if "--model" in options else ["--model", "model"]
    return cli.main(["refine", "image.png", "mask.png", "reference.png", "-o", output, *model, *options])


def empty(name):
    shape = (HEIGHT, WIDTH) if name == "mask.png" else (81, 101)
    Image.fromarray(np.zeros(shape, np.uint8)).save(name)


def cut(path, share=0.5):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: int(len(whole) * share)])


def deep(name, channels=None):
    shape = (HEIGHT, WIDTH) if channels is None else (HEIGHT, WIDTH, channels)
    Path(name).write_bytes(png16(np.random.default_rng(0).integers(0, 65536, shape, np.uint16)))


def print_colours(name):
    Image.new("CMYK", (WIDTH, HEIGHT), (9, 9, 9, 9)).save("print.jpg")
    Path("print.jpg").replace(name)  # found out by its content, not by its name


def other_unet():
    """The U-Net of another model: other widths, so other shapes under the same names."""
    state = load_file("model/unet/diffusion_pytorch_model.safetensors")
    save_file({k: v[:1].contiguous() for k, v in state.items()}, "model/unet/diffusion_pytorch_model.safetensors")


def less_of_the_unet():
    state = load_file("model/unet/diffusion_pytorch_model.safetensors")
    state.pop("mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight")
    save_file(state, "model/unet/diffusion_pytorch_model.safetensors")


def unknown_setting():
    settings = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(settings | {"colour": "blue"}))


# what: (how the files are spoiled, options, how the message goes on after "rba: ")
REFUSED = {
    "mask of another size": (lambda: Image.new("L", (WIDTH + 1, HEIGHT), 255).save("mask.png"), "", "mask: is 131 x 96, its image 130 x 96"),
    "empty mask": (lambda: empty("mask.png"), "", "mask: is empty"),
    "full mask": (lambda: Image.new("L", (WIDTH, HEIGHT), 255).save("mask.png"), "", "mask: covers the whole image"),
    "fully transparent mask": (lambda: Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0)).save("mask.png"), "", "mask: is empty"),
    "1 px image": (lambda: Image.new("RGB", (1, 1)).save("image.png"), "", "image: is only 1 x 1 pixels"),
    "1 px reference": (lambda: Image.new("RGB", (1, 1)).save("reference.png"), "", "reference: is only 1 x 1 pixels"),
    "narrow image": (lambda: Image.new("RGB", (15, 400)).save("image.png"), "", "image: is only 15 x 400 pixels"),
    "16-bit RGB image": (lambda: deep("image.png", 3), "", "image: image.png has 16 bits a channel"),
    "16-bit grey image": (lambda: deep("image.png"), "", "image: image.png has 16 bits a channel"),
    "huge image": (lambda: Path("image.png").write_bytes(huge_png()), "", "image: image.png is 50000 x 50000 pixels"),
    "huge mask": (lambda: Path("mask.png").write_bytes(huge_png()), "", "mask: mask.png is 50000 x 50000 pixels"),
    "CMYK image": (lambda: print_colours("image.png"), "", "image: image.png is CMYK"),
    "missing image": (lambda: Path("image.png").unlink(), "", "image: image.png does not exist"),
    "missing mask": (lambda: Path("mask.png").unlink(), "", "mask: mask.png does not exist"),
    "missing reference": (lambda: Path("reference.png").unlink(), "", "reference: reference.png does not exist"),
    "missing reference mask": (lambda: None, "--reference-mask none.png", "reference mask: none.png does not exist"),
    "folder as image": (lambda: (Path("image.png").unlink(), Path("image.png").mkdir()), "", "image: image.png"),
    "text as image": (lambda: Path("image.png").write_text("a picture"), "", "image: image.png cannot be read"),
    "empty file as reference": (lambda: Path("reference.png").write_bytes(b""), "", "reference: reference.png cannot be read"),
    "truncated image": (lambda: cut("image.png"), "", "image: image.png cannot be read"),
    "truncated mask": (lambda: cut("mask.png"), "", "mask: mask.png cannot be read"),
    "reference mask empty": (lambda: empty("reference_mask.png"), "--reference-mask reference_mask.png", "reference mask: is empty"),
    "reference mask of another size": (lambda: None, "--reference-mask mask.png", "reference mask: is 130 x 96, its reference 101 x 81"),
    "fully transparent reference": (lambda: Image.new("RGBA", (101, 81), (9, 9, 9, 0)).save("reference.png"), "", "reference mask: is empty"),
    "output with loss": (lambda: None, "-o out.jpg", "output: out.jpg would be stored with loss"),
    "output without suffix": (lambda: None, "-o out", "output: out would be stored"),
    "output folder missing": (lambda: None, "-o nowhere/out.png", "output: folder nowhere does not exist"),
    "output is a folder": (lambda: Path("taken.png").mkdir(), "-o taken.png", "output: "),
    "correspondence with loss": (lambda: None, "--save-correspondence m.jpg", "output: m.jpg would be stored with loss"),
    "unknown model": (lambda: None, "--model rba-huge", "model: 'rba-huge' is neither a model folder nor a shipped model"),
    "missing config": (lambda: Path("model/config.json").unlink(), "", "model: 'model' is neither a model folder"),
    "config not JSON": (lambda: cut("model/config.json"), "", "model: model cannot be read"),
    "unknown setting": (unknown_setting, "", "model: model/config.json has unknown keys ['colour']"),
    "missing weights": (lambda: Path("model/vae/diffusion_pytorch_model.safetensors").unlink(), "", "model: model cannot be read"),
    "truncated weights": (lambda: cut("model/unet/diffusion_pytorch_model.safetensors"), "", "model: model cannot be read"),
    "weights cut in the header": (lambda: cut("model/projector.safetensors", 0.001), "", "model: model cannot be read"),
    "weights of another model": (other_unet, "", "model: model cannot be read"),
    "weights with a layer missing": (less_of_the_unet, "", "model: model cannot be read"),
    "vae in the unet's place": (lambda: (shutil.rmtree("model/unet"), shutil.copytree("model/vae", "model/unet")), "", "model: "),
    "steps 0": (lambda: None, "--steps 0", "steps: is 0"),
    "steps 5000": (lambda: None, "--steps 5000", "steps: is 5000"),
    "guidance not a number": (lambda: None, "--guidance nan", "guidance: is nan"),
    "layer 99": (lambda: None, "--layer 99", "layer: is 99"),
    "layer -1": (lambda: None, "--layer -1", "layer: is -1"),
    "timestep 50": (lambda: None, "--timestep 50", "timestep: is 50"),
    "noise level 2": (lambda: None, "--noise-level 2", "noise level: is 2"),
    "threshold 0": (lambda: None, "--threshold 0", "threshold: is 0"),
    "threshold 2": (lambda: None, "--threshold 2", "threshold: is 2"),
    "context below 1": (lambda: None, "--context 0.5", "context: is 0.5"),
    "context 0": (lambda: None, "--context 0", "context: is 0"),
    "unknown device": (lambda: None, "--device abacus", "device: 'abacus' is not available here"),
    "device that computes nothing": (lambda: None, "--device meta", "device: 'meta' is not available here"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_told_in_one_line_with_exit_code_2_and_nothing_is_written(place, capsys, what):
    spoil, options, message = REFUSED[what]
    spoil()
    before = listing(place)
    capsys.readouterr()
    assert refine(*options.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"rba: {message}"), err
    assert err.count("\n") == 1 and err.endswith("\n") and "; " in err
    assert out == ""
    assert listing(place) == before


def test_the_program_itself_leaves_with_2_and_one_line(place):
    """In a process of its own, where libraries may log what they like."""
    Path("model/vae/diffusion_pytorch_model.safetensors").unlink()
    command = [sys.executable, "-m", "rba_core.cli", *"refine image.png mask.png reference.png -o out.png --model model".split()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("rba: model: model cannot be read") and done.stderr.count("\n") == 1
    assert not Path("out.png").exists()


@pytest.mark.parametrize("what", ["mask of another size", "empty mask", "text as image", "layer 99", "threshold 2", "unknown model"])
def test_align_refuses_alike(place, capsys, what):
    spoil, options, message = REFUSED[what]
    spoil()
    before = listing(place)
    model = [] if "--model" in options else ["--model", "model"]
    assert cli.main(["align", "image.png", "mask.png", "reference.png", "-o", "out.png", *model, *options.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rba: {message}") and err.count("\n") == 1
    assert listing(place) == before


@pytest.fixture(scope="module")
def results() -> dict[str, np.ndarray]:
    return {}


@pytest.fixture
def right(place, results) -> np.ndarray:
    """The result of the good inputs, computed once."""
    if "right" not in results:
        assert refine(output="right.png") == 0
        results["right"] = np.asarray(Image.open("right.png"))
    return results["right"]


def result() -> np.ndarray:
    assert refine() == 0
    return np.asarray(Image.open("out.png"))


def test_an_image_with_alpha_keeps_it(right):
    alpha = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
    Image.fromarray(np.concatenate([np.asarray(Image.open("image.png")), alpha], -1)).save("image.png")
    assert np.array_equal(result(), np.concatenate([right, alpha], -1))


def test_a_grey_image_is_refined_like_the_same_in_rgb(place):
    grey = Image.open("image.png").convert("L")
    grey.convert("RGB").save("image.png")
    as_rgb = result()
    grey.save("image.png")
    assert np.array_equal(result(), as_rgb)


def test_a_palette_image_is_refined_like_the_same_in_rgb(place):
    palette = Image.open("image.png").quantize(32)
    palette.convert("RGB").save("image.png")
    as_rgb = result()
    palette.save("image.png")
    assert np.array_equal(result(), as_rgb)


def mask_pixels() -> np.ndarray:
    return np.asarray(Image.open("mask.png"))


def test_a_16_bit_mask_is_right(right):
    Path("mask.png").write_bytes(png16(mask_pixels().astype(np.uint16) * 257))
    assert np.array_equal(result(), right)


def test_a_mask_painted_in_red_is_right(right):
    red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    red[..., 0] = mask_pixels()
    Image.fromarray(red).save("mask.png")
    assert np.array_equal(result(), right)


def test_a_mask_with_soft_edges_is_right(right):
    soft = np.where(mask_pixels() > 0, 200, 60).astype(np.uint8)
    Image.fromarray(soft).save("mask.png")
    assert np.array_equal(result(), right)


def test_a_1_bit_mask_is_right(right):
    Image.fromarray(mask_pixels() > 0).save("mask.png")
    assert np.array_equal(result(), right)


def test_a_mask_on_a_transparent_layer_is_right(right):
    layer = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
    layer[..., 3] = mask_pixels()
    Image.fromarray(layer).save("mask.png")
    assert np.array_equal(result(), right)


def test_a_picture_turned_by_exif_is_right_with_an_upright_mask(right):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.open("image.png").transpose(Image.ROTATE_90).save("image.png", exif=exif)
    assert np.array_equal(result(), right)


def test_wrong_names_of_files_do_not_matter(right):
    image = Image.open("image.png")
    image.load()
    image.save("image.png", format="TIFF")
    assert np.array_equal(result(), right)


LIBRARY = {
    "image: holds NaN": dict(image=torch.full((3, HEIGHT, WIDTH), torch.nan)),
    "mask: holds NaN": dict(mask=torch.full((HEIGHT, WIDTH), torch.nan)),
    "reference: holds NaN or infinite": dict(reference=torch.full((3, 81, 101), torch.inf)),
    "image: has values from": dict(image=torch.linspace(0, 255, 3 * HEIGHT * WIDTH).view(3, HEIGHT, WIDTH)),
    "reference: has values from": dict(reference=torch.linspace(-1, 1, 3 * 81 * 101).view(3, 81, 101)),
    "image: has shape (96, 130, 3)": dict(image=torch.rand(HEIGHT, WIDTH, 3)),
}


@pytest.mark.parametrize("message", LIBRARY)
def test_bad_tensors_are_refused_by_the_library(model, scene, message):
    good = dict(image=scene.image, mask=scene.mask, reference=scene.reference, reference_mask=scene.reference_mask)
    with pytest.raises(InputError) as caught:
        refine_by_align(model, **good | LIBRARY[message])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
