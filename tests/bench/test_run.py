import json

import pytest
import torch

from rba_core.bench import run as bench
from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods import METHODS, Outcome
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.postprocessing import MatchedRegion


def oracle(item, model, seed):
    found = item.correspondence
    return Outcome(item.truth, MatchedRegion(found, Box.around(found), found))


def lost(item, model, seed):
    return Outcome(item.image, None, fell_back=True)


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.setitem(METHODS, "detail", oracle)
    monkeypatch.setitem(METHODS, "single-stage", lost)


def test_report(small_set, methods):
    steps = []
    report = bench.run(small_set, ["none", "detail"], object(), progress=lambda done, total: steps.append((done, total)))
    assert report["set"] == "small" and report["n"] == 2
    assert json.loads(json.dumps(report)) == report
    none, refined = report["methods"]["none"], report["methods"]["detail"]
    assert refined["iou"] == refined["box_iou"] == refined["soft_iou"] == refined["hp_ssim"] == 1
    assert refined["masked_psnr"] == 100 > none["masked_psnr"]
    assert 0.5 < refined["token_bound_iou"] < 1
    assert none["outside_changed_pixels"] == refined["outside_changed_pixels"] == 0
    assert not {"iou", "box_iou", "soft_iou", "token_bound_iou", "fell_back"} & set(none)
    assert [(row["id"], row["method"]) for row in report["items"]] == [("00000", "none"), ("00000", "detail"), ("00001", "none"), ("00001", "detail")]
    assert report["items"][3]["artifact"] == "smear"
    mean = (report["items"][0]["hp_ssim"] + report["items"][2]["hp_ssim"]) / 2
    assert none["hp_ssim"] == pytest.approx(mean)
    assert report["groups"]["artifact"]["smear"]["none"]["hp_ssim"] == report["items"][2]["hp_ssim"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_item_that_fell_back_counts_as_missed(small_set, methods):
    report = bench.run(small_set, ["single-stage"], object())
    assert report["methods"]["single-stage"]["fell_back"] == 1
    assert report["items"][0]["iou"] == report["items"][0]["box_iou"] == report["items"][0]["soft_iou"] == 0
    assert report["items"][0]["fell_back"] is True


def test_metrics_need_what_they_compare_with(small_set):
    item = BenchmarkSet(small_set)[0]
    bare = bench.Item(item.id, item.task, {}, item.image, item.mask, item.reference)
    assert bench.measure(bare, oracle(item, None, 0)) == {"fell_back": False, "outside_changed_pixels": 0}
    spoilt = Outcome(torch.where(item.mask > 0.5, item.image, 1 - item.image))
    assert bench.measure(bare, spoilt)["outside_changed_pixels"] > 0.9 * 192 * 192


def test_the_model_is_warmed_up_before_timing(small_set, monkeypatch):
    seen = []

    def timed(item, model, seed):
        seen.append((item.id, model, seed))
        return Outcome(item.image)

    monkeypatch.setitem(METHODS, "detail", timed)
    report = bench.run(small_set, ["detail"], "model", limit=1, seed=5)
    assert seen == [("00000", "model", 5)] * 2
    assert report["n"] == 1 and len(report["items"]) == 1


def test_on_item_gets_outcomes(small_set, methods):
    seen = {}
    bench.run(small_set, ["none", "detail"], object(), on_item=lambda item, outcomes, figures: seen.update({item.id: (outcomes, figures)}))
    outcomes, figures = seen["00001"]
    assert set(outcomes) == set(figures) == {"none", "detail"}
    assert figures["detail"]["iou"] == 1 and outcomes["detail"].region is not None


@pytest.mark.parametrize(
    "methods, model, limit, problem",
    [(["detail", "magic"], object(), None, "'magic' is not known"), (["detail"], None, None, "missing for detail"), (["none"], None, 0, "limit: is 0")],
)
def test_bad_arguments(small_set, methods, model, limit, problem):
    with pytest.raises(InputError, match=problem):
        bench.run(small_set, methods, model, limit=limit)


def test_table(small_set, methods):
    table = bench.format_table(bench.run(small_set, ["none", "detail"], object()))
    lines = [line.split() for line in table.splitlines()]
    assert lines[0][:4] == ["items", "n", "method", "PSNR"]
    assert lines[2][:4] == ["all", "2", "none", lines[2][3]]
    assert lines[3][:2] == ["detail", "100.00"]
    assert any(line[:3] == ["difficulty", "easy", "2"] for line in lines if line)
