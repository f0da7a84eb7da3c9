import json

import pytest

from rba_core.bench.report import write_report
from rba_core.bench.run import PIXEL_METRICS
from rba_core.errors import InputError

MEANS = dict.fromkeys((*PIXEL_METRICS, "seconds"), 0.5)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "docs" / "results"
    (folder / "grid-search").mkdir(parents=True)
    rows = [{"id": id, "method": "oracle", "task": task, **MEANS} for id, task in (("a", "try_on"), ("b", "compositing"))]
    groups = {"task": {"try_on": {"oracle": MEANS}, "compositing": {"oracle": MEANS}}}
    files = {
        "run.json": {"set": "synthetic", "n": 2, "methods": {"oracle": MEANS}, "groups": groups, "items": rows},
        "steps.json": {"set": "synthetic", "n": 2, "model": "m", "steps": {"1": MEANS, "50": MEANS}, "fewest": 1},
        "grid-search/grid.json": {"set": "validation", "n": 7, "model": "m", "timesteps": [6], "gamma": [[0.2, 0.3]], "dense": [[0.1, 0.4]], "best": {"timestep": 6, "layer": 1, "miou": 0.4}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_a_folder_stands_for_its_files(results):
    page = results.parent / "results.md"
    write_report([results], page)
    text = page.read_text()
    assert "## synthetic, 2 items" in text and "| oracle | 0.50 |" in text and "- **oracle**: M_gt in place" in text and "### task: try_on (1)" in text
    assert "## Denoising steps: synthetic, 2 items" in text and "| **1** | 0.50 |" in text
    assert "## Grid search over t and l: validation, 7 items" in text and "best 0.400 at t = 6, layer 1; by Eq. 5 alone, best 0.300" in text
    assert "](results/grid-search/heat_map.png)" in text and "](results/grid-search/curves.png)" in text


def test_files_keep_the_order_given(results):
    page = results / "page.md"
    write_report([results / "steps.json", results / "run.json"], page)
    text = page.read_text()
    assert text.index("Denoising steps") < text.index("## synthetic") and "Grid search" not in text


def test_what_is_not_a_result(results):
    (results / "other.json").write_text("{}")
    with pytest.raises(InputError, match="other.json is not what rba bench writes"):
        write_report([results], results / "page.md")
    with pytest.raises(InputError, match="nowhere.json does not exist"):
        write_report([results / "nowhere.json"], results / "page.md")
