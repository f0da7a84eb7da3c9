"""Small random models in the topology of Stable Diffusion 1.x, built once, and a scene to run them on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the suite runs two processes, and small operations gain little by a second thread

import checkpoints
import hypothesis
import pytest
import torch
from comfy_server import expected, prompt, sample, server  # noqa: F401 (fixtures)
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from rba_core.alignment import cross_attentions
from rba_core.model import ModelConfig, RefineByAlign, read_config

hypothesis.settings.register_profile("rba", max_examples=60, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("rba")

LATENT_CHANNELS = 4


def build_model(context_features: int = 0, prediction: str = "epsilon", sharpness: float = 30.0, seed: int = 0, collage: bool = False) -> RefineByAlign:
    """All 16 cross-attentions, 4 levels, 64 px crops, 0.7 M parameters, random weights.

    Random attention is nearly uniform; `sharpness` scales the keys of the alignment layer so that its map has
    peaks (1 leaves it flat).
    """
    torch.manual_seed(seed)
    model = RefineByAlign(
        ModelConfig(image_size=64, context_features=context_features, collage=collage, steps=3, guidance=1.5),
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 8, 16, 16],
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
            sample_size=64,
        ),
        UNet2DConditionModel(
            sample_size=8,
            in_channels=2 * LATENT_CHANNELS + 1 + (LATENT_CHANNELS + 1 if collage else 0) + context_features,
            out_channels=LATENT_CHANNELS,
            block_out_channels=[16, 16, 32, 32],
            layers_per_block=2,
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)),
        DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=False,
        ),
    ).eval()
    with torch.no_grad():
        cross_attentions(model.unet)[model.config.alignment_layer].to_k.weight.mul_(sharpness)
    return model


@pytest.fixture(scope="session")
def make_model():
    """`make_model(context_features=0, prediction="epsilon", sharpness=30.0, seed=0, collage=False)`, the same model for the same
    arguments: leave it as it is. `make_model.__wrapped__(...)` gives a fresh one to change."""
    return cache(build_model)


@pytest.fixture(scope="session")
def model(make_model) -> RefineByAlign:
    return make_model()


@pytest.fixture(
    scope="session",
    params=[(0, "epsilon", False), (0, "v_prediction", False), (6, "epsilon", False), (6, "v_prediction", True)],
    ids=["noise", "velocity", "noise, context features", "velocity, context features, collage"],
)
def every_model(request, make_model) -> RefineByAlign:
    context_features, prediction, collage = request.param
    return make_model(context_features, prediction, collage=collage)


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory) -> Path:
    """The small model on disk; leave it as it is."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model.save(folder)
    return folder


@pytest.fixture(scope="session")
def small_anydoor() -> dict:
    """The config anydoor in narrow, for `checkpoints.SMALL21`: 64 px crops, DINOv2 of two layers."""
    parts = read_config("anydoor")
    width, multiples = checkpoints.SMALL21["width"], checkpoints.SMALL21["multiples"]
    widths = [width * multiple for multiple in multiples]
    network = {"block_out_channels": widths, "attention_head_dim": [width // 64 for width in widths], "cross_attention_dim": checkpoints.SMALL21["context"]}
    return parts | {
        "model": parts["model"] | {"image_size": 64},
        "unet": parts["unet"] | network,
        "detail_encoder": parts["detail_encoder"] | network,
        "vae": parts["vae"] | {"block_out_channels": [32, 32, 32, 64]},
        "encoder": parts["encoder"] | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    }


@pytest.fixture(scope="session")
def anydoor(small_anydoor) -> RefineByAlign:
    """Random weights, two steps; leave it as it is."""
    torch.manual_seed(0)
    model = RefineByAlign.from_config(small_anydoor | {"model": small_anydoor["model"] | {"steps": 2}})
    with torch.no_grad():
        for name, weight in model.detail_encoder.named_parameters():
            if name.startswith("controlnet_"):  # zero before training
                torch.nn.init.normal_(weight, std=0.1)
        cross_attentions(model.unet)[model.config.alignment_layer].to_k.weight.mul_(60)
    return model


@dataclass(frozen=True)
class Scene:
    image: Tensor
    mask: Tensor
    reference: Tensor
    reference_mask: Tensor


@pytest.fixture
def scene() -> Scene:
    """A generated image, 8-bit values, with one artifact, and a reference of another size."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (3, 96, 130), generator=generator) / 255
    mask = torch.zeros(96, 130)
    mask[30:50, 41:70] = 1
    reference = torch.randint(0, 256, (3, 81, 101), generator=generator) / 255
    reference_mask = torch.zeros(81, 101)
    reference_mask[4:77, 10:95] = 1
    return Scene(image, mask, reference, reference_mask)
