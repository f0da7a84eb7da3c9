from dataclasses import replace

import pytest
import torch

from rba_core.bench import metrics
from rba_core.bench.methods.oracle_warp import oracle_warp
from rba_core.bench.methods.sift_warp import sift_warp
from rba_core.errors import InputError


@pytest.mark.parametrize("method", [sift_warp, oracle_warp])
def test_warps_bring_back_the_detail_and_change_nothing_else(detailed, method):
    pytest.importorskip("cv2")
    outcome = method(detailed, None, 0)
    assert torch.equal(outcome.image[:, detailed.mask < 0.5], detailed.image[:, detailed.mask < 0.5])
    assert metrics.hp_ssim(outcome.image, detailed.truth, detailed.mask) > 0.8 > 0.5 > metrics.hp_ssim(detailed.image, detailed.truth, detailed.mask)
    assert metrics.end_point_error(outcome.flow, detailed.flow, detailed.correspondence) < 0.02
    assert metrics.iou(outcome.region.mask, detailed.correspondence) > 0.9


def test_sift_without_matches_leaves_the_image_as_it_is(detailed):
    pytest.importorskip("cv2")
    outcome = sift_warp(replace(detailed, reference=torch.full_like(detailed.reference, 0.5)), None, 0)
    assert outcome.fell_back and torch.equal(outcome.image, detailed.image)


def test_the_oracle_warp_needs_a_flow(detailed):
    pytest.importorskip("cv2")
    with pytest.raises(InputError, match="oracle-warp needs the true flow, which"):
        oracle_warp(replace(detailed, flow=None), None, 0)
