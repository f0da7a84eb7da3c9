import math

import numpy as np
import pytest
import torch

from rba_core.dense_correspondence import best_similarity, centres, fit_affine, looked_at, place
from rba_core.geometry import Box
from rba_core.registration import carry_back
from rba_core.zoom_crop import ZoomCrop

TURNED = np.array([[0.4, -0.1, 0.2], [0.12, 0.35, -0.3]])
"""A crop that is seen turned, smaller and a little sheared in its reference."""


def attention_of(affine: np.ndarray, side: int = 16, tokens: int = 16) -> torch.Tensor:
    """Each cell looks at the tokens around where the map sends it: `[side², tokens²]`, rows of sum 1."""
    at = centres(side) @ affine[:, :2].T + affine[:, 2]
    distance = np.linalg.norm(at[:, None] - centres(tokens)[None], axis=-1)
    return torch.from_numpy(-((distance * tokens / 2) ** 2)).softmax(-1).float()


def crop_with(mask: torch.Tensor, box: Box = Box(0, 0, 64, 64)) -> ZoomCrop:
    return ZoomCrop(mask.expand(3, -1, -1), mask, box)


@pytest.fixture
def mask():
    mask = torch.zeros(64, 64)
    mask[24:40, 20:44] = 1
    return mask


def test_the_map_that_all_cells_agree_on_is_found(mask):
    placement = place(attention_of(TURNED), crop_with(mask), Box(0, 0, 200, 200))
    expected = torch.tensor([[40.0, -10.0, 120.0], [12.0, 35.0, 70.0]])
    assert torch.allclose(placement.affine, expected, atol=2.5)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_any_grid_of_cells_will_do(mask, side):
    placement = place(attention_of(TURNED, side), crop_with(mask), Box(0, 0, 200, 200))
    assert torch.allclose(placement.affine[:, 2], torch.tensor([120.0, 70.0]), atol=3)


def test_cells_that_look_astray_do_not_move_it(mask):
    """A third of all cells, among them all under the mask, look anywhere."""
    attention = attention_of(TURNED)
    generator = torch.Generator().manual_seed(0)
    covered = torch.nn.functional.avg_pool2d(mask[None, None], 4).flatten() > 0
    astray = covered | (torch.rand(256, generator=generator) < 0.25)
    attention[astray] = attention[astray][:, torch.randperm(256, generator=generator)]
    whole = place(attention_of(TURNED), crop_with(mask), Box(0, 0, 200, 200))
    placement = place(attention, crop_with(mask), Box(0, 0, 200, 200))
    assert torch.allclose(placement.affine, whole.affine, atol=2)
    assert placement.agreement < whole.agreement


def test_the_references_square_and_the_crops_box_are_minded(mask):
    """The same attention over a close-up that begins elsewhere; from a crop twice as far out."""
    placement = place(attention_of(TURNED), crop_with(mask, Box(100, 40, 128, 128)), Box(30, -10, 100, 100))
    assert torch.allclose(placement.affine, torch.tensor([[20.0, -5.0, 90.0], [6.0, 17.5, 25.0]]), atol=1.2)
    further = placement.over(Box(36, -24, 256, 256))  # the same centre
    assert torch.allclose(further[:, :2], 2 * placement.affine[:, :2], atol=1e-4)
    assert torch.allclose(further[:, 2], placement.affine[:, 2], atol=1e-4)
    beside = placement.over(Box(164, 40, 128, 128))  # half a side to the right
    assert torch.allclose(beside[:, 2], placement.affine[:, 2] + placement.affine[:, 0], atol=1e-4)


def test_attention_that_says_nothing_is_not_agreed_on(mask):
    generator = torch.Generator().manual_seed(1)
    square = Box(0, 0, 64, 64)
    told = place(attention_of(TURNED), crop_with(mask), square).agreement
    for attention in (torch.full((256, 256), 1 / 256), torch.rand(256, 256, generator=generator).softmax(-1)):
        placement = place(attention, crop_with(mask), square)
        assert placement is None or placement.agreement < 0.1 * told


def test_a_token_that_all_cells_look_at_tells_none_apart():
    attention = 0.5 * attention_of(TURNED)
    attention[:, 17] += 0.5
    seen, _ = looked_at(attention)
    expected = centres(16) @ TURNED[:, :2].T + TURNED[:, 2]
    near = np.linalg.norm(seen - expected, axis=1) < 0.1
    assert near.mean() > 0.85


def test_of_two_places_the_stronger_counts_not_the_middle():
    attention = torch.zeros(1, 256)
    attention[0, 3 * 16 + 2], attention[0, 12 * 16 + 13] = 0.6, 0.4
    seen, sureness = looked_at(attention)
    assert seen[0] == pytest.approx([2.5 / 8 - 1, 3.5 / 8 - 1]) and 0 < sureness[0] <= 1


def test_similarities_beyond_the_ranges_are_not_proposed():
    cells = centres(8)
    for turn in (math.pi, math.pi / 2):
        cos, sin = math.cos(turn), math.sin(turn)
        seen = cells @ np.array([[cos, sin], [-sin, cos]])
        found = best_similarity(cells, seen, np.ones(64), 0.1)
        assert found is None or abs(math.atan2(found[1, 0], found[0, 0])) <= 1.0
    assert best_similarity(cells, np.zeros((64, 2)), np.ones(64), 0.1) is None  # all look at one point


def test_the_fit_is_exact_where_cells_agree():
    cells = centres(8)
    seen = cells @ TURNED[:, :2].T + TURNED[:, 2]
    near = TURNED + np.array([[0.02, 0, 0.02], [0, -0.02, 0]])
    assert np.abs(fit_affine(cells, seen, np.ones(64), 0.5, TURNED) - TURNED).max() < 1e-9
    assert np.abs(fit_affine(cells, seen, np.ones(64), 0.5, near) - TURNED).max() < 0.3 * np.abs(near - TURNED).max()


def test_carry_moves_a_mask():
    mask = torch.zeros(10, 10)
    mask[2:4, 5:9] = 1
    doubled = carry_back(mask, torch.tensor([[10.0, 0, 12], [0, 10.0, 11]]), 24, 30)  # 20 pixels for 10, from (2, 1)
    assert Box.around(doubled) == Box(12, 5, 8, 4) and doubled.sum() == 32
    assert doubled.shape == (24, 30)


def test_the_same_attention_gives_the_same_map(mask):
    first, again = (place(attention_of(TURNED), crop_with(mask), Box(0, 0, 64, 64)) for _ in range(2))
    assert torch.equal(first.affine, again.affine) and first.agreement == again.agreement
