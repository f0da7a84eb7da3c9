import numpy as np
import pytest
from PIL import Image

from rba_core.bench.dataset import BenchmarkSet, Item
from rba_core.bench.methods import Outcome
from rba_core.bench.sheet import CAPTION, GAP, HEADING, TILE, caption, columns, contact_sheet, save_tiles
from rba_core.errors import InputError
from rba_core.geometry import Box
from rba_core.postprocessing import MatchedRegion


def test_a_row_an_item(small_set, tmp_path):
    rows = []
    for item in BenchmarkSet(small_set):
        region = MatchedRegion(item.correspondence, Box.around(item.correspondence), item.correspondence)
        save_tiles(tmp_path / item.id, item, {"none": Outcome(item.image), "telea": Outcome(item.image), "detail": Outcome(item.truth, region)})
        rows.append((tmp_path / item.id, "words"))
    shown = list(columns(["none", "telea", "detail"]))
    assert shown == ["image", "M* of detail", "detail", "zoom: image", "zoom: detail", "zoom: truth", "zoom: telea"]
    pixels = np.asarray(contact_sheet(rows, ["none", "telea", "detail"])).astype(int)
    assert pixels.shape == (HEADING + 2 * (TILE + CAPTION + GAP), 7 * (TILE + GAP), 3)

    def tile(row, column):
        y, x = HEADING + row * (TILE + CAPTION + GAP) + CAPTION, shown.index(column) * (TILE + GAP)
        return pixels[y : y + TILE, x : x + TILE]

    for row in range(2):
        assert np.array_equal(tile(row, "zoom: detail"), tile(row, "zoom: truth"))
        assert not np.array_equal(tile(row, "zoom: image"), tile(row, "zoom: truth"))
        assert np.array_equal(tile(row, "zoom: image"), tile(row, "zoom: telea"))


def test_items_without_truth_or_region(small_set, tmp_path):
    item = BenchmarkSet(small_set)[0]
    wide = item.image[:, :150]
    mask = wide.new_zeros(150, 192)
    mask[60:80, 60:80] = 1
    save_tiles(tmp_path, Item(item.id, item.task, {}, wide, mask, item.reference), {"none": Outcome(wide)})
    assert {path.stem for path in tmp_path.iterdir()} == {"image", "reference", "zoom-image", "result-none", "zoom-none"}
    assert Image.open(tmp_path / "image.jpg").size == (TILE, TILE)
    assert contact_sheet([(tmp_path, "")], ["none"]).width == 5 * (TILE + GAP)


def test_words_of_an_item():
    rows = {"none": {"id": "a", "hp_ssim": 0.2}, "detail": {"id": "a", "hp_ssim": 0.75, "iou": 0.5, "fell_back": False, "artifact": "smear"}}
    assert caption(rows) == "a   smear   IoU 0.50   hp-SSIM none 0.20, detail 0.75"


def test_an_empty_sheet():
    with pytest.raises(InputError, match="no rows"):
        contact_sheet([], ["none"])
