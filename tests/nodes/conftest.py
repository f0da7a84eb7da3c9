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
def defaults(nodes):
    """`defaults(node, **changes)`: a value for each widget of a node."""

    def values(node, **changes):
        entries = [entry for entry in node.define_schema().inputs if "default" in entry.options or "options" in entry.options]
        return {entry.id: entry.options.get("default", entry.options.get("options", [None])[0]) for entry in entries} | changes

    return values
