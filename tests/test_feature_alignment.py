from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from pictures import texture
from transformers import Dinov2Config, Dinov2Model

from rba_core.bench.metrics import iou
from rba_core.dense_correspondence import place
from rba_core.errors import InputError
from rba_core.feature_alignment import CROP, FINEST, REFERENCE, Dift, FeatureAligner, combined, model_aligner, mutual_softmax, patch_features
from rba_core.geometry import Box
from rba_core.model import imagenet_normalised
from rba_core.pipeline import carried
from rba_core.zoom_crop import ZoomCrop

SIZE, SHIFT = 256, 64
"""The shift is one that the small U-Net, whose coarsest cells cover 64 pixels, can express: untrained, it knows no part of a cell."""


class Pooling:
    """An autoencoder that takes means over 8 x 8 pixels: what an untrained one makes of a picture is mostly the picture's border."""

    config = SimpleNamespace(scaling_factor=1.0)

    def encode(self, pixels):
        means = F.avg_pool2d(pixels, 8)
        means = (means - means.mean((2, 3), keepdim=True)) / means.std((2, 3), keepdim=True)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.cat([means, means.mean(1, keepdim=True)], 1)))


def small_unet(**options):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=[16, 16, 32, 32], layers_per_block=1, cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8,
        **options,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def make_dift():
    unet, scheduler = small_unet(), DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    return partial(Dift, Pooling(), unet, scheduler, torch.zeros(1, 7, 32), SIZE, timestep=20, ensemble=2)


@pytest.fixture(scope="module")
def patches():
    """An untrained DINOv2 on 32 x 32 patches, finer than its position embedding's 16 x 16."""
    torch.manual_seed(0)
    encoder = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)).eval()
    return patch_features(lambda pixels: encoder(imagenet_normalised(pixels)).last_hidden_state[:, 1:], 32 * 14)


@pytest.fixture(scope="module")
def shifted():
    """A crop, and a reference that shows the same further to the left: (crop, reference, what lies under the mask there)."""
    picture = texture(SIZE, SIZE + SHIFT)
    mask, wanted = torch.zeros(SIZE, SIZE), torch.zeros(SIZE, SIZE)
    mask[90:150, 110:180] = wanted[90:150, 110 - SHIFT : 180 - SHIFT] = 1
    return ZoomCrop(picture[:, :, :SIZE], mask, Box(0, 0, SIZE, SIZE)), picture[:, :, SHIFT:], wanted


@pytest.mark.parametrize("kind", ["patches", "diffusion", "both"])
def test_a_shifted_copy_is_found_at_the_shift(make_dift, patches, shifted, kind):
    dift = make_dift(up_block=2)
    aligner = FeatureAligner({"patches": patches, "diffusion": dift, "both": combined(dift, patches)}[kind])
    crop, reference, wanted = shifted
    seen = aligner.encode(reference, torch.ones(SIZE, SIZE))
    attention = aligner.attend(crop, seen)
    assert attention.shape == (32**2, 32**2) and seen.tokens == 32
    assert torch.allclose(attention.sum(1), torch.ones(32**2), atol=1e-5)
    assert iou(carried(crop.mask, place(attention, crop, seen.box), seen.mask).mask, wanted) > 0.85


def test_the_reference_keeps_its_aspect_and_its_background_is_not_looked_at(patches, shifted):
    wide = torch.zeros(SIZE, SIZE)
    wide[100:164, 40:240] = 1
    aligner = FeatureAligner(patches)
    seen = aligner.encode(shifted[1], wide)
    assert seen.box == Box(40, 32, 200, 200)
    looked = aligner.attend(shifted[0], seen).sum(0).view(32, 32)
    assert looked[:9].sum() == looked[23:].sum() == 0 and (looked[12:20] > 0).all()


def test_a_key_that_all_are_like_does_not_take_all():
    query = F.one_hot(torch.arange(4), 6).float()
    key = torch.cat([query, query.mean(0, keepdim=True) * 3])
    query[:, :4] += 0.8  # all now like the last key best
    everything = torch.ones(5, dtype=torch.bool)
    plain = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / 0.1).softmax(-1)
    attention = mutual_softmax(query, key, everything, 0.1)
    assert (plain.argmax(1) == 4).all() and (attention.argmax(1) == torch.arange(4)).all()
    assert torch.allclose(attention.sum(1), torch.ones(4))
    assert mutual_softmax(query, key, everything & (torch.arange(5) != 2), 0.1)[:, 2].sum() == 0


def test_grids_finer_than_the_finest_are_averaged(shifted):
    aligner = FeatureAligner(lambda picture, which: F.interpolate(picture[None], (FINEST + 10,) * 2)[0])
    assert aligner.encode(shifted[1], torch.ones(SIZE, SIZE)).tokens == FINEST


def test_crop_and_reference_get_noises_of_their_own_and_a_seed_gives_the_same(make_dift, shifted):
    picture = shifted[1]
    first = make_dift()(picture, CROP)
    assert torch.equal(first, make_dift()(picture, CROP))
    assert not torch.equal(first, make_dift()(picture, REFERENCE)) and not torch.equal(first, make_dift(seed=1)(picture, CROP))


def test_dift_is_the_mean_over_noises_of_the_block_and_nothing_after_it_runs(make_dift, shifted):
    dift, told = make_dift(ensemble=3, up_block=1), []
    ran = []
    handle = dift.unet.up_blocks[2].register_forward_hook(lambda *_: ran.append(1))
    try:
        features = make_dift(ensemble=3, up_block=1, progress=lambda done, total: told.append((done, total)))(shifted[1], CROP)
    finally:
        handle.remove()
    assert told == [(1, 3), (2, 3), (3, 3)] and not ran and features.shape == (32, 16, 16)
    generator = torch.Generator().manual_seed(0)
    latents = dift.vae.encode(shifted[1][None] * 2 - 1).latent_dist.mode()
    single = [dift.noisy_features(latents, torch.randn(latents.shape, generator=generator)) for _ in range(3)]
    assert torch.allclose(features, torch.stack(single).mean(0), atol=1e-5)


def test_a_u_net_with_further_conditions_as_sdxl_s_is_read(make_dift, shifted):
    unet = small_unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16)
    conditions = {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}}
    dift = Dift(Pooling(), unet, make_dift().scheduler, torch.zeros(1, 7, 32), SIZE, ensemble=1, conditions=conditions)
    assert dift(shifted[1], CROP).shape == (32, 16, 16)


def test_what_cannot_be_is_refused(make_dift, patches, shifted):
    with pytest.raises(InputError, match="up block"):
        make_dift(up_block=4)(shifted[1], CROP)
    with pytest.raises(InputError, match="ensemble"):
        make_dift(ensemble=0)(shifted[1], CROP)
    with pytest.raises(InputError, match="weight"):
        combined(make_dift(), patches, 1.5)


def test_the_model_s_own_encoder_aligns_on_as_many_tokens_as_asked(model, scene):
    for tokens in (16, 20):
        assert model_aligner(model, tokens).encode(scene.reference, scene.reference_mask).tokens == tokens
