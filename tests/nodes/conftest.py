"""The nodes over the stand-in, with the small random model behind them."""

from __future__ import annotations

import comfy_stand_in
import pytest
import torch


@pytest.fixture(scope="session")
def nodes():
    """The pack's `nodes` package."""
    return comfy_stand_in.load_pack()


@pytest.fixture
def loaded(nodes, model):
    """The small model as Load Model hands it on."""
    cpu = torch.device("cpu")
    return comfy_stand_in.ModelPatcher(nodes.types.RefineByAlignModel(model), cpu, cpu)


@pytest.fixture
def inputs(scene):
    """The scene as ComfyUI passes it: IMAGE `[1, H, W, 3]`, MASK `[1, H, W]`."""
    return {
        "image": scene.image.movedim(0, -1)[None],
        "mask": scene.mask[None],
        "reference": scene.reference.movedim(0, -1)[None],
        "reference_mask": scene.reference_mask[None],
    }


@pytest.fixture
def whole(nodes, loaded, inputs):
    """The whole object, encoded."""
    return nodes.alignment.EncodeReference.execute(loaded, inputs["reference"], inputs["reference_mask"])[0]


@pytest.fixture
def zoomed(nodes, loaded, inputs):
    """The crop to align: (crop, its mask, its box)."""
    return nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "alignment", 0.0).args


@pytest.fixture
def defaults(nodes):
    """`defaults(node, **changes)`: a value for each widget of a node."""

    def values(node, **changes):
        entries = [entry for entry in node.define_schema().inputs if "default" in entry.options or "options" in entry.options]
        return {entry.id: entry.options.get("default", entry.options.get("options", [None])[0]) for entry in entries} | changes

    return values


@pytest.fixture
def same_product(scene):
    """`inputs` whose image shows the reference itself, its mask damaged: registration finds it again."""
    generator = torch.Generator().manual_seed(3)
    print_ = torch.nn.functional.interpolate(torch.rand(1, 3, 20, 24, generator=generator), (96, 130), mode="bicubic").clamp(0, 1)
    image = torch.where(scene.mask > 0.5, torch.rand(1, 3, 96, 130, generator=generator), print_)
    region = torch.zeros(1, 96, 130)
    region[:, 26:48, 46:72] = 1
    return {
        "image": image.movedim(1, -1),
        "mask": scene.mask[None],
        "reference": print_.movedim(1, -1),
        "reference_mask": torch.ones(1, 96, 130),
        "matched_region": region,
    }
