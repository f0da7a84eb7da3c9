import torch
from pictures import texture

from rba_core.collage import Collage
from rba_core.geometry import Box
from rba_core.overlay import draw_matches, outline, overlay
from rba_core.zoom_crop import ZoomCrop


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


def matched(sureness: float, valid: float = 1.0):
    """A crop of 64 pixels at (20, 10), seen in the reference moved by (30, 40) and twice as large; its middle is masked."""
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    mask = torch.zeros(64, 64)
    mask[24:40, 24:40] = 1
    collage = Collage(torch.rand(3, 64, 64), torch.full((64, 64), valid), mask, 0.9, torch.stack([2 * x + 30, 2 * y + 40]), torch.full((64, 64), sureness))
    image = texture(120, 120, 4)
    crop = ZoomCrop(image[:, 10:74, 20:84], mask, Box(20, 10, 64, 64))
    return draw_matches(image, crop, texture(200, 200, 5), collage, side=256, points=4)


def test_matched_points_have_one_colour_in_both_pictures():
    sheet = matched(0.9)
    assert sheet.shape == (3, 256, 512 + 16) and 0 <= sheet.min() and sheet.max() <= 1
    colours = set()
    for row in range(4):
        for column in range(4):
            x, y = (column + 0.5) * 64, (row + 0.5) * 64
            # the reference is cut from its first matched point, 31 and 41, to the last, 126 pixels on
            there = [int((2 * (int(at / 4) + 0.5) - 1) / 126 * 256) for at in (x, y)]
            colours.add(tuple(sheet[:, int(y), int(x)].tolist()))
            assert torch.equal(sheet[:, int(y), int(x)], sheet[:, there[1], there[0] + 272])
    assert len(colours) == 16


def test_points_are_hollow_where_unsure_and_absent_where_the_object_does_not_show():
    sure, unsure, nothing = matched(0.9), matched(0.1), matched(0.9, valid=0.0)
    assert torch.equal(unsure[:, 32, 32], nothing[:, 32, 32]) and not torch.equal(sure[:, 32, 32], nothing[:, 32, 32])
    assert not torch.equal(unsure, nothing)
