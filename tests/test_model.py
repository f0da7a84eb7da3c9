import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from rba_core import model as model_module
from rba_core.alignment import cross_attentions
from rba_core.autoencoder import BlockAutoencoder
from rba_core.errors import InputError
from rba_core.model import ModelConfig, RefineByAlign
from rba_core.pipeline import refine_by_align

TINY_DINOV2 = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)


def parameters(*modules) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture
def copied(model_folder, tmp_path):
    """A model folder to damage."""
    return shutil.copytree(model_folder, tmp_path / "copied")


def refused(folder) -> str:
    with pytest.raises(InputError) as caught:
        RefineByAlign.load(folder)
    assert caught.value.name in ("model", "unet config")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_loaded_again_has_the_same_weights_config_and_outputs(every_model, scene, tmp_path):
    every_model.save(tmp_path / "saved")
    loaded = RefineByAlign.load(tmp_path / "saved")
    assert loaded.config == every_model.config
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == every_model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in every_model.state_dict().items())
    inputs = scene.image, scene.mask, scene.reference, scene.reference_mask
    images = [refine_by_align(m, *inputs).image for m in (loaded, every_model)]
    assert torch.allclose(*images, atol=1e-4)  # where its weights stand in memory decides on the last bits


def test_a_convolutional_stem_comes_back_too(make_model, tmp_path):
    plain = make_model()
    encoder = Dinov2Model(Dinov2Config(**TINY_DINOV2 | {"num_channels": 8, "image_size": 112, "patch_size": 7}))
    stemmed = RefineByAlign(replace(plain.config, encoder_stem=8), plain.vae, plain.unet, encoder, plain.scheduler).eval()
    assert stemmed.encoder_size == 224 and stemmed.patch_size == 14
    stemmed.save(tmp_path / "stemmed")
    loaded = RefineByAlign.load(tmp_path / "stemmed")
    picture = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        tokens = stemmed.tokens(picture)
        assert tokens.shape == (1, 256, 32)
        assert torch.allclose(loaded.tokens(picture), tokens, atol=1e-4)
        assert not torch.allclose(loaded.tokens(picture), plain.tokens(picture), atol=1e-2)


def test_a_block_autoencoder_comes_back_too(make_model, tmp_path):
    plain = make_model()
    vae = BlockAutoencoder(luma=2, chroma=1, width=4, latent_channels=4)
    torch.nn.init.normal_(vae.residual[-2].weight)
    vae.fit_scale(torch.rand(4, 3, 64, 64) * 2 - 1)
    model = RefineByAlign(plain.config, vae, plain.unet, plain.encoder, plain.scheduler).eval()
    model.save(tmp_path / "blocks")
    loaded = RefineByAlign.load(tmp_path / "blocks")
    assert isinstance(loaded.vae, BlockAutoencoder) and loaded.stride == model.stride == 8
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(loaded.encode_image(picture), model.encode_image(picture), atol=1e-5)
        assert torch.allclose(loaded.decode_latents(torch.ones(1, 4, 8, 8)), model.decode_latents(torch.ones(1, 4, 8, 8)), atol=1e-5)


PUBLISHED_AND_NEWER = [
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("mlp.weights_out", "mlp.down_proj"),
]
"""Names of DINOv2's weights as published and in transformers 4, and in transformers 5."""


def named(state: dict, newer: bool) -> dict:
    for published, new in PUBLISHED_AND_NEWER:
        state = {name.replace(*((published, new) if newer else (new, published))): value for name, value in state.items()}
    for gate in [name for name in state if "mlp.gate_proj" in name and not newer]:
        state[gate.replace("gate_proj", "weights_in")] = torch.cat([state.pop(gate), state.pop(gate.replace("gate_proj", "up_proj"))])
    for both in [name for name in state if "mlp.weights_in" in name and newer]:
        state[both.replace("weights_in", "gate_proj")], state[both.replace("weights_in", "up_proj")] = state.pop(both).chunk(2)
    return {name: value.contiguous() for name, value in state.items()}


@pytest.mark.parametrize("newer", [False, True], ids=["names of transformers 4", "names of transformers 5"])
@pytest.mark.parametrize("variant", [{}, {"use_swiglu_ffn": True}], ids=["DINOv2", "DINOv2 giant"])
def test_an_encoder_loads_whichever_version_of_transformers_wrote_it(make_model, tmp_path, variant, newer):
    if newer and transformers.__version__ < "5":
        pytest.skip("transformers 4 has no such names, and no version writes them")
    plain = make_model()
    encoder = Dinov2Model(Dinov2Config(**TINY_DINOV2, **variant))
    model = RefineByAlign(plain.config, plain.vae, plain.unet, encoder, plain.scheduler).eval()
    model.save(tmp_path / "m")
    save_file(named(encoder.state_dict(), newer), tmp_path / "m" / "encoder" / "model.safetensors", metadata={"format": "pt"})
    picture = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(RefineByAlign.load(tmp_path / "m").tokens(picture), model.tokens(picture), atol=1e-4)


def test_a_half_precision_model_is_half_the_size_and_loads_in_any_precision(make_model, tmp_path):
    model = make_model.__wrapped__()
    model.half().save(tmp_path / "half")
    stored = sum(value.nbytes for file in (tmp_path / "half").rglob("*.safetensors") for value in load_file(file).values())
    assert stored <= 2 * parameters(model) + 64
    assert RefineByAlign.load(tmp_path / "half").dtype == torch.float32
    assert RefineByAlign.load(tmp_path / "half", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_bfloat16_on_the_cpu_works(model_folder, scene):
    model = RefineByAlign.load(model_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    result = refine_by_align(model, scene.image, scene.mask, scene.reference, scene.reference_mask).image
    outside = scene.mask < 0.5
    assert torch.equal(result[:, outside], scene.image[:, outside]) and torch.isfinite(result).all()


def test_saving_over_a_model_replaces_it_whole(model, make_model, tmp_path):
    model.save(tmp_path / "m")
    (tmp_path / "m" / "left over").write_text("of the old one")
    other = make_model(6, "v_prediction")
    other.save(tmp_path / "m")
    assert RefineByAlign.load(tmp_path / "m").config == other.config
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert not (tmp_path / "m" / "left over").exists()


def test_a_save_that_fails_leaves_the_old_model_and_no_litter(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m")
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_module, "save_file", full_disk)
    with pytest.raises(OSError):
        model.save(tmp_path / "m")
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_save_that_fails_at_the_last_moment_leaves_the_old_model(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m")
    usual = os.replace

    def not_into_place(source, target):
        if Path(target) == tmp_path / "m" and "former" not in Path(source).name:
            raise OSError(5, "Input/output error")
        usual(source, target)

    monkeypatch.setattr(os, "replace", not_into_place)
    with pytest.raises(OSError):
        model.save(tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    RefineByAlign.load(tmp_path / "m")


def test_a_saved_folder_can_be_read_by_others_like_any_new_folder(model, tmp_path):
    (tmp_path / "plain").mkdir()
    model.save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in (tmp_path / "m").rglob("*") if file.is_file())


def test_saving_and_loading_are_silent(model, tmp_path, capfd):
    model.save(tmp_path / "m")
    RefineByAlign.load(tmp_path / "m")
    assert capfd.readouterr() == ("", "")


def test_saving_creates_the_folders_above(model, tmp_path):
    model.save(tmp_path / "a" / "b" / "m")
    assert (tmp_path / "a" / "b" / "m" / "config.json").is_file()


def test_a_saved_folder_does_not_tell_where_its_parts_were_read(model_folder, tmp_path):
    loaded = RefineByAlign.load(model_folder)
    assert str(model_folder) in str(loaded.unet.config._name_or_path)  # which diffusers would write
    loaded.save(tmp_path / "again")
    files = [*(tmp_path / "again").rglob("*.json")]
    assert len(files) == 5 and not any(str(model_folder) in file.read_text() or "_name_or_path" in file.read_text() for file in files)
    again = RefineByAlign.load(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("source", ["no-such-model", "/no/such/folder", ""])
def test_an_unknown_model_is_refused(source):
    assert "neither a model folder nor a shipped model" in refused(source)


def test_a_folder_without_config_is_refused(copied):
    (copied / "config.json").unlink()
    assert str(copied) in refused(copied)


FILES = [
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "encoder/config.json",
    "encoder/model.safetensors",
    "scheduler/scheduler_config.json",
    "projector.safetensors",
]


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_told_in_one_line(copied, file):
    (copied / file).unlink()
    assert str(copied) in refused(copied)


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_short_is_told_in_one_line(copied, file):
    whole = (copied / file).read_bytes()
    (copied / file).write_bytes(whole[: len(whole) // 2])
    assert str(copied) in refused(copied)


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith("safetensors")])
def test_an_empty_weight_file_is_told_in_one_line(copied, file):
    (copied / file).write_bytes(b"")
    assert str(copied) in refused(copied)


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith("safetensors")])
def test_a_tensor_of_another_shape_is_told_in_one_line(copied, file):
    state = load_file(copied / file)
    name = next(name for name, value in state.items() if value.ndim >= 2)
    state[name] = torch.zeros(*state[name].shape[:-1], state[name].shape[-1] + 1)
    save_file(state, copied / file)
    assert str(copied) in refused(copied)


@pytest.mark.parametrize("file", [f for f in FILES if f.endswith("safetensors")])
def test_a_missing_tensor_is_told_and_not_replaced_by_a_random_one(copied, file):
    state = load_file(copied / file)
    state.pop(sorted(state)[-1])
    save_file(state, copied / file)
    assert str(copied) in refused(copied)


def test_the_unet_of_another_model_is_refused(copied, make_model, tmp_path):
    make_model(6).save(tmp_path / "other")
    shutil.rmtree(copied / "unet")
    shutil.copytree(tmp_path / "other" / "unet", copied / "unet")
    assert "has 15 input channels; this model's parts need 9" in refused(copied)


def test_the_projector_of_another_model_is_refused(copied, make_model, tmp_path):
    make_model(6).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "projector.safetensors", copied / "projector.safetensors")
    assert "projector.safetensors has other keys" in refused(copied)


def test_unknown_settings_are_named(copied):
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings | {"image_scale": 3}))
    assert "unknown keys ['image_scale']" in refused(copied)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'"rba-tiny"', b'{"image_size": 64,}', b"\xff\xfe"])
def test_a_config_that_is_not_a_json_object_is_refused(copied, text):
    (copied / "config.json").write_bytes(text)
    assert str(copied) in refused(copied)


def test_settings_left_out_take_their_defaults(copied):
    (copied / "config.json").write_text(json.dumps({"image_size": 64}))
    assert asdict(RefineByAlign.load(copied).config) == asdict(ModelConfig(image_size=64))


def test_an_unknown_config_is_refused():
    with pytest.raises(InputError, match="model config: 'sdxl' is not known; use one of anydoor, rba-tiny, sd1x"):
        RefineByAlign.from_config("sdxl")


def test_parts_that_do_not_fit_are_refused(make_model):
    plain, features = make_model(0), make_model(6)
    with pytest.raises(InputError, match="unet config: has 15 input channels; this model's parts need 9"):
        RefineByAlign(plain.config, plain.vae, features.unet, plain.encoder, plain.scheduler)


@pytest.fixture(scope="module")
def sd1x() -> RefineByAlign:
    return RefineByAlign.from_config("sd1x", device="meta")


def test_sd1x_has_the_parts_of_stable_diffusion_1(sd1x):
    unet, vae = sd1x.unet, sd1x.vae
    inpainting_channels = 5 * 320 * 9  # the first convolution reads 9 channels, not 4
    assert parameters(unet) == 859_520_964 + inpainting_channels
    assert parameters(vae) == 83_653_863
    assert unet.config.in_channels == 9 and unet.config.out_channels == 4
    assert unet.conv_in.weight.shape == (320, 9, 3, 3)
    assert len(cross_attentions(unet)) == 16
    assert {(a.to_k.in_features, a.to_v.in_features, a.heads) for a in cross_attentions(unet)} == {(768, 768, 8)}
    assert [a.to_q.in_features for a in cross_attentions(unet)] == [320] * 2 + [640] * 2 + [1280] * 6 + [640] * 3 + [320] * 3
    assert sd1x.stride == 8 and sd1x.config.image_size == 512


def test_sd1x_reads_dinov2_giant(sd1x):
    assert parameters(sd1x.encoder) == 1_136_480_768
    assert sd1x.encoder_size == 224
    assert [tuple(p.shape) for p in sd1x.projector.parameters() if p.ndim == 2] == [(768, 1536), (768, 768)]


def test_sd1x_starts_its_50_steps_at_981_as_stable_diffusion_does(sd1x):
    assert [int(sd1x.noise_step(t)) for t in (0, 1, 49)] == [981, 961, 1]


def test_rba_tiny_has_the_same_topology_and_stays_small():
    tiny = RefineByAlign.from_config("rba-tiny", device="meta")
    assert len(cross_attentions(tiny.unet)) == 16
    assert parameters(tiny) <= 20e6
    assert tiny.stride == 8 and tiny.encoder_size == 224


def test_pictures_are_normalised_as_dinov2_expects():
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = model_module.imagenet_normalised(torch.stack([mean, mean + std])[..., None, None])
    assert torch.allclose(normalised.flatten(1), torch.tensor([[0.0] * 3, [1.0] * 3]), atol=1e-6)


def test_latents_are_scaled_and_decoded_back(make_model):
    model = make_model.__wrapped__()
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        latents = model.encode_image(picture)
        decoded = model.decode_latents(latents)
        model.vae.register_to_config(scaling_factor=2 * model.vae.config.scaling_factor)
        assert torch.allclose(model.encode_image(picture), 2 * latents)
        assert torch.allclose(model.decode_latents(2 * latents), decoded, atol=1e-6)
    assert latents.shape == (1, 4, 8, 8)
    assert decoded.dtype == torch.float32 and decoded.min() >= 0 and decoded.max() <= 1


def test_parts_that_are_offloaded_come_one_at_a_time(model_folder, model, monkeypatch):
    """The U-Net and the encoder go to the device when they run, after the other has left it; what comes out is the same."""
    offloaded = RefineByAlign.load(model_folder, low_memory=True)
    moves = []
    for name in ("unet", "encoder"):
        part = getattr(offloaded, name)
        monkeypatch.setattr(part, "to", lambda device, name=name, part=part: (moves.append((name, str(device))), part)[1])
    offloaded.offload("cpu:0")  # after that of loading, whose device is called otherwise
    moves.clear()
    pictures = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(offloaded.embed(pictures), model.embed(pictures), atol=1e-5)
        assert [move for move in moves if move[1] == "cpu:0"] == [("encoder", "cpu:0")] and moves.index(("unet", "cpu")) < moves.index(("encoder", "cpu:0"))
        moves.clear()
        sample, step, tokens = torch.zeros(1, 9, 8, 8), torch.tensor([1]), torch.zeros(1, 256, 32)
        assert torch.allclose(offloaded.unet(sample, step, tokens).sample, model.unet(sample, step, tokens).sample, atol=1e-4)
        assert [move for move in moves if move[1] == "cpu:0"] == [("unet", "cpu:0")] and moves.index(("encoder", "cpu")) < moves.index(("unet", "cpu:0"))
    assert offloaded.device == torch.device("cpu")


def test_a_picture_is_encoded_once_where_latents_are_reused(make_model, monkeypatch):
    model = make_model()
    encoded = []
    monkeypatch.setattr(model.vae, "encode", lambda pictures, encode=model.vae.encode: (encoded.append(pictures), encode(pictures))[1])
    one, other = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = model.encode_image(one), model.encode_image(other)
        encoded.clear()
        with model.reusing_latents():
            for picture, expected in [(one, latents[0]), (other, latents[1]), (one.clone(), latents[0]), (other, latents[1])]:
                assert torch.equal(model.encode_image(picture), expected)
        assert len(encoded) == 2
        model.encode_image(one)
    assert len(encoded) == 3 and model.known_latents is None


def test_tiles_only_above_the_autoencoder_s_own_size(make_model):
    """At its own size nothing changes; above it the seams do, and little."""
    model = make_model.__wrapped__()
    size = model.vae.config.sample_size // model.stride
    own, larger = (torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)) for side in (size, 2 * size))
    with torch.no_grad():
        whole = model.decode_latents(own), model.decode_latents(larger)
        model.spare_memory()
        tiled = model.decode_latents(own), model.decode_latents(larger)
        model.spare_memory(False)
        assert torch.equal(model.decode_latents(larger), whole[1])
    assert torch.equal(tiled[0], whole[0]) and not torch.equal(tiled[1], whole[1])
    assert tiled[1].shape == whole[1].shape and (tiled[1] - whole[1]).abs().mean() < 0.1


def test_attention_is_fused_also_after_an_alignment_looked_at_a_layer(make_model):
    model = make_model()
    processors = {type(processor).__name__ for part in (model.unet, model.vae) for processor in part.attn_processors.values()}
    assert processors == {"AttnProcessor2_0"} and model.encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model_folder, model, dtype):
    half = RefineByAlign.load(model_folder, dtype=dtype)
    assert {value.dtype for value in half.state_dict().values()} == {dtype}
    with torch.no_grad():
        pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert (half.encode_image(pictures).float() - model.encode_image(pictures)).abs().amax() < 0.05
