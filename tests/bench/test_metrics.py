import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.filters import gaussian
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.classification import binary_jaccard_index
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

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


def test_token_rounding():
    """Tokens of 6 px: a part that fills whole ones is kept, one that lies across them is not."""
    assert metrics.token_rounding_iou(rectangle(24, 30, 36, 30)) == 1
    assert metrics.token_rounding_iou(rectangle(26, 30, 6, 6)) == pytest.approx(24 / 48)  # 4 of its 6 columns lie in one token
    assert metrics.token_rounding_iou(rectangle(25, 31, 2, 2)) == pytest.approx(4 / 36)  # half of no token
    object_mask = rectangle(20, 20, 48, 48)
    object_mask[26:32, 26] = 0  # beside the object nothing is selected
    assert metrics.token_rounding_iou(rectangle(26, 26, 6, 6) * object_mask, object_mask) == 1


def test_size_in_tokens():
    assert metrics.region_tokens(rectangle(24, 30, 12, 12)) == 2
    assert metrics.region_tokens(rectangle(24, 30, 12, 3), rectangle(20, 20, 48, 16)) == 2


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


# Parity: other packages' implementations, or the formula written out in loops.


@pytest.fixture(params=["in the middle", "at the border"])
def pair(request):
    """Two noisy pictures `[3, 96, 120]` of one smooth scene, and a ragged mask."""
    rng = np.random.default_rng(3)
    scene = ndimage.gaussian_filter(rng.uniform(size=(3, 96, 120)), (0, 3, 3))
    scene = (scene - scene.min()) / (scene.max() - scene.min())
    result, truth = (torch.from_numpy((scene + rng.normal(0, 0.1, scene.shape)).clip(0, 1)).float() for _ in range(2))
    mask = torch.zeros(96, 120)
    part = (slice(40, 60), slice(45, 72)) if request.param == "in the middle" else (slice(0, 25), slice(100, 120))
    mask[part] = torch.from_numpy(rng.uniform(size=mask[part].shape) < 0.7).float()
    return result, truth, mask


def grey(picture):
    return np.tensordot([0.299, 0.587, 0.114], picture.double().numpy(), 1)


def skimage_ssim(a, b, mask):
    _, values = structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True)
    return values[mask.numpy() > 0.5].mean()


def high_passed(picture):
    return picture - gaussian(picture, 4, mode="reflect", truncate=4)


def test_psnr_agrees_with_scikit_image_and_torchmetrics(pair):
    result, truth, mask = pair
    ours = metrics.masked_psnr(result, truth, mask)
    inside = [picture[:, mask > 0.5].double() for picture in (result, truth)]
    assert ours == pytest.approx(peak_signal_noise_ratio(*(values.numpy() for values in inside[::-1]), data_range=1), abs=1e-6)
    assert ours == pytest.approx(float(torchmetrics_psnr(*inside, data_range=1.0)), abs=1e-4)


def test_ssim_agrees_with_scikit_image_and_torchmetrics(pair):
    result, truth, mask = pair
    ours = metrics.masked_ssim(result, truth, mask)
    a, b = grey(result), grey(truth)
    assert ours == pytest.approx(skimage_ssim(a, b, mask), abs=1e-9)
    if not mask[:5].any():  # torchmetrics leaves out the border's five pixels, and mirrors without repeating the edge
        batch = (torch.from_numpy(values)[None, None] for values in (a, b))
        _, values = torchmetrics_ssim(*batch, sigma=1.5, data_range=1.0, return_full_image=True)
        assert ours == pytest.approx(float(values[0, 0][mask > 0.5].mean()), abs=1e-6)


def test_high_passed_ssim_agrees_with_scikit_image(pair):
    result, truth, mask = pair
    expected = skimage_ssim(high_passed(grey(result)), high_passed(grey(truth)), mask)
    assert metrics.hp_ssim(result, truth, mask) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("contrast", [1.0, 0.05])
def test_ncc_agrees_with_its_formula(contrast):
    """At a contrast of 0.05 the windows are flatter than what counts as detail."""
    rng = np.random.default_rng(4)
    result, truth = (torch.from_numpy(0.5 + contrast * rng.uniform(-0.4, 0.4, (3, 40, 40))) for _ in range(2))
    truth[:, :20] = result[:, 4:24].roll(4, -1)
    mask = torch.zeros(40, 40)
    mask[[14, 17, 17, 22], [15, 19, 20, 24]] = 1
    a, b = grey(result), grey(truth)

    def vector(picture, y, x):
        window = picture[y - 4 : y + 5, x - 4 : x + 5].ravel()
        window = (window - window.mean()) / max(np.linalg.norm(window - window.mean()), 0.03 * 9)
        return np.append(window, np.sqrt(max(0, 1 - window @ window)))

    shifts = [(dy, dx) for dy in range(-4, 5) for dx in range(-4, 5)]
    best = [max(vector(a, y + dy, x + dx) @ vector(b, y, x) for dy, dx in shifts) for y, x in mask.nonzero().tolist()]
    assert metrics.detail_ncc(result, truth, mask) == pytest.approx(np.mean(best), abs=1e-9)


def test_iou_agrees_with_counting_and_torchmetrics():
    rng = np.random.default_rng(5)
    region, correspondence = np.zeros((40, 50)), np.zeros((40, 50))
    region[5:25, 8:30], correspondence[12:38, 14:41] = rng.uniform(size=(20, 22)), rng.uniform(size=(26, 27)) < 0.6
    both = either = least = most = 0
    for ours, theirs in zip(region.ravel(), correspondence.ravel()):
        both += ours > 0.5 and theirs > 0.5
        either += ours > 0.5 or theirs > 0.5
        least, most = least + min(ours, theirs), most + max(ours, theirs)
    region, correspondence = torch.from_numpy(region).float(), torch.from_numpy(correspondence).float()
    assert metrics.iou(region, correspondence) == pytest.approx(both / either)
    assert metrics.iou(region, correspondence) == pytest.approx(float(binary_jaccard_index(region, correspondence.int())))
    assert metrics.soft_iou(region, correspondence) == pytest.approx(least / most, abs=1e-6)

    def pixels_of_the_box(mask):
        ys, xs = zip(*((y, x) for y in range(40) for x in range(50) if mask[y, x] > 0.5))
        return {(y, x) for y in range(min(ys), max(ys) + 1) for x in range(min(xs), max(xs) + 1)}

    a, b = pixels_of_the_box(region), pixels_of_the_box(correspondence)
    assert metrics.box_iou(region, correspondence) == pytest.approx(len(a & b) / len(a | b))


def test_end_point_error_agrees_with_its_formula():
    rng = np.random.default_rng(6)
    truth = torch.from_numpy(rng.uniform(0, 40, (2, 12, 15))).float()
    flow = truth + torch.from_numpy(rng.normal(0, 4, (2, 12, 15))).float()
    region = torch.from_numpy(rng.uniform(size=(40, 50)) < 0.03).float()
    truth[:, :4], flow[:, 6, 3:9] = torch.nan, torch.nan
    size, errors = sum(value > 0.5 for value in region.flatten().tolist()) ** 0.5, []
    for y in range(4, 12):
        for x in range(15):
            (u, v), (p, q) = flow[:, y, x].tolist(), truth[:, y, x].tolist()
            errors.append(1 if u != u else min(1, ((u - p) ** 2 + (v - q) ** 2) ** 0.5 / size))
    assert 0 < sum(error == 1 for error in errors) < len(errors)
    assert metrics.end_point_error(flow, truth, region) == pytest.approx(sum(errors) / len(errors), abs=1e-6)


def test_token_bound_agrees_with_its_formula():
    """Tokens of 4 px over the square around an object that is taller than wide, and so reach beyond it."""
    object_mask = torch.zeros(90, 80)
    object_mask[12:76, 22:62] = 1
    part = torch.zeros(90, 80)
    part[30:47, 28:39] = part[38:45, 39:50] = 1
    top, left = 12, 10
    tokens = [[sum(float(part[top + 4 * i + y, left + 4 * j + x]) for y in range(4) for x in range(4)) / 16 for j in range(16)] for i in range(16)]
    soft = np.zeros((90, 80))
    for y in range(12, 76):
        for x in range(22, 62):
            v, u = (min(max((place + 0.5) / 4 - 0.5, 0), 15) for place in (y - top, x - left))
            i, j = min(int(v), 14), min(int(u), 14)
            above, below = (tokens[row][j] * (j + 1 - u) + tokens[row][j + 1] * (u - j) for row in (i, i + 1))
            soft[y, x] = above * (i + 1 - v) + below * (v - i)
    selected = part.numpy() > 0.5
    cut = [soft >= share * soft.max() - 1e-7 for share in np.arange(1, 20) / 20]
    expected = max((region & selected).sum() / (region | selected).sum() for region in cut)
    assert metrics.token_bound_iou(part, object_mask) == pytest.approx(expected, abs=1e-6)
