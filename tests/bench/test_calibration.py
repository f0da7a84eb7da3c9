import numpy as np
import pytest
import torch
from scipy.special import expit

from rba_core import RefineByAlign
from rba_core.bench import calibration as bench
from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.doubt import KINDS, made_to_fail
from rba_core.errors import InputError


@pytest.fixture(scope="module")
def model():
    return RefineByAlign.load("rba-tiny")


def test_calibrating_on_a_set(small_set, model):
    told = []
    fitted = bench.calibrate([small_set], model, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert len(fitted["rows"]) == 2 * len(bench.TAKES) * len(KINDS) and {row["kind"] for row in fitted["rows"]} == set(KINDS)
    assert len(fitted["weights"]) == len(fitted["rows"][0]["evidence"])
    right = [expit(np.dot(row["evidence"], fitted["weights"]) + fitted["constant"]) for row in fitted["rows"] if row["kind"] == "right" and row["error"] <= bench.RIGHT]
    assert fitted["below"][0.5]["right"] == pytest.approx(np.mean(np.array(right) < 0.5))
    shares = [fitted["below"][bar]["wrong object"] for bar in bench.BARS]
    assert shares == sorted(shares)


def test_evidence_of_a_right_reference_and_of_one_that_is_not(small_set, model):
    item, other = BenchmarkSet(small_set)
    right, error = bench.evidence(item, model, 0)
    wrong, missed = bench.evidence(made_to_fail(item, "wrong object", other), model, 0)
    assert error < bench.RIGHT < missed and right[0] > wrong[0]


def test_taken_anew_the_artifact_and_the_geometry_stay(small_set):
    item = BenchmarkSet(small_set)[0]
    anew = bench.taken_anew(item, np.random.default_rng(1), 1.0, 0.6, 3.0)
    inside = item.mask > 0.5
    assert torch.equal(anew.image[:, inside], item.image[:, inside]) and not torch.equal(anew.image[:, ~inside], item.image[:, ~inside])
    assert 0 <= anew.image.min() and anew.image.max() <= 1 and 0 <= anew.reference.min() and anew.reference.max() <= 1
    assert set(anew.reference_mask.unique().tolist()) <= {0.0, 1.0}
    both, either = (anew.reference_mask * item.object_mask).sum(), torch.maximum(anew.reference_mask, item.object_mask).sum()
    assert both / either > 0.9
    again = bench.taken_anew(item, np.random.default_rng(1), 1.0, 0.6, 3.0)
    assert torch.equal(again.image, anew.image) and torch.equal(again.reference, anew.reference)


def test_harsher_is_farther_from_the_picture(small_set):
    picture = BenchmarkSet(small_set)[0].image

    def departure(harshness: float) -> float:
        return np.mean([float((bench.photographed(picture, np.random.default_rng(seed), harshness) - picture).abs().mean()) for seed in range(4)])

    assert departure(0.1) < 0.05 < departure(1.0)


def test_the_fit_tells_right_from_wrong():
    generator = np.random.default_rng(0)
    rows = [{"kind": "right", "error": 0.02, "evidence": [0.9 + e, 0.5]} for e in generator.normal(0, 0.05, 60)]
    rows += [{"kind": "hidden", "error": 0.02, "evidence": [0.5 + e, 0.5]} for e in generator.normal(0, 0.05, 60)]
    rows += [{"kind": "right", "error": 0.2, "evidence": [5.0, 0.0]}]  # neither: left out
    weights, constant = bench.fit(rows)
    assert abs(weights[1]) < 1e-3
    odds = [constant + weights[0] * value + weights[1] * 0.5 for value in (0.5, 0.9)]
    assert odds[0] < -2 and odds[1] > 2


def test_nothing_right_to_fit_to():
    with pytest.raises(InputError, match="no registration that is known to be right"):
        bench.fit([{"kind": "hidden", "error": 0.0, "evidence": [0.5]}])
