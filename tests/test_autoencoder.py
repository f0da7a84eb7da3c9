import pytest
import torch

from rba_core.autoencoder import BlockAutoencoder, block_basis


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_with_every_coefficient_kept_nothing_is_lost(pictures):
    whole = BlockAutoencoder(luma=64, chroma=64, width=4, latent_channels=192)
    with torch.no_grad():
        latents = whole.encode(pictures).latent_dist.mode()
        assert latents.shape == (3, 192, 4, 6)
        assert torch.allclose(whole.decode(latents).sample, pictures, atol=1e-4)


def test_a_flat_picture_survives_with_the_lowest_coefficients_alone():
    smallest = BlockAutoencoder(luma=1, chroma=1, width=4, latent_channels=3)
    flat = torch.tensor([0.7, -0.2, 0.1])[None, :, None, None].expand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(smallest.decode(smallest.encode(flat).latent_dist.mode()).sample, flat, atol=1e-4)


def test_latents_of_a_block_depend_on_that_block_alone(pictures):
    model = BlockAutoencoder()
    changed = pictures.clone()
    changed[:, :, 8:16, 24:32] *= -1
    with torch.no_grad():
        difference = (model.encode(pictures).latent_dist.mode() - model.encode(changed).latent_dist.mode()).abs().amax((0, 1))
    assert difference[1, 3] > 0
    difference[1, 3] = 0
    assert (difference == 0).all()


def test_there_is_nothing_random_in_it(pictures):
    latents = BlockAutoencoder().encode(pictures).latent_dist
    assert torch.equal(latents.mode(), latents.sample())


def test_the_basis_is_orthogonal_within_a_plane_and_starts_with_the_mean():
    basis = block_basis(8, 15, 3)
    assert basis.shape == (21, 3, 8, 8)
    luma = basis[:15].flatten(1)
    products = luma @ luma.T
    assert torch.allclose(products, torch.diag(products.diagonal()), atol=1e-5)
    assert all(float(plane.std()) < 1e-6 for plane in basis[0])


def test_fitted_scales_bring_the_channels_together_and_leave_the_reconstruction_alone(pictures):
    coloured = pictures.cumsum(-1) / 10  # strong low frequencies, as photos have
    model = BlockAutoencoder()
    with torch.no_grad():
        before = model.encode(coloured).latent_dist.mode()
        decoded = model.decode(before).sample
        model.fit_scale(coloured)
        after = model.encode(coloured).latent_dist.mode()
        assert torch.allclose(model.decode(after).sample, decoded, atol=1e-4)
    spread = [latents.std((0, 2, 3)) for latents in (before, after)]
    assert float(spread[1].square().mean()) == pytest.approx(1, rel=1e-3)
    assert spread[1].max() / spread[1].min() < spread[0].max() / spread[0].min()


def test_latent_channels_must_add_up():
    with pytest.raises(ValueError, match="latent_channels is 20, luma \\+ 2 chroma 21"):
        BlockAutoencoder(latent_channels=20)
