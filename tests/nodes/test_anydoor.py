"""A model with a detail encoder behind the nodes: same nodes, same outputs."""

import comfy_stand_in
import pytest
import torch


@pytest.fixture
def loaded(nodes, anydoor):
    cpu = torch.device("cpu")
    return comfy_stand_in.ModelPatcher(nodes.types.RefineByAlignModel(anydoor), cpu, cpu)


def test_an_encoded_reference_carries_its_map(nodes, loaded, anydoor, inputs):
    (reference,) = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"], inputs["reference_mask"])[0]
    assert reference["embedding"].shape == (1, 257, 64)
    again = nodes.types.encoded(reference, anydoor)
    assert again.tokens == 16 and torch.equal(again.detail, reference["detail"]) and again.detail.any()


def test_refine_by_align(nodes, loaded, inputs, defaults):
    settings = defaults(nodes.refinement.RefineByAlign, on_flat="single-stage")
    image = nodes.refinement.RefineByAlign.execute(loaded, **inputs, **settings)[0]
    outside = inputs["mask"][0] < 0.5
    assert torch.equal(image[0][outside], inputs["image"][0][outside]) and not torch.equal(image, inputs["image"])
