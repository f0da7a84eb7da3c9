import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.postprocessing import CleaningSettings, clean, largest_blob, remove_border_peaks
from rba_core.reference_encoding import EncodedReference, segment

TOKENS = 16


def reference(mask: torch.Tensor) -> EncodedReference:
    _, box = segment(torch.zeros(3, *mask.shape), mask, 0.5)
    return EncodedReference(torch.zeros(1, TOKENS**2, 8), box, mask)


def blob(row: float, column: float, spread: float = 1.2, height: float = 1.0) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    return height * torch.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * spread**2))


def token_box(row: float, column: float, half: float) -> tuple[float, float, float, float]:
    """A square around a token's centre in the pixels of a 224 px reference: left, top, right, bottom."""
    x, y = 14 * column + 7, 14 * row + 7
    return x - 14 * half, y - 14 * half, x + 14 * half, y + 14 * half


WHOLE = reference(torch.ones(224, 224))


def holds(region, row, column) -> bool:
    return bool(region.mask[int(14 * row + 7), int(14 * column + 7)])


@given(st.integers(2, 13), st.integers(2, 13), st.floats(0.8, 2.0))
def test_one_blob_is_found_where_it_is(row, column, spread):
    region = clean(blob(row, column, spread) + 1e-4, WHOLE)
    assert set(region.mask.unique().tolist()) == {0.0, 1.0}
    assert holds(region, row, column)
    radius = spread * math.sqrt(-2 * math.log(0.4))  # where it falls to the threshold
    left, top, right, bottom = token_box(row, column, radius + 0.5)
    assert region.box.x >= left - 1 and region.box.y >= top - 1
    assert region.box.x + region.box.width <= right + 1 and region.box.y + region.box.height <= bottom + 1
    assert region.mask.sum() > 0.5 * math.pi * (14 * radius) ** 2 * (1 if min(row, column, 15 - row, 15 - column) >= radius else 0.4)


@pytest.mark.parametrize("corner", [(0, 0), (0, 15), (15, 0), (15, 15)])
def test_a_spike_in_a_corner_is_noise(corner):
    raw = blob(7, 9) + 0.01
    raw[corner] = 20.0
    region = clean(raw, WHOLE)
    assert holds(region, 7, 9)
    assert not holds(region, *corner)
    assert region.mask.mean() < 0.1


@pytest.mark.parametrize("edge", [(0, 6), (15, 3), (4, 0), (10, 15)])
def test_a_spike_at_the_border_is_noise(edge):
    raw = blob(7, 9) + 0.01
    raw[edge] = 20.0
    region = clean(raw, WHOLE)
    assert holds(region, 7, 9) and not holds(region, *edge)


def test_spikes_at_all_corners_and_along_the_border_are_noise():
    raw = blob(7, 9) + 0.01
    for spike in [(0, 0), (0, 15), (15, 0), (15, 15), (0, 5), (8, 0), (15, 10), (6, 15)]:
        raw[spike] = 5.0
    region = clean(raw, WHOLE)
    assert holds(region, 7, 9) and region.mask.mean() < 0.1


def test_a_broad_peak_at_the_border_is_no_noise():
    region = clean(blob(0, 8, spread=2.0) + 0.01, WHOLE)
    assert holds(region, 0, 8)
    assert region.box.y == 0


def test_only_lone_border_tokens_are_replaced():
    token_map = (blob(7, 7) + 0.02).numpy()
    token_map[0, 4] = 3.0
    token_map[9, 9] = 3.0  # a lone peak, but in the middle
    cleaned = remove_border_peaks(token_map, 0.25)
    changed = np.argwhere(cleaned != token_map).tolist()
    assert changed == [[0, 4]]
    assert cleaned[0, 4] == pytest.approx(0.02, abs=1e-3)


def test_of_two_blobs_the_larger_mass_wins_not_the_higher_peak():
    region = clean(blob(4, 4, spread=0.7, height=1.0) + blob(11, 11, spread=2.2, height=0.8) + 1e-4, WHOLE)
    assert holds(region, 11, 11) and not holds(region, 4, 4)


def test_the_largest_blob_is_by_mass_and_diagonal_neighbours_belong_together():
    soft = np.zeros((8, 8))
    soft[0, :4] = 1.0
    soft[4, 4] = soft[5, 5] = soft[6, 6] = 2.0
    assert np.argwhere(largest_blob(soft, 0.5)).tolist() == [[4, 4], [5, 5], [6, 6]]


def test_the_region_is_one_connected_area():
    from scipy import ndimage

    region = clean(blob(3, 3) + blob(12, 4, height=0.9) + blob(8, 12, height=0.95) + 1e-4, WHOLE)
    assert ndimage.label(region.mask.numpy(), np.ones((3, 3)))[1] == 1


@given(st.integers(0, 2**31), st.integers(30, 90), st.integers(30, 90))
def test_the_region_lies_on_the_object_and_in_its_box(seed, height, width):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(height, width)
    y, x = (int(torch.randint(extent // 2, (), generator=generator)) for extent in (height, width))
    mask[y : y + height // 2, x : x + width // 2] = 1
    mask[y + 3, x + 3] = 0
    raw = torch.rand(16, 16, generator=generator) ** 8
    region = clean(raw / raw.sum(), reference(mask))
    assert region.mask.shape == region.soft.shape == (height, width)
    assert (region.mask <= mask).all() and region.mask.any()
    assert region.box == Box.around(region.mask)
    assert (region.soft[mask == 0] == 0).all()
    assert float(region.soft.max()) == pytest.approx(1)


def test_attention_beside_the_object_is_ignored():
    mask = torch.zeros(224, 224)
    mask[:, :112] = 1
    mask[:112] = 1  # an L: the lower right quarter of the square is not on the object
    region = clean(blob(12, 12, height=5.0) + blob(4, 4) + 1e-4, reference(mask))
    assert holds(region, 4, 4)


NOTHING = {
    "empty": torch.zeros(16, 16),
    "negative": -torch.ones(16, 16),
    "not a number": torch.full((16, 16), float("nan")),
    "one token not a number": torch.where(blob(7, 7) == 1, torch.nan, blob(7, 7)),
    "infinite": torch.where(blob(7, 7) == 1, torch.inf, blob(7, 7)),
    "flat": torch.full((16, 16), 1 / 256),
    "flat with noise": 1 + 0.1 * torch.rand(16, 16, generator=torch.Generator().manual_seed(0)),
    "flat but for a corner": torch.full((16, 16), 1 / 256).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(0.2)),
    "nothing but a corner": torch.zeros(16, 16).index_put((torch.tensor(0), torch.tensor(15)), torch.tensor(1.0)),
    "nothing but a border token": torch.zeros(16, 16).index_put((torch.tensor(15), torch.tensor(6)), torch.tensor(1.0)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_map_that_says_nothing_is_an_error_and_never_a_full_mask(name):
    with pytest.raises(InputError, match="alignment: gave an? (empty|flat) map"):
        clean(NOTHING[name], WHOLE)


def test_a_map_with_nothing_on_the_object_is_an_error_and_never_a_full_mask():
    mask = torch.zeros(224, 224)
    mask[:, :112] = 1
    mask[:112] = 1
    beside = torch.zeros(16, 16)
    beside[10:14, 10:14] = 1
    with pytest.raises(InputError, match="alignment"):
        clean(beside, reference(mask))


def test_the_map_is_not_modified():
    raw = blob(7, 7) + 0.01
    raw[0, 0] = 9
    before = raw.clone()
    clean(raw, WHOLE)
    assert torch.equal(raw, before)


def test_the_threshold_sets_how_much_of_the_blob_belongs():
    raw = blob(7, 7, 2.0) + 1e-4
    areas = [float(clean(raw, WHOLE, CleaningSettings(threshold=t)).mask.sum()) for t in (0.2, 0.4, 0.8)]
    assert areas[0] > areas[1] > areas[2] > 0


@pytest.mark.parametrize("threshold", [-0.1, 0.0, 1.5, float("nan")])
def test_a_threshold_that_selects_everything_or_nothing_is_refused(threshold):
    with pytest.raises(InputError, match="threshold"):
        clean(blob(7, 7) + 1e-4, WHOLE, CleaningSettings(threshold=threshold))


def test_flatness_decides_how_much_must_stand_out():
    raw = torch.ones(16, 16) + blob(7, 7)  # peak 2, mean little above 1
    assert holds(clean(raw, WHOLE, CleaningSettings(flatness=1.5, threshold=0.8)), 7, 7)
    with pytest.raises(InputError, match="flat"):
        clean(raw, WHOLE, CleaningSettings(flatness=2.0))


def test_a_thin_object_is_cleaned_like_any_other():
    mask = torch.zeros(320, 320)
    mask[range(320), range(320)] = 1  # a line one pixel wide covers a twentieth of each of its tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        region = clean(blob(7, 7) + 1e-4, reference(mask))
        assert region.mask[150, 150] and (region.mask <= mask).all()
        with pytest.raises(InputError, match="flat"):
            clean(torch.ones(16, 16), reference(mask))


def test_the_box_is_right_to_the_pixel_for_a_reference_of_token_size():
    raw = torch.full((16, 16), 1e-6)
    raw[5:8, 3:7] = 1  # at 16 px a side, a token is a pixel
    region = clean(raw, reference(torch.ones(16, 16)), CleaningSettings(threshold=0.6))
    assert region.box == Box(3, 5, 4, 3)
