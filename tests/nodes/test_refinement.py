import sys

import comfy_stand_in
import pytest
import torch

from rba_core.pipeline import Settings, refine_by_align
from rba_core.zoom_crop import zoom_crop


@pytest.fixture
def run(nodes, loaded, inputs, defaults):
    """`run(**changes)`: Refine by Align on the scene, as (refined, matched region)."""

    def refine(**changes):
        node = nodes.refinement.RefineByAlign
        return node.execute(loaded, **(inputs | defaults(node, steps=2) | changes)).args[:2]

    return refine


@pytest.fixture
def run_registered(nodes, loaded, same_product, defaults, monkeypatch):
    """`run_registered(**changes)`: the same where registration succeeds, with the confidence as a third result."""
    inputs = {name: value for name, value in same_product.items() if name != "matched_region"}
    pipeline = sys.modules[nodes.refinement.refine_by_align.__module__]
    region = same_product["matched_region"][0]
    monkeypatch.setattr(pipeline, "find_region", lambda *_: pipeline.MatchedRegion(region, pipeline.Box.around(region), region))

    def refine(**changes):
        node = nodes.refinement.RefineByAlign
        return node.execute(changes.pop("model", loaded), **(inputs | defaults(node, steps=2) | changes)).args

    return refine


@pytest.mark.parametrize("purpose, context", [("refinement", 2.0), ("alignment", 3.0)])
def test_zoom_crop_takes_the_model_s_context(nodes, loaded, scene, inputs, purpose, context):
    crop, mask, box = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], purpose, 0.0).args
    expected = zoom_crop(scene.image, scene.mask, 64, context=context)
    assert torch.equal(crop[0], expected.image.movedim(0, -1)) and torch.equal(mask[0], expected.mask)
    assert nodes.types.boxes_in(box)[0] == nodes.types.Box(expected.box.x, expected.box.y, expected.box.width, expected.box.height)


def test_stitch_changes_nothing_outside_the_mask(nodes, loaded, inputs):
    _, _, box = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "refinement", 0.0).args
    (stitched,) = nodes.refinement.Stitch.execute(inputs["image"], inputs["mask"], torch.rand(1, 33, 33, 3), box, 1.0, 3.0, True).args
    inside = inputs["mask"] > 0.5
    assert torch.equal(stitched[~inside], inputs["image"][~inside])
    assert not torch.equal(stitched[inside], inputs["image"][inside])


def test_stitch_undoes_an_editor_s_drift_before_detail_is_carried_over(nodes, loaded, same_product):
    """The crop comes back whole but shifted and tinted, the collage lies where it belongs."""
    image, mask = same_product["reference"], same_product["mask"]
    crop, crop_mask, box = nodes.refinement.ZoomCrop.execute(loaded, image, mask, "refinement", 0.0).args
    redrawn = 0.95 * crop.roll((2, -1), (1, 2))

    def off(**changes):
        (stitched,) = nodes.refinement.Stitch.execute(image, mask, redrawn, box, 1.0, 1.0, False, **changes).args
        assert torch.equal(stitched[mask < 0.5], image[mask < 0.5])
        return float((stitched - image)[mask > 0.5].abs().mean())

    assert off(drift_correction=True) < 0.2 * off() and off() == off(drift_correction=False)
    collage = {"collage": crop, "crop_mask": crop_mask}
    assert off(drift_correction=True, **collage) < 0.5 * off(**collage)


def test_all_in_one_is_the_library_s(run, model, scene):
    image, region = run(seed=11, steps=0)
    expected = refine_by_align(model, scene.image, scene.mask, scene.reference, scene.reference_mask, seed=11)
    assert torch.equal(image[0].movedim(-1, 0), expected.image)
    assert torch.equal(region[0], expected.regions[0].mask)


def aligned(nodes, loaded, inputs, defaults, levels=2, dense=True):
    """Stage one, node by node, coarse to fine: (matched region, placement)."""
    one, two = nodes.alignment, nodes.refinement
    seen, before = inputs["reference_mask"], {}
    for purpose in ["alignment", *["refinement"] * (levels - 1)]:
        reference = one.EncodeReference.execute(loaded, inputs["reference"], seen)[0]
        crop, crop_mask, box = two.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], purpose, 0.0).args
        raw, attention = one.Align.execute(loaded, crop, crop_mask, reference, **defaults(one.Align)).args
        looking = {"attention": attention, "crop_mask": crop_mask, "bounding_box": box} if dense else {}
        region, _, _, seen, placement = one.PostProcess.execute(raw, reference, **defaults(one.PostProcess), **looking, **before).args
        before = {"matched_region": region, "placement": placement}
    return region, placement


def refined(nodes, loaded, inputs, defaults, region, placement=None, steps=2):
    """Stage two, node by node: (refined, matched region, confidence)."""
    one, two = nodes.alignment, nodes.refinement
    picture, mask, reference = (inputs[name] for name in ("image", "mask", "reference"))
    crop, crop_mask, box = two.ZoomCrop.execute(loaded, picture, mask, "refinement", 0.0).args
    collage, collage_mask, region, guide, confidence, _ = one.Register.execute(
        crop, crop_mask, box, picture, reference, region, reference_mask=inputs["reference_mask"], placement=placement, **defaults(one.Register)
    ).args
    laid = {"collage": collage, "collage_mask": collage_mask}
    matched = one.EncodeReference.execute(loaded, reference, guide)[0]
    redrawn = two.Refine.execute(loaded, crop, crop_mask, matched, **defaults(two.Refine, steps=steps), **laid, confidence=confidence)[0]
    stitched = two.Stitch.execute(picture, mask, redrawn, box, **defaults(two.Stitch), **laid, crop_mask=crop_mask)[0]
    return stitched, region, confidence


@pytest.mark.parametrize("min_agreement", [-1.0, 1.1], ids=["cells agree", "cells do not agree"])
@pytest.mark.parametrize("options", [{}, {"levels": 1}, {"dense": False}, {"dense": False, "levels": 1}], ids=str)
def test_step_by_step_is_the_same_as_all_in_one(nodes, loaded, run, inputs, defaults, monkeypatch, options, min_agreement):
    monkeypatch.setattr(sys.modules[nodes.refinement.refine_by_align.__module__], "MIN_AGREEMENT", min_agreement)
    image, found = run(**options)
    region, placement = aligned(nodes, loaded, inputs, defaults, **options)
    assert (placement[0] is not None) == (min_agreement < 0 and "dense" not in options)
    stitched, region, confidence = refined(nodes, loaded, inputs, defaults, region, placement)
    assert torch.equal(found, region) and torch.equal(image, stitched) and confidence < Settings().min_confidence


@pytest.mark.parametrize("reads_collage", [False, True])
def test_step_by_step_is_the_same_where_it_is_registered(nodes, make_model, run_registered, same_product, defaults, reads_collage):
    cpu = torch.device("cpu")
    model = make_model(6, "v_prediction", collage=True) if reads_collage else make_model()
    loaded = comfy_stand_in.ModelPatcher(nodes.types.RefineByAlignModel(model), cpu, cpu)
    image, found, confidence = run_registered(model=loaded, steps=3)
    stitched, region, same_confidence = refined(nodes, loaded, same_product, defaults, same_product["matched_region"], [None], steps=3)
    assert confidence == same_confidence > 0.8
    assert torch.equal(found, region) and torch.equal(image, stitched)
    assert not torch.equal(region, same_product["matched_region"])


def test_registration_s_settings_reach_the_library(run_registered, same_product):
    image, region, confidence = run_registered()
    assert confidence > 0.8 and not torch.equal(region, same_product["matched_region"])
    for change in ({"register": False}, {"min_confidence": 1.0}, {"detail_transfer": 0.0}):
        changed, aligned, told = run_registered(**change)
        assert told == (confidence if "min_confidence" in change else 0), change
        assert torch.equal(aligned, same_product["matched_region"]) and not torch.equal(changed, image), change
    for change in ({"detail_transfer": 0.5}, {"strength": 1.0}):
        changed, same_region, _ = run_registered(**change)
        assert torch.equal(same_region, region) and not torch.equal(changed, image), change


def test_confidence_is_the_lowest_of_the_batch(run_registered, same_product):
    other = torch.rand(same_product["reference"].shape, generator=torch.Generator().manual_seed(8))
    _, regions, confidence = run_registered(reference=torch.cat([same_product["reference"], other]))
    assert confidence < Settings().min_confidence and torch.equal(regions[1:], same_product["matched_region"])
    assert not torch.equal(regions[:1], same_product["matched_region"])


def test_of_more_references_the_surest_is_taken(run_registered, same_product):
    """The product's own photo among the further ones: the same picture; nothing was found on the first."""
    image, region, confidence = run_registered()
    noise = torch.rand(same_product["reference"].shape, generator=torch.Generator().manual_seed(8))
    both = torch.cat([noise, same_product["reference"]])
    for masks in (None, torch.ones(1, *both.shape[1:3]), torch.ones(2, *both.shape[1:3])):
        found, regions, same_confidence = run_registered(reference=noise, more_references=both, more_reference_masks=masks)
        assert torch.equal(found, image) and same_confidence == confidence and not regions.any()
    found, regions, _ = run_registered(more_references=noise)
    assert torch.equal(found, image) and torch.equal(regions, region)


def test_empty_collage_mask_is_no_collage(nodes, make_model, inputs, defaults):
    cpu = torch.device("cpu")
    loaded = comfy_stand_in.ModelPatcher(nodes.types.RefineByAlignModel(make_model(6, "v_prediction", collage=True)), cpu, cpu)
    crop, crop_mask, box = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "refinement", 0.0).args
    reference = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"])[0]
    laid = {"collage": torch.rand(1, 40, 40, 3), "collage_mask": torch.zeros(1, 40, 40)}

    def redrawn(**collage):
        return nodes.refinement.Refine.execute(loaded, crop, crop_mask, reference, **defaults(nodes.refinement.Refine, steps=2), **collage)[0]

    def stitched(**collage):
        return nodes.refinement.Stitch.execute(inputs["image"], inputs["mask"], crop, box, **defaults(nodes.refinement.Stitch), **collage)[0]

    for of, crop_s in ((redrawn, {}), (stitched, {"crop_mask": crop_mask})):
        assert torch.equal(of(**laid, **crop_s), of())
        assert not torch.equal(of(collage=laid["collage"], **crop_s), of())


def test_collage_needs_the_crop_s_mask(nodes, inputs, defaults):
    arguments = inputs["image"], inputs["mask"], torch.rand(1, 64, 64, 3), {"x": 20, "y": 10, "width": 64, "height": 64}
    with pytest.raises(ValueError, match="^crop mask: is not connected; with a collage, connect the crop mask of Zoom-in Crop too$"):
        nodes.refinement.Stitch.execute(*arguments, **defaults(nodes.refinement.Stitch), collage=torch.rand(1, 64, 64, 3))


def test_collage_of_another_form_is_refused(nodes):
    with pytest.raises(ValueError, match="^collage: is 50 x 40, not square"):
        nodes.types.collages(torch.rand(1, 40, 50, 3), None)
    with pytest.raises(ValueError, match="^collage mask: is 64 x 64, its collage 40 x 40"):
        nodes.types.collages(torch.rand(1, 40, 40, 3), torch.zeros(1, 64, 64))


def test_settings_reach_the_library(nodes, run, monkeypatch):
    paper = {"dense": False, "levels": 1, "register": False}
    image, region = run(**paper)
    for change in ({"seed": 1}, {"steps": 3}, {"guidance": 4.0}, {"scheduler": "euler"}, {"margin": 0.6}, {"context": 4.0}, {"feather": 0.0}, {"colour_match": False}):
        changed, same_region = run(**change, **paper)
        assert not torch.equal(changed, image), change
        assert "seed" in change or torch.equal(same_region, region), change
    for change in ({"layer": 5}, {"timestep": 45}, {"noise_level": 0.05}, {"threshold": 0.9}, {"alignment_context": 1.5}):
        assert not torch.equal(run(**change, **paper, on_flat="single-stage")[1], region), change
    pipeline = sys.modules[nodes.refinement.refine_by_align.__module__]
    monkeypatch.setattr(pipeline, "MIN_AGREEMENT", -1.0)
    monkeypatch.setattr(pipeline, "DISPROVED", 0.0)
    once, twice = run(levels=1)[1], run()[1]
    assert not torch.equal(once, region) and not torch.equal(twice, once) and torch.equal(run(dense=False, register=False)[1], region)


def test_single_stage_matches_the_whole_object(run, inputs):
    assert torch.equal(run(single_stage=True)[1], inputs["reference_mask"])


def test_flat_map(run):
    with pytest.raises(ValueError, match="^alignment: gave a flat map"):
        run(flatness=20.0, layer=5, dense=False)


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


def test_previews_while_sampling(run, monkeypatch):
    run(steps=2)
    assert comfy_stand_in.ProgressBar.made[-1].previews == [None, None]
    monkeypatch.setattr(sys.modules["comfy.cli_args"].args, "preview_method", "auto")
    run(steps=2)
    kinds, pictures, sizes = zip(*comfy_stand_in.ProgressBar.made[-1].previews)
    assert kinds == ("JPEG",) * 2 and sizes == (512,) * 2 and all(picture.size == (8, 8) for picture in pictures)
