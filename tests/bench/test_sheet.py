import numpy as np
import pytest
from PIL import Image

from rba_core.bench.dataset import BenchmarkSet, Item
from rba_core.bench.methods import Outcome
from rba_core.bench.run import measure
from rba_core.bench.sheet import CAPTION, GAP, HEADING, ContactSheet
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.postprocessing import MatchedRegion


def test_a_row_an_item(small_set, tmp_path):
    sheet = ContactSheet(tile=96)
    for item in BenchmarkSet(small_set):
        region = MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence)
        outcomes = {"none": Outcome(item.image), "telea": Outcome(item.image), "detail": Outcome(item.truth, region)}
        sheet.add(item, outcomes, {name: measure(item, outcome) for name, outcome in outcomes.items()})
    sheet.save(tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    columns = ["image", "mask", "reference", "detail", "truth", "zoom: image", "zoom: telea", "zoom: detail", "zoom: truth"]
    assert sheet.headings == columns
    assert pixels.shape == (HEADING + 2 * (96 + CAPTION + GAP), 9 * (96 + GAP), 3)

    def tile(row, column):
        y, x = HEADING + row * (96 + CAPTION + GAP) + CAPTION, columns.index(column) * (96 + GAP)
        return pixels[y : y + 96, x : x + 96]

    for row in range(2):
        assert np.array_equal(tile(row, "detail"), tile(row, "truth"))
        assert np.array_equal(tile(row, "zoom: detail"), tile(row, "zoom: truth"))
        assert not np.array_equal(tile(row, "zoom: image"), tile(row, "zoom: truth"))
        coarse = np.abs(tile(row, "image") - tile(row, "truth")).sum(-1) > 60
        assert coarse.any() and tile(row, "mask")[coarse].mean() > 128


def test_items_without_truth_or_region(small_set, tmp_path):
    item = BenchmarkSet(small_set)[0]
    wide = item.image[:, :150]
    mask = wide.new_zeros(150, 192)
    mask[60:80, 60:80] = 1
    bare = Item(item.id, item.task, {}, wide, mask, item.reference)
    sheet = ContactSheet(tile=64)
    outcome = Outcome(bare.image)
    sheet.add(bare, {"none": outcome}, {"none": measure(bare, outcome)})
    sheet.save(tmp_path / "sheet.png")
    assert sheet.headings == ["image", "mask", "reference", "none", "zoom: image", "zoom: none"]


def test_an_empty_sheet(tmp_path):
    with pytest.raises(InputError, match="no rows"):
        ContactSheet().save(tmp_path / "sheet.png")
