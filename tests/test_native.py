import pytest
import torch
from diffusers import DDIMScheduler

from rba_core.alignment import cross_attentions, noise_like
from rba_core.conversion.stable_diffusion import UNET, unet_names
from rba_core.native import LAYERS, inpainting, noise_sigma


def test_layers_are_ours_under_their_names_in_ldm(model):
    ours = {id(layer): name for name, layer in model.unet.named_modules()}
    names = unet_names(model.unet)
    found = [names[f"{ours[id(layer)]}.to_q.weight"].removeprefix(UNET).split(".") for layer in cross_attentions(model.unet)]
    assert [(part.removesuffix("_blocks"), int(number)) if part != "middle_block" else ("middle", 0) for part, number, *_ in found] == LAYERS


def test_sigma_is_that_of_the_library_s_step(make_model):
    model = make_model.__wrapped__()
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="leading", steps_offset=1)  # Stable Diffusion's own
    alphas = model.scheduler.alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    for timestep in (0, 1, 25, 49):
        assert noise_sigma(sigmas, timestep) == sigmas[model.noise_step(timestep)]
    for level in (0.0, 0.3, 0.99, 1.0):
        assert noise_sigma(sigmas, noise_level=level) == sigmas[model.noise_step(0, level)]
    assert noise_sigma(sigmas[19::20], 0) == sigmas[999] and noise_sigma(sigmas[19::20], 49) == sigmas[19]  # a distilled model's fifty


@pytest.mark.parametrize(("given", "message"), [({"timestep": 50}, "^timestep: is 50"), ({"timestep": -1}, "^timestep: is -1"), ({"noise_level": 1.5}, "^noise level: is 1.5")])
def test_noise_out_of_range(given, message):
    with pytest.raises(ValueError, match=message):
        noise_sigma(torch.linspace(0.03, 14.6, 1000), **given)


def test_scaled_for_the_unet_it_is_the_library_s_noising(model):
    latents, step = torch.randn(1, 4, 8, 8), torch.tensor([400])
    noise = noise_like(latents, 3)
    kept = model.scheduler.alphas_cumprod[400]
    sigma = ((1 - kept) / kept).sqrt()
    torch.testing.assert_close((latents + sigma * noise) / (1 + sigma**2).sqrt(), model.add_noise(latents, noise, step))
    assert torch.equal(noise, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)))


@torch.no_grad()
def test_inpainting_is_the_model_s_condition(model, scene):
    picture, mask = scene.image[None, :, :64, :64], scene.mask[None, :64, :64]
    blanked, redrawn = inpainting(picture, mask)
    torch.testing.assert_close(torch.cat([redrawn, model.encode_image(blanked)], 1), model.inpainting_condition(picture, mask[:, None]))
