import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rba_core.errors import InputError
from rba_core.geometry import Box, resize, resize_mask

boxes = st.builds(Box, st.integers(-40, 80), st.integers(-40, 80), st.integers(1, 60), st.integers(1, 60))
extents = st.integers(1, 64)


def contains(outer: Box, inner: Box) -> bool:
    return (
        outer.x <= inner.x
        and outer.y <= inner.y
        and outer.x + outer.width >= inner.x + inner.width
        and outer.y + outer.height >= inner.y + inner.height
    )


@given(boxes, extents, extents)
def test_a_clamped_box_lies_inside_where_it_fits_and_covers_the_picture_where_it_does_not(box, height, width):
    moved = box.clamped(height, width)
    assert (moved.width, moved.height) == (box.width, box.height)
    for start, extent, limit in ((moved.x, moved.width, width), (moved.y, moved.height, height)):
        if extent <= limit:
            assert 0 <= start <= limit - extent
        else:
            assert start <= 0 and start + extent >= limit


@given(boxes, extents, extents)
def test_a_box_already_inside_is_not_moved(box, height, width):
    once = box.clamped(height, width)
    assert once.clamped(height, width) == once


@given(boxes, st.integers(0, 60))
def test_a_square_holds_the_box_it_was_grown_from(box, extra):
    side = max(box.width, box.height) + extra
    square = box.square(side)
    assert (square.width, square.height) == (side, side)
    assert contains(square, box)
    assert abs((square.x + side / 2) - (box.x + box.width / 2)) <= 0.5
    assert abs((square.y + side / 2) - (box.y + box.height / 2)) <= 0.5


@given(st.integers(0, 2**31), extents, extents)
def test_around_is_the_smallest_box_that_holds_every_set_pixel(seed, height, width):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(height, width, generator=generator) > 0.97).float()
    mask[torch.randint(height, (), generator=generator), torch.randint(width, (), generator=generator)] = 1
    box = Box.around(mask)
    inside = mask[box.y : box.y + box.height, box.x : box.x + box.width]
    assert inside.sum() == mask.sum()
    assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_around_an_empty_mask_says_so():
    with pytest.raises(InputError, match="mask: is empty"):
        Box.around(torch.full((4, 4), 0.5))


@given(boxes, extents, extents, st.integers(0, 2**31))
def test_pasting_a_crop_back_changes_nothing(box, height, width, seed):
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    box = box.clamped(height, width)
    before = picture.clone()
    assert torch.equal(box.paste(picture, box.crop(picture)), picture)
    assert torch.equal(picture, before)


@given(boxes, extents, extents)
def test_pasting_writes_the_box_and_nothing_else(box, height, width):
    box = box.clamped(height, width)
    pasted = box.paste(torch.zeros(1, height, width), torch.ones(1, box.height, box.width))
    expected = torch.zeros(1, height, width)
    expected[:, max(0, box.y) : box.y + box.height, max(0, box.x) : box.x + box.width] = 1
    assert torch.equal(pasted, expected)


def test_a_crop_over_the_border_repeats_the_border():
    picture = torch.arange(6.0).view(1, 2, 3)
    assert Box(-1, -1, 3, 3).crop(picture)[0].tolist() == [[0, 0, 1], [0, 0, 1], [3, 3, 4]]
    assert Box(2, 1, 2, 2).crop(picture)[0].tolist() == [[5, 5], [5, 5]]


def test_a_crop_over_the_border_can_be_filled():
    picture = torch.arange(6.0).view(1, 2, 3)
    assert Box(-1, -1, 3, 3).crop(picture, fill=9)[0].tolist() == [[9, 9, 9], [9, 0, 1], [9, 3, 4]]


def test_resizing_to_the_same_size_returns_the_very_values():
    picture, mask = torch.rand(3, 17, 23), torch.rand(17, 23)
    assert torch.equal(resize(picture, 17, 23), picture)
    assert torch.equal(resize_mask(mask, 17, 23), (mask > 0.5).float())


@given(extents, extents, extents, extents)
def test_a_resized_picture_stays_in_range_and_a_flat_one_flat(height, width, to_height, to_width):
    checks = ((torch.arange(height)[:, None] + torch.arange(width)) % 2).float().expand(3, height, width)
    resized = resize(checks, to_height, to_width)
    assert resized.shape == (3, to_height, to_width)
    assert resized.min() >= 0 and resized.max() <= 1
    assert torch.allclose(resize(torch.full((3, height, width), 0.3), to_height, to_width), torch.tensor(0.3), atol=1e-5)


@given(st.integers(2, 8), st.integers(0, 2**31))
def test_a_mask_enlarged_and_shrunk_again_is_nearly_the_same_mask(factor, seed):
    mask = (torch.rand(12, 12, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
    mask = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    enlarged = resize_mask(mask, 48 * factor, 48 * factor)
    assert set(enlarged.unique().tolist()) <= {0.0, 1.0}
    assert (resize_mask(enlarged, 48, 48) != mask).float().mean() < 0.1
