import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods.sd_inpainting import StableDiffusionInpainting
from rba_core.bench.methods.user_weights import prompt


@pytest.fixture
def method(inpainting_folder, monkeypatch):
    monkeypatch.setattr(StableDiffusionInpainting, "steps", 2)
    return StableDiffusionInpainting(inpainting_folder, "cpu", torch.float32)


def test_the_caption_guides_and_the_reference_does_not(small_set, method):
    item = BenchmarkSet(small_set)[0]
    image = method(item, None, 0).image
    assert torch.equal(method(replace(item, reference=1 - item.reference), None, 0).image, image)
    assert not torch.equal(method(replace(item, caption="a red cup"), None, 0).image, image)


def test_the_artifact_is_not_seen(small_set, method):
    item = BenchmarkSet(small_set)[0]
    seen = []
    encode = method.pipeline.vae.encode
    method.pipeline.vae.encode = lambda pictures, *rest, **named: seen.append(pictures) or encode(pictures, *rest, **named)
    method(item, None, 0)
    hidden = replace(item, image=torch.where(item.mask > 0.5, 1 - item.image, item.image))
    method(hidden, None, 0)
    blanked = [pictures for pictures in seen if (pictures == 0).any()]  # of the others the pipeline makes no use at full strength
    assert len(blanked) == 2 and (blanked[0] - blanked[1]).abs().mean() < 0.02  # but for the resampling at the mask's border


def test_prompt(small_set):
    item = replace(BenchmarkSet(small_set)[0], caption=None)
    assert prompt(replace(item, caption="two mugs")) == "two mugs"
    assert prompt(replace(item, labels={"subject": "teapot"})) == "a photo of a teapot"
    assert prompt(replace(item, labels={})) == "a photo of a product"


def test_the_text_encoder_is_read_under_old_names(inpainting_folder, tmp_path, method):
    folder = shutil.copytree(inpainting_folder, tmp_path / "inpainting")
    file = folder / "text_encoder" / "model.safetensors"
    save_file({"text_model." + name.removeprefix("text_model."): value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    read = StableDiffusionInpainting(folder, "cpu", torch.float32).pipeline.text_encoder.state_dict()
    for name, value in method.pipeline.text_encoder.state_dict().items():
        assert torch.equal(read[name], value), name


def test_latents_are_never_clipped(method):
    """The folder's PNDM schedule does not say so, and DDIM's default is to clip."""
    assert method.pipeline.scheduler.config.clip_sample is False and method.pipeline.scheduler.config.steps_offset == 1
