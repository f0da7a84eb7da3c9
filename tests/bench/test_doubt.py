import json

import pytest
import torch

from rba_core.bench import doubt as bench
from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods import Outcome
from rba_core.bench.report import write_report


def test_what_is_made_to_fail(small_set):
    item, other = BenchmarkSet(small_set)
    assert bench.made_to_fail(item, "right", other) is item
    assert bench.made_to_fail(item, "wrong object", other).reference is other.reference
    mirrored = bench.made_to_fail(item, "mirrored", other)
    assert torch.equal(mirrored.reference.flip(-1), item.reference) and torch.equal(mirrored.reference_mask.flip(-1), item.reference_mask)
    hidden = bench.made_to_fail(item, "hidden", other)
    assert not (hidden.reference_mask * item.correspondence).any() and hidden.reference_mask.any()
    assert (hidden.reference[:, item.correspondence > 0.5] == 0.5).all()
    assert torch.equal(hidden.image, item.image)


@pytest.fixture
def methods(monkeypatch):
    """Stands in for both: sure of itself where the reference is the item's own."""

    def detail(item, model, seed):
        sure = item.flow is not None and torch.equal(item.reference, detail.own[item.id])
        return Outcome(item.image, flow=item.flow if sure else None, confidence=0.9 if sure else 0.002, evidence=(0.9, 0.5) if sure else (0.3, 0.4))

    monkeypatch.setattr(bench, "detail", detail)
    monkeypatch.setattr(bench, "paper", lambda item, model, seed: Outcome(item.image))
    return detail


def test_shares_of_low_confidence_and_of_right_choices(small_set, methods, tmp_path):
    methods.own = {item.id: item.reference for item in BenchmarkSet(small_set)}
    told = []
    results = bench.doubt(small_set, object(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)] and results["n"] == 2 and results["told"] == 1
    assert [results["kinds"][kind]["low"] for kind in bench.KINDS] == [0, 1, 1, 1]
    assert [results["kinds"][kind]["unused"] for kind in bench.KINDS] == [0, 1, 1, 1]
    assert results["kinds"]["right"]["detail"] == results["kinds"]["right"]["paper"]
    (tmp_path / "doubt.json").write_text(json.dumps(results | {"model": "rba-tiny"}))
    write_report([tmp_path], tmp_path / "page.md")
    assert "| wrong object | 2 | 100% | 100% | " in (tmp_path / "page.md").read_text()
