import torch

from rba_core.overlay import outline, overlay


def blob():
    soft = torch.zeros(128, 96)
    soft[40:60, 30:70] = 1.0
    return soft


def test_tint_where_the_map_is_high():
    reference = torch.full((3, 128, 96), 0.5)
    before = reference.clone()
    drawn = overlay(reference, blob())
    assert drawn.shape == reference.shape and 0 <= drawn.min() and drawn.max() <= 1
    assert torch.equal(reference, before)
    hot, cold = drawn[:, 50, 50], drawn[:, 100, 10]
    assert hot[0] > hot[2] + 0.2
    assert cold[0] == cold[1] == cold[2] < 0.5


def test_contour_follows_the_mask():
    reference = torch.zeros(3, 128, 96)
    mask = torch.zeros(128, 96)
    mask[45:55, 40:60] = 1
    default, given = overlay(reference, blob()), overlay(reference, blob(), mask)
    white = torch.ones(3)
    assert torch.equal(default[:, 39, 50], white) and torch.equal(given[:, 44, 50], white)
    assert not torch.equal(given[:, 39, 50], white)


def test_outline_leaves_the_inside():
    picture = torch.rand(3, 128, 96, generator=torch.Generator().manual_seed(0))
    drawn = outline(picture, blob(), (0.0, 1.0, 0.0))
    assert torch.equal(drawn[:, blob() > 0.5], picture[:, blob() > 0.5])
    assert drawn[:, 39, 50].tolist() == [0.0, 1.0, 0.0]
