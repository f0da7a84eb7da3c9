import numpy as np
import pytest
import torch
from PIL import Image

from rba_core.data.scenes import Scenes, grid
from rba_core.training.validation import mean_iou, true_map, write_sheet


def blank(size: int = 64) -> Scenes:
    """The reference is the crop itself."""
    pictures = torch.zeros(1, 3, size, size)
    return Scenes(pictures, torch.zeros(1, 1, size, size), pictures, grid(size // 4, 1), torch.ones(1, 1, size // 4, size // 4))


def test_the_true_region_is_where_the_flow_carries_the_mask():
    scenes = blank()
    scenes.mask[0, 0, 16:32, 40:56] = 1
    truth = true_map(scenes)
    assert truth.shape == (1, 16, 16)
    wanted = torch.zeros(16, 16)
    wanted[4:8, 10:14] = 1
    assert torch.equal((truth[0] > 0.4 * truth.max()).float(), wanted)


def test_what_the_flow_cannot_speak_of_is_no_part_of_it():
    scenes = blank()
    scenes.mask[0, 0, 16:32, 40:56] = 1
    scenes.visible[..., :6, :] = 0
    assert true_map(scenes)[0].sum(1).nonzero().flatten().tolist() == [6, 7]


def test_iou_is_cut_at_the_threshold_of_each_maps_own_peak():
    truth = torch.zeros(3, 16, 16)
    truth[0, 2:6, 2:6] = 1
    truth[1, 8:10, 8:12] = 0.01
    found = torch.zeros_like(truth)
    found[0, 2:6, 4:8] = 5  # half of it, and as much beside it
    found[0, 10:, 10:] = 1.9
    found[1, 8:10, 8:12] = 3e-6
    found[2] = torch.rand(16, 16)  # its region is out of sight
    assert mean_iou(found, truth) == pytest.approx((1 / 3 + 1) / 2)
    assert mean_iou(truth, truth) == 1 and mean_iou(found[2:], truth[2:]) == 0


def test_the_sheet_has_a_row_an_item_and_a_column_a_heading(tmp_path):
    red, blue = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 40, 40), torch.tensor([0, 0, 1.0])[:, None, None].expand(3, 300, 300)
    write_sheet(tmp_path / "sheet.png", ["crop", "truth"], [[red, blue], [blue, blue], [red, red]], tile=50)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (20 + 3 * 56, 2 * 56, 3)
    assert [[sheet[20 + 56 * row + 25, 56 * column + 25].tolist() for column in (0, 1)] for row in (0, 1)] == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 255]] * 2]
