from dataclasses import replace

import pytest
import torch
from pictures import texture

from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods.anydoor import AnyDoor, centred, crop_around, enlarged, padded_hint
from rba_core.errors import InputError
from rba_core.geometry import Box


@pytest.fixture(scope="module")
def method(anydoor_folder) -> AnyDoor:
    return AnyDoor(anydoor_folder, "cpu", torch.float32)


def test_the_whole_reference_object_guides(small_set, method):
    item = BenchmarkSet(small_set)[0]
    image = method(item, None, 0).image
    for other in (1 - item.reference, torch.where(item.object_mask > 0.5, item.reference, 1 - item.reference)):
        changed = method(replace(item, reference=other), None, 0).image
        assert torch.equal(changed, image) == bool(((other == item.reference) | (item.object_mask < 0.5)).all())


def test_boxes_and_padding():
    assert enlarged(Box(100, 50, 20, 40), 1.1, 200, 300) == Box(99, 48, 22, 44)
    assert crop_around(Box(99, 48, 22, 44), 200, 300) == Box(66, 26, 88, 88)
    cut = crop_around(Box(0, 90, 40, 40), 200, 300)
    assert cut == Box(0, 70, 70, 80) and centred(80, 60) == (10, 10, 0, 0) and centred(60, 81) == (0, 0, 10, 11)
    assert centred(64, 64) == (0, 0, 0, 0)


def test_the_hint():
    picture, detail = texture(80, 60), torch.full((3, 256, 256), 0.5)
    hint = padded_hint(picture, Box(5, 10, 20, 30), centred(80, 60), detail, 160)
    assert hint.shape == (4, 160, 160) and set(hint[3].unique().tolist()) == {-1, 0, 1}
    assert (hint[3, :, :20] == -1).all() and (hint[3, :, 140:] == -1).all() and (hint[3, :, 20:140] >= 0).all()
    assert (hint[3] == 1).sum() == 40 * 60 and (hint[3, 20:80, 30:70] == 1).all()
    assert hint[:3, 25:75, 35:65].abs().max() < 1e-5 and (hint[:3, :, :18] == -1).all()


def test_the_artifact_is_not_seen_nor_imposed_but_what_is_beside_its_box_is_hinted(small_set, method):
    item, hints = BenchmarkSet(small_set)[0], []
    handle = method.model.detail_encoder.register_forward_pre_hook(lambda module, args: hints.append(args[0]))
    try:
        image = method(item, None, 0).image
        hidden = method(replace(item, image=torch.where(item.mask > 0.5, 1 - item.image, item.image)), None, 0).image
    finally:
        handle.remove()
    assert torch.equal(hints[0], hints[len(hints) // 2]) and (image - hidden).abs().max() < 1e-5
    assert hints[0].shape == (2, 4, 64, 64) and (hints[0][:, 3] == 1).any()


def test_another_models_folder_is_refused(model_folder):
    with pytest.raises(InputError, match="is not AnyDoor"):
        AnyDoor(model_folder, "cpu", torch.float32)
