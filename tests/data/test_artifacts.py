import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial import cKDTree

from rba_core.bench.metrics import detail_ncc, hp_ssim, masked_psnr
from rba_core.data.artifacts import ARTIFACTS, simulate
from rba_core.data.textures import product_texture
from rba_core.errors import InputError


@pytest.fixture(scope="module")
def printed():
    """A busy print `[3, 256, 256]` and a round mask of 2 %."""
    picture = torch.from_numpy(product_texture(np.random.default_rng(5), 256)[..., :3].copy()).permute(2, 0, 1).float() / 255
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    checks = ((x // 7 + y // 9) % 2).float()
    picture = 0.5 * picture + 0.5 * checks * torch.tensor([0.9, 0.4, 0.2])[:, None, None]
    return picture, ((y - 120) ** 2 + (x - 100) ** 2 < 20**2).float()


BROKEN = [kind for kind in ARTIFACTS if kind != "recolour"]


@pytest.mark.parametrize("kind", ARTIFACTS)
class TestEach:
    def test_outside_is_untouched(self, printed, kind):
        image, mask = printed
        before = image.clone()
        spoilt = simulate(image, mask, kind, np.random.default_rng(0))
        assert torch.equal(spoilt[:, mask < 0.5], image[:, mask < 0.5])
        assert torch.equal(image, before)
        assert spoilt.dtype == image.dtype and 0 <= spoilt.min() and spoilt.max() <= 1

    def test_same_seed_same_artifact(self, printed, kind):
        image, mask = printed
        first, again, other = (simulate(image, mask, kind, np.random.default_rng(seed)) for seed in (3, 3, 4))
        assert torch.equal(first, again) and not torch.equal(first, other)

    @pytest.mark.parametrize("corner", [(0, 0), (252, 250)])
    def test_tiny_masks_at_the_border(self, printed, kind, corner):
        image, _ = printed
        mask = torch.zeros(256, 256)
        mask[corner[0] : corner[0] + 4, corner[1] : corner[1] + 6] = 1
        spoilt = simulate(image, mask, kind, np.random.default_rng(0))
        assert torch.isfinite(spoilt).all()
        assert torch.equal(spoilt[:, mask < 0.5], image[:, mask < 0.5])


@pytest.mark.parametrize("kind", BROKEN)
def test_detail_is_broken(printed, kind):
    image, mask = printed
    for seed in range(5):
        spoilt = simulate(image, mask, kind, np.random.default_rng(seed))
        assert hp_ssim(spoilt, image, mask) < 0.6
        assert detail_ncc(spoilt, image, mask) < 0.92
        assert masked_psnr(spoilt, image, mask) < 22


@pytest.mark.parametrize("kind", BROKEN)
def test_colours_stay_the_regions_own(printed, kind):
    image, mask = printed
    spoilt = simulate(image, mask, kind, np.random.default_rng(1))
    inside = mask > 0.5
    distance, _ = cKDTree(image[:, inside].T).query(spoilt[:, inside].T)
    assert distance.mean() < 0.15


def test_recolouring_keeps_the_drawing_and_changes_the_colours(printed):
    image, mask = printed
    grey = image.mean(0).expand(3, -1, -1) * 0.6 + 0.2
    for seed in range(5):
        for picture in (image, grey):
            spoilt = simulate(picture, mask, "recolour", np.random.default_rng(seed))
            assert detail_ncc(spoilt, picture, mask) > 0.8
            assert masked_psnr(spoilt, picture, mask) < 20


def test_smear_loses_detail_and_garble_keeps_it(printed):
    image, mask = printed
    inside = torch.from_numpy(ndimage.binary_erosion(mask.numpy(), iterations=5))

    def contrast(picture):
        return float((picture[:, 1:, 1:] - picture[:, :-1, :-1]).abs()[:, inside[1:, 1:]].mean())

    smeared, garbled = (simulate(image, mask, kind, np.random.default_rng(0)) for kind in ("smear", "garble"))
    assert contrast(smeared) < 0.5 * contrast(image) < 0.7 * contrast(garbled)


def test_unknown_kind(printed):
    with pytest.raises(InputError, match="use one of garble, smear, swap, invent, recolour"):
        simulate(*printed, "melt", np.random.default_rng(0))
