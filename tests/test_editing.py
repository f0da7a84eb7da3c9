import numpy as np
import pytest
import torch
from PIL import Image

from rba_core.editing import find_match, reference_crop, stitcher
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.pipeline import Settings, refine_by_align
from rba_core.zoom_crop import crop_box, zoom_crop


def resampled(pixels: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """`[h, w]` or `[h, w, 3]`, cut to 8 bits and resized as that node does it."""
    picture = Image.fromarray((pixels * 255).byte().numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture) / np.float32(255))


def inpaint_stitch(given: dict, inpainted: torch.Tensor) -> torch.Tensor:
    """The *Inpaint Stitch* of ComfyUI-Inpaint-CropAndStitch on a CPU, of one picture `[1, h, w, 3]`, re-stated."""
    x, y, width, height = (given[f"cropped_to_canvas_{side}"] for side in "xywh")
    weight, canvas = resampled(given["cropped_mask_for_blend"][0], width, height)[..., None], given["canvas_image"].clone()
    canvas[:, y : y + height, x : x + width] = weight * resampled(inpainted[0], width, height) + (1 - weight) * canvas[:, y : y + height, x : x + width]
    x, y, width, height = (given[f"canvas_to_orig_{side}"] for side in "xywh")
    return canvas[:, y : y + height, x : x + width]


def test_the_match_is_that_of_the_whole_method(model, scene):
    inputs, settings = (model, scene.image, scene.mask, scene.reference, scene.reference_mask), Settings(one_crop=True, register=False)
    match, expected = find_match(*inputs, settings=settings, seed=3), refine_by_align(*inputs, settings=settings, seed=3).matches[0]
    assert torch.equal(match.region.mask, expected.region.mask) and match.collage is None
    assert not torch.equal(match.region.mask, find_match(*inputs, settings=settings, seed=4).region.mask)


def test_reference_crop_is_a_square_around_the_region(scene):
    region = torch.zeros(81, 101)
    region[30:40, 50:70] = 1
    cut = reference_crop(scene.reference, region, context=2.0)
    assert cut.box == Box(40, 15, 40, 40)
    assert torch.equal(cut.image, scene.reference[:, 15:55, 40:80]) and torch.equal(cut.mask, region[15:55, 40:80])


def test_background_is_filled_beyond_the_margin_and_off_the_object(scene):
    region, thing = torch.zeros(81, 101), torch.ones(81, 101)
    region[30:40, 50:70] = 1
    thing[:, 65:] = 0
    cut = reference_crop(scene.reference, region, context=2.0, background=0.5, margin=0.1, object_mask=thing)
    kept = torch.zeros(81, 101)
    kept[28:42, 50:65] = kept[30:40, 48:65] = 1  # 2 px further, the corners cut
    kept = cut.box.crop(kept[None])[0] > 0
    grey = (cut.image == 0.5).all(0)
    assert torch.equal(cut.image[:, kept & ~grey], cut.box.crop(scene.reference)[:, kept & ~grey])
    assert grey[~kept].sum() >= (~kept).sum() - 4 and not grey[cut.mask * cut.box.crop(thing[None])[0] > 0].any()


def test_reference_crop_keeps_its_size_when_given(scene):
    assert reference_crop(scene.reference, scene.reference_mask, 32).image.shape == (3, 32, 32)
    with pytest.raises(InputError, match="context"):
        reference_crop(scene.reference, scene.reference_mask, context=0.5)


@pytest.mark.parametrize("rows, columns", [((30, 50), (41, 70)), ((2, 9), (100, 130)), ((0, 90), (10, 125))], ids=["inside", "corner", "larger than the image"])
@pytest.mark.parametrize("size", [40, 128, 300])
def test_a_crop_comes_back_to_its_place(scene, rows, columns, size):
    mask = torch.zeros(96, 130)
    mask[slice(*rows), slice(*columns)] = 1
    smooth = torch.nn.functional.interpolate(scene.image[None], scale_factor=1 / 16, mode="area")
    image = torch.nn.functional.interpolate(smooth, (96, 130), mode="bicubic")[0].clamp(0, 1)
    crop = zoom_crop(image, mask, size)
    given = stitcher(image, mask, crop.box)
    back = inpaint_stitch(given, crop.image.movedim(0, -1)[None])[0].movedim(-1, 0)
    assert back.shape == image.shape
    assert torch.equal(back[:, mask < 0.5], image[:, mask < 0.5])
    assert (back - image).abs().max() < 0.06  # resampled there and back

    blank = inpaint_stitch(given, torch.zeros(1, size, size, 3))[0].movedim(-1, 0)
    deep = torch.zeros_like(mask)
    deep[rows[0] + 2 : rows[1] - 2, columns[0] + 2 : columns[1] - 2] = 1
    assert blank[:, deep > 0].max() == 0 and torch.equal(blank[:, mask < 0.5], image[:, mask < 0.5])


def test_the_stitcher_feathers_inside_the_mask(scene):
    box = crop_box(scene.mask, 2.0, 8)
    weight = stitcher(scene.image, scene.mask, box, feather=4)["cropped_mask_for_blend"][0]
    assert weight.max() == 1 and 0 < weight[weight > 0].min() <= 0.2
    assert not weight[box.crop(scene.mask[None])[0] < 0.5].any()
