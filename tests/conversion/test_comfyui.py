"""What is exported, in a real ComfyUI: its detection and its networks, run in a process of its own, one for all tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import checkpoints
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from comfy_server import PACK, find_comfyui, find_python

from rba_core.alignment import attend, cross_attentions
from rba_core.conversion import export_ldm, import_anydoor, import_sd15
from rba_core.geometry import Box
from rba_core.model import RefineByAlign, read_config, read_part
from rba_core.reference_encoding import EncodedReference
from rba_core.zoom_crop import ZoomCrop

START = """
import contextlib, io, json, sys, traceback
import torch
from safetensors.torch import load_file, save_file
pack, sys.argv = sys.argv[1], ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_detection, comfy.ops, comfy.sd, comfy.utils

for line in sys.stdin:
    script, folder = json.loads(line)
    problem = None
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            exec(script, globals() | {"folder": folder})
        except Exception:
            problem = traceback.format_exc()
    print(json.dumps([told.getvalue(), problem]), flush=True)
"""


@pytest.fixture(scope="module")
def in_comfyui(tmp_path_factory):
    """`in_comfyui(script, folder)` runs a script in ComfyUI's own Python; the script knows the folder as `folder`. What it printed."""
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI here: set COMFYUI_PATH")

    complaints = tmp_path_factory.mktemp("comfyui") / "stderr"

    with open(complaints, "w") as errors:
        process = subprocess.Popen([find_python(comfyui), "-c", START, str(PACK)], cwd=comfyui, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)

    def run(script: str, folder: Path) -> str:
        print(json.dumps([script, str(folder)]), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, complaints.read_text(errors="replace")[-4000:]
        told, problem = json.loads(answer)
        assert problem is None, problem
        return told

    yield run
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A narrow model, random in every weight, and the folder that it was exported to."""
    folder, parts = tmp_path_factory.mktemp("exported"), read_config("sd1x")
    widths = [checkpoints.SMALL["width"] * multiple for multiple in checkpoints.SMALL["multiples"]]
    parts |= {
        "model": parts["model"] | {"image_size": 64},
        "unet": parts["unet"] | {"block_out_channels": widths, "cross_attention_dim": checkpoints.SMALL["context"]},
        "vae": parts["vae"] | {"block_out_channels": widths},
    }
    save_file(checkpoints.randomly(checkpoints.ldm_unet(9, **checkpoints.SMALL) | checkpoints.ldm_vae(32, checkpoints.SMALL["multiples"])), folder / "sd.safetensors")
    torch.save(checkpoints.randomly(checkpoints.dinov2(128, 3, True)), folder / "dinov2.pth")
    import_sd15(folder / "sd.safetensors", folder / "model", folder / "dinov2.pth", config=parts)
    model = RefineByAlign.load(folder / "model")
    export_ldm(model, folder / "out.safetensors")
    return model, folder


@torch.no_grad()
def test_comfyuis_networks_give_the_same_outputs(exported, in_comfyui):
    model, folder = exported
    generator = torch.Generator().manual_seed(4)
    given = {
        "sample": torch.randn(2, 9, 8, 8, generator=generator), "context": torch.randn(2, 256, 64, generator=generator), "timesteps": torch.tensor([981.0, 37.0]),
        "pictures": torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1, "latents": torch.randn(1, 4, 8, 8, generator=generator),
        "native": torch.randn(1, 3, 518, 518, generator=generator), "at_224": torch.randn(1, 3, 224, 224, generator=generator),
    }  # fmt: skip
    save_file(given, folder / "given.safetensors")
    in_comfyui("""
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.image_encoders.dino2 import Dinov2Model
operations = comfy.ops.disable_weight_init
given, state = load_file(f"{folder}/given.safetensors"), load_file(f"{folder}/out.safetensors")

prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
config = comfy.model_detection.detect_unet_config(state, prefix)
unet = UNetModel(**config, num_heads=8, num_head_channels=-1, operations=operations).eval()
unet.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, strict=True)

sizes = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2, 2], num_res_blocks=2, attn_resolutions=[], dropout=0.0)
vae = AutoencoderKL(ddconfig=sizes, embed_dim=4).eval()
vae.load_state_dict({key.removeprefix("first_stage_model."): value for key, value in state.items() if key.startswith("first_stage_model.")}, strict=True)

settings = dict(num_hidden_layers=3, hidden_size=128, num_attention_heads=2, layer_norm_eps=1e-6, use_swiglu_ffn=True)
encoder = Dinov2Model(settings, torch.float32, "cpu", operations).eval()
encoder.load_state_dict(load_file(f"{folder}/out.dinov2.safetensors"), strict=True)

with torch.no_grad():
    found = {
        "noise": unet(given["sample"], given["timesteps"], context=given["context"]),
        "moments": vae.quant_conv(vae.encoder(given["pictures"])),
        "decoded": vae.decode(given["latents"]),
        "native": encoder(given["native"])[0],
        "at_224": encoder(given["at_224"])[0],
    }
save_file({key: value.contiguous() for key, value in found.items()}, f"{folder}/found.safetensors")
""", folder)  # fmt: skip
    found = load_file(folder / "found.safetensors")
    expected = {
        "noise": model.unet(given["sample"], given["timesteps"], given["context"]).sample,
        "moments": model.vae.encode(given["pictures"]).latent_dist.parameters,
        "decoded": model.vae.decode(given["latents"]).sample,
        "native": model.encoder(given["native"]).last_hidden_state,
        "at_224": model.encoder(given["at_224"]).last_hidden_state,
    }
    for name, value in expected.items():
        difference = (found[name] - value).abs().max()
        assert found[name].shape == value.shape and value.std() > 0.05
        assert difference < 1e-3, (name, difference)
    original = checkpoints.dinov2_tokens(torch.load(folder / "dinov2.pth", weights_only=True), given["at_224"])
    assert (found["at_224"] - original).abs().max() < 1e-3


@torch.no_grad()
def test_anydoors_unet_is_comfyuis_of_stable_diffusion_2(in_comfyui, small_anydoor, tmp_path):
    """Heads of 64 channels, linear projections: the same output without the detail encoder."""
    shapes = checkpoints.anydoor(checkpoints.SMALL21, (32, (1, 1, 1, 2)), (128, 2))
    save_file(checkpoints.randomly(shapes), tmp_path / "anydoor.safetensors")
    import_anydoor(tmp_path / "anydoor.safetensors", tmp_path / "model", config=small_anydoor)
    generator = torch.Generator().manual_seed(4)
    given = {"sample": torch.randn(2, 4, 8, 8, generator=generator), "context": torch.randn(2, 257, 64, generator=generator), "timesteps": torch.tensor([981.0, 37.0])}
    save_file(given, tmp_path / "given.safetensors")
    in_comfyui("""
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
given, state = load_file(f"{folder}/given.safetensors"), load_file(f"{folder}/anydoor.safetensors")
prefix = "model.diffusion_model."
state = {key: value for key, value in state.items() if key.startswith(prefix)}
config = comfy.model_detection.detect_unet_config(state, prefix)
unet = UNetModel(**config, num_heads=-1, num_head_channels=64, operations=comfy.ops.disable_weight_init).eval()
unet.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()}, strict=True)
with torch.no_grad():
    save_file({"noise": unet(given["sample"], given["timesteps"], context=given["context"])}, f"{folder}/found.safetensors")
""", tmp_path)  # fmt: skip
    unet = read_part(UNet2DConditionModel, tmp_path / "model" / "unet")
    expected = unet(given["sample"], given["timesteps"], given["context"]).sample
    assert expected.std() > 0.05 and (load_file(tmp_path / "found.safetensors")["noise"] - expected).abs().max() < 1e-4


def test_comfyui_detects_stable_diffusion_inpainting_at_full_size(in_comfyui, tmp_path):
    """By names and shapes; no weight is made. Any number of channels above four counts as inpainting."""
    shapes = {channels: checkpoints.ldm_unet(channels, **checkpoints.SD15) | checkpoints.ldm_vae() for channels in (4, 9, 14)}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    told = in_comfyui("""
for channels, shapes in json.load(open(f"{folder}/shapes.json")).items():
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    config = comfy.model_detection.model_config_from_unet(state, prefix)
    print("told", channels, type(config).__name__, config.inpaint_model(), config.unet_config["num_heads"], config.unet_config["context_dim"])
""", tmp_path)  # fmt: skip
    lines = [line for line in told.splitlines() if line.startswith("told")]
    assert lines == ["told 4 SD15 False 8 768", "told 9 SD15 True 8 768", "told 14 SD15 True 8 768"]


NATIVE = """
import importlib, importlib.util
import comfy.model_patcher, comfy.samplers, comfy.supported_models

spec = importlib.util.spec_from_file_location("pack", f"{pack}/__init__.py")
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
nodes = importlib.import_module("pack.nodes.native")

given, state = load_file(f"{folder}/looked.safetensors"), load_file(f"{folder}/out.safetensors")
prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
config = comfy.supported_models.SD15(comfy.model_detection.detect_unet_config(state, prefix))
config.set_inference_dtype(torch.float32, None)
base = config.get_model(state, prefix).load_model_weights(dict(state), prefix).eval()
model = comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))
sizes = dict(double_z=True, z_channels=4, resolution=64, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2, 2], num_res_blocks=2, attn_resolutions=[], dropout=0.0)
weights = {key.removeprefix("first_stage_model."): value for key, value in state.items() if key.startswith("first_stage_model.")}
vae = comfy.sd.VAE(sd=weights, config={"params": dict(ddconfig=sizes, embed_dim=4)})
crop, mask = given["picture"].movedim(0, -1)[None], given["mask"][None]


def reference(tokens):
    return [{"embedding": tokens, "box": dict(x=0, y=0, width=64, height=64), "mask": torch.ones(64, 64)}]


def align(patcher, layer=9, timestep=0, noise_level=-1.0):
    return nodes.AlignNative.execute(patcher, vae, crop, mask, reference(given["tokens"]), layer, timestep, noise_level, 3)[1][0]


class OneCall(comfy.samplers.Sampler):
    def sample(self, guider, sigmas, extra_args, callback, noise, *_):
        return guider(noise * (1 + sigmas[0] ** 2).sqrt(), sigmas[:1], **extra_args)


with torch.inference_mode():
    options, found = repr(model.model_options), {}
    for name, settings in json.load(open(f"{folder}/settings.json")).items():
        found[name] = align(model, **settings)
    lora, key = model.clone(), "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_k.weight"
    lora.add_patches({key: ("diff", (given["lora"],))}, 1.0)
    found["patched"], found["unpatched"] = align(lora), align(model)
    assert repr(model.model_options) == options and not model.patches and base.current_patcher is None

    positive, negative, latent = nodes.InpaintingCondition.execute(*nodes.ReferenceConditioning.execute(reference(given["tokens"] / 5)).args, vae, crop, mask).args
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(3.0)
    sigma = base.model_sampling.sigmas[501]
    denoised = guider.sample(given["z"], torch.zeros_like(given["z"]), OneCall(), torch.stack([sigma, torch.zeros(())]), disable_pbar=True, seed=0)
    found["denoised"] = base.process_latent_in(denoised)
save_file({key: value.clone().contiguous() for key, value in found.items()}, f"{folder}/seen.safetensors")
"""


@torch.no_grad()
def test_a_native_model_sees_and_draws_what_ours_does(exported, in_comfyui):
    model, folder = exported
    generator = torch.Generator().manual_seed(7)
    picture, mask, tokens = torch.rand(3, 64, 64, generator=generator), torch.zeros(64, 64), torch.randn(1, 256, 64, generator=generator) * 5
    mask[18:37, 21:45] = 1
    z = torch.randn(1, 4, 8, 8, generator=generator)
    lora = torch.randn(cross_attentions(model.unet)[9].to_k.weight.shape, generator=generator) * 0.1
    save_file({"picture": picture, "mask": mask, "tokens": tokens, "z": z, "lora": lora}, folder / "looked.safetensors")
    settings = {"first": {"layer": 0}, "middle": {"layer": 6}, "usual": {}, "last": {"layer": 15}, "later": {"timestep": 30}, "cleaner": {"noise_level": 0.3}}
    (folder / "settings.json").write_text(json.dumps(settings))
    in_comfyui(NATIVE, folder)
    seen = load_file(folder / "seen.safetensors")

    crop, reference = ZoomCrop(picture, mask, Box(0, 0, 64, 64)), EncodedReference(tokens, Box(0, 0, 64, 64), torch.ones(64, 64))
    for name, changes in settings.items():
        expected = attend(model, crop, reference, seed=3, **changes)
        assert expected.max() > 20 / 256  # not flat, or all would agree
        assert (seen[name] - expected).abs().max() < 1e-5, name
    assert torch.equal(seen["unpatched"], seen["usual"]) and (seen["patched"] - seen["usual"]).abs().max() > 1e-3

    condition = model.inpainting_condition(picture[None], mask[None, None])
    context = torch.cat([torch.zeros_like(tokens), tokens / 5])  # as `refine` guides
    dropped, guided = model.unet(model.unet_input(z, condition).expand(2, -1, -1, -1), torch.tensor(501), context).sample.chunk(2)
    kept = model.scheduler.alphas_cumprod[501]
    expected = (z - (1 - kept).sqrt() * (dropped + 3 * (guided - dropped))) / kept.sqrt()
    assert (seen["denoised"] - expected).abs().max() < 1e-4 * expected.abs().max()
