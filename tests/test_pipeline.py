from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch

import rba_core.alignment as alignment
import rba_core.pipeline as pipeline
from rba_core.collage import Collage
from rba_core.dense_correspondence import Placement
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.pipeline import Settings, check_inputs, grow, refine_by_align
from rba_core.postprocessing import MatchedRegion
from rba_core.reference_encoding import EncodedReference

GREY = torch.full((3, 40, 50), 0.5)


def run(model, scene, **changes):
    settings = {f.name: changes.pop(f.name) for f in fields(Settings) if f.name in changes}
    mask = changes.pop("mask", scene.mask)
    return refine_by_align(model, scene.image, mask, scene.reference, scene.reference_mask, settings=Settings(**settings), **changes)


@pytest.fixture
def three_artifacts(scene):
    mask = torch.zeros_like(scene.mask)
    mask[0:9, 0:12] = mask[70:96, 118:130] = mask[40:52, 50:71] = 1  # two of them at the border
    return mask


def test_outside_the_mask_the_result_equals_the_image_bit_for_bit(every_model, scene):
    before = scene.image.clone()
    result = run(every_model, scene).image
    outside = scene.mask < 0.5
    assert result.shape == scene.image.shape and result.dtype == scene.image.dtype
    assert torch.equal(result[:, outside], before[:, outside])
    assert not torch.equal(result[:, ~outside], before[:, ~outside])
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("one_crop", [False, True])
def test_several_artifacts_are_redrawn_and_nothing_else(model, scene, three_artifacts, one_crop):
    result = run(model, scene, mask=three_artifacts, one_crop=one_crop)
    outside = three_artifacts < 0.5
    assert torch.equal(result.image[:, outside], scene.image[:, outside])
    for box in (Box(0, 0, 12, 9), Box(118, 70, 12, 26), Box(50, 40, 21, 12)):
        assert not torch.equal(box.crop(result.image), box.crop(scene.image))
    assert len(result.regions) == (1 if one_crop else 3)


def test_a_mask_as_wide_as_the_picture_works(model, scene):
    mask = torch.zeros_like(scene.mask)
    mask[20:90] = 1
    result = run(model, scene, mask=mask).image
    assert torch.equal(result[:, :20], scene.image[:, :20]) and torch.equal(result[:, 90:], scene.image[:, 90:])
    assert (result[:, 20:90] != scene.image[:, 20:90]).float().mean() > 0.9


def test_a_soft_mask_counts_above_one_half(model, scene):
    soft = scene.mask * 0.8 + 0.1
    assert torch.equal(run(model, scene, mask=soft, feather=2.0).image, run(model, scene, feather=2.0).image)


def test_one_region_an_artifact_on_the_object_and_at_the_references_size(model, scene, three_artifacts):
    for region in run(model, scene, mask=three_artifacts).regions:
        assert region.mask.shape == scene.reference.shape[-2:]
        assert region.mask.any() and (region.mask <= scene.reference_mask).all()


def test_the_steps_come_in_their_order(model, scene, monkeypatch):
    ran = []
    of_pipeline = "check_inputs", "encode_reference", "place", "correspondence", "clean", "register", "crop_for", "refine", "stitch"
    for module, name in [*((pipeline, name) for name in of_pipeline), (alignment, "encode_reference"), (alignment, "attend")]:
        usual = getattr(module, name)

        def spy(*args, name=name, usual=usual, **kwargs):
            ran.append(name)
            return usual(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    start, end = ["check_inputs", "encode_reference", "crop_for", "crop_for"], ["register", "encode_reference", "refine", "stitch"]
    run(model, scene, dense=False, levels=1)
    assert ran == [*start, "attend", "correspondence", "clean", *end]
    ran.clear()
    monkeypatch.setattr(pipeline, "DISPROVED", 0.0)
    run(model, scene)
    assert [name for name in ran if name not in ("correspondence", "clean")] == [*start, "attend", "place", "encode_reference", "attend", "place", *end]
    ran.clear()
    run(model, scene, single_stage=True)
    assert ran == ["check_inputs", "encode_reference", "crop_for", "refine", "stitch"]


def spy_on_refine(monkeypatch) -> list:
    guides = []
    usual = pipeline.refine

    def spy(model, crop, reference, **kwargs):
        guides.append(reference)
        return usual(model, crop, reference, **kwargs)

    monkeypatch.setattr(pipeline, "refine", spy)
    return guides


def test_the_matched_region_guides_and_in_a_single_stage_the_whole_reference(model, scene, monkeypatch):
    guides = spy_on_refine(monkeypatch)
    found = run(model, scene)
    whole = run(model, scene, single_stage=True)
    assert found.regions[0] is not None and whole.regions == [None]
    assert torch.equal(guides[0].mask, grow(found.regions[0], 0.12) * scene.reference_mask)
    assert torch.equal(guides[1].mask, scene.reference_mask)
    assert not torch.equal(found.image, whole.image)


def test_a_flat_map_is_an_error_unless_the_whole_reference_may_take_over(make_model, scene, monkeypatch):
    flat = make_model(sharpness=1.0)
    with pytest.raises(InputError, match="alignment: gave a flat map"):
        run(flat, scene)
    guides = spy_on_refine(monkeypatch)
    fallen_back = run(flat, scene, on_flat="single-stage")
    assert fallen_back.regions == [None]
    assert torch.equal(guides[0].mask, scene.reference_mask)
    assert torch.equal(fallen_back.image, run(flat, scene, single_stage=True).image)


def test_where_alignment_finds_something_on_flat_changes_nothing(model, scene):
    assert torch.equal(run(model, scene).image, run(model, scene, on_flat="single-stage").image)


def test_falling_back_does_not_swallow_other_errors(model, scene):
    with pytest.raises(InputError, match="layer"):
        run(model, scene, layer=99, on_flat="single-stage")


def test_an_unknown_on_flat_is_refused(make_model, scene):
    with pytest.raises(InputError, match="on.flat"):
        run(make_model(sharpness=1.0), scene, on_flat="ignore")


@pytest.mark.parametrize("name", ["context", "alignment_context"])
def test_a_context_of_0_is_refused_and_not_taken_for_the_default(model, scene, name):
    with pytest.raises(InputError, match="context"):
        run(model, scene, **{name: 0.0})


def test_no_input_is_modified(model, scene, three_artifacts):
    inputs = scene.image, three_artifacts, scene.reference, scene.reference_mask
    before = [tensor.clone() for tensor in inputs]
    refine_by_align(model, *inputs)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before))


def test_the_model_is_not_modified(make_model, scene):
    model = make_model.__wrapped__()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, scene)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_seed_gives_the_same_image_and_another_seed_another(model, scene, three_artifacts):
    first, again, other = (run(model, scene, mask=three_artifacts, seed=seed).image for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_reference_mask_the_whole_picture_is_the_object(model, scene):
    everything = torch.ones(scene.reference.shape[-2:])
    given = refine_by_align(model, scene.image, scene.mask, scene.reference, everything)
    left_out = refine_by_align(model, scene.image, scene.mask, scene.reference)
    assert torch.equal(given.image, left_out.image)


def test_settings_reach_their_steps(model, scene, monkeypatch):
    seen = {}
    for module, name in ((alignment, "attend"), (pipeline, "clean"), (pipeline, "refine"), (pipeline, "stitch")):
        usual = getattr(module, name)

        def spy(*args, name=name, usual=usual, **kwargs):
            seen[name] = args, kwargs
            return usual(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    cleaning = pipeline.CleaningSettings(threshold=0.3, flatness=0.0)
    run(model, scene, layer=8, timestep=3, cleaning=cleaning, dense=False, steps=2, guidance=1.0, scheduler="euler", strength=0.3, feather=2.0, colour_match=False, seed=4)
    assert {k: seen["attend"][1][k] for k in ("layer", "timestep", "noise_level", "seed")} == dict(layer=8, timestep=3, noise_level=None, seed=4)
    assert seen["clean"][0][2] is cleaning
    options = dict(steps=2, guidance=1.0, scheduler="euler", strength=0.3, seed=4)
    assert {k: seen["refine"][1][k] for k in options} == options
    assert seen["stitch"][1] == dict(feather=2.0, colour_match=False)


def test_the_two_crops_have_their_own_contexts(model, scene, monkeypatch):
    boxes = []
    usual = pipeline.crop_for

    def spy(*args, **kwargs):
        boxes.append(usual(*args, **kwargs).box.width)
        return usual(*args, **kwargs)

    monkeypatch.setattr(pipeline, "crop_for", spy)
    monkeypatch.setattr(pipeline, "DISPROVED", 0.0)
    run(model, scene)  # the mask is 29 wide: 2 times for refinement, 3 times for alignment, in eights
    run(model, scene, alignment_context=1.0, context=1.5)
    assert boxes == [64, 88, 48, 32]


@pytest.fixture
def same_product(scene, monkeypatch):
    """The image shows the reference itself, its mask damaged, and alignment finds about the right place."""
    generator = torch.Generator().manual_seed(3)
    print_ = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 24, generator=generator), (96, 130), mode="bicubic")[0].clamp(0, 1)
    image = torch.where(scene.mask > 0.5, torch.rand(3, 96, 130, generator=generator), print_)
    about = torch.zeros(96, 130)
    about[26:48, 46:72] = 1
    monkeypatch.setattr(pipeline, "find_region", lambda *_: MatchedRegion(about, Box.around(about), about))
    return replace(scene, image=image, reference=print_, reference_mask=torch.ones(96, 130)), about


def test_where_the_pictures_agree_the_region_is_settled_to_the_pixel(model, same_product, monkeypatch):
    scene, about = same_product
    guides = spy_on_refine(monkeypatch)
    result = run(model, scene, region_margin=0.0)
    assert result.confidences[0] > 0.8
    found = result.regions[0].mask
    assert float((found * scene.mask).sum() / torch.maximum(found, scene.mask).sum()) > 0.9
    assert torch.equal(guides[0].mask, found) and result.regions[0].box == Box.around(found)
    outside = scene.mask < 0.5
    assert torch.equal(result.image[:, outside], scene.image[:, outside])


def test_the_surer_the_registration_the_closer_to_the_reference_unless_told_otherwise(model, same_product, monkeypatch):
    scene, _ = same_product
    seen, usual = [], pipeline.refine
    monkeypatch.setattr(pipeline, "refine", lambda *args, **kwargs: seen.append(kwargs["strength"]) or usual(*args, **kwargs))
    confidence = run(model, scene).confidences[0]
    run(model, scene, strength=0.7)
    run(model, scene, register=False)
    assert seen == [pytest.approx(model.config.collage_strength * (1 - confidence)), 0.7, 1.0]


def test_where_they_do_not_agree_the_region_stays_as_it_was(model, same_product):
    scene, about = same_product
    other = replace(scene, reference=torch.rand(scene.reference.shape, generator=torch.Generator().manual_seed(8)))
    result = run(model, other)
    assert result.confidences[0] < Settings().min_confidence and torch.equal(result.regions[0].mask, about)
    assert torch.equal(result.image, run(model, other, register=False).image)  # never a wrong paste


def test_where_the_pixels_disprove_it_all_is_as_published(model, scene):
    """The scene's pictures are noise: they agree nowhere."""
    result, paper = run(model, scene), run(model, scene, dense=False, levels=1, register=False)
    assert result.confidences[0] < pipeline.DISPROVED
    assert torch.equal(result.regions[0].mask, paper.regions[0].mask) and torch.equal(result.image, paper.image)


@pytest.mark.parametrize("changes", [dict(register=False), dict(detail_transfer=0.0), dict(min_confidence=1.1), dict(single_stage=True)])
def test_registration_can_be_left_out(model, same_product, changes):
    scene, about = same_product
    result = run(model, scene, **changes)
    assert (result.confidences == [None]) == ("min_confidence" not in changes)
    assert result.regions[0] is None if "single_stage" in changes else torch.equal(result.regions[0].mask, about)


def test_without_detail_transfer_it_is_the_papers_refinement(model, same_product):
    scene, _ = same_product
    assert torch.equal(run(model, scene, detail_transfer=0.0).image, run(model, scene, register=False).image)


@pytest.mark.parametrize("confidence, believed", [(0.3, True), (0.2, False)])
def test_the_confidence_decides_whether_the_collage_is_used(scene, monkeypatch, confidence, believed):
    found = torch.zeros(96, 130)
    found[30:50, 40:70] = 1
    collage = Collage(torch.rand(3, 64, 64), torch.ones(64, 64), found.roll(5, 1), confidence)
    monkeypatch.setattr(pipeline, "lay_over", lambda *_, **__: collage)
    settings = Settings(min_confidence=0.25)
    settled, laid = pipeline.register(None, scene.reference, torch.ones(96, 130), MatchedRegion(found, Box.around(found), found), scene.image, settings)
    assert laid is collage and pipeline.believed(laid, settings) is (collage if believed else None)
    assert torch.equal(settled.mask, collage.region if believed else found)


def test_of_several_references_the_surest_is_taken(model, same_product):
    scene, _ = same_product
    noise = torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(8))
    alone = run(model, scene)
    for references, masks, place in (([noise, scene.reference], [None, scene.reference_mask], 1), ([scene.reference, noise], [scene.reference_mask, None], 0)):
        result = refine_by_align(model, scene.image, scene.mask, references, masks)
        assert result.matches[0].reference == place
        assert torch.equal(result.image, alone.image) and result.confidences == alone.confidences


@pytest.mark.parametrize("agreements", [(0.02, 0.3), (0.3, 0.02), (None, 0.02)])
def test_without_registration_attention_chooses_the_reference(model, scene, monkeypatch, agreements):
    def found(model, image, mask, crop, reference, whole, settings, seed):
        agreement = agreements[0 if reference is scene.reference else 1]
        placement = None if agreement is None else Placement(torch.eye(2, 3), Box(0, 0, 64, 64), agreement, torch.ones(1, 1), Box(0, 0, 9, 9), torch.ones(1))
        return MatchedRegion(whole.mask, Box.around(whole.mask), whole.mask, placement)

    monkeypatch.setattr(pipeline, "find_region", found)
    result = refine_by_align(model, scene.image, scene.mask, [scene.reference, GREY], settings=Settings(register=False))
    assert result.matches[0].reference == (0 if agreements == (0.3, 0.02) else 1)


def test_a_reference_in_which_nothing_is_found_does_not_stop_the_others(model, same_product):
    scene, _ = same_product
    flat = run(model, scene)
    with pytest.MonkeyPatch.context() as patch:
        usual = pipeline.find_region

        def blind(model, image, mask, crop, reference, whole, settings, seed):
            if reference is GREY:
                raise InputError("alignment", "gave a flat map", "")
            return usual(model, image, mask, crop, reference, whole, settings, seed)

        patch.setattr(pipeline, "find_region", blind)
        result = refine_by_align(model, scene.image, scene.mask, [GREY, scene.reference], [None, scene.reference_mask])
        assert result.matches[0].reference == 1 and torch.equal(result.image, flat.image)
        with pytest.raises(InputError, match="flat map"):
            refine_by_align(model, scene.image, scene.mask, [GREY])


@pytest.mark.parametrize(
    "references, masks, message",
    [([], None, "reference: is missing"), ([GREY, GREY], [None], "reference mask: is given 1 times for 2 references"), ([GREY, GREY * 9], None, "reference 2: has values from")],
)
def test_several_references_that_do_not_fit_are_told_of(model, scene, references, masks, message):
    with pytest.raises(InputError) as caught:
        refine_by_align(model, scene.image, scene.mask, references, masks)
    assert message in str(caught.value)


def test_detail_of_the_reference_is_carried_into_the_result_in_the_amount_asked_for(model, same_product):
    scene, _ = same_product
    images = {amount: run(model, scene, detail_transfer=amount, colour_match=False, feather=0.0).image for amount in (0.0, 1.0)}
    inside = scene.mask > 0.5
    assert not torch.equal(images[0.0], images[1.0])
    difference = (images[1.0] - scene.reference)[:, inside]
    assert float((difference - difference.mean(1, keepdim=True)).abs().mean()) < float((images[0.0] - scene.reference)[:, inside].abs().mean())


def test_progress_counts_through_all_artifacts(model, scene, three_artifacts):
    told = []
    run(model, scene, mask=three_artifacts, steps=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(n, 6) for n in range(1, 7)]


def test_a_region_grows_by_a_share_of_its_longer_side():
    mask = torch.zeros(60, 60)
    mask[20:40, 25:35] = 1
    region = MatchedRegion(mask, Box.around(mask), mask)
    assert Box.around(grow(region, 0.1)) == Box(23, 18, 14, 24)
    assert torch.equal(grow(region, 0.0), mask)


GOOD = dict(image=torch.rand(3, 20, 30), mask=torch.zeros(20, 30).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(1.0)), reference=torch.rand(3, 25, 16), reference_mask=torch.ones(25, 16))

BAD = {
    "image: has shape": dict(image=torch.rand(20, 30)),
    "image: has shape (4, 20, 30)": dict(image=torch.rand(4, 20, 30)),
    "reference: has shape (1, 3, 25, 16)": dict(reference=torch.rand(1, 3, 25, 16)),
    "image: is only 15 x 20 pixels": dict(image=torch.rand(3, 20, 15)),
    "reference: is only 1 x 1 pixels": dict(reference=torch.rand(3, 1, 1)),
    "image: holds NaN": dict(image=torch.full((3, 20, 30), float("nan"))),
    "reference: holds NaN or infinite": dict(reference=torch.full((3, 25, 16), float("inf"))),
    "image: has values from": dict(image=torch.rand(3, 20, 30) * 255),
    "reference: has values from -1": dict(reference=-torch.ones(3, 25, 16)),
    "mask: is 30 x 21, its image 30 x 20": dict(mask=torch.ones(21, 30)),
    "mask: is 30 x 20 x 1, its image": dict(mask=torch.ones(1, 20, 30)),
    "mask: is empty": dict(mask=torch.full((20, 30), 0.5)),
    "mask: covers the whole image": dict(mask=torch.ones(20, 30)),
    "mask: holds NaN": dict(mask=torch.full((20, 30), float("nan"))),
    "reference mask: is 25 x 16, its reference 16 x 25": dict(reference_mask=torch.ones(16, 25)),
    "reference mask: is empty": dict(reference_mask=torch.zeros(25, 16)),
    "reference mask: holds NaN": dict(reference_mask=torch.full((25, 16), float("nan"))),
}


def test_good_inputs_pass():
    check_inputs(**GOOD)
    check_inputs(**GOOD | dict(reference_mask=None))


@pytest.mark.parametrize("message", BAD)
def test_bad_inputs_are_named_before_anything_runs(message):
    with pytest.raises(InputError) as caught:
        check_inputs(**GOOD | BAD[message])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


class Looking:
    """An aligner whose d x d cells look where the crop shows them; notes what it is asked."""

    def __init__(self, agreements=()):
        self.asked, self.agreements = [], list(agreements)

    def encode(self, reference, mask):
        self.asked.append(("encode", int(mask.sum())))
        height, width = mask.shape
        return EncodedReference(torch.zeros(1, 256, 0), Box(0, 0, width, width), (mask > 0.5).float())

    def attend(self, crop, reference):
        self.asked.append(("attend", crop.box.width))
        sure = self.agreements.pop(0) if self.agreements else 0.5
        return sure * torch.eye(256) + (1 - sure) / 256


def test_any_aligner_goes_coarse_to_fine(model, scene):
    looking = Looking()
    region = run(model, scene, aligner=looking, register=False).regions[0]
    assert region.placement is not None and region.placement.agreement > 0.2
    assert [name for name, _ in looking.asked] == ["encode", "attend"] * 2
    assert looking.asked[2][1] < looking.asked[0][1] and looking.asked[3][1] <= looking.asked[1][1]


def test_the_model_s_encoder_may_align(model, scene):
    found, attention = run(model, scene, aligner="features"), run(model, scene)
    assert found.regions[0].mask.any() and not torch.equal(found.regions[0].mask, attention.regions[0].mask)
    assert torch.equal(found.image, run(model, scene, aligner="features", layer=3, timestep=7).image)  # they are attention's


def test_an_unknown_aligner_is_refused(model, scene):
    with pytest.raises(InputError, match="aligner: 'likeness' is not known; use attention or features"):
        run(model, scene, aligner="likeness")


@pytest.mark.parametrize("agreements, looks, kept", [([0.5, 0.5, 0.4, 0.5], 3, 1), ([0.5, 0.5, 0.6, 0.5], 4, 2), ([0.9, 0.5, 0.6, 0.7], 4, 3)])
def test_from_the_third_look_on_one_counts_only_where_as_many_cells_agree(model, scene, monkeypatch, agreements, looks, kept):
    looking, sides = Looking(agreements), []
    monkeypatch.setattr(pipeline, "SETTLED", 0.0)
    usual = pipeline.place

    def spy(attention, crop, square):
        sides.append(usual(attention, crop, square))
        return sides[-1]

    monkeypatch.setattr(pipeline, "place", spy)
    region = run(model, scene, aligner=looking, levels=4, register=False).regions[0]
    assert len(sides) == looks and torch.equal(region.placement.affine, sides[kept].affine) and region.placement.agreement == sides[kept].agreement


def test_looks_end_where_the_region_has_settled(model, scene, monkeypatch):
    monkeypatch.setattr(pipeline, "SETTLED", 1.1)
    looking = Looking()
    run(model, scene, aligner=looking, levels=4, register=False)
    assert [name for name, _ in looking.asked] == ["encode", "attend"] * 2


def test_a_run_encodes_no_picture_twice(every_model, scene, monkeypatch):
    """Alignment and refinement look at the same crops: fewer passes of the autoencoder, the same result bit for bit."""
    encoded = []
    encode = every_model.vae.encode
    monkeypatch.setattr(every_model.vae, "encode", lambda pictures: (encoded.append(pictures), encode(pictures))[1])
    kept = run(every_model, scene, on_flat="single-stage").image
    assert not any(torch.equal(one, other) for index, one in enumerate(encoded) for other in encoded[:index])
    count = len(encoded)
    encoded.clear()
    monkeypatch.setattr(every_model, "reusing_latents", nullcontext)
    again = run(every_model, scene, on_flat="single-stage").image
    assert len(encoded) > count and torch.equal(kept, again)
