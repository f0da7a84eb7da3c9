import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import REFERENCE, WHOLE, seen_through, texture
from scipy.ndimage import gaussian_filter

from rba_core.collage import in_the_image, lay_over, match_sharpness, match_tone, transfer_detail
from rba_core.geometry import Box
from rba_core.postprocessing import MatchedRegion
from rba_core.zoom_crop import zoom_crop


def region_around(height: int, width: int, centre: tuple[float, float], half: float) -> MatchedRegion:
    """A square as alignment would give it."""
    mask = torch.zeros(height, width)
    x, y = centre
    mask[max(0, int(y - half)) : int(y + half), max(0, int(x - half)) : int(x + half)] = 1
    return MatchedRegion(mask, Box.around(mask), mask)


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
    assert collage.confidence > 0.5
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


def test_nothing_is_sure_where_the_reference_hides_what_the_mask_covers():
    image, _, _, crop = damaged_view(1.0, 0.0)
    place = region_around(160, 180, (90.0, 80.0), 15)
    box = Box.around(lay_over(crop, REFERENCE, WHOLE, place, image).region)
    shown = box.square(32).paste(WHOLE[None], torch.zeros(1, 32, 32))[0]
    hidden = lay_over(crop, REFERENCE, shown, place, image)
    assert hidden.evidence[1] > 0.5 and hidden.confidence == 0 and not hidden.region.any() and not hidden.sureness.any()


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
        noise = torch.rand(3, 160, 180, generator=torch.Generator().manual_seed(seed))
        for other in (texture(160, 180, seed), noise):
            assert lay_over(crop, other, WHOLE, region_around(160, 180, (90.0, 80.0), 15), image).confidence < 0.1


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
    assert math.isfinite(collage.confidence) and collage.confidence < 0.1
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


def test_tone_is_matched_by_one_gain_and_an_offset_of_each_channel():
    picture = texture(40, 40, 7) * 0.5 + 0.2
    target = picture * 1.3 + torch.tensor([-0.1, 0.05, 0.1])[:, None, None]
    assert torch.allclose(match_tone(picture, target, torch.ones(40, 40)), target, atol=0.03)


def test_detail_off_its_place_keeps_its_contrast():
    """A fitted gain would be near 0 here."""
    picture = texture(96, 96, 7)
    toned = match_tone(picture, picture.roll(6, -1), torch.ones(96, 96))
    assert float(toned.std()) > 0.9 * float(picture.std())


def test_light_that_falls_off_is_followed():
    picture = texture(96, 96, 7) * 0.6 + 0.2
    target = picture * torch.linspace(1.2, 0.7, 96)
    toned = match_tone(picture, target, torch.ones(96, 96))
    assert (toned - target).abs().mean() < 0.4 * (picture * 0.95 - target).abs().mean()


def test_tone_is_learnt_where_the_weight_says():
    picture = texture(40, 40, 7) * 0.5 + 0.2
    target = picture * 1.3
    target[:, :, 20:] = 0
    weight = torch.zeros(40, 40)
    weight[:, :20] = 1
    toned = match_tone(picture, target, weight)
    assert torch.allclose(toned[:, :, :20], target[:, :, :20], atol=0.05)
    assert float((toned[:, :, 30:] / picture[:, :, 30:]).mean()) > 1.1


def test_tone_is_not_pulled_further_than_by_half_or_double():
    picture = texture(40, 40, 7) * 0.2 + 0.4
    flat = torch.full_like(picture, 0.5)
    assert float(match_tone(picture, flat, torch.ones(40, 40)).std()) >= 0.45 * float(picture.std())


def test_colours_that_the_surround_lacks_keep_their_hue():
    """Red with a green pattern all around says nothing of how green the yellow is: one gain for all channels."""
    red = torch.tensor([0.6, 0.1, 0.1])[:, None, None].expand(3, 60, 60).clone()
    red[0] += 0.2 * (texture(60, 60, 3)[0] - 0.5)
    picture, target = red.clone(), red.clone()
    target[1] += 0.3 * (texture(60, 60, 5)[1] - 0.5)
    picture[:, 25:35, 25:35] = torch.tensor([0.7, 0.5, 0.1])[:, None, None]
    weight = torch.ones(60, 60)
    weight[20:40, 20:40] = 0
    toned = match_tone(picture, target, weight)[:, 30, 30] - target.mean((1, 2))
    before = picture[:, 30, 30] - picture[:, weight > 0.5].mean(1)
    assert float(toned[1] / toned[0]) < 1.4 * float(before[1] / before[0])


def test_yellow_on_red_stays_yellow_in_a_darker_picture():
    """Half as bright around it, but with as much contrast: the print keeps its contrast, green hardly comes to exceed red."""
    fur = 0.15 * (texture(60, 60, 3)[:1] - 0.5)
    picture = torch.tensor([0.7, 0.1, 0.1])[:, None, None] + fur
    target = torch.tensor([0.4, 0.1, 0.1])[:, None, None] + fur
    picture[:, 25:35, 25:35] = torch.tensor([0.85, 0.75, 0.2])[:, None, None]
    weight = torch.ones(60, 60)
    weight[20:40, 20:40] = 0
    red, green, blue = match_tone(picture, target, weight)[:, 30, 30]
    assert green < 1.2 * red and green > 2 * blue


def test_a_sharp_reference_is_softened_to_the_photo_and_a_soft_one_left():
    sharp = texture(96, 96, 2)
    soft = torch.from_numpy(gaussian_filter(sharp.numpy(), (0, 1.6, 1.6)))
    everywhere = torch.ones(96, 96)
    assert (match_sharpness(sharp, soft, everywhere) - soft).abs().mean() < 0.15 * (sharp - soft).abs().mean()
    assert torch.equal(match_sharpness(soft, sharp, everywhere), soft)


def test_the_warped_reference_stands_in_the_images_frame():
    image, mask, right, crop = damaged_view(1.0, 0.1)
    collage = lay_over(crop, REFERENCE, WHOLE, region_around(160, 180, (92.0, 78.0), 15), image)
    laid, shown = in_the_image(collage, crop.box, 128, 128)
    assert laid.shape == (3, 128, 128) and shown.shape == (128, 128)
    assert shown[mask > 0.5].all() and (laid - right)[:, mask > 0.5].abs().mean() < 0.02
    assert not shown[:10].any() and not laid[:, :10].any()


def test_the_flow_says_where_each_pixel_is_seen():
    image, mask, _, crop = damaged_view(0.9, 0.2)
    collage = lay_over(crop, REFERENCE, WHOLE, region_around(160, 180, (94.0, 76.0), 14), image)
    box = crop.box
    y, x = torch.meshgrid(torch.arange(box.height) + box.y + 0.5 - 64, torch.arange(box.width) + box.x + 0.5 - 64, indexing="ij")
    cos, sin = math.cos(0.2) * 0.9, math.sin(0.2) * 0.9
    wanted = torch.stack([cos * x - sin * y + 90, sin * x + cos * y + 80])
    inside = box.crop(mask[None])[0] > 0.5
    assert (collage.flow - wanted)[:, inside].norm(dim=0).mean() < 0.3
    assert collage.sureness.shape == inside.shape and collage.sureness[inside].min() > 0.3 and collage.sureness.max() <= collage.confidence


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
