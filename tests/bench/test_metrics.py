import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from rba_core.bench import metrics


@pytest.fixture
def word():
    """A printed word `[3, 80, 200]` and a mask over its third letter."""
    picture = Image.new("RGB", (200, 80), (230, 220, 200))
    ImageDraw.Draw(picture).text((10, 20), "REFINE", fill=(20, 30, 90), font=ImageFont.load_default(40))
    mask = torch.zeros(80, 200)
    mask[18:62, 58:92] = 1
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255, mask


def inside(mask, content, truth):
    return torch.where(mask > 0.5, content, truth)


def blurred(picture, sigma):
    return torch.from_numpy(ndimage.gaussian_filter(picture.numpy(), (0, sigma, sigma)))


def erased(word):
    truth, mask = word
    return inside(mask, truth[:, :1, :1], truth)


PIXEL = [metrics.masked_psnr, metrics.masked_ssim, metrics.hp_ssim, metrics.detail_ncc]


@pytest.mark.parametrize("metric, best", list(zip(PIXEL, (100, 1, 1, 1))))
def test_the_truth_itself_is_best(word, metric, best):
    truth, mask = word
    assert metric(truth, truth, mask) == pytest.approx(best, abs=1e-6)
    assert metric(erased(word), truth, mask) < 0.6 * best


@pytest.mark.parametrize("metric", PIXEL)
def test_what_lies_far_outside_the_mask_does_not_count(word, metric):
    truth, mask = word
    elsewhere = truth.clone()
    elsewhere[:, :, 150:] = 0.5
    assert metric(elsewhere, truth, mask) == pytest.approx(metric(truth, truth, mask))


def test_psnr_of_a_known_error(word):
    truth, mask = word
    assert metrics.masked_psnr(truth + 0.1 * mask, truth, mask) == pytest.approx(20, abs=1e-3)


def test_ssim_agrees_with_its_formula():
    rng = np.random.default_rng(0)
    grey = torch.from_numpy(rng.uniform(size=(2, 40, 40)))
    mask = torch.zeros(40, 40)
    mask[20, 17] = 1
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    a, b = grey[:, 15:26, 12:23].numpy()
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    covariance = (window * a * b).sum() - mean_a * mean_b
    variances = (window * a * a).sum() - mean_a**2 + (window * b * b).sum() - mean_b**2
    expected = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4) / ((mean_a**2 + mean_b**2 + 1e-4) * (variances + 9e-4))
    assert metrics.masked_ssim(grey[0].expand(3, -1, -1), grey[1].expand(3, -1, -1), mask) == pytest.approx(expected, abs=1e-9)


def test_hp_ssim_wants_sharp_detail_and_ignores_tone(word):
    truth, mask = word
    assert metrics.hp_ssim(inside(mask, blurred(truth, 4), truth), truth, mask) < 0.3
    y = torch.linspace(0, 0.15, 80)[:, None]
    assert metrics.hp_ssim(truth - y, truth, mask) > 0.95


def test_ncc_forgives_a_shift_but_not_a_missing_letter(word):
    truth, mask = word
    moved = inside(mask, truth.roll((2, 3), (1, 2)), truth)
    assert metrics.detail_ncc(moved, truth, mask) > 0.85
    assert metrics.detail_ncc(erased(word), truth, mask) < 0.5
    assert metrics.masked_ssim(moved, truth, mask) < 0.6


def test_ncc_of_flat_windows():
    flat = torch.full((3, 60, 60), 0.5)
    detailed = (0.5 + 0.3 * torch.randn(60, 60, generator=torch.Generator().manual_seed(0))).expand(3, -1, -1)
    faint = 0.5 + (detailed - 0.5) * 0.005
    mask = torch.zeros(60, 60)
    mask[20:40, 20:40] = 1
    assert metrics.detail_ncc(flat + 0.1, flat, mask) == pytest.approx(1)
    assert metrics.detail_ncc(flat, detailed, mask) == pytest.approx(0, abs=1e-6)
    assert metrics.detail_ncc(detailed, flat, mask) == pytest.approx(0, abs=1e-6)
    assert metrics.detail_ncc(faint, detailed, mask) < 0.06


def rectangle(y, x, height, width):
    mask = torch.zeros(96, 96)
    mask[y : y + height, x : x + width] = 1
    return mask


def test_iou():
    a, b = rectangle(10, 10, 20, 20), rectangle(10, 20, 20, 20)
    assert metrics.iou(a, a) == 1
    assert metrics.iou(a, b) == metrics.box_iou(a, b) == pytest.approx(1 / 3)
    assert metrics.iou(a, rectangle(60, 60, 9, 9)) == metrics.box_iou(a, rectangle(60, 60, 9, 9)) == 0


def test_box_iou_looks_at_boxes():
    diagonal = torch.zeros(96, 96)
    diagonal[range(10, 30), range(10, 30)] = 1
    assert metrics.box_iou(diagonal, rectangle(10, 10, 20, 20)) == 1


def test_soft_iou_counts_doubt():
    region = rectangle(10, 10, 20, 20)
    assert metrics.soft_iou(region, region) == 1
    assert metrics.soft_iou(0.5 * region, region) == pytest.approx(0.5)
    assert metrics.soft_iou(torch.full((96, 96), 0.01) + 0.99 * region, region) < 0.9


def test_token_bound():
    assert metrics.token_bound_iou(rectangle(24, 30, 36, 30)) > 0.85
    small = metrics.token_bound_iou(rectangle(27, 34, 4, 4))
    assert 0 < small < 0.6
    object_mask = rectangle(20, 20, 40, 40)  # tokens are laid over the object: the same part is larger to them
    assert metrics.token_bound_iou(rectangle(27, 34, 4, 4), object_mask) > small + 0.1


def test_outside_changed_pixels(word):
    truth, mask = word
    assert metrics.outside_changed_pixels(erased(word), truth, mask) == 0
    changed = truth.clone()
    changed[1, 0, 0] += 1 / 255
    changed[:, 0, 1] -= 1 / 255
    changed[:, 0, 2] += 0.3 / 255
    assert metrics.outside_changed_pixels(changed, truth, mask) == 2


def test_end_point_error_is_in_units_of_the_regions_size():
    truth, region = torch.full((2, 20, 20), torch.nan), torch.zeros(30, 30)
    truth[:, 5:10, 5:10], region[3:13, 4:14] = 7.0, 1
    assert metrics.end_point_error(truth, truth, region) == 0
    assert metrics.end_point_error(truth + torch.tensor([3.0, 4.0])[:, None, None], truth, region) == pytest.approx(0.5)
    missing = truth.clone()
    missing[:, 5:10, 5] = torch.nan
    assert metrics.end_point_error(missing, truth, region) == pytest.approx(0.2)
    assert metrics.end_point_error(truth + 1000, truth, region) == 1
