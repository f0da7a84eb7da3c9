"""Aligning by features with ComfyUI's own networks, small ones with random weights, in a process of ComfyUI's Python."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from comfy_server import PACK, find_comfyui, find_python

SCRIPT = '''
import importlib.util, json, sys
from pathlib import Path
import torch
import torch.nn.functional as F
pack, tests, sys.argv = sys.argv[1], sys.argv[2], ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.clip_vision, comfy.model_patcher, comfy.supported_models
import nodes  # ComfyUI's, before the pack's
sys.path.insert(0, tests)
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py", submodule_search_locations=[pack])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
ours, theirs = (importlib.import_module(f"pack.nodes.{name}") for name in ("feature_alignment", "alignment"))
from pictures import texture

SIZE, SHIFT = 256, 64


class Pooling:
    """A VAE that takes means over 8 x 8 pixels."""

    def encode(self, pixels):
        means = F.avg_pool2d(pixels.movedim(-1, 1), 8)
        means = (means - means.mean((2, 3), keepdim=True)) / means.std((2, 3), keepdim=True) / 0.18215
        return torch.cat([means, means.mean(1, keepdim=True)], 1)


def randomly(network):
    torch.manual_seed(0)
    for name, weight in network.named_parameters():
        torch.nn.init.normal_(weight, std=0.02) if weight.ndim < 2 else torch.nn.init.kaiming_uniform_(weight, a=5**0.5)
        if weight.ndim < 2 and name.endswith("weight"):
            torch.nn.init.ones_(weight)


def native(kind, **changes):
    """A MODEL of one of ComfyUI's classes, narrow; `ran` counts the blocks of its decoder."""
    config = kind({**kind.unet_config, "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_heads": 2, "num_head_channels": -1, **changes})
    model = config.get_model({}, "", device="cpu")
    randomly(model.diffusion_model)
    ran = []
    for block in model.diffusion_model.output_blocks:
        block[0].register_forward_hook(lambda *_: ran.append(1))
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu")), ran


picture = texture(SIZE, SIZE + SHIFT).movedim(0, -1)[None]
crop, reference, mask, wanted = picture[:, :, :SIZE], picture[:, :, SHIFT:], torch.zeros(1, SIZE, SIZE), torch.zeros(SIZE, SIZE)
mask[:, 90:150, 110:180] = 1
wanted[90:150, 110 - SHIFT : 180 - SHIFT] = 1
pair = {"crop": crop, "crop_mask": mask, "reference": reference}
box = {"x": 0, "y": 0, "width": SIZE, "height": SIZE}


def found(node, **options):
    """IoU of the matched region with the truth, and the map's side."""
    settings = {entry.id: entry.default for entry in node.define_schema().inputs if getattr(entry, "default", None) is not None}
    raw, attention, grid = node.execute(**{**settings, **pair, **options}).args
    post = {entry.id: entry.default for entry in theirs.PostProcess.define_schema().inputs if getattr(entry, "default", None) is not None}
    region = theirs.PostProcess.execute(raw, grid, **post, attention=attention, crop_mask=mask, bounding_box=box).args[0][0]
    return float((region * wanted).sum() / torch.maximum(region, wanted).sum()), raw.shape[-1]


def native_dino():
    config = json.loads((Path(comfy.clip_vision.__file__).parent / "image_encoders" / "dino2_large.json").read_text())
    vision = comfy.clip_vision.ClipVisionModel(config | {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1})
    randomly(vision.model)
    return vision


sd15, ran = native(comfy.supported_models.SD15, num_res_blocks=[1] * 4, channel_mult=[1, 2, 2, 2], transformer_depth=[1, 1, 1, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1, use_spatial_transformer=True, legacy=False)
sdxl, _ = native(comfy.supported_models.SDXL, num_res_blocks=[1] * 3, channel_mult=[1, 2, 2], transformer_depth=[0, 1, 1],
    transformer_depth_output=[0, 0, 1, 1, 1, 1], transformer_depth_middle=1, use_spatial_transformer=True, legacy=False, num_classes="sequential", adm_in_channels=2816)
vision, options = native_dino(), {"vae": Pooling(), "size": SIZE, "timestep": 20, "ensemble": 2, "seed": 3}
with torch.no_grad():
    told = {
        "dinov2": found(ours.AlignDINOv2, clip_vision=vision),
        "sd15": found(ours.AlignDIFT, model=sd15, **options, up_block=2),
    }
    told["blocks"] = len(ran)
    told["both"] = found(ours.AlignDIFT, model=sd15, **options, up_block=2, clip_vision=vision)
    told["sdxl"] = found(ours.AlignDIFT, model=sdxl, **options, up_block=1)
    first, again = (ours.AlignDIFT.execute(model=sd15, weight=0.5, temperature=0.02, up_block=1, **pair, **options).args[1][0] for _ in range(2))
    told["same"] = torch.equal(first, again)
    told["prompt"] = torch.equal(first, ours.AlignDIFT.execute(
        model=sd15, weight=0.5, temperature=0.02, up_block=1, **pair, **options, conditioning=[[torch.randn(1, 77, 768), {}]]).args[1][0])
    told["patches left"] = len(sd15.model_options["transformer_options"].get("patches", {}))
    try:
        ours.AlignDIFT.execute(model=sdxl, weight=0.5, temperature=0.02, up_block=2, **pair, **options)
    except ours.InputError as error:
        told["refused"] = str(error)
print(json.dumps(told))
'''


@pytest.fixture(scope="module")
def told():
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI here: set COMFYUI_PATH")
    done = subprocess.run([find_python(comfyui), "-c", SCRIPT, str(PACK), str(Path(__file__).parents[1])], cwd=comfyui, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind, tokens", [("dinov2", 37), ("sd15", 32), ("both", 37), ("sdxl", 32)])
def test_a_shifted_copy_is_found_at_the_shift(told, kind, tokens):
    overlap, side = told[kind]
    assert overlap > 0.8 and side == tokens


def test_nothing_after_the_block_runs_and_nothing_stays_patched(told):
    assert told["blocks"] == 2 * 2 * 3 * 2  # pictures, noises, up blocks, blocks in each
    assert told["patches left"] == 0


def test_a_seed_gives_the_same_and_a_prompt_counts(told):
    assert told["same"] and not told["prompt"]


def test_a_block_that_sdxl_has_not_is_refused(told):
    assert told["refused"] == "up block: is 2; of this model 0 to 1 can be read"
