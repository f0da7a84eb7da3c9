import numpy as np
import pytest
from PIL import Image

from rba_core.data.textures import background_texture, load_photos, product_texture


@pytest.fixture(scope="module")
def products() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [product_texture(rng, 80) for _ in range(40)]


def test_a_product_is_rgba_of_the_size_asked_for(products):
    assert all(product.shape == (80, 80, 4) and product.dtype == np.uint8 for product in products)
    assert product_texture(np.random.default_rng(0), 33).shape == (33, 33, 4)


def test_its_alpha_is_a_shape_in_the_middle_that_leaves_room_around_it(products):
    for product in products:
        alpha = product[..., 3]
        assert set(np.unique(alpha)) <= {0, 255}
        assert alpha[40, 40] == 255
        assert 0.1 < (alpha > 0).mean() < 1


def test_products_have_detail_and_differ(products):
    assert np.mean([product[..., :3].std() > 10 for product in products]) > 0.8
    assert len({product.tobytes() for product in products}) == len(products)


def test_the_same_seed_draws_the_same_products_and_another_seed_others():
    first, again, other = ([product_texture(np.random.default_rng(seed), 64) for _ in range(3)] for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other))


def test_a_background_is_rgb_of_the_size_asked_for():
    rng = np.random.default_rng(1)
    for _ in range(10):
        background = background_texture(rng, 48)
        assert background.shape == (48, 48, 3) and background.dtype == np.uint8


def test_photos_become_part_of_some_products_and_backgrounds():
    photo = np.full((120, 200, 3), (253, 1, 127), np.uint8)
    rng = np.random.default_rng(0)
    with_photo = [(product_texture(rng, 40, [photo])[..., :3] == (253, 1, 127)).all(-1).mean() > 0.3 for _ in range(60)]
    assert 0.2 < np.mean(with_photo) < 0.6
    backgrounds = [(background_texture(rng, 40, [photo]) == (253, 1, 127)).all() for _ in range(60)]
    assert 0.2 < np.mean(backgrounds) < 0.6


def test_photos_are_read_as_rgb_in_the_order_of_their_names(tmp_path):
    Image.new("L", (30, 20), 7).save(tmp_path / "b.png")
    Image.new("RGBA", (10, 40), (1, 2, 3, 0)).save(tmp_path / "a.webp", lossless=True, exact=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "c.JPG")
    (tmp_path / "d.txt").write_text("not a photo")
    photos = load_photos(tmp_path)
    assert [photo.shape for photo in photos] == [(40, 10, 3), (20, 30, 3), (8, 8, 3)]
    assert (photos[0] == (1, 2, 3)).all() and (photos[1] == 7).all()
