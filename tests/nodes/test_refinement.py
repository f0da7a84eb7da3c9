import sys

import comfy_stand_in
import pytest
import torch

from rba_core.pipeline import refine_by_align
from rba_core.zoom_crop import zoom_crop


@pytest.fixture
def run(nodes, loaded, inputs, defaults):
    """`run(**changes)`: Refine by Align on the scene, as (refined, matched region)."""

    def refine(**changes):
        node = nodes.refinement.RefineByAlign
        return node.execute(loaded, **(inputs | defaults(node, steps=2) | changes)).args

    return refine


@pytest.mark.parametrize("purpose, context", [("refinement", 2.0), ("alignment", 3.0)])
def test_zoom_crop_takes_the_model_s_context(nodes, loaded, scene, inputs, purpose, context):
    crop, mask, box = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], purpose, 0.0).args
    expected = zoom_crop(scene.image, scene.mask, 64, context=context)
    assert torch.equal(crop[0], expected.image.movedim(0, -1)) and torch.equal(mask[0], expected.mask)
    assert nodes.types.boxes_in(box)[0] == nodes.types.Box(expected.box.x, expected.box.y, expected.box.width, expected.box.height)


def test_stitch_changes_nothing_outside_the_mask(nodes, loaded, inputs):
    _, _, box = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "refinement", 0.0).args
    (stitched,) = nodes.refinement.Stitch.execute(inputs["image"], inputs["mask"], torch.rand(1, 33, 33, 3), box, 3.0, True).args
    inside = inputs["mask"] > 0.5
    assert torch.equal(stitched[~inside], inputs["image"][~inside])
    assert not torch.equal(stitched[inside], inputs["image"][inside])


def test_all_in_one_is_the_library_s(run, model, scene):
    image, region = run(seed=11, steps=0)
    expected = refine_by_align(model, scene.image, scene.mask, scene.reference, scene.reference_mask, seed=11)
    assert torch.equal(image[0].movedim(-1, 0), expected.image)
    assert torch.equal(region[0], expected.regions[0].mask)


def test_step_by_step_is_the_same_as_all_in_one(nodes, loaded, run, inputs, defaults):
    steps = nodes.alignment, nodes.refinement
    whole = steps[0].EncodeReference.execute(loaded, inputs["reference"], inputs["reference_mask"])[0]
    crop, crop_mask, _ = steps[1].ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "alignment", 0.0).args
    raw = steps[0].Align.execute(loaded, crop, crop_mask, whole, **defaults(steps[0].Align))[0]
    region, guide, _ = steps[0].PostProcess.execute(raw, whole, **defaults(steps[0].PostProcess)).args
    matched = steps[0].EncodeReference.execute(loaded, inputs["reference"], guide)[0]
    crop, crop_mask, box = steps[1].ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "refinement", 0.0).args
    redrawn = steps[1].Refine.execute(loaded, crop, crop_mask, matched, **defaults(steps[1].Refine, steps=2))[0]
    stitched = steps[1].Stitch.execute(inputs["image"], inputs["mask"], redrawn, box, **defaults(steps[1].Stitch))[0]
    image, found = run()
    assert torch.equal(found, region) and torch.equal(image, stitched)


def test_settings_reach_the_library(run):
    image, region = run()
    for change in ({"seed": 1}, {"steps": 3}, {"guidance": 4.0}, {"scheduler": "euler"}, {"margin": 0.6}, {"context": 4.0}, {"feather": 0.0}, {"colour_match": False}):
        changed, same_region = run(**change)
        assert not torch.equal(changed, image), change
        assert "seed" in change or torch.equal(same_region, region), change
    for change in ({"layer": 5}, {"timestep": 45}, {"noise_level": 0.05}, {"threshold": 0.9}, {"alignment_context": 1.5}):
        assert not torch.equal(run(**change, on_flat="single-stage")[1], region), change


def test_single_stage_matches_the_whole_object(run, inputs):
    assert torch.equal(run(single_stage=True)[1], inputs["reference_mask"])


def test_flat_map(run):
    with pytest.raises(ValueError, match="^alignment: gave a flat map"):
        run(flatness=20.0, layer=5)


def test_alpha_and_overshoot_outside_the_mask_stay(run, inputs):
    image = torch.cat([inputs["image"] * 1.1 - 0.05, torch.rand(1, 96, 130, 1)], -1)
    refined, _ = run(image=image)
    outside = inputs["mask"] < 0.5
    assert refined.shape == image.shape
    assert torch.equal(refined[outside], image[outside]) and torch.equal(refined[..., 3], image[..., 3])


def test_half_precision_images_stay_so(run, inputs):
    refined, _ = run(image=inputs["image"].half())
    outside = inputs["mask"] < 0.5
    assert refined.dtype == torch.float16 and torch.equal(refined[outside], inputs["image"].half()[outside])


def test_parts_that_lie_apart_are_joined_in_one_region(run, inputs):
    two = inputs["mask"].clone()
    two[:, 80:90, 5:14] = 1
    image, region = run(mask=two)
    assert set(region.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(image[two > 0.5], inputs["image"][two > 0.5])


def test_batch_is_the_same_as_one_by_one(run, inputs):
    images = torch.cat([inputs["image"], inputs["image"].flip(1)])
    masks = torch.cat([inputs["mask"], inputs["mask"].roll(4, 1)])
    refined, regions = run(image=images, mask=masks)
    for index in range(2):
        alone, region = run(image=images[index : index + 1], mask=masks[index : index + 1])
        assert torch.equal(refined[index], alone[0]) and torch.equal(regions[index], region[0])


def test_one_mask_for_all_images(run, inputs):
    refined, _ = run(image=inputs["image"].repeat(2, 1, 1, 1))
    assert torch.equal(refined[0], refined[1])


def test_counts_that_do_not_pair(run, inputs):
    with pytest.raises(ValueError, match="^reference: has 2 in its batch, image has 3"):
        run(image=inputs["image"].repeat(3, 1, 1, 1), reference=inputs["reference"].repeat(2, 1, 1, 1))


def test_empty_mask(run, inputs):
    with pytest.raises(ValueError, match="^mask: is empty"):
        run(mask=torch.zeros(1, 64, 64))


def test_inputs_are_left_alone(run, inputs):
    before = {name: value.clone() for name, value in inputs.items()}
    run()
    assert all(torch.equal(inputs[name], before[name]) for name in before)


def test_progress_and_cancel(run, monkeypatch):
    run(steps=4)
    bar = comfy_stand_in.ProgressBar.made[-1]
    assert bar.updates == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def interrupted():
        if len(comfy_stand_in.ProgressBar.made[-1].updates) == 2:
            raise comfy_stand_in.InterruptProcessingException

    monkeypatch.setattr(sys.modules["comfy.model_management"], "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy_stand_in.InterruptProcessingException):
        run(steps=4)
    assert len(comfy_stand_in.ProgressBar.made[-1].updates) == 2
