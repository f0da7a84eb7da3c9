import pytest
import torch
import torch.nn.functional as F

from rba_core import RefineByAlign
from rba_core.imageio import read_image
from rba_core.latent_preview import LatentPreview
from rba_core.model import PRETRAINED
from rba_core.reference_encoding import encode_reference
from rba_core.refinement import SCHEDULERS, refine
from rba_core.zoom_crop import zoom_crop


@pytest.fixture(scope="module")
def tiny():
    return RefineByAlign.load()


@pytest.fixture(scope="module")
def picture(tiny):
    """A crop of the sample at the model's size."""
    size = tiny.config.image_size
    return read_image(PRETRAINED.parent / "sample" / "image.png").rgb[:, 250 : 250 + size, 220 : 220 + size]


@torch.no_grad()
def test_colours_are_the_picture_s(tiny, picture):
    known = tiny.encode_image(picture[None])
    look = LatentPreview(tiny, known, torch.zeros_like(known[:, :1]), picture)
    shown = look(torch.randn_like(known), torch.randn_like(known), torch.tensor(500))
    small = F.adaptive_avg_pool2d(picture, shown.shape[-2:])
    assert shown.shape == small.shape
    assert (shown - small).abs().mean() < 0.01 < (small - small.mean((1, 2), keepdim=True)).abs().mean()


@torch.no_grad()
def test_colours_that_the_crop_lacks_are_right_too(tiny, picture):
    grey = picture.mean(0, keepdim=True).expand(3, -1, -1).contiguous()
    known = tiny.encode_image(grey[None])
    look = LatentPreview(tiny, known, torch.ones_like(known[:, :1]), grey)
    wanted = torch.tensor([0.9, 0.2, 0.1])[:, None, None].expand_as(grey)
    look.known, look.hole = tiny.encode_image(wanted[None]), torch.zeros_like(known[:, :1])
    shown = look(known, known, torch.tensor(1))
    assert (shown - wanted[:, :1, :1]).abs().max() < 0.1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_noise_is_taken_off(make_model, prediction, scene):
    model = make_model(0, prediction)
    crop = zoom_crop(scene.image, scene.mask, 64)
    known = model.encode_image(crop.image[None])
    look = LatentPreview(model, known, torch.ones_like(known[:, :1]), crop.image)
    noise, timestep = torch.randn(known.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(400)
    level = model.scheduler.alphas_cumprod[timestep]
    target = noise if prediction == "epsilon" else level.sqrt() * noise - (1 - level).sqrt() * known
    shown = look(level.sqrt() * known + (1 - level).sqrt() * noise, target, timestep)
    look.hole = torch.zeros_like(look.hole)
    torch.testing.assert_close(shown, look(noise, noise, timestep), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_looking_changes_nothing(make_model, scene, scheduler):
    model, crop = make_model(), zoom_crop(scene.image, scene.mask, 64)
    reference, seen = encode_reference(model, scene.reference, scene.reference_mask), []
    watched = refine(model, crop, reference, scheduler=scheduler, steps=4, preview=seen.append)
    assert torch.equal(watched, refine(model, crop, reference, scheduler=scheduler, steps=4))
    assert len(seen) == 4 and all(picture.shape == (3, 8, 8) and torch.isfinite(picture).all() for picture in seen)


def test_one_step_is_not_worth_a_look(make_model, scene):
    model, crop = make_model(), zoom_crop(scene.image, scene.mask, 64)
    refine(model, crop, encode_reference(model, scene.reference, scene.reference_mask), steps=1, preview=pytest.fail)
