import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL, PaintByExamplePipeline, PNDMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel,
)  # fmt: skip
from checkpoints import Shapes, depth_anything, randomly
from pictures import texture
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

from rba_core.bench.dataset import BenchmarkSet
from rba_core.bench.methods.mimicbrush import MimicBrush


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
    """An item all over detail, its artifact flat grey and always in the same place: what a seed of the set gives, versions of libraries decide."""
    mask, right = torch.zeros(192, 192), texture(192, 192)
    mask[118:144, 113:141] = 1
    return turned(replace(BenchmarkSet(small_set)[0], truth=right, mask=mask, image=torch.where(mask > 0.5, 0.5, right)))


BYTES = [chr(code) for code in range(33, 127)]


def save_tokenizer(folder):
    """CLIP's files, its vocabulary printable bytes and no merges."""
    words = [*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77), len(words)


NETWORK = {
    "sample_size": 8, "out_channels": 4, "block_out_channels": [16, 16, 32, 32], "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8,
}  # fmt: skip


def network(channels):
    return UNet2DConditionModel(**NETWORK, in_channels=channels)


def autoencoder():
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "block_out_channels": [8, 8, 16, 16]}
    return AutoencoderKL(**blocks, layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64)


def schedule():
    """As Stable Diffusion's folders have it."""
    return PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1)


def stable_diffusion(folder, channels):
    """A pipeline of random weights for 64 px, saved as `save_pretrained` does."""
    torch.manual_seed(channels)
    tokenizer, words = save_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=words, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=1,
    ))  # fmt: skip
    kind = StableDiffusionPipeline if channels == 4 else StableDiffusionInpaintPipeline
    kind(
        autoencoder(), text_encoder, tokenizer, network(channels), schedule(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("weights") / "sd", 4)


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("weights") / "inpainting", 9)


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory):
    """Paint-by-Example with random weights."""
    folder = tmp_path_factory.mktemp("weights") / "example"
    torch.manual_seed(1)
    image_encoder = inspect.getmodule(PaintByExamplePipeline).PaintByExampleImageEncoder(CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=32,
    ))  # fmt: skip
    extractor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    PaintByExamplePipeline(autoencoder(), image_encoder, network(9), schedule(), None, extractor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def anydoor_folder(anydoor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "anydoor"
    anydoor.save(folder)
    return folder


def depth_guider():
    """Of MimicBrush's file, whatever the size of its other networks."""
    shapes = Shapes()
    shapes.add("conv_in", 16, 1, 3, 3)
    for number, (given, width) in enumerate([(16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128)]):
        shapes.add(f"blocks.{number}", width, given, 3, 3)
    shapes.add("conv_out", 4, 128, 3, 3)
    return shapes


@pytest.fixture(scope="session")
def mimicbrush_folder(tmp_path_factory):
    """MimicBrush as published, with random weights."""
    folder = tmp_path_factory.mktemp("weights") / "mimicbrush"
    torch.manual_seed(2)
    image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=32,
    ))  # fmt: skip
    block = "up_blocks.3.attentions.1."
    left_out = ("conv_norm_out", "conv_out", f"{block}proj_out", *(f"{block}transformer_blocks.0.{part}." for part in ("attn1", "norm2", "attn2", "norm3", "ff")))
    weights = {
        "unet": network(13).state_dict(),
        "referencenet": {name: value for name, value in network(4).state_dict().items() if not name.startswith(left_out)},
        "depth_guider": randomly(depth_guider()),
        "image_encoder": image_encoder.state_dict(),
        "image_proj": randomly({"projector.weight": (32, 48), "projector.bias": (32,)}),
    }
    for part in ("mimicbrush", "depth_model"):
        (folder / part).mkdir(parents=True)
    torch.save(weights, folder / "mimicbrush" / "mimicbrush.bin")
    torch.save(randomly(depth_anything()), folder / "depth_model" / "depth_anything_vitb14.pth")
    autoencoder().save_pretrained(folder / "sd-vae-ft-mse")
    image_encoder.config.save_pretrained(folder / "image_encoder")
    return folder


@pytest.fixture
def small_mimicbrush(monkeypatch):
    monkeypatch.setattr(MimicBrush, "network", NETWORK | {"in_channels": 13})
