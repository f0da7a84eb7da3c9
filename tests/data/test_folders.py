import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from rba_core.data.folders import FolderSampler, PhotoBank, object_mask
from rba_core.data.scenes import REFERENCE_FILL, Scenes, SceneSampler
from rba_core.errors import InputError

MODES = ["alignment", "refinement"]


def ramp(width: int, height: int) -> np.ndarray:
    """Red says how far right one is, green how far down; blue is 0."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return (np.stack([x, y, np.zeros_like(x)], -1) * 255).round().astype(np.uint8)


def save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def disc(width: int, height: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(width) - 0.6 * width, np.arange(height) - 0.4 * height)
    return ((x**2 + y**2 < (0.3 * height) ** 2) * 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two photos, of the second only a disc is the object; there the blue channel is full."""
    save(tmp_path / "plain.png", ramp(240, 200))
    masked = ramp(300, 220)
    masked[..., 2] = disc(300, 220)
    save(tmp_path / "tin.png", masked)
    save(tmp_path / "tin_mask.png", disc(300, 220))
    return tmp_path


@pytest.fixture
def plain_light(monkeypatch):
    monkeypatch.setattr(SceneSampler, "_photometric", lambda self, picture: picture)


def sampler(*folders: Path, size: int = 64, reference: int = 96, **settings) -> FolderSampler:
    made = FolderSampler(PhotoBank(list(folders)), 0, size, reference)
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def mismatch(scenes: Scenes, shift: float = 0.0) -> torch.Tensor:
    image = F.interpolate(scenes.image, scenes.flow.shape[1:3], mode="area")
    found = F.grid_sample(scenes.reference, scenes.flow + shift, align_corners=False)
    return (image - found)[:, :2].abs().amax(1)[scenes.visible[:, 0] > 0.5]


@pytest.mark.parametrize("mode", MODES)
def test_the_flow_leads_to_the_same_point_of_the_photo(folder, plain_light, mode):
    scenes = sampler(folder, size=96, reference=160).sample(16, mode)
    right = mismatch(scenes)
    assert len(right) > 600
    assert float(right.median()) < 0.006
    assert float(mismatch(scenes, shift=0.15).median()) > 3 * float(right.median())


@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_ranges(folder, mode):
    scenes = sampler(folder, size=64, reference=112).sample(5, mode)
    assert scenes.image.shape == (5, 3, 64, 64) and scenes.mask.shape == (5, 1, 64, 64)
    assert scenes.reference.shape == (5, 3, 112, 112)
    assert scenes.flow.shape == (5, 16, 16, 2) and scenes.visible.shape == (5, 1, 16, 16)
    for picture in (scenes.image, scenes.reference):
        assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1
    assert set(scenes.visible.unique().tolist()) <= {0.0, 1.0} and torch.isfinite(scenes.flow).all()
    assert set(scenes.mask.unique().tolist()) == {0.0, 1.0} and (scenes.mask.sum((1, 2, 3)) > 4).all()


@pytest.mark.parametrize("place", ["tin_mask.png", "masks/tin.png"])
def test_masks_and_what_the_reference_shows_stay_on_the_object(tmp_path, plain_light, place):
    picture = ramp(300, 220)
    picture[..., 2] = disc(300, 220)
    save(tmp_path / "tin.png", picture)
    save(tmp_path / place, disc(300, 220))
    for mode in MODES:
        scenes = sampler(tmp_path).sample(8, mode)
        assert scenes.image[:, 2][scenes.mask[:, 0] > 0.5].min() > 0.45
        assert (scenes.image[:, 2] < 0.1).any()  # the crop shows its surroundings
        shown = (scenes.reference != REFERENCE_FILL).any(1)
        assert 0.05 < shown.float().mean() < 0.9
        assert scenes.reference[:, 2][shown].min() > 0.45
        assert (scenes.visible > 0).flatten(1).any(1).all()


def test_without_a_mask_the_whole_picture_is_the_object(tmp_path, plain_light):
    save(tmp_path / "a.png", ramp(200, 100))
    reference = sampler(tmp_path, close_ups=0.0, disparity=0.0).sample(2, "alignment").reference
    shown = (reference != REFERENCE_FILL).any(1)[0]
    assert shown.sum() == pytest.approx(96 * 48, rel=0.06)
    assert float(reference[0, 0][shown].max() - reference[0, 0][shown].min()) > 0.95


def test_references_show_the_object_in_alignment_and_the_region_in_refinement_mode(tmp_path, plain_light):
    save(tmp_path / "a.png", ramp(200, 200))
    for mode, low, high in (("alignment", 0.95, 1.0), ("refinement", 0.05, 0.75)):
        scenes = sampler(tmp_path, close_ups=0.0).sample(12, mode)
        reds = [picture[0][(picture != REFERENCE_FILL).any(0)] for picture in scenes.reference]
        assert low < float(np.mean([float(red.max() - red.min()) for red in reds])) <= high


def group(folder: Path, names: str = "ab", size: int = 160) -> None:
    """Photos of one object, a disc: each of a colour of its own, the surroundings white, the mask a little too large."""
    for index, name in enumerate(names):
        picture = np.full((size, size, 3), 255, np.uint8)
        picture[disc(size, size) > 0] = (0, 0, 60 + 60 * index)
        save(folder / f"{name}.png", picture)
        save(folder / f"{name}_mask.png", np.asarray(Image.fromarray(disc(size, size)).filter(ImageFilter.MaxFilter(3))))


@pytest.mark.parametrize("mode", MODES)
def test_of_two_photos_one_is_the_image_and_the_other_the_reference(tmp_path, plain_light, mode):
    group(tmp_path / "toy")
    scenes = sampler(tmp_path, pairs=1.0).sample(8, mode)
    assert (scenes.visible == 0).all() and torch.isfinite(scenes.flow).all()
    for image, mask, reference in zip(scenes.image, scenes.mask[:, 0], scenes.reference):
        inside, shown = image[2][mask > 0.5], reference[:, (reference != REFERENCE_FILL).any(0)]
        assert mask.any() and image[0][mask > 0.5].max() < 0.02  # no white: M_a is in the eroded mask
        assert shown[0].max() < 0.02 and shown.shape[1] > 0.3 * 96**2  # nor in the reference, which is the whole object
        assert abs(float(inside.mean() - shown[2].mean())) == pytest.approx(60 / 255, abs=0.02)


def test_half_of_a_group_s_scenes_are_of_one_photo(tmp_path, plain_light):
    group(tmp_path / "toy", "abc")
    seen = (sampler(tmp_path).sample(40, "alignment").visible > 0).flatten(1).any(1)
    assert 0.25 < seen.float().mean() < 0.75


def test_photos_of_different_objects_are_never_paired(tmp_path):
    group(tmp_path, "ab")
    for name in ("toy", "cup"):
        group(tmp_path / name, "abc")
    group(tmp_path / "single", "a")
    bank = PhotoBank([tmp_path])
    assert len(bank.paths) == 9
    for (path, _), others in zip(bank.paths, bank.partners):
        expected = {"toy": 2, "cup": 2}.get(path.parent.name, 0)
        assert len(others) == expected
        assert all(bank.paths[other][0].parent == path.parent and bank.paths[other][0] != path for other in others)


def test_the_same_seed_draws_the_same_whatever_was_drawn_before(folder):
    group(folder / "toy")
    one, other = sampler(folder), sampler(folder)
    other.sample(3, "refinement")
    other.at(7)
    for each in (one, other):
        each.seed(5)
    batches = [each.sample(6, "alignment") for each in (one, other)]
    assert all(torch.equal(a, b) for a, b in zip(*(vars(batch).values() for batch in batches)))
    one.seed(6)
    assert not torch.equal(one.sample(6, "alignment").image, batches[0].image)


def test_what_cannot_be_used_is_named_and_skipped(folder):
    (folder / "broken.jpg").write_bytes(b"no picture")
    for name in ("odd", "empty", "dot", "torn"):
        save(folder / f"{name}.png", ramp(120, 120))
    save(folder / "odd_mask.png", np.full((60, 120), 255, np.uint8))
    save(folder / "empty_mask.png", np.zeros((120, 120), np.uint8))
    dot = np.zeros((120, 120), np.uint8)
    dot[50:60, 50:60] = 255
    save(folder / "dot_mask.png", dot)
    (folder / "torn_mask.png").write_bytes(b"")
    with pytest.warns(UserWarning) as told:
        bank = PhotoBank([folder])
    assert [path.name for path, _ in bank.paths] == ["plain.png", "tin.png"] and len(bank.partners) == 2
    messages = [str(warning.message) for warning in told]
    for part in ("broken.jpg cannot be read", "odd_mask.png has not the proportions", "empty_mask.png is empty", "dot.png shows an object of 10 x 10", "torn_mask.png cannot be read"):
        assert sum(part in message for message in messages) == 1
    assert len(messages) == 5


def test_a_folder_with_nothing_to_use_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="folders: .*empty holds no readable picture"):
        PhotoBank([tmp_path / "empty"])


def test_masks_follow_the_photo_s_size_and_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp(2400, 1200)).save(tmp_path / "a.jpg", exif=exif, quality=90)
    upright = np.zeros((600, 300), np.uint8)
    upright[300:] = 255
    save(tmp_path / "a_mask.png", upright)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photo = PhotoBank([tmp_path]).photo(0)
    assert photo.levels[0].shape == (4, 1024, 512)
    assert photo.centre.tolist() == [256, 768] and photo.half == 256
    assert torch.equal(object_mask(tmp_path / "a.jpg", 1024, 512).sum(1) > 0, torch.arange(1024) >= 512)


def test_a_photo_is_looked_up_where_and_as_coarse_as_asked(tmp_path):
    save(tmp_path / "a.png", ramp(256, 128))
    photo = PhotoBank([tmp_path]).photo(0)
    places = torch.tensor([[[-0.5, -0.25], [0.75, 0.0], [0.0, 0.75]]])
    fine, coarse = photo.look_up(places, 2 / 256), photo.look_up(places, 8 / 256)
    for found in (fine, coarse):
        assert torch.allclose(found[0, 0, :2], torch.tensor([0.25, 0.875]), atol=0.004)
        assert torch.allclose(found[1, 0, :2], torch.tensor([0.25, 0.5]), atol=0.004)
        assert found[3, 0].tolist() == [1, 1, 0]  # the last is below the picture
    stripes = np.zeros((128, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    save(tmp_path / "a.png", stripes)
    photo = PhotoBank([tmp_path]).photo(0)
    centres = (torch.arange(256) + 0.5) / 128 - 1
    row = torch.stack([centres, torch.zeros(256)], -1)[None]
    assert photo.look_up(row, 2 / 256)[0].std() > 0.4 and photo.look_up(row, 8 / 256)[0].std() < 0.01
