import math
import sys

import pytest
import torch

from rba_core.bench import metrics


def values(nodes, **pictures):
    output = nodes.score.Score.execute(**pictures)
    names = [socket.id for socket in nodes.score.Score.define_schema().outputs]
    return dict(zip(names, output.args, strict=True))


@pytest.fixture
def pair(scene):
    """Truth, and a result that is off by a tenth under the mask."""
    truth = scene.image.movedim(0, -1)[None] * 0.8
    return truth, truth + 0.1 * scene.mask[None, ..., None]


def test_against_the_truth(nodes, scene, inputs, pair):
    truth, refined = pair
    found = values(nodes, refined=refined, mask=inputs["mask"], truth=truth)
    assert found["psnr"] == pytest.approx(20, abs=1e-4)
    pictures = [picture[0].movedim(-1, 0) for picture in (refined, truth)]
    for output, metric in (("ssim", metrics.masked_ssim), ("hp_ssim", metrics.hp_ssim), ("ncc", metrics.detail_ncc)):
        assert found[output] == pytest.approx(metric(*pictures, scene.mask), abs=1e-9)
    assert math.isnan(found["changed"]) and "changed: not available, connect image" in found["scores"]


def test_gain_over_the_image_is_told(nodes, inputs, pair):
    truth, refined = pair
    worse = truth + 0.2 * inputs["mask"][..., None]
    assert "PSNR dB: 20.00 (before: 13.98)" in values(nodes, refined=refined, mask=inputs["mask"], truth=truth, image=worse)["scores"]


def test_without_truth_only_what_needs_none(nodes, inputs):
    refined = inputs["image"].clone()
    refined[:, 0, :3] = 1 - refined[:, 0, :3].round()
    found = values(nodes, refined=refined, mask=inputs["mask"], image=inputs["image"])
    assert found["changed"] == 3
    assert all(math.isnan(found[name]) for name in ("psnr", "ssim", "hp_ssim", "ncc", "kgain"))
    assert "PSNR dB: not available, connect truth" in found["scores"] and "KGain: not available, connect reference" in found["scores"]


def test_keypoints_found_again_count(nodes, same_product):
    found = values(
        nodes, refined=same_product["reference"], mask=same_product["mask"], image=same_product["image"], reference=same_product["reference"],
        reference_mask=same_product["reference_mask"],
    )  # fmt: skip
    assert found["kgain"] == 1


def test_without_opencv_it_is_said(nodes, inputs, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    found = values(nodes, refined=inputs["image"], mask=inputs["mask"], image=inputs["image"], reference=inputs["reference"])
    assert math.isnan(found["kgain"]) and "KGain: not available, kgain needs OpenCV; pip install" in found["scores"]


def test_batch_gives_means(nodes, inputs, pair):
    truth, refined = pair
    found = values(nodes, refined=torch.cat([refined, truth]), mask=inputs["mask"], truth=truth)
    assert found["psnr"] == pytest.approx(60, abs=1e-3)
    assert found["scores"].startswith("mean of 2 images\n")


def test_truth_of_another_size_is_refused(nodes, inputs, pair):
    with pytest.raises(ValueError, match="^truth: is 130 x 90, the refined image 130 x 96; give both in one size$"):
        values(nodes, refined=pair[1], mask=inputs["mask"], truth=pair[0][:, :90])
