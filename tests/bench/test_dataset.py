import json
import shutil

import numpy as np
import pytest
import torch

from rba_core.bench.dataset import BenchmarkSet
from rba_core.errors import InputError
from rba_core.imageio import write_mask


@pytest.fixture
def folder(small_set, tmp_path):
    return shutil.copytree(small_set, tmp_path / "set")


def rewrite(folder, **changes):
    lines = (folder / "index.jsonl").read_text().splitlines()
    entry = json.loads(lines[1]) | changes
    lines[1] = json.dumps({key: value for key, value in entry.items() if value is not None})
    (folder / "index.jsonl").write_text("\n".join(lines))


def test_an_item(small_set):
    items = BenchmarkSet(small_set)
    assert [item.id for item in items] == ["00000", "00001"]
    item = items[1]
    assert item.image.shape == item.truth.shape == (3, 192, 192)
    assert item.task == "view_synthesis" and item.caption.endswith("seen from another side")
    assert item.labels["artifact"] == "smear" and item.labels["difficulty"] == "easy"
    assert set(item.mask.unique().tolist()) == set(item.correspondence.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(item.image[:, item.mask < 0.5], item.truth[:, item.mask < 0.5])


def test_optional_fields_may_be_absent(folder):
    rewrite(folder, truth=None, correspondence=None, reference_mask=None, caption="a card")
    item = BenchmarkSet(folder)[1]
    assert item.truth is item.correspondence is item.reference_mask is None
    assert item.caption == "a card"


def test_pictures_are_read_when_asked_for(folder):
    items = BenchmarkSet(folder)
    (folder / "00000" / "image.png").write_bytes(b"cut short")
    assert items[1].id == "00001"
    with pytest.raises(InputError, match="00000"):
        items[0]


def test_missing_index(tmp_path):
    with pytest.raises(InputError, match="no index.jsonl"):
        BenchmarkSet(tmp_path)


def test_empty_index(folder):
    (folder / "index.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        BenchmarkSet(folder)


def test_bad_json_names_its_line(folder):
    with open(folder / "index.jsonl", "a") as file:
        file.write('\n{"id": "x",\n')
    with pytest.raises(InputError, match="line 4 is not JSON"):
        BenchmarkSet(folder)


@pytest.mark.parametrize("line", ['{"id": "x", "task": "customization"}', '"a string"'])
def test_missing_fields(folder, line):
    (folder / "index.jsonl").write_text(line)
    with pytest.raises(InputError, match="line 1 lacks .*image, mask, reference"):
        BenchmarkSet(folder)


def test_missing_file(folder):
    rewrite(folder, truth="00001/nowhere.png")
    with pytest.raises(InputError, match="line 2: truth 00001/nowhere.png does not exist"):
        BenchmarkSet(folder)


@pytest.mark.parametrize("name, owner", [("mask", "image"), ("correspondence", "reference"), ("reference_mask", "reference")])
def test_sizes_must_match(folder, name, owner):
    write_mask(folder / "00001" / f"{name}.png", torch.ones(100, 192))
    with pytest.raises(InputError, match=f"00001: {name} is 192 x 100, {owner} 192 x 192"):
        BenchmarkSet(folder)[1]


def test_the_flow_is_read_in_pixels_and_known_under_the_mask(small_set):
    item = BenchmarkSet(small_set)[0]
    known = ~item.flow.isnan().any(0)
    assert item.flow.shape == (2, 192, 192) and not known[item.mask < 0.5].any() and known[item.mask > 0.5].float().mean() > 0.9
    column, row = item.flow[:, known].long()
    assert item.correspondence[row, column].mean() > 0.9


@pytest.mark.parametrize("write, message", [
    (lambda path: path.write_bytes(b"cut short"), "holds no flow"),
    (lambda path: np.savez(path, other=np.zeros(3)), "holds no flow"),
    (lambda path: np.savez(path, flow=np.zeros((192, 192, 2), np.float32)), r"flow has shape \(192, 192, 2\)"),
    (lambda path: np.savez(path, flow=np.zeros((2, 100, 192), np.float32)), "flow is 192 x 100, image 192 x 192"),
])  # fmt: skip
def test_a_broken_flow_is_told_of(folder, write, message):
    write(folder / "00001" / "flow.npz")
    with pytest.raises(InputError, match=message):
        BenchmarkSet(folder)[1]
