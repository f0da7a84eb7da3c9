import inspect
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from diffusers import PaintByExamplePipeline
from safetensors.torch import load_file, save_file

from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods.paint_by_example import PaintByExample


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(PaintByExample, "steps", 2)


def test_the_reference_guides_and_what_lies_far_from_its_object_does_not(small_set, example_folder, few_steps):
    item = BenchmarkSet(small_set)[0]
    method = PaintByExample(example_folder, "cpu", torch.float32)
    image = method(item, None, 0).image
    assert not torch.equal(method(replace(item, reference=1 - item.reference), None, 0).image, image)
    object_mask = torch.zeros_like(item.object_mask)
    object_mask[40:90, 50:100] = 1
    cut = replace(item, reference_mask=object_mask)
    other = cut.reference.clone()
    other[:, :30], other[:, :, 110:] = 0, 1
    assert torch.equal(method(cut, None, 0).image, method(replace(cut, reference=other), None, 0).image)


@pytest.mark.parametrize("prefix", ["model.", "model.vision_model."])
def test_the_image_encoder_is_read_under_old_and_new_names(example_folder, tmp_path, prefix):
    if prefix == "model." and transformers.__version__ < "5":
        pytest.skip("transformers 5 writes these names, 4 cannot read them")
    folder = shutil.copytree(example_folder, tmp_path / "example")
    file = folder / "image_encoder" / "model.safetensors"
    state = {"model." + name.removeprefix("model.").removeprefix("vision_model.") if name.startswith("model.") else name: value for name, value in load_file(file).items()}
    save_file({prefix + name.removeprefix("model.") if name.startswith("model.") else name: value for name, value in state.items()}, file, metadata={"format": "pt"})
    read = PaintByExample(folder, "cpu", torch.float32).pipeline.image_encoder
    for name, value in read.state_dict().items():
        assert torch.equal(value, state[name.replace("vision_model.", "")]), name
    assert isinstance(read, inspect.getmodule(PaintByExamplePipeline).PaintByExampleImageEncoder)
