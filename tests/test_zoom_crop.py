import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.zoom_crop import crop_box, separate, zoom_crop


@st.composite
def masks(draw, smallest=16, largest=120):
    height, width = draw(st.integers(smallest, largest)), draw(st.integers(smallest, largest))
    y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    mask = torch.zeros(height, width)
    mask[y : y + draw(st.integers(1, height)), x : x + draw(st.integers(1, width))] = 1
    return mask


@given(masks(), st.floats(1, 6), st.sampled_from([1, 4, 8, 16]))
def test_the_crop_is_a_square_of_whole_strides_that_holds_the_mask(mask, context, multiple):
    box, tight = crop_box(mask, context, multiple), Box.around(mask)
    assert box.width == box.height and box.width % multiple == 0
    assert box.x <= tight.x and box.y <= tight.y
    assert box.x + box.width >= tight.x + tight.width and box.y + box.height >= tight.y + tight.height


@given(masks(), st.floats(1, 6))
def test_the_crop_stays_in_the_picture_where_the_mask_allows_it(mask, context):
    box, (height, width) = crop_box(mask, context, 8), mask.shape
    needed = -(-max(Box.around(mask).width, Box.around(mask).height) // 8) * 8
    assume(needed <= min(height, width))
    assert 0 <= box.x <= width - box.width and 0 <= box.y <= height - box.height


def test_the_crop_is_context_times_the_masks_longer_side():
    mask = torch.zeros(400, 400)
    mask[180:220, 190:200] = 1  # 10 x 40
    assert crop_box(mask, 2.0, 8) == Box(155, 160, 80, 80)
    assert crop_box(mask, 3.0, 8) == Box(135, 140, 120, 120)


def test_the_crop_moves_inwards_at_the_border():
    mask = torch.zeros(200, 300)
    mask[190:200, 0:10] = 1
    assert crop_box(mask, 4.0, 8) == Box(0, 160, 40, 40)


def test_less_than_the_mask_is_no_context():
    with pytest.raises(InputError, match="context"):
        crop_box(torch.ones(20, 20), 0.9, 8)


@given(masks(), st.floats(1, 4))
def test_the_zoomed_mask_is_binary_and_never_empty(mask, context):
    crop = zoom_crop(torch.rand(3, *mask.shape), mask, 64, context=context)
    assert crop.image.shape == (3, 64, 64) and crop.mask.shape == (64, 64)
    assert set(crop.mask.unique().tolist()) <= {0.0, 1.0}
    assert crop.mask.any()


def test_one_painted_pixel_survives_a_crop_that_is_shrunk():
    mask = torch.zeros(400, 400)
    mask[3, 397] = 1
    crop = zoom_crop(torch.rand(3, 400, 400), mask, 64, context=200)
    assert crop.box == Box(200, 0, 200, 200)
    y, x = crop.mask.nonzero()[0].tolist()
    assert (y, x) == (3 * 64 // 200, 197 * 64 // 200)


def test_a_crop_of_the_models_size_holds_the_pictures_own_pixels():
    image, mask = torch.rand(3, 100, 100), torch.zeros(100, 100)
    mask[40:72, 30:62] = 1
    crop = zoom_crop(image, mask, 64, context=2)
    assert crop.box == Box(14, 24, 64, 64)
    assert torch.equal(crop.image, image[:, 24:88, 14:78])
    assert torch.equal(crop.mask, mask[24:88, 14:78])


def test_beyond_the_border_a_painted_border_stays_painted():
    """The model must not take the repeated pixels of the artifact for its surroundings."""
    mask = torch.zeros(40, 160)
    mask[:, 40:120] = 1  # 80 wide in a picture 40 high: the crop reaches over the top and the bottom
    crop = zoom_crop(torch.rand(3, 40, 160), mask, 80, context=1)
    assert crop.box == Box(40, -20, 80, 80)
    assert crop.mask.all()


@given(st.integers(0, 2**31), st.integers(16, 80), st.integers(16, 80))
def test_separate_parts_are_disjoint_make_up_the_mask_and_come_largest_first(seed, height, width):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(height, width)
    for _ in range(4):
        y, x = (int(torch.randint(extent, (), generator=generator)) for extent in (height, width))
        mask[y : y + 4, x : x + 5] = 1
    parts = separate(mask)
    assert torch.equal(torch.stack(parts).sum(0), mask)
    sizes = [float(part.sum()) for part in parts]
    assert all(sizes) and sizes == sorted(sizes, reverse=True)


def test_far_artifacts_are_apart_and_near_strokes_together():
    mask = torch.zeros(100, 200)
    mask[10:20, 10:20] = mask[10:20, 22:32] = 1  # two strokes 2 px apart
    mask[70:80, 170:178] = 1
    parts = separate(mask)
    assert [Box.around(part) for part in parts] == [Box(10, 10, 22, 10), Box(170, 70, 8, 10)]
