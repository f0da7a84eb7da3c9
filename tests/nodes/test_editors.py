from dataclasses import replace

import comfy_stand_in
import pytest
import torch

from rba_core.editing import find_match, reference_crop, stitcher
from rba_core.pipeline import Settings
from rba_core.zoom_crop import zoom_crop


@pytest.fixture
def find(nodes, loaded, inputs, defaults, monkeypatch):
    """`find(**changes)`: Find Matching Region without the registration, which takes its time where there is nothing to register."""
    node, editors = nodes.editors.FindRegion, nodes.editors
    found = editors.find_match
    monkeypatch.setattr(editors, "find_match", lambda *given, settings, seed: found(*given, settings=replace(settings, register=False), seed=seed))
    return lambda **changes: node.execute(changes.pop("model", loaded), **(inputs | defaults(node, **changes))).args


def test_find_region_is_the_library_s(find, model, scene):
    region, confidence = find(seed=2)
    expected = find_match(model, scene.image, scene.mask, scene.reference, scene.reference_mask, settings=Settings(register=False), seed=2)
    assert torch.equal(region[0], expected.region.mask) and confidence == 0


def test_find_region_of_a_flat_map_is_all_of_the_object(find, nodes, make_model, scene):
    cpu = torch.device("cpu")
    flat = comfy_stand_in.ModelPatcher(nodes.types.RefineByAlignModel(make_model(0, "epsilon", 1.0)), cpu, cpu)
    with pytest.raises(ValueError, match="flat"):
        find(model=flat)
    region, confidence = find(model=flat, on_flat="single-stage")
    assert torch.equal(region[0], scene.reference_mask) and confidence == 0


def test_editor_crop_and_stitch_there_and_back(nodes, scene, inputs, defaults):
    node = nodes.editors.EditorCrop
    crop, mask, box, _ = node.execute(inputs["image"], inputs["mask"], **defaults(node, size=256)).args
    expected = zoom_crop(scene.image, scene.mask, 256, context=2.0)
    assert torch.equal(crop[0].movedim(-1, 0), expected.image) and torch.equal(mask[0], expected.mask)
    (stitched,) = nodes.refinement.Stitch.execute(inputs["image"], inputs["mask"], torch.zeros_like(crop), box, 1.0, 1.0, False).args
    assert torch.equal(stitched[inputs["mask"] < 0.5], inputs["image"][inputs["mask"] < 0.5])
    assert stitched[0, 32:48, 43:68].max() == 0


def test_the_stitcher_is_a_list_over_the_batch(nodes, scene, inputs, defaults):
    node = nodes.editors.EditorCrop
    other = torch.zeros(1, 96, 130)
    other[:, 60:70, 10:20] = 1
    _, _, boxes, together = node.execute(inputs["image"].repeat(2, 1, 1, 1), torch.cat([inputs["mask"], other]), **defaults(node, size=64)).args
    for index, (box, mask) in enumerate(zip(nodes.types.boxes_in(boxes), (scene.mask, other[0]))):
        expected = stitcher(scene.image, mask, nodes.types.Box(box.x, box.y, box.width, box.height))
        for key, value in expected.items():
            assert torch.equal(together[key][index], value) if torch.is_tensor(value) else together[key][index] == value
    assert {"downscale_algorithm", "upscale_algorithm", "blend_pixels"} < set(together)


def test_size_0_keeps_the_largest_crop_s_own(nodes, inputs, defaults):
    node = nodes.editors.EditorCrop
    masks = torch.zeros(2, 96, 130)
    masks[0, 30:50, 41:70] = masks[1, 60:65, 10:15] = 1
    crop, *_ = node.execute(inputs["image"], masks, **defaults(node, size=0)).args
    assert crop.shape == (2, 64, 64, 3)


def test_reference_crop_is_the_library_s(nodes, scene, inputs, defaults):
    node = nodes.editors.ReferenceCrop
    region = torch.zeros(1, 81, 101)
    region[:, 30:40, 50:70] = 1
    crop, mask, box = node.execute(inputs["reference"], region, **defaults(node, size=64, background="grey"), reference_mask=inputs["reference_mask"]).args
    expected = reference_crop(scene.reference, region[0], 64, background=0.5, object_mask=scene.reference_mask)
    assert torch.equal(crop[0].movedim(-1, 0), expected.image) and torch.equal(mask[0], expected.mask)
    assert box == {"x": 40, "y": 15, "width": 40, "height": 40}
