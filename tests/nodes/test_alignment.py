import pytest
import torch

from rba_core.alignment import align
from rba_core.geometry import Box
from rba_core.pipeline import Settings, grow, register
from rba_core.postprocessing import MatchedRegion, clean
from rba_core.reference_encoding import encode_reference
from rba_core.zoom_crop import zoom_crop


@pytest.fixture
def whole(nodes, loaded, inputs):
    return nodes.alignment.EncodeReference.execute(loaded, inputs["reference"], inputs["reference_mask"])[0]


def peaked_map():
    raw = torch.full((1, 16, 16), 0.001)
    raw[0, 5:8, 8:11] = 0.08
    return raw / raw.sum()


def test_encode_is_the_library_s(nodes, loaded, model, scene, whole):
    expected = encode_reference(model, scene.reference, scene.reference_mask)
    assert torch.equal(whole[0]["embedding"], expected.embedding)


def test_no_mask_encodes_the_whole_picture(nodes, loaded, model, scene, inputs):
    (reference,) = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"])[0]
    assert torch.equal(reference["embedding"], encode_reference(model, scene.reference, torch.ones_like(scene.reference_mask)).embedding)


def test_one_picture_with_several_masks(nodes, loaded, inputs):
    masks = torch.cat([inputs["reference_mask"], torch.ones_like(inputs["reference_mask"])])
    encoded = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"], masks)[0]
    assert len(encoded) == 2 and encoded[0]["box"] != encoded[1]["box"]


def test_align_is_the_library_s(nodes, loaded, model, scene, inputs, whole, defaults):
    crop, crop_mask, _ = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "alignment", 0.0).args
    (raw,) = nodes.alignment.Align.execute(loaded, crop, crop_mask, whole, **defaults(nodes.alignment.Align, seed=3)).args
    expected = align(model, zoom_crop(scene.image, scene.mask, 64, context=model.config.alignment_context), encode_reference(model, scene.reference, scene.reference_mask), seed=3)
    assert raw.shape == (1, 16, 16) and torch.equal(raw[0], expected)


def test_align_settings_reach_the_library(nodes, loaded, inputs, whole, defaults):
    crop, crop_mask, _ = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "alignment", 0.0).args

    def raw(**changes):
        return nodes.alignment.Align.execute(loaded, crop, crop_mask, whole, **defaults(nodes.alignment.Align, **changes))[0]

    as_it_is = raw()
    for change in ({"layer": 5}, {"timestep": 40}, {"noise_level": 0.1}, {"seed": 1}):
        assert not torch.equal(raw(**change), as_it_is), change
    assert torch.equal(raw(layer=9), as_it_is) and torch.equal(raw(timestep=0), as_it_is)


def test_post_process_is_the_library_s(nodes, model, scene, whole, defaults):
    region, guide, box = nodes.alignment.PostProcess.execute(peaked_map(), whole, **defaults(nodes.alignment.PostProcess)).args
    expected = clean(peaked_map()[0], encode_reference(model, scene.reference, scene.reference_mask))
    assert torch.equal(region[0], expected.mask)
    assert torch.equal(guide[0], grow(expected, 0.12) * scene.reference_mask) and guide.sum() > region.sum()
    assert box == {"x": expected.box.x, "y": expected.box.y, "width": expected.box.width, "height": expected.box.height}


def test_flat_map(nodes, scene, whole, defaults):
    flat = torch.full((1, 16, 16), 1 / 256)
    with pytest.raises(ValueError, match="^alignment: gave a flat map"):
        nodes.alignment.PostProcess.execute(flat, whole, **defaults(nodes.alignment.PostProcess))
    region, guide, box = nodes.alignment.PostProcess.execute(flat, whole, **defaults(nodes.alignment.PostProcess, on_flat="single-stage")).args
    assert torch.equal(region[0], scene.reference_mask) and torch.equal(guide, region)
    assert box == {"x": 10, "y": 4, "width": 85, "height": 73}


def test_batch_of_maps_with_one_reference(nodes, whole, defaults):
    raw = torch.cat([peaked_map(), peaked_map().flip(-1)])
    region, _, boxes = nodes.alignment.PostProcess.execute(raw, whole, **defaults(nodes.alignment.PostProcess)).args
    assert len(region) == 2 and [len(of_one) for of_one in boxes] == [1, 1] and boxes[0] != boxes[1]


def test_a_region_is_not_a_raw_map(nodes, inputs, whole, defaults):
    with pytest.raises(ValueError, match="^correspondence map: is 101 x 81, not 16 x 16; connect the raw map of Align$"):
        nodes.alignment.PostProcess.execute(inputs["reference_mask"], whole, **defaults(nodes.alignment.PostProcess))


@pytest.fixture
def registered(nodes, loaded, same_product, defaults):
    """`registered(**changes)`: Register on the same product, as (collage, collage mask, matched region, guide mask, confidence)."""
    node = nodes.alignment.Register

    def run(**changes):
        given = same_product | changes
        crop, crop_mask, box = nodes.refinement.ZoomCrop.execute(loaded, given["image"], given.pop("mask"), "refinement", 0.0).args
        return node.execute(crop, crop_mask, box, **(defaults(node) | given)).args

    return run


def test_register_is_the_library_s(registered, same_product):
    image, reference, mask, found = (same_product[name][0] for name in ("image", "reference", "mask", "matched_region"))
    image, reference = (picture.movedim(-1, 0).contiguous() for picture in (image, reference))
    crop = zoom_crop(image, mask, 64, context=2.0)
    region, expected = register(crop, reference, torch.ones(96, 130), MatchedRegion(found, Box.around(found), found), image, Settings())
    collage, shown, matched, guide, confidence = registered()
    assert collage.shape == (1, crop.box.height, crop.box.width, 3) and torch.equal(collage[0].movedim(-1, 0), expected.picture)
    assert torch.equal(shown[0], expected.valid) and torch.equal(matched[0], region.mask) and torch.equal(guide[0], grow(region, 0.12))
    assert confidence == expected.confidence > 0.8


def test_what_cannot_be_registered_stays_as_aligned(registered, same_product):
    found, thing = same_product["matched_region"], torch.ones(1, 96, 130)
    thing[:, :, 75:] = 0
    unlike = torch.rand(same_product["reference"].shape, generator=torch.Generator().manual_seed(8))
    for change in ({"reference": unlike}, {"min_confidence": 1.0}, {"matched_region": thing}):
        collage, shown, matched, guide, confidence = registered(reference_mask=thing, **change)
        assert torch.equal(matched, change.get("matched_region", found)) and confidence == 0, change
        assert collage.shape[1:3] == shown.shape[1:] and not shown.any() and not collage.any()
        assert (guide <= thing).all() and (guide >= matched).all()


def test_crops_of_several_sizes_give_collages_of_the_largest(registered, same_product):
    mask = same_product["mask"]
    smaller = mask.clone()
    smaller[..., :48] = 0
    collage, shown, matched, guide, confidence = registered(mask=torch.cat([mask, smaller]))
    alone = registered()
    assert torch.equal(collage[:1], alone[0]) and torch.equal(shown[:1], alone[1]) and torch.equal(matched[:1], alone[2])
    assert shown[1].any() and confidence <= alone[4] and matched[1].sum() < matched[0].sum()
