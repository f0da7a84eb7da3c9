import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rba_core.geometry import Box
from rba_core.reference_encoding import EncodedReference, encode_reference, segment

TOKENS = 16


def encoded(mask: torch.Tensor) -> EncodedReference:
    """The geometry of a reference with that mask, without a network."""
    _, box = segment(torch.zeros(3, *mask.shape), mask, 0.5)
    return EncodedReference(torch.zeros(1, TOKENS**2, 8), box, (mask > 0.5).float())


def rectangle(height: int, width: int, box: Box) -> torch.Tensor:
    return box.paste(torch.zeros(1, height, width), torch.ones(1, box.height, box.width))[0]


def hot(row: int, column: int) -> torch.Tensor:
    token_map = torch.zeros(TOKENS, TOKENS)
    token_map[row, column] = 1
    return token_map


REFERENCES = {
    "the whole of a square": rectangle(224, 224, Box(0, 0, 224, 224)),
    "odd sizes": rectangle(301, 455, Box(101, 37, 231, 219)),
    "the top left corner": rectangle(300, 400, Box(0, 0, 160, 160)),
    "the bottom right corner": rectangle(300, 400, Box(239, 139, 161, 161)),
    "wide, the square reaches over the border": rectangle(120, 333, Box(3, 5, 320, 111)),
    "tall, the square reaches over the border": rectangle(333, 120, Box(9, 0, 97, 333)),
    "large": rectangle(1000, 900, Box(31, 55, 777, 801)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_hot_token_goes_to_its_own_square_of_14_in_224(name):
    mask = REFERENCES[name]
    reference = encoded(mask)
    side = max(Box.around(mask).width, Box.around(mask).height)
    cell = side / TOKENS
    corner_x, corner_y = reference.box.x, reference.box.y
    assert reference.box.width == reference.box.height == side
    height, width = mask.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    checked = 0
    for row, column in [(2, 3), (7, 7), (8, 12), (13, 13), (5, 10), (11, 8)]:
        centre_x, centre_y = corner_x + (column + 0.5) * cell, corner_y + (row + 0.5) * cell
        if not (cell < centre_x < width - cell and cell < centre_y < height - cell):
            continue  # its spread would be cut by the border of the picture
        spread = reference.to_reference(hot(row, column))
        assert float((spread * x).sum() / spread.sum()) == pytest.approx(centre_x, abs=0.02 * cell)
        assert float((spread * y).sum() / spread.sum()) == pytest.approx(centre_y, abs=0.02 * cell)
        assert abs(float(spread.sum()) / cell**2 - 1) < 0.02
        above_half = Box.around((spread > 0.5).float())  # half height in both directions is within the token's square
        assert above_half.x + 1 >= centre_x - cell / 2 and above_half.x + above_half.width - 1 <= centre_x + cell / 2
        assert above_half.y + 1 >= centre_y - cell / 2 and above_half.y + above_half.height - 1 <= centre_y + cell / 2
        checked += 1
    assert checked >= 2


def test_at_224_px_the_token_in_row_r_and_column_c_is_centred_on_14_times_r_and_c_plus_7():
    reference = encoded(torch.ones(224, 224))
    spread = reference.to_reference(hot(4, 9))
    brightest = spread == spread.max()
    assert {tuple(p) for p in brightest.nonzero().tolist()} == {(y, x) for y in (62, 63) for x in (132, 133)}


def test_a_corner_token_reaches_into_the_corner():
    reference = encoded(torch.ones(224, 224))
    spread = reference.to_reference(hot(0, 15))
    assert spread[0, 223] == 1 and (spread[:7, 217:] == 1).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_a_map_carried_to_pixels_and_back_keeps_its_peak_and_shape(name):
    reference = encoded(REFERENCES[name])
    inside = reference.to_tokens(torch.ones(REFERENCES[name].shape))
    row, column = next((r, c) for r, c in [(8, 7), (5, 9), (7, 3)] if inside[r - 1 : r + 2, c - 1 : c + 2].min() == 1)
    back = reference.to_tokens(reference.to_reference(hot(row, column)))
    assert divmod(int(back.argmax()), TOKENS) == (row, column)
    assert float(back.sum()) == pytest.approx(1, abs=0.1)  # means over whole pixels
    assert float(back[row - 1 : row + 2, column - 1 : column + 2].sum()) == pytest.approx(float(back.sum()), abs=1e-5)


@given(st.integers(20, 150), st.integers(20, 150), st.data())
def test_a_flat_map_stays_flat_on_the_object_wherever_it_stands(height, width, data):
    x, y = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    box = Box(x, y, data.draw(st.integers(3, width - x)), data.draw(st.integers(3, height - y)))
    reference = encoded(rectangle(height, width, box))
    pixels = reference.to_reference(torch.full((TOKENS, TOKENS), 0.25))
    assert torch.allclose(pixels[reference.mask > 0.5], torch.tensor(0.25))


def test_pixels_outside_the_square_get_nothing():
    reference = encoded(rectangle(100, 200, Box(60, 20, 48, 48)))
    pixels = reference.to_reference(torch.ones(TOKENS, TOKENS))
    assert torch.equal(pixels, rectangle(100, 200, Box(60, 20, 48, 48)))


def test_tokens_hold_the_share_of_their_square_that_the_mask_covers():
    mask = torch.ones(64, 64)
    mask[:, 34:40] = 0  # tokens are 4 px: columns 8 and 9 lose 2 and 4 px
    coverage = encoded(mask).to_tokens(mask)
    assert coverage[0].tolist() == pytest.approx([1] * 8 + [0.5, 0] + [1] * 6)
    assert torch.equal(coverage, coverage[:1].expand(TOKENS, TOKENS))


def test_tokens_beyond_the_border_of_the_picture_are_not_covered():
    reference = encoded(torch.ones(16, 32))  # 32 x 32 around it, 8 px over at the top and the bottom
    coverage = reference.to_tokens(reference.mask)
    assert (coverage[:4] == 0).all() and (coverage[4:12] == 1).all() and (coverage[12:] == 0).all()


def test_the_segment_is_cut_to_its_box_padded_to_a_square_and_filled():
    reference = torch.rand(3, 40, 60)
    mask = torch.zeros(40, 60)
    mask[10:18, 20:50] = 1
    mask[12, 30] = 0
    square, box = segment(reference, mask, fill=0.5)
    assert box == Box(20, -1, 30, 30) and square.shape == (3, 30, 30)
    assert torch.equal(square[:, 11:19][:, mask[10:18, 20:50] > 0.5], reference[:, 10:18, 20:50][:, mask[10:18, 20:50] > 0.5])
    assert (square[:, 13, 10] == 0.5).all()
    assert (square[:, :11] == 0.5).all() and (square[:, 19:] == 0.5).all()


def test_the_embedding_has_256_tokens_as_wide_as_the_unets_context(every_model, scene):
    whole = encode_reference(every_model, scene.reference, scene.reference_mask)
    assert whole.embedding.shape == (1, 256, every_model.unet.config.cross_attention_dim)
    assert whole.tokens == 16
    assert torch.equal(whole.mask, scene.reference_mask)
    assert torch.isfinite(whole.embedding).all()


def test_the_embedding_does_not_see_what_the_mask_leaves_out(model, scene):
    changed = scene.reference.clone()
    changed[:, scene.reference_mask < 0.5] = 0
    first = encode_reference(model, scene.reference, scene.reference_mask).embedding
    assert torch.equal(first, encode_reference(model, changed, scene.reference_mask).embedding)
    changed[:, 40, 50] = 1 - changed[:, 40, 50]
    assert not torch.equal(first, encode_reference(model, changed, scene.reference_mask).embedding)


def test_token_rows_run_from_top_to_bottom_and_columns_from_left_to_right(model):
    """A change at one place of the reference changes the patch embedding of that token and no other."""
    kept = {}
    handle = model.encoder.embeddings.patch_embeddings.register_forward_hook(lambda _, __, out: kept.setdefault(len(kept), out))
    try:
        picture = torch.full((3, 224, 224), 0.4)
        encode_reference(model, picture, torch.ones(224, 224))
        picture[:, 14 * 3 : 14 * 4, 14 * 11 : 14 * 12] = 0.9
        encode_reference(model, picture, torch.ones(224, 224))
    finally:
        handle.remove()
    changed = (kept[0] != kept[1]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [3 * 16 + 11]
