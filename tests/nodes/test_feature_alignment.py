"""Aligning by features over the stand-in; the native networks are in tests/nodes/test_native_features.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from rba_core.alignment import correspondence
from rba_core.feature_alignment import model_aligner
from rba_core.geometry import Box
from rba_core.zoom_crop import ZoomCrop


def clip_vision(model_type="dinov2"):
    """Patches that are their own mean colours, behind a class token."""

    def network(pixel_values):
        means = F.avg_pool2d(pixel_values, 14).flatten(2).mT
        return torch.cat([torch.zeros_like(means[:, :1]), means], 1), None, None, None

    return SimpleNamespace(model=network, model_type=model_type, image_mean=[0.5] * 3, image_std=[0.2] * 3, patcher=None, load_device="cpu")


@pytest.fixture
def align(nodes, inputs, zoomed, defaults):
    node = nodes.feature_alignment.AlignDINOv2

    def run(**changes):
        given = {"crop": zoomed[0], "crop_mask": zoomed[1], "reference": inputs["reference"], "reference_mask": inputs["reference_mask"]}
        return node.execute(**(defaults(node) | given | changes)).args

    return run


def test_a_clip_vision_s_patches_align_and_post_process_takes_them(nodes, align, inputs, zoomed, defaults):
    raw, attention, grid = align(clip_vision=clip_vision())
    assert raw.shape == (1, 37, 37) and attention[0].shape == (37**2, 37**2) and torch.isclose(raw.sum(), torch.tensor(1.0))
    post = nodes.alignment.PostProcess
    region, _, _, near, _ = post.execute(raw, grid, attention=attention, crop_mask=zoomed[1], bounding_box=zoomed[2], **defaults(post)).args
    assert region.shape == near.shape == inputs["reference_mask"].shape and (region <= inputs["reference_mask"]).all() and region.any()
    assert align(clip_vision=clip_vision(), reference_mask=near)[2][0]["box"] != grid[0]["box"]


def test_the_encoder_of_a_model_aligns_as_in_the_library(align, loaded, model, scene, zoomed):
    raw, attention, _ = align(model=loaded)
    aligner, crop = model_aligner(model), ZoomCrop(zoomed[0][0].movedim(-1, 0), zoomed[1][0], Box(0, 0, 64, 64))
    expected = aligner.attend(crop, aligner.encode(scene.reference, scene.reference_mask))
    assert torch.equal(attention[0], expected) and torch.equal(raw[0], correspondence(expected, crop.mask))
    assert torch.equal(align(model=loaded, temperature=0.05)[1][0], expected) and not torch.equal(align(model=loaded, temperature=0.02)[1][0], expected)


def test_refine_crop_does_not_read_the_grid(nodes, align, loaded, zoomed, defaults):
    grid = align(model=loaded)[2]
    with pytest.raises(nodes.types.InputError, match="reference: was encoded by another model"):
        nodes.refinement.Refine.execute(loaded, zoomed[0], zoomed[1], grid, **defaults(nodes.refinement.Refine))


def test_a_batch_is_aligned_item_by_item_and_told(nodes, align, zoomed):
    raw, attention, grid = align(clip_vision=clip_vision(), tokens=16, crop=torch.cat([zoomed[0], zoomed[0].flip(2)]), crop_mask=zoomed[1])
    assert len(raw) == len(attention) == len(grid) == 2 and not torch.equal(attention[0], attention[1])
    assert nodes.types.comfy.utils.ProgressBar.made[-1].updates == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("changes, match", [
    ({}, "clip vision: is not connected"),
    ({"clip_vision": clip_vision("clip_vision_model")}, "clip vision: is not DINOv2"),
    ({"clip_vision": clip_vision(), "crop": torch.rand(1, 64, 80, 3), "crop_mask": torch.ones(1, 64, 80)}, "crop: is 80 x 64, not square"),
    ({"clip_vision": clip_vision(), "crop_mask": torch.ones(1, 32, 32)}, "crop mask: is 32 x 32"),
])  # fmt: skip
def test_what_does_not_fit_is_an_error(nodes, align, changes, match):
    with pytest.raises(nodes.types.InputError, match=match):
        align(**changes)


def test_a_model_without_up_blocks_is_refused(nodes, inputs, zoomed, defaults):
    node = nodes.feature_alignment.AlignDIFT
    transformer = SimpleNamespace(get_model_object=lambda name: torch.nn.Linear(1, 1))
    with pytest.raises(nodes.types.InputError, match="model: is no U-Net"):
        node.execute(**(defaults(node) | {"model": transformer, "vae": None, "crop": zoomed[0], "crop_mask": zoomed[1], "reference": inputs["reference"]}))
