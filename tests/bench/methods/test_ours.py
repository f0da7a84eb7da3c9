import pytest
import torch

from rba_core.bench import metrics
from rba_core.bench.dataset import BenchmarkSet, Item
from rba_core.bench.methods import ours
from rba_core.collage import Collage
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.pipeline import Match, Refined
from rba_core.postprocessing import MatchedRegion
from rba_core.zoom_crop import crop_for


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
    monkeypatch.setattr(ours, "refine_by_align", stub)
    return stub


def test_detail_unites_the_regions(small_set, model, pipeline):
    pipeline.regions = [region(0, 0), region(50, 30)]
    outcome = ours.detail(BenchmarkSet(small_set)[0], model, 7)
    assert outcome.region.box == Box(0, 0, 40, 60) and outcome.region.mask.sum() == 200
    assert not outcome.fell_back
    settings, seed = pipeline.calls[0]
    assert settings.on_flat == "single-stage" and not settings.single_stage and seed == 7


def test_detail_tells_that_it_fell_back(small_set, model, pipeline):
    item = BenchmarkSet(small_set)[0]
    outcome = ours.detail(item, model, 0)
    assert outcome.fell_back and outcome.region is None
    pipeline.regions = [region(0, 0), None]
    outcome = ours.detail(item, model, 0)
    assert outcome.fell_back and outcome.region.box == Box(0, 0, 10, 10)


def test_detail_tells_the_flow_under_the_mask_and_the_confidence(small_set, model, pipeline):
    item = BenchmarkSet(small_set)[0]
    pipeline.regions = [region(0, 0)]
    box = crop_for(model, item.image, item.mask).box
    laid = torch.arange(2.0)[:, None, None].expand(2, box.height, box.width) + 40
    pipeline.collage = Collage(torch.rand(3, 8, 8), torch.ones(8, 8), item.mask, 0.3, laid, torch.ones(8, 8), (0.1, 0.2))
    outcome = ours.detail(item, model, 0)
    assert outcome.confidence == 0.3 and outcome.evidence == (0.1, 0.2)
    assert (outcome.flow[:, item.mask > 0.5] == torch.tensor([[40.0], [41.0]])).all() and outcome.flow[:, item.mask < 0.5].isnan().all()


def test_single_stage_does_not_align(small_set, pipeline):
    outcome = ours.single_stage(BenchmarkSet(small_set)[0], object(), 0)
    assert outcome.region is None and not outcome.fell_back
    assert pipeline.calls[0][0].single_stage


def test_the_oracle_redraws_from_the_true_region(small_set, model, second_stage):
    item = BenchmarkSet(small_set)[0]
    outcome = ours.oracle(item, model, 0)
    (_, guide, collage, strength), = second_stage
    assert metrics.iou(outcome.region.mask, item.correspondence) > 0.6
    assert guide[item.correspondence > 0.5].mean() > 0.9 and guide.mean() < 4 * item.correspondence.mean()
    assert collage is not None and strength == pytest.approx(model.config.collage_strength * (1 - collage.confidence))
    assert metrics.outside_changed_pixels(outcome.image, item.image, item.mask) == 0
    assert not torch.equal(outcome.image, item.image)


def test_the_oracle_needs_a_correspondence(small_set, model):
    item = BenchmarkSet(small_set)[0]
    with pytest.raises(InputError, match="oracle needs M_gt, which x lacks"):
        ours.oracle(Item("x", item.task, {}, item.image, item.mask, item.reference), model, 0)


def test_without_reference_nothing_of_it_is_used(small_set, model, second_stage):
    item = BenchmarkSet(small_set)[0]
    outcome = ours.no_reference(item, model, 0)
    (embedding, _, collage, strength), = second_stage
    assert not embedding.any() and collage is None and strength == 1
    assert outcome.region is None and not outcome.fell_back
