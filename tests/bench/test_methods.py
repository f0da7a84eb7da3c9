import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import texture

from rba_core.bench import methods, metrics
from rba_core.bench.dataset import BenchmarkSet
from rba_core.data.textures import product_texture
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.collage import Collage
from rba_core.pipeline import Match, Refined
from rba_core.postprocessing import MatchedRegion


def region(y, x):
    mask = torch.zeros(192, 192)
    mask[y : y + 10, x : x + 10] = 1
    return MatchedRegion(mask, Box(x, y, 10, 10), 0.5 * mask)


@pytest.fixture
def pipeline(monkeypatch):
    """Stands in for the two-stage pipeline: paints the mask grey, keeps how it was called."""
    calls = []

    def stub(model, image, mask, reference, reference_mask, *, settings, seed):
        calls.append((settings, seed))
        return Refined(torch.where(mask > 0.5, 0.5, image), [Match(0, region, stub.collage) for region in stub.regions])

    stub.regions, stub.collage, stub.calls = [None], None, calls
    monkeypatch.setattr(methods, "refine_by_align", stub)
    return stub


def test_detail_unites_the_regions(small_set, model, pipeline):
    pipeline.regions = [region(0, 0), region(50, 30)]
    outcome = methods.detail(BenchmarkSet(small_set)[0], model, 7)
    assert outcome.region.box == Box(0, 0, 40, 60) and outcome.region.mask.sum() == 200
    assert not outcome.fell_back
    settings, seed = pipeline.calls[0]
    assert settings.on_flat == "single-stage" and not settings.single_stage and seed == 7


def test_detail_tells_that_it_fell_back(small_set, model, pipeline):
    item = BenchmarkSet(small_set)[0]
    outcome = methods.detail(item, model, 0)
    assert outcome.fell_back and outcome.region is None
    pipeline.regions = [region(0, 0), None]
    outcome = methods.detail(item, model, 0)
    assert outcome.fell_back and outcome.region.box == Box(0, 0, 10, 10)


def test_detail_tells_the_flow_under_the_mask_and_the_confidence(small_set, model, pipeline):
    item = BenchmarkSet(small_set)[0]
    pipeline.regions = [region(0, 0)]
    box = methods._crop(item, model).box
    laid = torch.arange(2.0)[:, None, None].expand(2, box.height, box.width) + 40
    pipeline.collage = Collage(torch.rand(3, 8, 8), torch.ones(8, 8), item.mask, 0.3, laid, torch.ones(8, 8), (0.1, 0.2))
    outcome = methods.detail(item, model, 0)
    assert outcome.confidence == 0.3 and outcome.evidence == (0.1, 0.2)
    assert (outcome.flow[:, item.mask > 0.5] == torch.tensor([[40.0], [41.0]])).all() and outcome.flow[:, item.mask < 0.5].isnan().all()


def test_single_stage_does_not_align(small_set, pipeline):
    outcome = methods.single_stage(BenchmarkSet(small_set)[0], object(), 0)
    assert outcome.region is None and not outcome.fell_back
    assert pipeline.calls[0][0].single_stage


@pytest.fixture
def second_stage(monkeypatch):
    """Keeps what the refinement is given: (guide's embedding, its mask, collage, strength)."""
    given = []

    def stub(model, crop, guide, *, collage, strength, seed, **sampling):
        assert set(sampling.values()) == {None}  # the model's own
        given.append((guide.embedding, guide.mask, collage, strength))
        return torch.full_like(crop.image, 0.5)

    monkeypatch.setattr("rba_core.pipeline.refine", stub)
    return given


def test_the_oracle_redraws_from_the_true_region(small_set, model, second_stage):
    item = BenchmarkSet(small_set)[0]
    outcome = methods.oracle(item, model, 0)
    (_, guide, collage, strength), = second_stage
    assert metrics.iou(outcome.region.mask, item.correspondence) > 0.6
    assert guide[item.correspondence > 0.5].mean() > 0.9 and guide.mean() < 4 * item.correspondence.mean()
    assert collage is not None and strength == pytest.approx(model.config.collage_strength * (1 - collage.confidence))
    assert metrics.outside_changed_pixels(outcome.image, item.image, item.mask) == 0
    assert not torch.equal(outcome.image, item.image)


def test_the_oracle_needs_a_correspondence(small_set, model):
    item = BenchmarkSet(small_set)[0]
    with pytest.raises(InputError, match="oracle needs M_gt, which x lacks"):
        methods.oracle(methods.Item("x", item.task, {}, item.image, item.mask, item.reference), model, 0)


def test_without_reference_nothing_of_it_is_used(small_set, model, second_stage):
    item = BenchmarkSet(small_set)[0]
    outcome = methods.no_reference(item, model, 0)
    (embedding, _, collage, strength), = second_stage
    assert not embedding.any() and collage is None and strength == 1
    assert outcome.region is None and not outcome.fell_back


class ColourEncoder:
    """The small model's settings with tokens that are the patches' colours, centred: matching needs nothing learned."""

    def __init__(self, model):
        self.config, self.stride, self.encoder_size, self.embed = model.config, model.stride, 224, model.embed

    def tokens(self, pictures):
        return torch.nn.functional.avg_pool2d(pictures - 0.5, 14).flatten(2).mT


def test_features_find_the_region_of_the_same_colour(model, second_stage):
    image, reference = torch.full((3, 128, 128), 0.5), torch.full((3, 128, 128), 0.5)
    mask, wanted = torch.zeros(128, 128), torch.zeros(128, 128)
    image[:, ::2, ::3] += 0.1
    image[0, 40:60, 50:70], mask[40:60, 50:70] = 1.0, 1
    reference[1] = 0.8
    reference[0, 80:104, 16:40], reference[1, 80:104, 16:40], wanted[80:104, 16:40] = 1.0, 0.5, 1
    item = methods.Item("x", "customization", {}, image, mask, reference, correspondence=wanted)
    outcome = methods.features(item, ColourEncoder(model), 0)
    assert not outcome.fell_back and metrics.iou(outcome.region.mask, wanted) > 0.5
    same = methods.Item("x", "customization", {}, image, mask, torch.full_like(reference, 0.7))
    monochrome = pytest.MonkeyPatch()
    monochrome.setattr(methods, "single_stage", lambda *arguments: methods.Outcome(image))
    assert methods.features(same, ColourEncoder(model), 0).fell_back
    monochrome.undo()


def test_telea_fills_the_hole_and_nothing_else(small_set):
    pytest.importorskip("cv2")
    texture = torch.from_numpy(product_texture(np.random.default_rng(3), 192).copy()).permute(2, 0, 1)[:3].float() / 255
    item = BenchmarkSet(small_set)[0]
    item = methods.Item(item.id, item.task, {}, texture, item.mask, item.reference)
    filled = methods.telea(item, None, 0).image
    outside = item.mask < 0.5
    assert torch.equal(filled[:, outside], texture[:, outside])
    assert metrics.outside_changed_pixels(filled, texture, item.mask) == 0
    assert not torch.equal(filled, texture)
    assert metrics.hp_ssim(filled, texture, item.mask) < 0.9 < metrics.hp_ssim(texture, texture, item.mask)


def test_telea_without_opencv(small_set, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r'pip install "refine-by-align\[bench\]"'):
        methods.telea(BenchmarkSet(small_set)[0], None, 0)


def turned(item, angle=0.2):
    """An item whose reference is its truth turned, with the flow that goes with it."""
    height, width = item.mask.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    flow = torch.stack([cos * x - sin * y + width / 2, sin * x + cos * y + height / 2]).float()
    back = torch.stack([cos * x + sin * y, -sin * x + cos * y], -1).float() / torch.tensor([width / 2, height / 2])
    reference = torch.nn.functional.grid_sample(item.truth[None], back[None], align_corners=False, padding_mode="border")[0]
    carried = (torch.nn.functional.grid_sample(item.mask[None, None], back[None], align_corners=False)[0, 0] > 0.5).float()
    return replace(item, reference=reference, reference_mask=None, correspondence=carried, flow=torch.where(item.mask > 0.5, flow, torch.nan))


@pytest.fixture
def detailed(small_set):
    """An item all over detail, its artifact flat grey."""
    item, right = BenchmarkSet(small_set)[0], texture(192, 192)
    return turned(replace(item, truth=right, image=torch.where(item.mask > 0.5, 0.5, right)))


@pytest.mark.parametrize("method", [methods.sift_warp, methods.oracle_warp])
def test_warps_bring_back_the_detail_and_change_nothing_else(detailed, method):
    pytest.importorskip("cv2")
    outcome = method(detailed, None, 0)
    assert torch.equal(outcome.image[:, detailed.mask < 0.5], detailed.image[:, detailed.mask < 0.5])
    assert metrics.hp_ssim(outcome.image, detailed.truth, detailed.mask) > 0.8 > 0.5 > metrics.hp_ssim(detailed.image, detailed.truth, detailed.mask)
    assert metrics.end_point_error(outcome.flow, detailed.flow, detailed.correspondence) < 0.02
    assert metrics.iou(outcome.region.mask, detailed.correspondence) > 0.9


def test_sift_without_matches_leaves_the_image_as_it_is(detailed):
    pytest.importorskip("cv2")
    outcome = methods.sift_warp(replace(detailed, reference=torch.full_like(detailed.reference, 0.5)), None, 0)
    assert outcome.fell_back and torch.equal(outcome.image, detailed.image)


def test_the_oracle_warp_needs_a_flow(detailed):
    pytest.importorskip("cv2")
    with pytest.raises(InputError, match="oracle-warp needs the true flow, which"):
        methods.oracle_warp(replace(detailed, flow=None), None, 0)
