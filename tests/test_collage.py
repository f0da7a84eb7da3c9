import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rba_core.collage import INSIDE_WEIGHT, lay_over, match_tone, surround, transfer_detail
from rba_core.geometry import Box
from rba_core.postprocessing import MatchedRegion
from rba_core.zoom_crop import zoom_crop


def texture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours with detail at several scales, `[3, H, W]` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(torch.rand(1, 3, height // cell + 2, width // cell + 2, generator=generator), (height, width), mode="bicubic")[0] * share
        for cell, share in ((24, 0.5), (9, 0.3), (4, 0.2))
    ]
    return sum(layers).clamp(0, 1)


def seen_through(reference: torch.Tensor, size: int, scale: float, angle: float, centre: tuple[float, float]) -> torch.Tensor:
    """A picture `[3, size, size]` of the reference: its middle shows `centre` (x, y), one pixel is `scale` of the reference's."""
    axis = torch.arange(size) + 0.5 - size / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    points = torch.stack([cos * x - sin * y + centre[0], sin * x + cos * y + centre[1]], -1)
    frame = torch.tensor([reference.shape[2], reference.shape[1]])
    return F.grid_sample(reference[None], (points / frame * 2 - 1)[None], align_corners=False)[0]


def region_around(height: int, width: int, centre: tuple[float, float], half: float) -> MatchedRegion:
    """A square as alignment would give it."""
    mask = torch.zeros(height, width)
    x, y = centre
    mask[max(0, int(y - half)) : int(y + half), max(0, int(x - half)) : int(x + half)] = 1
    return MatchedRegion(mask, Box.around(mask), mask)


REFERENCE = texture(160, 180)
WHOLE = torch.ones(160, 180)


def damaged_view(scale: float, angle: float, centre=(90.0, 80.0)):
    """The image, its mask, what is right under the mask, and the crop."""
    right = seen_through(REFERENCE, 128, scale, angle, centre)
    mask = torch.zeros(128, 128)
    mask[52:76, 50:80] = 1
    image = torch.where(mask > 0.5, torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(9)), right)
    return image, mask, right, zoom_crop(image, mask, 64, context=2.5)


@pytest.mark.parametrize("scale, angle", [(1.0, 0.0), (0.8, 0.15), (1.2, -0.3), (0.9, 0.4)])
def test_the_reference_is_laid_where_it_belongs(scale, angle):
    image, mask, right, crop = damaged_view(scale, angle)
    off_place = region_around(160, 180, (96.0, 75.0), half=16 * scale)  # as coarse as a token
    collage = lay_over(crop, REFERENCE, WHOLE, off_place, image)
    box = crop.box
    assert collage.picture.shape == (3, box.height, box.width) and collage.valid.shape == (box.height, box.width)
    inside = box.crop(mask[None])[0] > 0.5
    assert collage.confidence > 0.8  # what lies under the mask is noise, and counts a little
    assert float((collage.picture - box.crop(right))[:, inside].abs().mean()) < 0.02
    assert collage.valid[inside].all()


@pytest.mark.parametrize("scale, angle", [(1.0, 0.0), (1.2, -0.3)])
def test_its_region_is_what_the_mask_covers_to_the_pixel(scale, angle):
    image, mask, _, crop = damaged_view(scale, angle)
    collage = lay_over(crop, REFERENCE, WHOLE, region_around(160, 180, (94.0, 76.0), half=15 * scale), image)
    y, x = torch.meshgrid(torch.arange(160) + 0.5 - 80, torch.arange(180) + 0.5 - 90, indexing="ij")
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    columns, rows = (cos * x + sin * y + 64).long(), (-sin * x + cos * y + 64).long()
    inside = (columns >= 0) & (columns < 128) & (rows >= 0) & (rows < 128)
    wanted = torch.where(inside, mask[rows.clamp(0, 127), columns.clamp(0, 127)], torch.tensor(0.0))
    assert set(collage.region.unique().tolist()) == {0.0, 1.0}
    assert float((collage.region * wanted).sum() / torch.maximum(collage.region, wanted).sum()) > 0.85


def test_without_the_image_the_collage_has_the_crops_own_resolution():
    image, _, right, crop = damaged_view(1.0, 0.0)
    collage = lay_over(crop, REFERENCE, WHOLE, region_around(160, 180, (90.0, 80.0), 15))
    assert collage.picture.shape == (3, 64, 64) and collage.valid.shape == (64, 64)
    assert collage.region.shape == (160, 180)


def test_another_exposure_is_matched():
    image, mask, right, crop = damaged_view(1.0, 0.1)
    collage = lay_over(crop, REFERENCE * 0.6 + 0.25, WHOLE, region_around(160, 180, (92.0, 78.0), 15), image)
    inside = crop.box.crop(mask[None])[0] > 0.5
    assert float((collage.picture - crop.box.crop(right))[:, inside].abs().mean()) < 0.03


def test_pictures_that_do_not_agree_get_little_confidence():
    image, _, _, crop = damaged_view(1.0, 0.0)
    for seed in (1, 2, 3):
        other = texture(160, 180, seed)
        assert lay_over(crop, other, WHOLE, region_around(160, 180, (90.0, 80.0), 15), image).confidence < 0.7
        noise = torch.rand(3, 160, 180, generator=torch.Generator().manual_seed(seed))
        assert lay_over(crop, noise, WHOLE, region_around(160, 180, (90.0, 80.0), 15), image).confidence < 0.45


def test_only_the_object_is_laid_over():
    image, _, _, crop = damaged_view(1.0, 0.0)
    left_half = WHOLE.clone()
    left_half[:, 95:] = 0
    collage = lay_over(crop, REFERENCE, left_half, region_around(160, 180, (85.0, 80.0), 15), image)
    assert (collage.region <= left_half).all()
    assert set(collage.valid.unique().tolist()) <= {0.0, 1.0}


FLAT = {
    "white image": (torch.ones(3, 128, 128), REFERENCE),
    "white reference": (texture(128, 128, 4), torch.ones(3, 160, 180)),
    "both white": (torch.ones(3, 128, 128), torch.ones(3, 160, 180)),
    "both black": (torch.zeros(3, 128, 128), torch.zeros(3, 160, 180)),
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_pictures_say_nothing_and_break_nothing(name):
    """Products on white are what this is for: there the surround of a mask may be one colour."""
    image, reference = FLAT[name]
    mask = torch.zeros(128, 128)
    mask[52:76, 50:80] = 1
    collage = lay_over(zoom_crop(image, mask, 64, context=2.5), reference, WHOLE, region_around(160, 180, (90.0, 80.0), 15), image)
    assert math.isfinite(collage.confidence) and collage.confidence < 0.45
    assert torch.isfinite(collage.picture).all()


@settings(max_examples=12)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(16, 90), st.integers(16, 90), st.integers(0, 2**31))
def test_any_sizes_of_pictures_masks_and_regions_work(height, width, reference_height, reference_width, seed):
    generator = torch.Generator().manual_seed(seed)

    def spot(rows: int, columns: int) -> torch.Tensor:
        selection = torch.zeros(rows, columns)
        y, x = (int(torch.randint(extent, (), generator=generator)) for extent in (rows, columns))
        selection[y : y + 1 + seed % 17, x : x + 1 + seed % 23] = 1
        return selection

    image, mask, found = texture(height, width, seed % 1000), spot(height, width), spot(reference_height, reference_width)
    reference = texture(reference_height, reference_width, seed % 999)
    crop = zoom_crop(image, mask, 64)
    collage = lay_over(crop, reference, torch.ones(reference_height, reference_width), MatchedRegion(found, Box.around(found), found), image)
    assert collage.picture.shape == (3, crop.box.height, crop.box.width)
    assert torch.isfinite(collage.picture).all() and collage.picture.min() >= 0 and collage.picture.max() <= 1
    assert collage.region.shape == (reference_height, reference_width)
    assert -3 <= collage.confidence <= 1.001


def test_nothing_given_is_modified():
    image, _, _, crop = damaged_view(1.0, 0.0)
    region = region_around(160, 180, (90.0, 80.0), 15)
    given_tensors = [crop.image, crop.mask, REFERENCE, WHOLE, region.mask, image]
    before = [tensor.clone() for tensor in given_tensors]
    lay_over(crop, REFERENCE, WHOLE, region, image)
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before))


def test_tone_is_matched_by_gain_and_offset_of_each_channel():
    picture = texture(40, 40, 7) * 0.5 + 0.2
    gain, offset = torch.tensor([1.3, 0.8, 1.0])[:, None, None], torch.tensor([-0.1, 0.05, 0.1])[:, None, None]
    target = picture * gain + offset
    assert torch.allclose(match_tone(picture, target, torch.ones(40, 40)), target, atol=0.03)


def test_tone_is_learnt_where_the_weight_says():
    picture, target = texture(40, 40, 7) * 0.5, texture(40, 40, 7) * 0.5 + 0.2
    target[:, :, 20:] = 0
    weight = torch.zeros(40, 40)
    weight[:, :20] = 1
    assert torch.allclose(match_tone(picture, target, weight), picture + 0.2, atol=0.01)


def test_tone_is_not_pulled_further_than_by_half_or_double():
    picture = texture(40, 40, 7) * 0.2 + 0.4
    flat = torch.full_like(picture, 0.5)
    assert float(match_tone(picture, flat, torch.ones(40, 40)).std()) >= 0.45 * float(picture.std())


def test_the_surround_counts_most_next_to_the_mask_and_little_inside():
    mask = torch.zeros(96, 96)
    mask[36:60, 40:56] = 1
    weight = surround(mask)
    assert (weight[mask > 0.5] == INSIDE_WEIGHT).all()
    row = weight[48, 56:]
    assert row[0] > 0.5 and row[0] > row[8] > row[16] and row[-1] < 0.05
    assert weight.min() >= 0 and weight.max() <= 1


def collage_of(picture: torch.Tensor, valid: torch.Tensor):
    from rba_core.collage import Collage

    return Collage(picture, valid, torch.ones(4, 4), 1.0)


def test_detail_is_carried_under_the_mask_where_the_reference_is_valid_and_nowhere_else():
    redrawn, laid = torch.full((3, 64, 64), 0.5), texture(64, 64, 3)
    mask, valid = torch.zeros(64, 64), torch.ones(64, 64)
    mask[20:44, 20:44] = 1
    valid[:, :30] = 0
    result = transfer_detail(redrawn, collage_of(laid, valid), mask, 1.0)
    changed = (result != redrawn).any(0)
    assert not changed[(mask * valid) < 0.5].any()
    assert changed[(mask * valid) > 0.5].float().mean() > 0.95


def test_broad_tone_stays_as_redrawn_and_detail_becomes_the_references():
    detail = 0.1 * ((torch.arange(96) % 4 < 2).float() - 0.5).expand(3, 96, 96)
    redrawn, laid = torch.full((3, 96, 96), 0.3), torch.full((3, 96, 96), 0.6) + detail
    result = transfer_detail(redrawn, collage_of(laid, torch.ones(96, 96)), torch.ones(96, 96), 1.0)
    assert torch.allclose(result, redrawn + detail, atol=0.02)


def test_no_detail_is_carried_with_amount_0_and_the_result_stays_in_range():
    redrawn, laid = texture(64, 64, 1), texture(64, 64, 2)
    whole = torch.ones(64, 64)
    assert torch.equal(transfer_detail(redrawn, collage_of(laid, whole), whole, 0.0), redrawn)
    contrasty = (laid > 0.5).float()
    result = transfer_detail((redrawn > 0.5).float(), collage_of(contrasty, whole), whole, 1.0)
    assert result.min() >= 0 and result.max() <= 1


def test_a_redrawn_crop_of_the_models_size_comes_back_in_the_collages():
    result = transfer_detail(torch.rand(3, 64, 64), collage_of(torch.rand(3, 90, 90), torch.ones(90, 90)), torch.ones(64, 64), 1.0)
    assert result.shape == (3, 90, 90)
