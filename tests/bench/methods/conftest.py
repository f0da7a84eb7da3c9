from dataclasses import replace

import numpy as np
import pytest
import torch
from pictures import texture

from rba_core.bench.dataset import BenchmarkSet


@pytest.fixture
def second_stage(monkeypatch):
    """Keeps what the refinement is given: (guide's embedding, its mask, collage, strength)."""
    given = []

    def stub(model, crop, guide, *, collage, strength, seed, **sampling):
        assert set(sampling.values()) == {None}  # the model's own
        given.append((guide.embedding, guide.mask, collage, strength))
        return torch.full_like(crop.image, 0.5)

    monkeypatch.setattr("rba_core.pipeline.refine", stub)
    return given


def turned(item, angle=0.2):
    """An item whose reference is its truth turned, with the flow that goes with it."""
    height, width = item.mask.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    flow = torch.stack([cos * x - sin * y + width / 2, sin * x + cos * y + height / 2]).float()
    back = torch.stack([cos * x + sin * y, -sin * x + cos * y], -1).float() / torch.tensor([width / 2, height / 2])
    reference = torch.nn.functional.grid_sample(item.truth[None], back[None], align_corners=False, padding_mode="border")[0]
    carried = (torch.nn.functional.grid_sample(item.mask[None, None], back[None], align_corners=False)[0, 0] > 0.5).float()
    return replace(item, reference=reference, reference_mask=None, correspondence=carried, flow=torch.where(item.mask > 0.5, flow, torch.nan))


@pytest.fixture
def detailed(small_set):
    """An item all over detail, its artifact flat grey."""
    item, right = BenchmarkSet(small_set)[0], texture(192, 192)
    return turned(replace(item, truth=right, image=torch.where(item.mask > 0.5, 0.5, right)))
