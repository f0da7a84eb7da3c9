import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import texture
from PIL import Image

from rba_core import cli
from rba_core.alignment import align
from rba_core.imageio import read_image, read_mask, to_bytes, write_image, write_mask
from rba_core.model import RefineByAlign
from rba_core.pipeline import Settings, refine_by_align
from rba_core.postprocessing import CleaningSettings, clean
from rba_core.reference_encoding import encode_reference
from rba_core.zoom_crop import zoom_crop


@pytest.fixture(scope="module")
def loaded(model_folder) -> RefineByAlign:
    """The small model as the command reads it."""
    return RefineByAlign.load(model_folder)


@pytest.fixture
def files(tmp_path, scene):
    """image.png, mask.png, reference.png and reference_mask.png."""
    write_image(tmp_path / "image.png", scene.image)
    write_mask(tmp_path / "mask.png", scene.mask)
    write_image(tmp_path / "reference.png", scene.reference)
    write_mask(tmp_path / "reference_mask.png", scene.reference_mask)
    return tmp_path


@pytest.fixture
def rba(files, model_folder, monkeypatch):
    """`rba("refine", "-o", "out.png", ...)` on the files; a model is given unless the options name one."""
    monkeypatch.chdir(files)

    def call(command: str, *options: str) -> int:
        inputs = ["image.png", "mask.png", "reference.png"] if command in ("refine", "align") else []
        model = [] if "--model" in options else ["--model", str(model_folder)]
        return cli.main([command, *inputs, *model, *options])

    return call


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_refine_writes_the_result_of_the_pipeline(rba, loaded, scene, capsys):
    assert rba("refine", "-o", "out.png") == 0
    expected = refine_by_align(loaded, scene.image, scene.mask, scene.reference)
    assert torch.allclose(read_image("out.png").rgb, expected.image, atol=0.51 / 255)
    outside = scene.mask.numpy() < 0.5
    assert np.array_equal(pixels("out.png")[outside], pixels("image.png")[outside])
    out, err = capsys.readouterr()
    assert re.fullmatch(r"out\.png  \(1 artifact, confidence 0\.\d\d, [\d.]+ s\)\n", out)
    assert err.count("rba:") == 1 and "do not agree around 1 of 1 artifacts" in err  # noise; a slow machine may show the bar


def test_refine_writes_one_file(rba, files):
    before = {p.name for p in files.iterdir()}
    rba("refine", "-o", "out.png")
    assert {p.name for p in files.iterdir()} - before == {"out.png"}


def test_every_option_of_refine_reaches_the_pipeline(rba, scene, monkeypatch):
    seen = {}
    usual = refine_by_align

    def spy(model, image, mask, reference, reference_mask, **kwargs):
        seen.update(kwargs, reference_mask=reference_mask)
        return usual(model, image, mask, reference, reference_mask, **kwargs)

    monkeypatch.setattr("rba_core.pipeline.refine_by_align", spy)
    options = (
        "--reference-mask reference_mask.png --aligner features --layer 8 --timestep 4 --threshold 0.3 --seed 7 --steps 2 --guidance 1.25 --scheduler euler "
        "--on-flat single-stage --one-crop --context 2.5 --feather 1.5 --no-colour-match --no-dense --levels 3 --no-register --strength 0.4 --detail-transfer 0.5"
    )
    assert rba("refine", "-o", "out.png", *options.split()) == 0
    assert torch.equal(seen["reference_mask"][0], scene.reference_mask)
    assert seen["seed"] == 7
    assert seen["settings"] == Settings(
        aligner="features", layer=8, timestep=4, cleaning=CleaningSettings(threshold=0.3), steps=2, guidance=1.25, scheduler="euler",
        on_flat="single-stage", one_crop=True, context=2.5, feather=1.5, colour_match=False,
        dense=False, levels=3, register=False, strength=0.4, detail_transfer=0.5,
    )  # fmt: skip
    assert rba("refine", "-o", "out.png", "--single-stage", "--noise-level", "0.7") == 0
    assert seen["settings"] == Settings(single_stage=True, noise_level=0.7, cleaning=CleaningSettings(threshold=0.4))
    assert seen["reference_mask"] == [None] and seen["seed"] == 0


def test_defaults_of_the_command_are_those_of_the_library():
    options = cli.parser().parse_args(["refine", "i", "m", "r", "-o", "o"])
    assert cli._settings(options) == Settings()


def test_the_correspondence_is_written_at_the_references_size(rba, loaded, scene):
    assert rba("refine", "-o", "out.png", "--save-correspondence", "m.png", "--reference-mask", "reference_mask.png") == 0
    expected = refine_by_align(loaded, scene.image, scene.mask, scene.reference, scene.reference_mask).regions[0].mask
    assert torch.equal(read_mask("m.png"), expected)
    assert set(np.unique(pixels("m.png"))) == {0, 255}


def test_the_correspondence_of_several_artifacts_is_their_union(rba, loaded, scene):
    mask = scene.mask.clone()
    mask[80:92, 100:125] = 1
    write_mask("mask.png", mask)
    assert rba("refine", "-o", "out.png", "--save-correspondence", "m.png") == 0
    regions = refine_by_align(loaded, scene.image, mask, scene.reference).regions
    assert len(regions) == 2
    assert torch.equal(read_mask("m.png"), torch.maximum(regions[0].mask, regions[1].mask))


def test_json_is_the_one_line_on_stdout(rba, loaded, scene, capsys):
    assert rba("refine", "-o", "out.png", "--json", "--seed", "3") == 0
    line, rest = capsys.readouterr().out.split("\n", 1)
    told = json.loads(line)
    box = refine_by_align(loaded, scene.image, scene.mask, scene.reference, seed=3).regions[0].box
    assert rest == ""
    assert told.keys() == {"output", "seconds", "seed", "regions", "references", "confidences", "fell_back"}
    assert told["output"] == "out.png" and told["seed"] == 3 and told["fell_back"] == 0 and told["seconds"] > 0
    assert told["regions"] == [[box.x, box.y, box.width, box.height]] and told["confidences"][0] < 0.1  # noise matches nothing


def test_the_same_seed_gives_the_same_file_and_another_seed_another(rba):
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        assert rba("refine", "-o", name, "--seed", seed, "--no-register") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_a_single_stage_uses_the_whole_reference(rba, loaded, scene, capsys):
    assert rba("refine", "-o", "out.png", "--single-stage", "--json", "--save-correspondence", "m.png") == 0
    expected = refine_by_align(loaded, scene.image, scene.mask, scene.reference, settings=Settings(single_stage=True)).image
    assert torch.allclose(read_image("out.png").rgb, expected, atol=0.51 / 255)
    out, err = capsys.readouterr()
    assert json.loads(out)["regions"] == [None] and json.loads(out)["fell_back"] == 0
    assert "rba:" not in err
    assert not read_mask("m.png").any()


def test_a_flat_map_is_one_line_and_exit_code_2(rba, make_model, tmp_path, capsys):
    make_model(sharpness=1.0).save(tmp_path / "flat")
    assert rba("refine", "-o", "out.png", "--model", "flat") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rba: alignment: gave a flat map") and err.count("\n") == 1
    assert not Path("out.png").exists()


def test_falling_back_is_told(rba, make_model, tmp_path, capsys):
    make_model(sharpness=1.0).save(tmp_path / "flat")
    assert rba("refine", "-o", "out.png", "--model", "flat", "--on-flat", "single-stage", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["fell_back"] == 1
    assert "the whole reference guided" in err
    assert Path("out.png").exists()


def test_the_alpha_of_the_image_is_kept(rba, scene):
    alpha = np.random.default_rng(0).integers(0, 256, (96, 130, 1), np.uint8)
    Image.fromarray(np.concatenate([pixels("image.png"), alpha], -1)).save("image.png")
    assert rba("refine", "-o", "out.png") == 0
    assert np.array_equal(pixels("out.png")[..., 3:], alpha)
    outside = scene.mask.numpy() < 0.5
    assert np.array_equal(pixels("out.png")[outside], pixels("image.png")[outside])


def test_the_alpha_of_a_cut_out_reference_is_its_mask(rba, scene):
    assert rba("refine", "-o", "given.png", "--reference-mask", "reference_mask.png") == 0
    cut_out = np.concatenate([pixels("reference.png"), pixels("reference_mask.png")[..., None]], -1)
    Image.fromarray(cut_out).save("reference.png")
    assert rba("refine", "-o", "from alpha.png") == 0
    assert np.array_equal(pixels("given.png"), pixels("from alpha.png"))


@pytest.mark.parametrize("suffix", ["webp", "tif", "bmp"])
def test_other_lossless_formats_keep_the_surround_too(rba, scene, suffix):
    assert rba("refine", "-o", f"out.{suffix}", "--no-register") == 0
    outside = scene.mask.numpy() < 0.5
    assert np.array_equal(pixels(f"out.{suffix}")[outside], pixels("image.png")[outside])


def test_the_result_may_replace_the_image(rba, scene):
    before = pixels("image.png")
    assert rba("refine", "-o", "image.png") == 0
    after, inside = pixels("image.png"), scene.mask.numpy() > 0.5
    assert np.array_equal(after[~inside], before[~inside]) and not np.array_equal(after[inside], before[inside])


def test_bfloat16_can_be_asked_for(rba, scene):
    assert rba("refine", "-o", "out.png", "--dtype", "bf16", "--on-flat", "single-stage") == 0
    outside = scene.mask.numpy() < 0.5
    assert np.array_equal(pixels("out.png")[outside], pixels("image.png")[outside])


def test_interrupting_writes_nothing(rba, files, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rba_core.pipeline.refine", interrupted)
    before = {p.name for p in files.iterdir()}
    assert rba("refine", "-o", "out.png") == 130
    assert {p.name for p in files.iterdir()} == before
    assert capsys.readouterr().err.count("\n") == 1


def aligned(model, scene, **options):
    whole = encode_reference(model, scene.reference, torch.ones(scene.reference.shape[-2:]))
    return align(model, zoom_crop(scene.image, scene.mask, 64, context=model.config.alignment_context), whole, **options), whole


def test_align_writes_the_matched_region(rba, loaded, scene, capsys):
    assert rba("align", "-o", "m.png", "--no-dense") == 0
    region = clean(*aligned(loaded, scene))
    assert torch.equal(read_mask("m.png"), region.mask)
    assert pixels("m.png").shape == (81, 101) and set(np.unique(pixels("m.png"))) == {0, 255}
    box = region.box
    assert capsys.readouterr().out == f"m.png  (box {box.x},{box.y} {box.width} x {box.height}, confidence 0.00)\n"  # noise matches nothing


def test_align_and_refine_find_the_same_region(rba):
    assert rba("align", "-o", "a.png", "--seed", "2") == 0
    assert rba("refine", "-o", "out.png", "--save-correspondence", "b.png", "--seed", "2") == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_the_raw_map_is_written_scaled_to_its_peak(rba, loaded, scene):
    assert rba("align", "-o", "m.png", "--raw", "raw.png") == 0
    raw, whole = aligned(loaded, scene)
    soft = whole.to_reference(raw)
    assert np.allclose(pixels("raw.png"), (soft / soft.max() * 255).numpy(), atol=0.51)


def test_the_overlay_is_a_picture_of_the_reference_marked_at_the_region(rba):
    assert rba("align", "-o", "m.png", "--overlay", "over.png") == 0
    assert pixels("over.png").shape == (81, 101, 3)
    assert not np.array_equal(pixels("over.png"), pixels("reference.png"))


def test_matches_are_drawn_and_the_warped_reference_is_cut_out(rba):
    assert rba("align", "-o", "m.png", "--matches", "matches.png", "--warped", "warped.png") == 0
    assert pixels("matches.png").shape == (384, 2 * 384 + 24, 3)
    warped = pixels("warped.png")
    assert warped.shape == (*pixels("mask.png").shape, 4) and set(np.unique(warped[..., 3])) <= {0, 255}
    assert not warped[..., :3][warped[..., 3] == 0].any() and (warped[..., 3] > 0).any()


def test_without_registration_there_are_no_matches(rba, capsys):
    assert rba("align", "-o", "m.png", "--matches", "matches.png", "--no-register") == 2
    assert "no-register: leaves no matches to show" in capsys.readouterr().err


def cut_and_redrawn(files, monkeypatch) -> torch.Tensor:
    """crop.png and crop mask.png cut from image.png, and edited.png: the crop shifted and tinted. The picture."""
    monkeypatch.chdir(files)
    picture = texture(96, 130)
    write_image("image.png", picture)
    assert cli.main(["crop", "image.png", "mask.png", "-o", "crop.png", "--crop-mask", "crop mask.png", "--size", "256"]) == 0
    write_image("edited.png", 0.93 * read_image("crop.png").rgb.roll((4, -3), (1, 2)))
    return picture


def test_a_crop_goes_through_an_editor_and_comes_back(files, scene, monkeypatch, capsys):
    cut_and_redrawn(files, monkeypatch)
    crop = zoom_crop(read_image("image.png").rgb, scene.mask, 256)
    assert np.array_equal(pixels("crop.png"), to_bytes(crop.image)) and torch.equal(read_mask("crop mask.png"), crop.mask)
    assert capsys.readouterr().out == f"crop.png  (box {crop.box.x},{crop.box.y} {crop.box.width} x {crop.box.height}, at 256 x 256)\n"
    assert cli.main(["stitch", "image.png", "mask.png", "edited.png", "-o", "undone.png", "--no-colour-match"]) == 0
    assert re.fullmatch(r"undone\.png  \(shift -(3\.[0-3]|2\.[7-9]), (4\.[0-3]|3\.[7-9]) px, zoom (1\.00|0\.99)\d undone\)\n", capsys.readouterr().out)
    assert cli.main(["stitch", "image.png", "mask.png", "edited.png", "-o", "drifted.png", "--no-colour-match", "--no-drift-correction"]) == 0
    image, undone, drifted = (pixels(f"{name}.png").astype(int) for name in ("image", "undone", "drifted"))
    inside = scene.mask.numpy() > 0.5
    assert np.array_equal(undone[~inside], image[~inside]) and np.array_equal(drifted[~inside], image[~inside])
    assert abs(undone - image)[inside].mean() < 0.2 * abs(drifted - image)[inside].mean()


def test_what_cannot_be_cut_or_put_back_is_said_in_a_line(files, monkeypatch, capsys):
    cut_and_redrawn(files, monkeypatch)
    write_image("wide.png", torch.rand(3, 64, 128))
    for words, told in (
        ("stitch image.png mask.png wide.png -o out.png", "redrawn: is 128 x 64, the crop is square"),
        ("stitch image.png reference_mask.png edited.png -o out.png", "mask: is 101 x 81, its image 130 x 96"),
        ("stitch image.png mask.png edited.png -o out.jpg", "output: out.jpg would be stored with loss"),
        ("stitch image.png mask.png none.png -o out.png", "redrawn: none.png does not exist"),
        ("crop image.png reference_mask.png -o out.png", "mask: is 101 x 81, its image 130 x 96"),
        ("crop image.png mask.png -o out.png --size 3", "size: is 3; use 16 to 16384"),
        ("crop image.png mask.png -o out.png --context 0.5", "context: is 0.5, less than the mask"),
    ):
        assert cli.main(words.split()) == 2
        assert told in capsys.readouterr().err, words
    assert not Path("out.png").exists()


def test_several_references(files, scene, capsys, monkeypatch):
    """The second shows what the image does; the first is noise."""
    wide = torch.nn.functional.interpolate(scene.image[None], scale_factor=1.5, mode="bilinear")[0]
    write_image(files / "second.png", wide)
    options = ["image.png", "mask.png", "reference.png", "second.png"]
    monkeypatch.chdir(files)
    assert cli.main(["refine", *options, "-o", "out.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["references"] == [1] and len(told["confidences"]) == 1
    assert cli.main(["align", *options, "-o", "m.png"]) == 0
    assert "reference 2, box" in capsys.readouterr().out
    assert pixels("m.png").shape == pixels("second.png").shape[:2]
    assert cli.main(["align", *options, "-o", "m.png", "--raw", "raw.png"]) == 2
    assert "raw: shows one reference" in capsys.readouterr().err
    assert cli.main(["refine", *options, "-o", "out.png", "--save-correspondence", "m.png"]) == 2
    assert "one picture for several references" in capsys.readouterr().err
    assert cli.main(["refine", *options, "-o", "out.png", "--reference-mask", "reference_mask.png"]) == 2
    assert "reference mask: is given 1 times for 2 references" in capsys.readouterr().err


def test_layer_noise_threshold_and_seed_change_the_map(rba):
    assert rba("align", "-o", "m.png", "--raw", "default.png", "--no-register") == 0
    for options in ("--layer 8", "--timestep 40", "--noise-level 0.3", "--seed 1"):
        assert rba("align", "-o", "m.png", "--raw", "other.png", "--threshold", "0.9", "--no-register", *options.split()) in (0, 2)
        assert not np.array_equal(pixels("default.png"), pixels("other.png")), options
    assert rba("align", "-o", "low.png", "--threshold", "0.2", "--no-dense", "--no-register") == 0
    assert rba("align", "-o", "high.png", "--threshold", "0.9", "--no-dense", "--no-register") == 0
    assert pixels("low.png").sum() > pixels("high.png").sum()


@pytest.mark.parametrize(
    "options",
    [
        ["refine", "i", "m", "r"],
        ["refine", "i", "m", "-o", "o.png"],
        ["refine", "i", "m", "r", "-o", "o.png", "--steps", "many"],
        ["refine", "i", "m", "r", "-o", "o.png", "--scheduler", "plms"],
        ["align", "i", "m", "r", "-o", "o.png", "--timestep", "1", "--noise-level", "0.5"],
        ["paint"],
        [],
    ],
)
def test_wrong_usage_exits_with_2(options, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(options)
    assert left.value.code == 2
    assert "usage: rba" in capsys.readouterr().err


def test_help_exits_with_0_for_every_command(capsys):
    for command in ("refine", "align", "crop", "stitch", "demo", "bench", "bench make", "bench run", "bench grid-search", "bench steps", "bench doubt", "bench calibrate", "bench speed", "bench study", "bench study-table", "report", "train"):
        with pytest.raises(SystemExit) as left:
            cli.main([*command.split(), "--help"])
        assert left.value.code == 0
        assert f"usage: rba {command}" in capsys.readouterr().out


def test_the_commands_schedulers_are_the_librarys():
    from rba_core.refinement import SCHEDULERS

    for name in SCHEDULERS:
        assert cli.parser().parse_args(["refine", "i", "m", "r", "-o", "o", "--scheduler", name]).scheduler == name
