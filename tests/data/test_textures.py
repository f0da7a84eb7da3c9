import numpy as np
import pytest
from PIL import Image

from rba_core.data.textures import background_texture, load_photos, photo_paths, product_texture
from rba_core.errors import InputError


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
    Image.new("L", (60, 40), 7).save(tmp_path / "b.png")
    Image.new("RGBA", (40, 80), (1, 2, 3, 0)).save(tmp_path / "a.webp", lossless=True, exact=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "c.JPG")
    (tmp_path / "d.txt").write_text("not a photo")
    (tmp_path / "e.jpg").mkdir()
    photos = load_photos(tmp_path)
    assert [photo.shape for photo in photos] == [(80, 40, 3), (40, 60, 3), (32, 32, 3)]
    assert (photos[0] == (1, 2, 3)).all() and (photos[1] == 7).all()


def test_masks_beside_the_photos_are_no_photos(tmp_path):
    for name in ("tin.jpg", "tin_mask.png", "gas_mask.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    assert [path.name for path in photo_paths(tmp_path)] == ["gas_mask.png", "tin.jpg"]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_photos_are_turned_upright(tmp_path, suffix):
    lying = Image.new("RGB", (80, 40), "white")
    lying.paste("red", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright after a quarter turn to the right
    lying.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    (photo,) = load_photos(tmp_path)
    assert photo.shape == (80, 40, 3)
    assert photo[20, 20, 1] < 60 and photo[60, 20, 1] > 200  # what was left is above


def test_broken_and_tiny_files_are_skipped_and_named(tmp_path):
    Image.effect_noise((200, 200), 90).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.webp").write_text("no picture")
    Image.new("RGB", (200, 20)).save(tmp_path / "low.png")
    Image.fromarray(np.full((200, 200), 999, np.uint16)).save(tmp_path / "sixteen.png")
    with pytest.warns(UserWarning) as told:
        photos = load_photos(tmp_path)
    assert len(photos) == 1 and photos[0].shape == (200, 200, 3)
    for name, warning in zip(("cut.jpg", "empty.png", "low.png", "sixteen.png", "text.webp"), told, strict=True):
        assert f"{tmp_path / name} " in str(warning.message) and str(warning.message).endswith("; skipped")


def test_a_folder_without_a_readable_picture_is_told(tmp_path):
    with pytest.raises(InputError, match=f"photos: {tmp_path} holds no readable picture; put"):
        load_photos(tmp_path)
    (tmp_path / "a.png").write_text("broken")
    with pytest.warns(UserWarning, match="a.png"), pytest.raises(InputError, match="no readable picture"):
        load_photos(tmp_path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_large_photos_are_reduced(tmp_path, suffix):
    Image.linear_gradient("L").resize((4000, 1000)).save(tmp_path / f"a.{suffix}")
    (photo,) = load_photos(tmp_path)
    assert photo.shape == (384, 1536, 3)
    assert abs(photo.mean((1, 2)) - np.linspace(0, 255, 384)).max() < 3
