import pytest
import torch

from rba_core.overlay import overlay


def preview(nodes, *arguments):
    return nodes.preview.CorrespondencePreview.execute(*arguments)


def test_region(nodes, scene, inputs):
    output = preview(nodes, inputs["reference"], inputs["reference_mask"])
    assert torch.equal(output[0][0].movedim(-1, 0), overlay(scene.reference, scene.reference_mask))
    assert output.ui.image is output[0]


def test_raw_map_is_carried_to_the_reference(nodes, loaded, inputs):
    whole = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"], inputs["reference_mask"])[0]
    raw = torch.zeros(1, 16, 16)
    raw[0, 8, 8] = 0.01
    drawn = preview(nodes, inputs["reference"], raw, whole)[0]
    far, near = drawn[0, 10, 15], drawn[0, 42, 54]
    assert drawn.shape == inputs["reference"].shape
    assert near[0] - near[2] > far[0] - far[2]


def test_raw_map_alone_is_refused(nodes, inputs):
    with pytest.raises(ValueError, match="^matched region: is 16 x 16, the reference 101 x 81; .*encoded_reference"):
        preview(nodes, inputs["reference"], torch.rand(1, 16, 16))
