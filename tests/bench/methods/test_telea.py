import builtins

import numpy as np
import pytest
import torch

from rba_core.bench import metrics
from rba_core.bench.dataset import BenchmarkSet, Item
from rba_core.bench.methods.telea import telea
from rba_core.data.textures import product_texture
from rba_core.errors import InputError


def test_telea_fills_the_hole_and_nothing_else(small_set):
    pytest.importorskip("cv2")
    texture = torch.from_numpy(product_texture(np.random.default_rng(3), 192).copy()).permute(2, 0, 1)[:3].float() / 255
    item = BenchmarkSet(small_set)[0]
    item = Item(item.id, item.task, {}, texture, item.mask, item.reference)
    filled = telea(item, None, 0).image
    outside = item.mask < 0.5
    assert torch.equal(filled[:, outside], texture[:, outside])
    assert metrics.outside_changed_pixels(filled, texture, item.mask) == 0
    assert not torch.equal(filled, texture)
    assert metrics.hp_ssim(filled, texture, item.mask) < 0.9 < metrics.hp_ssim(texture, texture, item.mask)


def test_telea_without_opencv(small_set, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name == "cv2":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r'pip install "refine-by-align\[bench\]"'):
        telea(BenchmarkSet(small_set)[0], None, 0)
