"""The nodes for native models, over a U-Net with the places to patch that a native one has; the real one: tests/conversion/test_comfyui.py."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from rba_core.alignment import align, attend, cross_attentions
from rba_core.conversion import ReferenceEncoder
from rba_core.geometry import resize
from rba_core.model import imagenet_normalised
from rba_core.native import LAYERS
from rba_core.reference_encoding import segment
from rba_core.zoom_crop import zoom_crop


def native_unet(layers=LAYERS):
    """Blocks alone, with transformers in those of `layers`."""
    block = {place: nn.ModuleList([nn.Module()]) for place in [*(("input", n) for n in range(12)), ("middle", 0), *(("output", n) for n in range(12))]}
    for place in layers:
        block[place][0].transformer_blocks = nn.ModuleList([nn.Module()])
    return SimpleNamespace(
        input_blocks=[block["input", n] for n in range(12)], middle_block=block["middle", 0], output_blocks=[block["output", n] for n in range(12)]
    )


class NativeModel:
    """One of ours behind what a native model is asked for."""

    concat_keys = ("mask", "masked_image")

    def __init__(self, model, unet=None):
        self.network, self.diffusion_model, self.loaded, self.layers_run = model, unet or native_unet(), False, []
        alphas = model.scheduler.alphas_cumprod
        self.model_sampling = SimpleNamespace(sigmas=((1 - alphas) / alphas).sqrt(), noise_scaling=lambda sigma, noise, latents: noise * sigma + latents)
        self.model_config = SimpleNamespace(unet_config={"context_dim": model.unet.config.cross_attention_dim, "in_channels": model.unet.config.in_channels})

    def process_latent_in(self, latents):
        return latents * self.network.vae.config.scaling_factor

    @torch.no_grad()
    def apply_model(self, x, sigma, concat, tokens, patches):
        def patched(place):
            def run(attn, args, kwargs):
                self.layers_run.append(place)
                if place in patches:
                    patches[place](attn.to_q(args[0]), attn.to_k(kwargs["encoder_hidden_states"]), None, {"n_heads": attn.heads})

            return run

        hooks = [layer.register_forward_pre_hook(patched((*place, 0)), with_kwargs=True) for place, layer in zip(LAYERS, cross_attentions(self.network.unet))]
        try:
            step = (self.model_sampling.sigmas - sigma).abs().argmin()
            return self.network.unet(torch.cat([x / (1 + sigma**2).sqrt(), concat], 1), step, tokens).sample
        finally:
            for hook in hooks:
                hook.remove()


class Patcher:
    def __init__(self, model, patches=()):
        self.model, self.patches = model, dict(patches)

    def clone(self):
        return Patcher(self.model, self.patches)

    def get_model_object(self, name):
        return getattr(self.model, name)

    def set_model_attn2_replace(self, patch, block_name, number, transformer_index=None):
        self.patches[block_name, number, transformer_index] = patch


class Vae:
    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def encode(self, image):
        return self.model.encode_image(image.movedim(-1, 1)) / self.model.vae.config.scaling_factor


@pytest.fixture
def aligned(nodes, make_model, whole, zoomed, defaults):
    """`aligned(native, **changes)`: (map, attention) of Align (native model)."""

    def run(native, **changes):
        node = nodes.native.AlignNative
        given = {"crop": zoomed[0], "crop_mask": zoomed[1], "encoded_reference": whole}
        return node.execute(Patcher(native), Vae(native.network), **(given | defaults(node) | changes)).args

    return run


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_align_is_the_library_s(aligned, make_model, scene, whole, nodes, prediction):
    model = make_model.__wrapped__(prediction=prediction)
    model.scheduler = DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="leading", steps_offset=1)  # Stable Diffusion's own
    crop, reference = zoom_crop(scene.image, scene.mask, 64, context=3.0), nodes.types.encoded(whole[0])
    for changes in ({}, {"layer": 0}, {"layer": 6}, {"layer": 15}, {"timestep": 40}, {"noise_level": 0.3}, {"seed": 7}):
        raw, (attention,) = aligned(NativeModel(model), **changes)
        torch.testing.assert_close(attention, attend(model, crop, reference, **changes), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(raw[0], align(model, crop, reference, **changes), atol=1e-5, rtol=1e-3)
    assert not torch.allclose(attention, aligned(NativeModel(model))[1][0], atol=1e-3)


def test_nothing_after_the_layer_runs_and_nothing_stays(nodes, model, whole, zoomed, defaults):
    native = NativeModel(model)
    patcher = Patcher(native, {("output", 5, 0): None, ("input", 1, 0): lambda *_: None})
    before = dict(patcher.patches)
    nodes.native.AlignNative.execute(patcher, Vae(model), *zoomed[:2], whole, **defaults(nodes.native.AlignNative))
    assert native.layers_run == [(*place, 0) for place in LAYERS[:10]]
    assert patcher.patches == before and not native.loaded


def test_batch_with_progress(nodes, aligned, model, zoomed):
    both = torch.cat([zoomed[0], zoomed[0].flip(2)])
    raw, attention = aligned(NativeModel(model), crop=both)
    assert raw.shape == (2, 16, 16) and len(attention) == 2
    assert [done for done, _ in nodes.types.comfy.utils.ProgressBar.made[-1].updates] == [1, 2]
    assert torch.equal(raw[:1], aligned(NativeModel(model))[0]) and not torch.equal(raw[0], raw[1])


def test_other_models_are_refused(aligned, model, make_model, whole, zoomed):
    transformer = NativeModel(model, SimpleNamespace(double_blocks=[]))
    sdxl = NativeModel(model, native_unet([("input", 4), ("input", 5), ("middle", 0), ("output", 0)]))
    for other in (transformer, sdxl):
        with pytest.raises(ValueError, match="^model: is not Stable Diffusion 1.x or 2.x"):
            aligned(other)
    with pytest.raises(ValueError, match="^model: takes 14 input channels, of which ComfyUI fills 4 or 9"):
        aligned(NativeModel(make_model(collage=True)))
    with pytest.raises(ValueError, match="^reference: was encoded for another model, 8 channels a token, not 32"):
        aligned(NativeModel(model), encoded_reference=[whole[0] | {"embedding": torch.zeros(1, 256, 8)}])
    with pytest.raises(ValueError, match="^crop: is 64 x 32, not square"):
        aligned(NativeModel(model), crop=zoomed[0][:, :32], crop_mask=zoomed[1][:, :32])


def test_a_layer_that_is_skipped_is_told(aligned, model):
    native = NativeModel(model)
    native.apply_model = lambda *_: torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="^model: did not come to its cross-attention layer 9"):
        aligned(native)


def test_conditioning_is_the_tokens_and_what_guidance_drops_to(nodes, whole):
    ((positive, _),), ((negative, _),) = nodes.native.ReferenceConditioning.execute(whole * 2).args
    assert torch.equal(positive, torch.cat([whole[0]["embedding"]] * 2)) and negative.shape == positive.shape and not negative.any()


def test_inpainting_condition_is_the_model_s(nodes, model, whole, zoomed):
    conditions = nodes.native.ReferenceConditioning.execute(whole).args
    positive, negative, latent = nodes.native.InpaintingCondition.execute(*conditions, Vae(model), *zoomed[:2]).args
    expected = model.inpainting_condition(zoomed[0].movedim(-1, 1), zoomed[1][:, None])
    for condition, given in ((positive, conditions[0]), (negative, conditions[1])):
        ((tokens, told),) = condition
        assert tokens is given[0][0] and given[0][1] == {}
        scaled = told["concat_latent_image"] * model.vae.config.scaling_factor
        torch.testing.assert_close(torch.cat([told["concat_mask"], scaled], 1), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(latent["noise_mask"], expected[:, :1])
    torch.testing.assert_close(latent["samples"], Vae(model).encode(zoomed[0]))


@pytest.fixture
def exported(model, tmp_path, monkeypatch, nodes):
    """DINOv2 and MLP, and the folder of checkpoints that they lie in as `rba convert to-ldm` leaves them."""
    torch.manual_seed(2)
    encoder = Dinov2Model(Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, image_size=224, patch_size=14)).eval()
    mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32))
    folder = tmp_path / "checkpoints"
    (folder / "mine").mkdir(parents=True)
    encoder.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").rename(folder / "mine" / "one.dinov2.safetensors")
    told = {"model": json.dumps(asdict(model.config)), "scheduler": json.dumps(dict(model.scheduler.config))}
    save_file(mlp.state_dict(prefix="projector."), folder / "mine" / "one.mlp.safetensors", told)
    monkeypatch.setitem(nodes.native.folder_paths.folder_names_and_paths, "checkpoints", ([str(folder)], set()))
    return encoder, mlp, folder / "mine"


@torch.no_grad()
def test_the_encoder_beside_a_checkpoint(nodes, exported, inputs, scene, model):
    encoder, mlp, _ = exported
    entry = nodes.native.LoadReferenceEncoder.define_schema().inputs[0]
    assert entry.options["options"] == ["mine/one"]
    loaded = nodes.native.LoadReferenceEncoder.execute("mine/one")[0]
    square, _ = segment(scene.reference, scene.reference_mask, model.config.reference_fill)
    expected = mlp(encoder(imagenet_normalised(resize(square, 224, 224)[None])).last_hidden_state[:, 1:])
    (reference,) = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"], inputs["reference_mask"])[0]
    torch.testing.assert_close(reference["embedding"], expected)
    crop, mask, box = nodes.refinement.ZoomCrop.execute(loaded, inputs["image"], inputs["mask"], "alignment", 0.0).args
    assert torch.equal(crop[0].movedim(-1, 0), zoom_crop(scene.image, scene.mask, 64, context=3.0).image)


def test_an_encoder_alone_neither_aligns_nor_redraws(nodes, exported, inputs, zoomed, defaults):
    loaded = nodes.native.LoadReferenceEncoder.execute("mine/one")[0]
    reference = nodes.alignment.EncodeReference.execute(loaded, inputs["reference"])[0]
    for run in (
        lambda: nodes.alignment.Align.execute(loaded, *zoomed[:2], reference, **defaults(nodes.alignment.Align)),
        lambda: nodes.refinement.Refine.execute(loaded, *zoomed[:2], reference, **{"steps": 2} | defaults(nodes.refinement.Refine)),
        lambda: nodes.refinement.RefineByAlign.execute(loaded, **inputs, **defaults(nodes.refinement.RefineByAlign)),
    ):
        with pytest.raises(ValueError, match="^model: is a reference encoder alone, without a U-Net; load the whole model"):
            run()


def test_half_of_an_export_is_told(exported):
    _, _, folder = exported
    (folder / "one.dinov2.safetensors").unlink()
    with pytest.raises(ValueError, match="^dinov2: .*one.dinov2.safetensors cannot be read"):
        ReferenceEncoder.load(folder / "one.mlp.safetensors")
    save_file({"projector.0.weight": torch.ones(64)}, folder / "bare.mlp.safetensors")
    with pytest.raises(ValueError, match="^mlp: .*bare.mlp.safetensors does not tell the model's settings"):
        ReferenceEncoder.load(folder / "bare.mlp.safetensors")
