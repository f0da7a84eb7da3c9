import json

import pytest
import torch

from rba_core import cli
from rba_core.bench import steps as bench_steps
from rba_core.bench.methods import Outcome
from rba_core.bench.run import PIXEL_METRICS
from rba_core.errors import InputError


@pytest.fixture
def refine(monkeypatch):
    """Stands in for the refinement: the artifact fades with the steps, and is gone from 4 on."""

    def stub(item, model, seed, *, steps):
        share = max(0.0, 1 - steps / 4)
        return Outcome(torch.where(item.mask > 0.5, share * item.image + (1 - share) * item.truth, item.image))

    monkeypatch.setattr(bench_steps, "detail", stub)


def test_the_fewest_steps_that_are_enough(small_set, refine):
    seen = []
    results = bench_steps.compare_steps(small_set, object(), (1, 2, 4, 8), progress=lambda *done: seen.append(done))
    assert results["n"] == 2 and list(results["steps"]) == ["1", "2", "4", "8"] and results["fewest"] == 4
    psnr = [means["masked_psnr"] for means in results["steps"].values()]
    assert psnr[0] < psnr[1] < psnr[2] == psnr[3] == 100
    assert seen == [(done, 8) for done in range(1, 9)]
    table = bench_steps.steps_table(results)
    assert table[0][:2] == ["steps", "PSNR dB"] and table[3][:2] == ["**4**", "100.00"] and len(table) == 5


def test_every_metric_has_to_stay():
    best = dict.fromkeys(PIXEL_METRICS, 0.5)
    assert bench_steps.fewest({1: best | {"hp_ssim": 0.4}, 2: best | {"detail_ncc": 0.491}, 50: best}) == 2
    assert bench_steps.fewest({1: best | {"hp_ssim": 0.4}, 2: best | {"detail_ncc": 0.489}, 50: best}) == 50
    assert bench_steps.fewest({1: best | {"hp_ssim": 0.9}, 50: best}) == 1
    low = dict.fromkeys(PIXEL_METRICS, -0.1)  # SSIM may be below 0
    assert bench_steps.fewest({1: low, 50: low}) == 1


def test_a_limit_of_nothing(small_set):
    with pytest.raises(InputError, match="limit: is 0"):
        bench_steps.compare_steps(small_set, object(), limit=0)


def test_the_command(small_set, model_folder, refine, tmp_path, capsys):
    assert cli.main(["bench", "steps", str(small_set), "--model", str(model_folder), "--limit", "1", "--json", str(tmp_path / "steps.json")]) == 0
    results = json.loads((tmp_path / "steps.json").read_text())
    assert results["n"] == 1 and results["model"] == "small" and list(results["steps"]) == ["1", "2", "4", "8", "16", "50"]
    out = capsys.readouterr().out
    assert "| **4** |" in out and "4 steps stay within 2% of the most" in out
