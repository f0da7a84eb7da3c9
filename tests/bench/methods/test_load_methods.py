import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods import METHODS, NEED_MODEL, NEED_WEIGHTS, load_methods
from rba_core.bench.run import run
from rba_core.cli import parser
from rba_core.errors import InputError
from rba_core.zoom_crop import separate


@pytest.fixture
def weights(sd_folder, inpainting_folder, example_folder, anydoor_folder, mimicbrush_folder):
    return {
        "paint-by-example": example_folder, "anydoor": anydoor_folder, "mimicbrush": mimicbrush_folder, "sd-inpainting": inpainting_folder,
        "cross-image-attention": sd_folder, "dift": sd_folder,
    }  # fmt: skip


STEPS = {
    "paint-by-example": {"steps": 2}, "anydoor": {}, "mimicbrush": {"steps": 2}, "sd-inpainting": {"steps": 2},
    "cross-image-attention": {"steps": 22, "skipped": 10}, "dift": {},
}  # fmt: skip


@pytest.mark.parametrize("name", NEED_WEIGHTS)
def test_a_method_on_the_users_weights(small_set, weights, name, small_mimicbrush, monkeypatch):
    pytest.importorskip("cv2")
    for count, value in STEPS[name].items():
        monkeypatch.setattr(NEED_WEIGHTS[name], count, value)
    item = BenchmarkSet(small_set)[0]
    item = replace(item, mask=item.mask.clone())
    item.mask[:8, -8:] = 1
    assert len(separate(item.mask)) == 2
    method = load_methods([name], weights)[name]
    first, again, other = (method(item, None, seed) for seed in (3, 3, 4))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.image[:, item.mask < 0.5], item.image[:, item.mask < 0.5])
    if name == "dift":
        assert first.region.mask.any() and torch.equal(first.region.mask, again.region.mask)
        return
    assert first.region is None
    assert not torch.equal(first.image, other.image)
    for artifact in separate(item.mask):
        assert not torch.equal(first.image[:, artifact > 0.5], item.image[:, artifact > 0.5])


def test_a_method_without_weights_is_the_registered_one():
    assert load_methods(["none", "detail"]) == {"none": METHODS["none"], "detail": METHODS["detail"]}
    assert NEED_MODEL < set(METHODS) and not set(METHODS) & set(NEED_WEIGHTS)


@pytest.mark.parametrize(
    "names, given, problem",
    [
        (["none", "magic"], {}, "'magic' is not known"),
        (["paint-by-example"], {}, "missing for paint-by-example; give them by --weights paint-by-example=FOLDER"),
        (["none"], {"telea": "folder"}, "'telea' takes none"),
        (["dift"], {"dift": "nowhere"}, "nowhere has no folder vae"),
    ],
)
def test_bad_arguments(names, given, problem):
    with pytest.raises(InputError, match=problem):
        load_methods(names, given)


@pytest.mark.parametrize(
    "name, folder, problem",
    [
        ("sd-inpainting", "sd_folder", "takes 4 channels, sd-inpainting needs 9"),
        ("cross-image-attention", "inpainting_folder", "takes 9 channels"),
        ("paint-by-example", "inpainting_folder", "no folder image_encoder"),
        ("sd-inpainting", "example_folder", "no folder tokenizer"),
    ],
)
def test_weights_of_another_model(request, name, folder, problem):
    with pytest.raises(InputError, match=problem):
        load_methods([name], {name: request.getfixturevalue(folder)})


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_weights_that_are_not_whole(sd_folder, tmp_path, part):
    folder = shutil.copytree(sd_folder, tmp_path / "sd")
    state = load_file(folder / part)
    state.pop(sorted(state)[0])
    save_file(state, folder / part, metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 weights|Cannot load"):  # which diffusers 0.30 says by itself
        load_methods(["cross-image-attention"], {"cross-image-attention": folder})
    (folder / part).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        load_methods(["cross-image-attention"], {"cross-image-attention": folder})


def test_run_takes_weights(small_set, sd_folder, tmp_path):
    pytest.importorskip("cv2")
    report = run(small_set, load_methods(["none", "dift"], {"dift": sd_folder}), None, tmp_path, limit=1)
    assert 0 <= report["methods"]["dift"]["iou"] <= 1 and "iou" not in report["methods"]["none"]
    assert report["methods"]["dift"]["hp_ssim"] == report["methods"]["none"]["hp_ssim"]


def test_the_command_line_names_every_method(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["bench", "run", "--help"])
    told = capsys.readouterr().out.replace("\n", " ").replace("- ", "-").replace(" ", "")
    assert all(name in told for name in (*METHODS, *NEED_WEIGHTS))
