import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rba_core.bench.report import differences_table, means_table, small_regions_table, worst_first, write_report
from rba_core.bench.run import PIXEL_METRICS, by_method, summary
from rba_core.errors import InputError

MEANS = dict.fromkeys((*PIXEL_METRICS, "seconds"), 0.5)


def kept(id: str, **figures: dict) -> dict:
    return {"id": id, "labels": {"task": "try_on" if id == "a" else "compositing"}, "figures": {name: MEANS | own for name, own in figures.items()}, "judged": {}, "failed": {}}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "docs" / "results"
    (folder / "grid-search").mkdir(parents=True)
    items = [kept("a", none={"hp_ssim": 0.2}, detail={"hp_ssim": 0.4}), kept("b", none={"hp_ssim": 0.3}, detail={"hp_ssim": 0.2})]
    items[1]["failed"] = {"oracle": "RuntimeError: <no>"}
    files = {
        "run.json": summary("synthetic", ["none", "oracle", "detail"], items) | {"made": {"seed": 7}},
        "steps.json": {"set": "synthetic", "n": 2, "model": "m", "steps": {"1": MEANS, "50": MEANS}, "fewest": 1},
        "grid-search/grid.json": {"set": "validation", "n": 7, "model": "m", "timesteps": [6], "gamma": [[0.2, 0.3]], "dense": [[0.1, 0.4]], "best": {"timestep": 6, "layer": 1, "miou": 0.4}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("heat_map", "curves"):
        Image.new("RGB", (8, 8)).save(folder / "grid-search" / f"{name}.png")
    return folder


def test_a_folder_stands_for_its_files(results):
    page = results.parent / "results.md"
    write_report([results], page)
    text = page.read_text()
    assert "## synthetic, 2 items" in text and "| detail | 2 | 0.50 [0.50, 0.50] |" in text and "- **none**: The image with its artifact" in text
    assert "### task: try_on (1)" in text and "Made with seed 7." in text and "oracle on b: RuntimeError: <no>" in text
    assert "## Denoising steps: synthetic, 2 items" in text and "| **1** | 0.50 |" in text
    assert "## Grid search over t and l: validation, 7 items" in text and "best 0.400 at t = 6, layer 1; by Eq. 5 alone, best 0.300" in text
    assert "](results/grid-search/heat_map.png)" in text and "](results/grid-search/curves.png)" in text
    assert "](results/run.png)" in text and Image.open(results / "run.png").width > 300


def test_html_stands_alone(results):
    (results / "run").mkdir()
    (results / "run" / "made.json").write_text("{}")
    for number, id in enumerate("ab"):
        tiles = results / "run" / f"{number:06d}"
        tiles.mkdir()
        tiles.with_suffix(".json").write_text(json.dumps({"id": id}))
        for name in ("image", "reference", "result-detail", "zoom-image", "zoom-detail"):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tiles / f"{name}.jpg")
    page = results.parent / "page.html"
    write_report([results], page)
    text = page.read_text()
    assert not re.search(r'src="(?!data:)', text) and "<link" not in text and "<script" not in text
    assert text.count("<figure>") == 2 * 5 and text.index('"words">b') < text.index('"words">a')  # b is the worse
    assert "<td>0.300 <small>[0.200, 0.400]</small></td>" in text and "<b>none</b>" in text
    assert "&lt;no&gt;" in text and "<no>" not in text


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
    assert not (results / "page.md").exists()


def test_differences_are_paired():
    """All of ours are better by 0.1, whatever the spread between items."""
    rows = [{"id": id, "method": method, "hp_ssim": id / 20 + gain, "detail_ncc": 0.5} for id in range(20) for method, gain in (("none", 0.0), ("detail", 0.1))]
    head, row = differences_table(rows, ["none", "detail"])
    assert row == ["none", "+0.100 [+0.100, +0.100]", "100%", "+0.000 [+0.000, +0.000]", "0%"]


def test_small_regions():
    """Six items, two of them the smallest third, three of at most two tokens; a method without alignment has no line."""
    rows = [{"id": "none", "method": "none", "hp_ssim": 0.5}]
    for size, iou in ((5.0, 0.9), (1.0, 0.3), (2.0, 0.6), (1.5, 0.8), (2.1, 0.7), (3.0, 0.7)):
        rows.append({"id": str(size), "method": "detail", "region_tokens": size, "iou": iou, "token_rounding_iou": 0.4, "token_bound_iou": 0.7})
    table = small_regions_table(rows, ["none", "detail"])
    assert table[1:] == [
        ["smallest third", "2", "detail", "0.550", "0.400", "50%", "0.700", "50%"],
        ["up to 2 x 2 tokens", "3", "detail", "0.567", "0.400", "67%", "0.700", "33%"],
    ]
    assert len(small_regions_table(rows[:1], ["none"])) == 1


def test_a_method_with_fewer_items_says_so():
    rows = [{"id": "a", "method": "none", **MEANS}, {"id": "b", "method": "none", **MEANS}, {"id": "a", "method": "detail", **MEANS}]
    table = means_table(rows, ["none", "detail"], intervals=False)
    assert table[0][1] == "n" and [row[1] for row in table[1:]] == ["2", "1"]


def test_the_worst_item_comes_first():
    rows = [{"id": id, "method": "detail", "hp_ssim": value} for id, value in zip("abc", (0.5, 0.1, 0.3))]
    assert [own["detail"]["id"] for own in worst_first(rows, ["detail"])] == ["b", "c", "a"]
    assert np.all(np.diff([own["detail"]["hp_ssim"] for own in worst_first(rows, ["detail"])]) > 0)


def test_the_committed_page_is_made_of_the_committed_figures(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    shutil.copytree(docs / "results", tmp_path / "results")
    write_report([tmp_path / "results"], tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (docs / "results.md").read_text()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_means_are_those_of_their_items(path):
    stored = json.loads(path.read_text())
    if "methods" in stored:
        methods = list(stored["methods"])
        for label, values in [("all", {"": stored["methods"]}), *stored["groups"].items()]:
            for value, means in values.items():
                own = [row for row in stored["items"] if label == "all" or str(row.get(label)) == value]
                assert by_method(methods, own) == {name: pytest.approx(figures) for name, figures in means.items()}
