import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rba_core.drift import estimate_drift, undo_drift
from rba_core.geometry import Box, resize
from rba_core.imageio import read_image, to_bytes, write_image
from rba_core.stitch import colour_offset, feather_inside, stitch


@st.composite
def cases(draw):
    """A picture, a free-form mask that may touch the border, and a box that may reach over it."""
    height, width = draw(st.integers(4, 60)), draw(st.integers(4, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.zeros(height, width)
    for _ in range(draw(st.integers(1, 3))):
        y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[y : y + draw(st.integers(1, 30)), x : x + draw(st.integers(1, 30))] = 1
    if draw(st.booleans()):
        mask = mask * torch.rand(mask.shape, generator=generator)  # soft values, and holes
    box = Box(draw(st.integers(-20, 50)), draw(st.integers(-20, 50)), draw(st.integers(2, 70)), draw(st.integers(2, 70)))
    box = box.clamped(height, width)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    image = torch.rand(3, height, width, generator=generator).to(dtype)
    side = draw(st.integers(2, 64))
    redrawn = torch.rand(3, side, side, generator=generator)
    return image, mask, redrawn, box


@given(cases(), st.floats(0, 8), st.booleans())
def test_outside_the_mask_not_one_bit_changes(case, feather, colour_match):
    image, mask, redrawn, box = case
    before = image.clone()
    result = stitch(image, mask, redrawn, box, feather=feather, colour_match=colour_match)
    assert result.dtype == image.dtype and result.shape == image.shape
    assert torch.equal(result[:, mask <= 0.5], before[:, mask <= 0.5])
    assert torch.equal(image, before)
    assert result.min() >= 0 and result.max() <= 1


@given(cases())
def test_outside_the_box_not_one_bit_changes(case):
    image, mask, redrawn, box = case
    result = stitch(image, mask, redrawn, box)
    inside = box.paste(torch.zeros(1, *mask.shape), torch.ones(1, box.height, box.width))[0] > 0
    assert torch.equal(result[:, ~inside], image[:, ~inside])


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff", ".bmp"])
def test_outside_the_mask_the_file_written_holds_the_bytes_of_the_file_read(tmp_path, suffix):
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(33, 47), (64, 20), (16, 16)]):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        source, target = tmp_path / f"in{number}.png", tmp_path / f"out{number}{suffix}"
        Image.fromarray(pixels).save(source)
        picture = read_image(source)
        mask = torch.zeros(height, width)
        mask[4 : height - 5, :9] = 1
        box = Box(-3, 2, 24, 24).clamped(height, width)
        write_image(target, stitch(picture.rgb, mask, torch.rand(3, 40, 40), box), like=picture)
        written = np.asarray(Image.open(target))
        assert np.array_equal(written[mask.numpy() < 0.5], pixels[mask.numpy() < 0.5])
        assert not np.array_equal(written[mask.numpy() > 0.5], pixels[mask.numpy() > 0.5])


@given(st.integers(0, 2**31))
def test_every_8_bit_value_survives_reading_and_writing(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    rgb = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1).float() / 255
    mask = torch.zeros(16, 16)
    mask[5:9, 5:9] = 1
    result = to_bytes(stitch(rgb, mask, torch.rand(3, 8, 8), Box(3, 3, 8, 8)))
    assert np.array_equal(result[mask.numpy() < 0.5], pixels[mask.numpy() < 0.5])


def test_all_256_values_come_back_from_floats():
    values = torch.arange(256).float() / 255
    assert to_bytes(values.expand(3, 1, 256))[0, :, 0].tolist() == list(range(256))


@given(cases(), st.floats(0, 10))
def test_feather_weights_are_zero_outside_and_one_deep_inside(case, radius):
    mask = case[1]
    weight = feather_inside(mask, radius)
    assert weight.min() >= 0 and weight.max() <= 1
    assert (weight[mask <= 0.5] == 0).all()
    assert (weight[mask > 0.5] > 0).all()


def test_the_feather_rises_over_its_radius_and_then_is_one():
    mask = torch.zeros(41, 41)
    mask[10:31, 10:31] = 1
    profile = feather_inside(mask, 3)[20, 9:16].tolist()
    assert profile == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1])
    assert torch.equal(feather_inside(mask, 0), mask)


def test_a_mask_at_the_border_of_the_picture_is_not_feathered_towards_it():
    mask = torch.zeros(30, 30)
    mask[:20, :20] = 1
    assert (feather_inside(mask, 3)[:16, :16] == 1).all()


def test_a_mask_at_the_border_is_redrawn_up_to_it_where_the_crop_reaches_over_it_too():
    mask = torch.zeros(20, 80)
    mask[:, 20:60] = 1
    result = stitch(torch.zeros(3, 20, 80), mask, torch.ones(3, 40, 40), Box(20, -10, 40, 40), feather=3, colour_match=False)
    assert (result[:, 0, 30:50] == 1).all() and (result[:, -1, 30:50] == 1).all()


def test_without_feather_and_colour_match_the_mask_shows_the_redrawn_pixels():
    image, redrawn, mask = torch.rand(3, 40, 40), torch.rand(3, 24, 24), torch.zeros(40, 40)
    mask[10:20, 12:25] = 1
    result = stitch(image, mask, redrawn, Box(6, 8, 24, 24), feather=0, colour_match=False)
    pasted = Box(6, 8, 24, 24).paste(image, redrawn)
    assert torch.allclose(result, torch.where(mask > 0.5, pasted, image), atol=1e-6)


def test_a_constant_shift_in_tone_is_taken_out():
    generator = torch.Generator().manual_seed(0)
    original = 0.3 + 0.3 * torch.rand(3, 48, 48, generator=generator)
    mask = torch.zeros(48, 48)
    mask[16:32, 14:30] = 1
    shift = torch.tensor([0.1, -0.07, 0.04])[:, None, None]
    offset = colour_offset(original + shift, original, mask)
    assert torch.allclose(offset, (-shift).expand_as(offset), atol=1e-4)
    result = stitch(original, mask, original + shift, Box(0, 0, 48, 48), feather=0)
    assert torch.allclose(result, original, atol=1e-4)


def test_a_slow_drift_in_tone_is_mostly_taken_out_and_detail_stays():
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    drift = (0.2 * x - 0.1 * y).expand(3, 64, 64)
    detail = 0.1 * ((torch.arange(64) % 4 < 2).float() - 0.5).expand(3, 64, 64)
    original = torch.full((3, 64, 64), 0.5)
    mask = torch.zeros(64, 64)
    mask[22:42, 22:42] = 1
    corrected = original + drift + detail * mask + colour_offset(original + drift + detail * mask, original, mask)
    inside = mask > 0.5
    assert (corrected - original - detail)[:, inside].abs().mean() < 0.3 * drift[:, inside].abs().mean()


def test_with_nothing_around_the_mask_no_tone_is_matched():
    assert (colour_offset(torch.rand(3, 8, 8), torch.rand(3, 8, 8), torch.ones(8, 8)) == 0).all()


def test_no_hairline_of_the_artifact_is_left_along_the_border():
    truth = torch.linspace(0.4, 0.6, 48).expand(3, 48, 48)
    mask = torch.zeros(48, 48)
    mask[16:32, 14:30] = 1
    result = stitch(truth * (1 - mask), mask, truth, Box(0, 0, 48, 48), feather=2.0)
    assert (result - truth).abs().max() < 0.02


def test_with_the_drift_undone_outside_the_mask_not_one_bit_changes_either():
    image = torch.randint(0, 256, (3, 70, 90), generator=torch.Generator().manual_seed(4)) / 255
    mask = torch.zeros(70, 90)
    mask[20:45, 30:60] = 1
    box = Box(20, 5, 56, 56)
    redrawn = (0.9 * resize(box.crop(image), 128, 128)).roll((2, -3), (1, 2))
    drift = estimate_drift(redrawn, box.crop(image), box.crop(mask[None])[0])
    assert drift.moved and drift.tinted
    result = stitch(image, mask, undo_drift(redrawn, drift), box)
    assert torch.equal(result[:, mask < 0.5], image[:, mask < 0.5])
    assert (result - image).abs().mean() < 0.5 * (stitch(image, mask, redrawn, box) - image).abs().mean()
