import pytest
import torch

from rba_core.alignment import align, attend
from rba_core.dense_correspondence import Placement, place
from rba_core.geometry import Box
from rba_core.overlay import draw_matches
from rba_core.pipeline import Settings, carried, close_up, grow, register
from rba_core.postprocessing import MatchedRegion, clean
from rba_core.reference_encoding import encode_reference
from rba_core.zoom_crop import zoom_crop


def peaked_map():
    raw = torch.full((1, 16, 16), 0.001)
    raw[0, 5:8, 8:11] = 0.08
    return raw / raw.sum()


def agreeing(shift=0.0):
    """`[64, 256]`: 8 x 8 cells that look at the middle half of the reference, as they lie in the crop."""
    axis = ((torch.arange(8) + 0.5) / 8 * 2 - 1) / 2 + shift
    token = ((axis + 1) / 2 * 16).long().clamp(0, 15)
    rows = torch.full((64, 256), 1e-4)
    rows[torch.arange(64), (token[:, None] * 16 + token).flatten()] = 1
    return rows / rows.sum(1, keepdim=True)


@pytest.fixture
def post_process(nodes, whole, zoomed, defaults):
    """`post_process(raw, **changes)`: (region, guide mask, box, close-up, placement)."""
    node = nodes.alignment.PostProcess

    def run(raw, **changes):
        looking = {"crop_mask": zoomed[1], "bounding_box": zoomed[2]} if "attention" in changes else {}
        return node.execute(raw, **({"encoded_reference": whole} | defaults(node) | looking | changes)).args

    return run


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


def test_align_is_the_library_s(nodes, loaded, model, scene, whole, zoomed, defaults):
    raw, attention = nodes.alignment.Align.execute(loaded, *zoomed[:2], whole, **defaults(nodes.alignment.Align, seed=3)).args
    given = model, zoom_crop(scene.image, scene.mask, 64, context=model.config.alignment_context), encode_reference(model, scene.reference, scene.reference_mask)
    assert raw.shape == (1, 16, 16) and torch.equal(raw[0], align(*given, seed=3))
    assert len(attention) == 1 and torch.equal(attention[0], attend(*given, seed=3))


def test_align_settings_reach_the_library(nodes, loaded, whole, zoomed, defaults):
    def raw(**changes):
        return nodes.alignment.Align.execute(loaded, *zoomed[:2], whole, **defaults(nodes.alignment.Align, **changes))[0]

    as_it_is = raw()
    for change in ({"layer": 5}, {"timestep": 40}, {"noise_level": 0.1}, {"seed": 1}):
        assert not torch.equal(raw(**change), as_it_is), change
    assert torch.equal(raw(layer=9), as_it_is) and torch.equal(raw(timestep=0), as_it_is)


def test_post_process_is_the_library_s(post_process, model, scene):
    region, guide, box, near, placement = post_process(peaked_map())
    expected = clean(peaked_map()[0], encode_reference(model, scene.reference, scene.reference_mask))
    assert torch.equal(region[0], expected.mask)
    assert torch.equal(guide[0], grow(expected, 0.12) * scene.reference_mask) and guide.sum() > region.sum()
    assert box == {"x": expected.box.x, "y": expected.box.y, "width": expected.box.width, "height": expected.box.height}
    assert torch.equal(near[0], close_up(expected, scene.reference_mask)) and region.sum() < near.sum() < scene.reference_mask.sum()
    assert placement == [None]


def test_the_region_is_where_all_cells_agree_that_it_is(post_process, model, scene):
    region, guide, box, near, (placement,) = post_process(peaked_map(), attention=[agreeing()])
    crop = zoom_crop(scene.image, scene.mask, 64, context=model.config.alignment_context)
    whole = encode_reference(model, scene.reference, scene.reference_mask)
    expected = carried(crop.mask, place(agreeing(), crop, whole.box), whole.mask)
    assert expected is not None and torch.equal(region[0], expected.mask) and not torch.equal(region, post_process(peaked_map())[0])
    assert torch.equal(guide[0], grow(expected, 0.12) * scene.reference_mask) and box["x"] == expected.box.x
    assert torch.equal(near[0], close_up(expected, scene.reference_mask))
    assert torch.equal(placement.affine, expected.placement.affine) and placement.agreement == expected.placement.agreement > 0.5
    assert (placement.box.x, placement.box.width) == (crop.box.x, crop.box.width)


def test_where_cells_do_not_agree_the_raw_map_decides(post_process):
    alone = post_process(peaked_map())
    region, guide, box, _, placement = post_process(peaked_map(), attention=[torch.full((64, 256), 1 / 256)])
    assert torch.equal(region, alone[0]) and torch.equal(guide, alone[1]) and box == alone[2] and placement == [None]


def test_where_cells_of_a_close_up_do_not_agree_the_region_stays(post_process, scene):
    found = torch.zeros(1, 81, 101)
    found[:, 20:40, 30:60] = 1
    map_before = Placement(torch.eye(2, 3), Box(0, 0, 64, 64), 0.1, agreeing(), Box(0, 0, 9, 9), torch.ones(64), published=found[0].roll(9, 1))
    before = {"matched_region": found, "placement": [map_before]}
    flat, unsure = torch.full((1, 16, 16), 1 / 256), torch.full((64, 256), 1 / 256)
    region, _, box, near, placement = post_process(flat, attention=[unsure], **before)
    assert torch.equal(region, found) and placement == [map_before]
    assert box == {"x": 30, "y": 20, "width": 30, "height": 20} and near.sum() > found.sum()
    region, _, _, _, (placement,) = post_process(flat, attention=[agreeing()], **before)
    assert torch.equal(region, post_process(flat, attention=[agreeing()])[0]) and placement.agreement > 0.5
    assert torch.equal(placement.published, map_before.published)  # Eq. 5's of the first level, should all of this turn out wrong
    with pytest.raises(ValueError, match="^matched region: is 64 x 64, its reference 101 x 81"):
        post_process(flat, matched_region=torch.ones(1, 64, 64))


def test_an_attention_needs_the_crop_s_mask_and_box(post_process):
    for missing in ("crop mask", "bounding box"):
        with pytest.raises(ValueError, match=f"^{missing}: is not connected; with an attention, connect crop mask and bounding box of Zoom-in Crop too$"):
            post_process(peaked_map(), attention=[agreeing()], **{missing.replace(" ", "_"): None})
    with pytest.raises(ValueError, match="^crop mask: is empty"):
        post_process(peaked_map(), attention=[agreeing()], crop_mask=torch.zeros(1, 64, 64))


def test_flat_map(post_process, scene):
    flat = torch.full((1, 16, 16), 1 / 256)
    with pytest.raises(ValueError, match="^alignment: gave a flat map"):
        post_process(flat)
    region, guide, box, near, placement = post_process(flat, on_flat="single-stage")
    assert torch.equal(region[0], scene.reference_mask) and torch.equal(guide, region) and torch.equal(near, region)
    assert box == {"x": 10, "y": 4, "width": 85, "height": 73} and placement == [None]


def test_batch_of_maps_with_one_reference(post_process):
    raw = torch.cat([peaked_map(), peaked_map().flip(-1)])
    region, _, boxes, near, placements = post_process(raw)
    assert len(region) == len(near) == 2 and [len(of_one) for of_one in boxes] == [1, 1] and boxes[0] != boxes[1] and placements == [None, None]
    unsure = torch.full((64, 256), 1 / 256)
    region, _, _, _, placements = post_process(raw, attention=[agreeing(), unsure])
    assert torch.equal(region[:1], post_process(peaked_map(), attention=[agreeing()])[0]) and placements[1] is None
    assert torch.equal(region[1:], post_process(raw[1:])[0])
    with pytest.raises(ValueError, match="^correspondence map: has 2 in its batch, attention has 3"):
        post_process(raw, attention=[unsure] * 3)


def test_a_region_is_not_a_raw_map(post_process, inputs):
    with pytest.raises(ValueError, match="^correspondence map: is 101 x 81, not 16 x 16; connect the raw map of Align$"):
        post_process(inputs["reference_mask"])


@pytest.fixture
def registered(nodes, loaded, same_product, defaults):
    """`registered(**changes)`: Register on the same product, as (collage, collage mask, matched region, guide mask, confidence)."""
    node = nodes.alignment.Register

    def run(**changes):
        given = same_product | changes
        crop, crop_mask, box = nodes.refinement.ZoomCrop.execute(loaded, given["image"], given.pop("mask"), "refinement", 0.0).args
        return node.execute(crop, crop_mask, box, **(defaults(node) | given)).args

    return run


def test_register_is_the_library_s(registered, same_product, nodes):
    image, reference, mask, found = (same_product[name][0] for name in ("image", "reference", "mask", "matched_region"))
    image, reference = (picture.movedim(-1, 0).contiguous() for picture in (image, reference))
    crop = zoom_crop(image, mask, 64, context=2.0)
    region, expected = register(crop, reference, torch.ones(96, 130), MatchedRegion(found, Box.around(found), found), image, Settings(dense=False))
    collage, shown, matched, guide, confidence, matches = registered()
    assert collage.shape == (1, crop.box.height, crop.box.width, 3) and torch.equal(collage[0].movedim(-1, 0), expected.picture)
    assert torch.equal(shown[0], expected.valid) and torch.equal(matched[0], region.mask) and torch.equal(guide[0], grow(region, 0.12))
    assert confidence == expected.confidence > 0.8
    drawn = draw_matches(image, crop, reference, expected)
    assert torch.equal(matches[0].movedim(-1, 0), drawn)


def test_what_cannot_be_registered_stays_as_aligned(registered, same_product):
    found, thing = same_product["matched_region"], torch.ones(1, 96, 130)
    thing[:, :, 75:] = 0
    unlike = torch.rand(same_product["reference"].shape, generator=torch.Generator().manual_seed(8))
    for change in ({"reference": unlike}, {"min_confidence": 1.0}, {"matched_region": thing}):
        collage, shown, matched, guide, confidence, _ = registered(reference_mask=thing, **change)
        assert torch.equal(matched, change.get("matched_region", found)), change
        assert confidence < Settings().min_confidence or "min_confidence" in change, change
        assert collage.shape[1:3] == shown.shape[1:] and not shown.any() and not collage.any()
        assert (guide <= thing).all() and (guide >= matched).all()


def test_crops_of_several_sizes_give_collages_of_the_largest(registered, same_product):
    mask = same_product["mask"]
    smaller = mask.clone()
    smaller[..., :48] = 0
    collage, shown, matched, guide, confidence, _ = registered(mask=torch.cat([mask, smaller]))
    alone = registered()
    assert torch.equal(collage[:1], alone[0]) and torch.equal(shown[:1], alone[1]) and torch.equal(matched[:1], alone[2])
    assert shown[1].any() and confidence <= alone[4] and matched[1].sum() < matched[0].sum()


def placement_over(affine, box):
    """That the cells agree on `affine`; what each of them saw is the same everywhere and speaks for no place."""
    return Placement(affine, box, 0.9, torch.full((16, 16), 1 / 16), Box(0, 0, 130, 130), torch.ones(16))


def test_register_starts_from_the_placement(registered, same_product, nodes):
    """A region so far off that the search does not find the product; the placement, found over another crop, lies on it."""
    image = same_product["image"][0].movedim(-1, 0).contiguous()
    wide, near = (zoom_crop(image, same_product["mask"][0], 64, context=context).box for context in (3.0, 2.0))
    affine = torch.tensor([[wide.width / 2, 0, wide.x + wide.width / 2], [0, wide.height / 2, wide.y + wide.height / 2]])  # the picture itself
    assert wide != near
    astray = torch.zeros(1, 96, 130)
    astray[:, 2:10, 2:10] = 1
    assert registered(matched_region=astray)[4] < Settings().min_confidence
    found = registered(matched_region=astray, placement=[placement_over(affine, wide)])
    assert found[4] > 0.8 and torch.equal(found[2], registered()[2])


def test_all_of_the_object_is_registered_where_a_placement_says_so(registered, same_product):
    product = torch.ones(1, 96, 130)
    box = zoom_crop(same_product["image"][0].movedim(-1, 0).contiguous(), same_product["mask"][0], 64, context=2.0).box
    affine = torch.tensor([[box.width / 2, 0, box.x + box.width / 2], [0, box.height / 2, box.y + box.height / 2]])
    assert registered(matched_region=product)[4] == 0
    assert registered(matched_region=product, placement=[placement_over(affine, box)])[4] > 0.6
