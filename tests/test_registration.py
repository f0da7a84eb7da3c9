import math

import pytest
import torch
from pictures import REFERENCE, WHOLE, seen_through, texture

from rba_core.dense_correspondence import Placement, centres
from rba_core.geometry import Box
from rba_core.registration import View, attention_at, carry_back, grid, nearness, polynomials, register, slopes, warped

TRUE = torch.tensor([[30.0, 4.0, 90.0], [-3.0, 28.0, 80.0]])
BENT = torch.cat([TRUE, torch.tensor([[1.5, -1.0, 0.6], [-0.8, 1.2, 1.4]])], 1)
WAVY = torch.cat([BENT, torch.tensor([[1.2, -0.8, 0.0, 1.0], [-0.9, 0.0, 1.1, 0.8]])], 1)
SIMILAR = torch.tensor([[29.0, 4.0, 90.0], [-4.0, 29.0, 80.0]])


def view(warp: torch.Tensor, size: int = 128, reference: torch.Tensor = REFERENCE) -> torch.Tensor:
    """What the crop shows where `warp` is true."""
    frame = torch.tensor([reference.shape[2], reference.shape[1]])
    return torch.nn.functional.grid_sample(reference[None], (warped(warp, grid(size)) / frame * 2 - 1)[None], align_corners=False)[0]


def hole(size: int = 128) -> torch.Tensor:
    mask = torch.zeros(size, size)
    mask[44:84, 40:90] = 1
    return mask


def damaged(warp: torch.Tensor) -> torch.Tensor:
    return torch.where(hole() > 0.5, torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(3)), view(warp))


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Mean under the mask, in units of the region's size."""
    inside = grid(128)[hole() > 0.5]
    distance = (warped(found, inside) - warped(true, inside)).norm(dim=-1).mean()
    return float(distance / carry_back(hole(), true, 160, 180).sum().sqrt())


ASTRAY = torch.tensor([[27.0, -2.0, 96.0], [4.0, 32.0, 75.0]])
"""As attention errs: a fifth of the crop's half side, 10 % of the scale, some degrees."""


@pytest.mark.parametrize("true", [SIMILAR, TRUE, BENT, WAVY], ids=["similarity", "affine", "bent", "wavy"])
def test_the_warp_is_found_to_a_hundredth_of_the_region_and_is_no_richer_than_need_be(true):
    found = register(damaged(true), hole(), REFERENCE, WHOLE, ASTRAY)
    assert found.warp.shape == true.shape
    assert error(found.warp, true) < 0.01 < error(ASTRAY, true)


@pytest.mark.parametrize("true", [[[21.6, 5.2, 96.0], [11.8, 44.4, 80.0]], [[44.1, -17.9, 90.0], [-11.0, 24.9, 80.0]]])
def test_a_view_from_the_side_is_found_from_an_upright_start(true):
    """Two to three times as long one way as the other, which none of the search's similarities is near."""
    true = torch.tensor(true)
    found = register(damaged(true), hole(), REFERENCE, WHOLE, torch.tensor([[30.0, 0.0, 90.0], [0.0, 30.0, 80.0]]))
    assert error(found.warp, true) < 0.01 and found.confidence > 0.5


def test_of_a_picture_seen_aslant_the_homography_is_found():
    """Perspective has two parameters more than an affine map."""
    points, tilt = grid(128), torch.tensor([0.06, -0.04])
    places = (warped(TRUE, points) - TRUE[:, 2]) / (1 + points @ tilt)[..., None] + TRUE[:, 2]
    frame = torch.tensor([REFERENCE.shape[2], REFERENCE.shape[1]])
    shown = torch.nn.functional.grid_sample(REFERENCE[None], (places / frame * 2 - 1)[None], align_corners=False)[0]
    found = register(shown, hole(), REFERENCE, WHOLE, ASTRAY)
    inside = hole() > 0.5
    assert found.warp.shape == (2, 6) and (warped(found.warp, points) - places)[inside].norm(dim=-1).mean() < 0.3
    a, b = found.warp[:, 0], found.warp[:, 1]
    g, h = (float(-1.5 * column @ found.warp[:, k] / (column @ column)) for column, k in ((a, 3), (b, 5)))
    assert torch.allclose(found.warp[:, 4], -(h * a + g * b), atol=0.02) and (g, h) == pytest.approx(tilt.tolist(), abs=0.02)


def test_a_strong_edge_at_another_depth_does_not_outshout_faint_print():
    """As a clock's rim does the figures of its dial."""
    height, width = WHOLE.shape
    stripes = (torch.arange(height) // 14 % 2)[:, None].expand_as(WHOLE) * torch.tensor([0.7, 0.5, 0.1])[:, None, None] + 0.2
    rim = (torch.arange(width) + 0.5 - TRUE[0, 2] > 18).float().expand(1, *WHOLE.shape)
    dial = 0.6 + 0.3 * (REFERENCE - 0.5)
    reference, nearer = torch.where(rim > 0, stripes, dial), TRUE + torch.tensor([[0, 0, 0], [0, 0, 2.5]])

    crop = torch.where(view(nearer, reference=rim) > 0.5, view(nearer, reference=reference), view(TRUE, reference=dial))
    seen = View.of(torch.where(hole() > 0.5, 0.5, crop), hole(), reference, WHOLE, 128, 28.0)
    plain, _ = seen.fit(ASTRAY[None], 1, 20, 0.07)
    even, _ = seen.evened().fit(plain, 1, 20, 0.07)
    assert error(even[0], TRUE) < 0.02 and error(plain[0], TRUE) > 0.1
    assert seen.unexplained(even) < seen.unexplained(plain)


def test_what_lies_under_the_mask_has_no_say():
    other = damaged(BENT)
    other[:, hole() > 0.5] = 0.2
    a, b = (register(picture, hole(), REFERENCE, WHOLE, ASTRAY) for picture in (other, damaged(BENT)))
    assert error(a.warp, b.warp) < 0.005 and a.confidence == pytest.approx(b.confidence, abs=0.05)


def test_light_that_falls_off_to_one_side_misleads_nobody():
    shaded = damaged(BENT) * torch.linspace(1.0, 0.55, 128) + 0.05
    assert error(register(shaded, hole(), REFERENCE, WHOLE, ASTRAY).warp, BENT) < 0.02


def test_more_pixels_place_it_more_finely():
    coarse = register(damaged(BENT), hole(), REFERENCE, WHOLE, ASTRAY)
    size = 256
    mask = torch.nn.functional.interpolate(hole()[None, None], (size, size))[0, 0]
    sharp = torch.where(mask > 0.5, 0.5, view(BENT, size))
    assert error(register(sharp, hole(), REFERENCE, WHOLE, ASTRAY).warp, BENT) < max(0.003, error(coarse.warp, BENT))


def test_right_pairs_are_trusted_and_others_are_not():
    right = register(damaged(BENT), hole(), REFERENCE, WHOLE, ASTRAY)
    assert right.confidence > 0.5
    for seed in (1, 2, 3):
        assert register(damaged(BENT), hole(), texture(160, 180, seed), WHOLE, ASTRAY).confidence < 0.1
    mirrored = register(damaged(BENT), hole(), REFERENCE.flip(-1), WHOLE, ASTRAY)
    assert mirrored.confidence < 0.1 and mirrored.evidence[4] > 0 > right.evidence[4]


def test_a_region_that_the_reference_does_not_show_is_not_trusted():
    shown = WHOLE * (1 - torch.nn.functional.max_pool2d(carry_back(hole(), BENT, 160, 180)[None], 9, 1, 4)[0])
    assert register(damaged(BENT), hole(), REFERENCE, shown, ASTRAY).confidence < 0.1


def test_agreement_is_low_where_crop_and_reference_differ():
    spoilt = damaged(BENT)
    spoilt[:, :, 100:] = texture(128, 128, 8)[:, :, 100:]
    agreement = register(spoilt, hole(), REFERENCE, WHOLE, ASTRAY).agreement
    assert agreement.shape == (128, 128) and 0 <= agreement.min() and agreement.max() <= 1
    assert agreement[:, :32].mean() > 0.8 > 0.4 > agreement[:, 108:].mean()


def test_attention_speaks_for_the_place_that_the_cells_look_at():
    """A cell looks at one token, where TRUE sends it; the reference's tokens cover all of it."""
    cells, square = torch.from_numpy(centres(16)).float(), Box(-10, 0, 200, 160)
    places = warped(TRUE, cells)
    column, row = (((places - torch.tensor([-10.0, 0.0])) / torch.tensor([200.0, 160.0]) * 16).long()).T
    attention = torch.full((256, 256), 0.2 / 255)
    attention[torch.arange(256), row * 16 + column] = 0.8
    placement = Placement(TRUE, Box(50, 60, 128, 128), 0.5, attention, square, torch.ones(256))
    shifted = TRUE + torch.tensor([[0.0, 0.0, 30.0], [0.0, 0.0, 0.0]])
    for box, there, elsewhere in ((Box(50, 60, 128, 128), TRUE, shifted), (Box(82, 92, 64, 64), placement.over(Box(82, 92, 64, 64)), shifted)):
        said = attention_at(placement, box, torch.stack([there, elsewhere]))
        assert said[0] > 1.5 and said[0] > said[1] + 1.5


def test_where_pixels_repeat_attention_decides():
    """Stripes fit every other period, too."""
    stripes = (torch.sin(torch.arange(180) * 2 * math.pi / 20) * 0.4 + 0.5).expand(3, 160, 180).clone()
    frame = torch.tensor([180, 160])
    true = torch.tensor([[30.0, 0.0, 90.0], [0.0, 30.0, 80.0]])
    shown = torch.nn.functional.grid_sample(stripes[None], (warped(true, grid(128)) / frame * 2 - 1)[None], align_corners=False)[0]
    assert abs(float(register(shown, hole(), stripes, WHOLE, true).warp[0, 2]) - 90) < 3


def test_the_region_is_the_inverse_of_the_warp():
    mask = hole()
    region = carry_back(mask, BENT, 160, 180)
    deep = torch.nn.functional.max_pool2d(1 - mask[None], 13, 1, 6)[0] == 0
    far = torch.nn.functional.max_pool2d(mask[None], 13, 1, 6)[0] == 0
    for selected, expected in ((deep, 1), (far, 0)):
        column, row = warped(BENT, grid(128)[selected]).long().T
        assert (region[row.clamp(0, 159), column.clamp(0, 179)] == expected).all()
    affine = carry_back(mask, TRUE, 160, 180)
    assert (affine - carry_back(mask, torch.cat([TRUE, torch.zeros(2, 3)], 1), 160, 180)).abs().sum() == 0


def test_a_cubic_warp_is_inverted_too():
    region, expected = carry_back(hole(), WAVY, 160, 180), torch.zeros(160, 180)
    under = torch.nn.functional.interpolate(hole()[None, None], (1024, 1024))[0, 0] > 0.5
    column, row = warped(WAVY, grid(1024))[under].long().T
    expected[row, column] = 1
    assert (region * expected).sum() / torch.maximum(region, expected).sum() > 0.9


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_slopes_are_those_of_the_polynomials(degree):
    points, step = grid(4).double(), torch.tensor([1e-5, 0.0]).double()
    for slope, offset in zip(slopes(points, degree), (step, step.flip(0))):
        assert torch.allclose(slope, (polynomials(points + offset, degree) - polynomials(points - offset, degree)) / 2e-5, atol=1e-6)


@pytest.mark.parametrize("bent", [False, True])
def test_on_a_much_larger_reference_the_region_is_whole(bent):
    """A pixel of the mask covers 20 x 20 of the reference: its outer half, too."""
    mask = torch.zeros(32, 32)
    mask[10:20, 8:24] = 1
    warp = torch.tensor([[320.0, 0.0, 330.0], [0.0, 320.0, 330.0]])
    region = carry_back(mask, torch.cat([warp, torch.zeros(2, 3)], 1) if bent else warp, 660, 660)
    assert Box.around(region) == Box(170, 210, 320, 200) and region.sum() > 0.98 * 320 * 200


def test_a_region_off_the_reference_is_empty():
    assert not carry_back(hole(), TRUE + torch.tensor([[0, 0, 900.0], [0, 0, 0]]), 160, 180).any()


def test_polynomials_are_orthogonal_over_the_crop():
    basis = polynomials(grid(400).double(), 3).flatten(0, 1)
    product = basis.T @ basis / len(basis)
    assert (product - torch.diag(product.diagonal())).abs().max() < 1e-4


def test_the_surround_counts_most_next_to_the_mask_and_what_is_under_it_not():
    mask = torch.zeros(96, 96)
    mask[36:60, 40:56] = 1
    weight = nearness(mask)
    assert (weight[mask > 0.5] == 0).all()
    row = weight[48, 56:]
    assert row[0] > 0.5 and row[0] > row[8] > row[16] and row[-1] < 0.05
    assert weight.min() >= 0 and weight.max() <= 1


def test_the_same_pictures_give_the_same_registration():
    a, b = (register(damaged(BENT), hole(), REFERENCE, WHOLE, ASTRAY) for _ in range(2))
    assert torch.equal(a.warp, b.warp) and a.confidence == b.confidence


def test_seen_through_and_warps_mean_the_same():
    """The picture that the collage's tests make is what a warp of that scale and turn shows."""
    cos, sin = math.cos(0.2) * 0.5 * 128, math.sin(0.2) * 0.5 * 128
    warp = torch.tensor([[cos, -sin, 90.0], [sin, cos, 80.0]])
    assert torch.allclose(view(warp), seen_through(REFERENCE, 128, 1.0, 0.2, (90.0, 80.0)), atol=1e-3)


def test_attention_that_agreed_on_no_place_is_evidence_against():
    unasked, disagreed = (register(damaged(BENT), hole(), REFERENCE, WHOLE, ASTRAY, disagreed=disagreed) for disagreed in (False, True))
    assert disagreed.confidence < unasked.confidence and torch.equal(disagreed.warp, unasked.warp)
    assert disagreed.evidence[2] == 0
