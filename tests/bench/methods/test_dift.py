import numpy as np
import pytest
import torch
from pictures import texture

from rba_core.bench import metrics
from rba_core.bench.dataset import Item
from rba_core.bench.methods.dift import POINTS, Dift, contour_points, nearest
from rba_core.feature_alignment import CROP


def test_nearest_finds_the_same_feature_elsewhere():
    torch.manual_seed(0)
    query, key = torch.randn(100, 8, 8), torch.randn(100, 8, 8)
    key[:, 5, 2] = 9 * query[:, 1, 6]  # cosine does not see the length
    found = nearest(query, np.array([[6 * 8 + 4, 1 * 8 + 4]]), key, torch.ones(64, 64))
    assert np.abs(found[0] - [2 * 8 + 3.5, 5 * 8 + 3.5]).max() <= 4
    allowed = torch.ones(64, 64)
    allowed[:, :32] = 0
    assert nearest(query, np.array([[52, 12]]), key, allowed)[0, 0] >= 32


def test_contour_points_stand_on_the_border_at_equal_distances():
    cv2 = pytest.importorskip("cv2")
    mask = torch.zeros(64, 64)
    mask[20:41, 10:51] = 1
    mask[0:2, 0:2] = 1
    points = contour_points(cv2, mask)
    assert points.shape == (POINTS, 2)
    assert all((x in (10, 50) and 20 <= y <= 40) or (y in (20, 40) and 10 <= x <= 50) for x, y in points)
    steps = np.abs(points - np.roll(points, 1, 0)).sum(1)
    assert steps.max() - steps.min() <= 1


def test_a_picture_matched_with_itself_gives_the_mask(sd_folder):
    """Crop and reference are both the whole picture, so that each point is its own match."""
    pytest.importorskip("cv2")
    picture, mask = texture(64, 64), torch.zeros(64, 64)
    mask[22:42, 20:42] = 1
    outcome = Dift(sd_folder, "cpu", torch.float32)(Item("x", "customization", {}, picture, mask, picture), None, 0)
    assert metrics.iou(outcome.region.mask, mask) > 0.5  # 0.52 to 0.96 with other random weights, which versions of transformers draw differently
    assert torch.equal(outcome.image, picture) and not outcome.fell_back


def test_features_are_those_of_the_second_up_block(sd_folder):
    pytest.importorskip("cv2")
    method = Dift(sd_folder, "cpu", torch.float32)
    features = method.features(texture(64, 64), CROP, 0)
    assert features.shape == (32, 4, 4)
    assert torch.equal(features, method.features(texture(64, 64), CROP, 0)) and not torch.equal(features, method.features(texture(64, 64), CROP, 1))
