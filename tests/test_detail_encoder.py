"""The detail encoder's hint, and a model with one in both stages. Its forward pass: tests/conversion/test_anydoor.py."""

import copy
from dataclasses import replace

import pytest
import torch
from pictures import texture

from rba_core.alignment import attend, attention_at, noised, over_patches
from rba_core.bench.grid_search import attend_everywhere
from rba_core.detail_map import high_frequency_map, make_hint
from rba_core.errors import InputError
from rba_core.pipeline import Settings, refine_by_align
from rba_core.reference_encoding import encode_reference
from rba_core.refinement import refine
from rba_core.training import train
from rba_core.zoom_crop import crop_for


def test_the_map_is_opencvs():
    """Step for step; of a mask at the border too, which OpenCV does not erode from there."""
    cv2 = pytest.importorskip("cv2")
    picture = (texture(256, 256) * 255).round() / 255
    mask = torch.zeros(256, 256)
    mask[0:200, 30:256] = 1
    mask[100:103, 60:90] = 0
    bytes_ = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    eroded = cv2.erode(mask.byte().numpy(), torch.ones(5, 5).byte().numpy(), iterations=2)
    across, down = (cv2.convertScaleAbs(cv2.Sobel(bytes_, cv2.CV_64F, *order, ksize=3)) for order in ((1, 0), (0, 1)))
    edges = torch.from_numpy(cv2.addWeighted(across, 0.5, down, 0.5, 0).max(-1) * eroded)
    edges = torch.where(edges < 50, 0, edges)
    expected = (edges[..., None].float() / 255 * torch.from_numpy(bytes_).float()).byte().permute(2, 0, 1)
    found = high_frequency_map(picture, mask)
    assert found.shape == (3, 256, 256) and 0.05 < (expected > 0).float().mean() < 0.9
    assert torch.equal((found * 255).round().byte(), expected)
    assert expected[:, 0].any() and not expected[:, 196:].any()


def test_a_map_of_another_size_is_made_at_256():
    map_ = high_frequency_map(texture(224, 224), torch.ones(224, 224))
    assert map_.shape == (3, 256, 256) and 0 < map_.amax() <= 1
    assert not high_frequency_map(torch.full((3, 224, 224), 0.4), torch.ones(224, 224)).any()


def test_the_hint_is_the_crop_with_the_map_in_the_masks_box_and_the_mask_in_its_form():
    image, mask, detail = texture(64, 64), torch.zeros(64, 64), torch.full((3, 256, 256), 0.75)
    mask[20:40, 10:40] = 1
    mask[20:30, 10:20] = 0
    hint = make_hint(image, mask, detail)
    assert hint.shape == (4, 64, 64) and torch.equal(hint[3], mask)
    box = torch.zeros(64, 64, dtype=torch.bool)
    box[19:41, 9:42] = True  # 22 x 33: 1.1 times its sides
    assert torch.equal(hint[:3, ~box], (image * 2 - 1)[:, ~box]) and torch.allclose(hint[:3, box], torch.tensor(0.5))
    blank = make_hint(image, mask)
    assert (blank[:3, box] == -1).all() and torch.equal(blank[:, ~box], hint[:, ~box])
    mask[0, 0] = mask[63, 63] = 1  # a box that reaches over the border
    assert make_hint(image, mask, detail).shape == (4, 64, 64)


def test_attention_over_patches():
    attention = torch.rand(16, 257).softmax(-1)
    patches = over_patches(attention)
    assert patches.shape == (16, 256) and torch.allclose(patches.sum(1), torch.ones(16))
    assert torch.allclose(patches, attention[:, 1:] / (1 - attention[:, :1]))
    assert over_patches(patches) is patches


def test_a_reference_carries_its_map_and_all_tokens(anydoor, scene):
    encoded = encode_reference(anydoor, scene.reference, scene.reference_mask)
    assert encoded.embedding.shape == (1, 257, 64) and encoded.tokens == 16
    assert encoded.box.width == encoded.box.height == round(1.2 * 85)
    assert encoded.detail.shape == (3, 256, 256) and encoded.detail.any() and not encoded.detail[:, :, :20].any()  # the margin


@torch.no_grad()
def test_alignment_sees_no_map_but_the_crop_beside_the_mask(anydoor, scene):
    crop = crop_for(anydoor, scene.image, scene.mask, 3.0)
    encoded = encode_reference(anydoor, scene.reference, scene.reference_mask)
    attention = attend(anydoor, crop, encoded)
    assert attention.shape[1] == 256 and torch.allclose(attention.sum(1), torch.ones(len(attention)), atol=1e-5)
    assert torch.equal(attend(anydoor, crop, replace(encoded, detail=None)), attention)
    step = anydoor.noise_step(0)
    whole = attention_at(anydoor.unet, 9, noised(anydoor, crop, step, 0), step, encoded.embedding)
    assert whole.shape[1] == 257 and torch.allclose(whole[:, 1:] / whole[:, 1:].sum(1, keepdim=True), attention, atol=1e-6)
    assert torch.allclose(attend_everywhere(anydoor, crop, encoded, 0)[9], attention, atol=1e-6)
    # z_t does not reach the detail encoder, the hint does
    beside = replace(crop, image=torch.where(crop.mask > 0.5, crop.image, 1 - crop.image))
    hints = [anydoor.inpainting_condition(other.image[None], other.mask[None, None]) for other in (crop, beside)]
    assert hints[0].shape == (1, 256, 8, 8) and not torch.equal(*hints)
    assert not torch.allclose(attend(anydoor, beside, encoded), attention, atol=1e-4)


def test_refinement_follows_map_and_tokens_and_holds_guidance_against_a_black_picture(anydoor, scene):
    crop = crop_for(anydoor, scene.image, scene.mask, 2.0)
    encoded = encode_reference(anydoor, scene.reference, scene.reference_mask)
    seen = []
    handle = anydoor.detail_encoder.register_forward_pre_hook(lambda module, args: seen.append(args))
    try:
        redrawn = refine(anydoor, crop, encoded)
    finally:
        handle.remove()
    assert len(seen) == 2 and redrawn.shape == (3, 64, 64)
    for hint, _, context in seen:
        assert torch.equal(hint[0], hint[1]) and torch.allclose(hint[0], make_hint(crop.image, crop.mask, encoded.detail))
        assert torch.equal(context[1:], encoded.embedding) and torch.allclose(context[:1], anydoor.embed(torch.zeros(1, 3, 224, 224)), atol=1e-5)
    assert not torch.allclose(refine(anydoor, crop, replace(encoded, detail=None)), redrawn, atol=1e-4)
    assert not torch.allclose(refine(anydoor, crop, replace(encoded, embedding=-encoded.embedding)), redrawn, atol=1e-5)


@pytest.mark.parametrize("settings", [Settings(), Settings(dense=False, levels=1, register=False), Settings(single_stage=True)], ids=["detail", "paper", "single stage"])
def test_both_stages_change_nothing_outside_the_mask(anydoor, scene, settings):
    settings = replace(settings, on_flat="single-stage")
    refined = refine_by_align(anydoor, scene.image, scene.mask, scene.reference, scene.reference_mask, settings=settings)
    assert torch.equal(refined.image[:, scene.mask < 0.5], scene.image[:, scene.mask < 0.5])
    assert not torch.equal(refined.image, scene.image)
    if not settings.single_stage:
        assert refined.regions[0] is not None
    again = refine_by_align(copy.deepcopy(anydoor), scene.image, scene.mask, scene.reference, scene.reference_mask, settings=settings)
    assert torch.equal(again.image, refined.image)


def test_half_precision(anydoor, scene):
    model = copy.deepcopy(anydoor).to(torch.bfloat16)
    refined = refine_by_align(model, scene.image, scene.mask, scene.reference, scene.reference_mask, settings=Settings(on_flat="single-stage", levels=1, steps=1))
    assert refined.image.dtype == torch.float32 and refined.image.isfinite().all()


def test_it_is_not_trained(anydoor, tmp_path):
    anydoor.save(tmp_path / "model")
    for plan in ({"init": {"model": str(tmp_path / "model")}}, {"model": "anydoor"}):
        with pytest.raises(InputError, match="has a detail encoder, which no leg trains"):
            train.build(plan)
