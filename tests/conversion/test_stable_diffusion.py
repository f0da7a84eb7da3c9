import copy
import json
import os
import stat

import checkpoints
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from rba_core import cli
from rba_core.alignment import cross_attentions
from rba_core.conversion import export_ldm, import_sd15, weights
from rba_core.conversion import stable_diffusion as conversion
from rba_core.conversion.dinov2 import read_dinov2
from rba_core.errors import InputError
from rba_core.model import RefineByAlign, quiet, read_config
from rba_core.pipeline import refine_by_align


@pytest.fixture(scope="module")
def small() -> dict:
    """The config sd1x in narrow, for `checkpoints.SMALL`."""
    parts = read_config("sd1x")
    width, multiples = checkpoints.SMALL["width"], checkpoints.SMALL["multiples"]
    widths = [width * multiple for multiple in multiples]
    return parts | {
        "model": parts["model"] | {"image_size": 64, "steps": 2},
        "unet": parts["unet"] | {"block_out_channels": widths, "cross_attention_dim": checkpoints.SMALL["context"]},
        "vae": parts["vae"] | {"block_out_channels": widths},
    }


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    file = tmp_path_factory.mktemp("dinov2") / "dinov2_pretrain.pth"
    torch.save(checkpoints.randomly(checkpoints.dinov2(64, 2, positions=16)), file)
    return file


def ldm(in_channels: int) -> dict:
    """A random checkpoint, with what one has beside the networks."""
    shapes = checkpoints.ldm_unet(in_channels, **checkpoints.SMALL) | checkpoints.ldm_vae(checkpoints.SMALL["width"], checkpoints.SMALL["multiples"])
    rest = {"cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(3), "alphas_cumprod": torch.ones(5), "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    return checkpoints.randomly(shapes, in_channels) | rest


@pytest.fixture(scope="module", params=[4, 9], ids=["plain", "inpainting"])
def imported(request, small, dinov2, tmp_path_factory):
    """A checkpoint, and the model made of it."""
    folder, tensors = tmp_path_factory.mktemp("imported"), ldm(request.param)
    save_file(tensors, folder / "sd.safetensors")
    aside = import_sd15(folder / "sd.safetensors", folder / "model", dinov2, config=small)
    assert aside == {"cond_stage_model": 1, "alphas_cumprod": 1, "model_ema": 2}
    return tensors, RefineByAlign.load(folder / "model")


def test_at_full_size_names_and_shapes_are_stable_diffusions():
    parts = read_config("sd1x")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**parts["unet"])
        vae = AutoencoderKL(**{key: value for key, value in parts["vae"].items() if key != "_class_name"})
    for part, names, expected, count in (
        (unet, conversion.unet_names(unet), checkpoints.ldm_unet(9, **checkpoints.SD15), 686),
        (vae, conversion.vae_names(vae), checkpoints.ldm_vae(), 248),
    ):
        shapes = {names[key]: conversion.ldm_shape(names[key], tensor) for key, tensor in part.state_dict().items()}
        assert len(expected) == count and shapes == expected


def test_every_weight_is_where_diffusers_own_conversion_puts_it(imported):
    tensors, model = imported
    for part, converted in (
        (model.vae, convert_ldm_vae_checkpoint(dict(tensors), model.vae.config)),
        (model.unet, convert_ldm_unet_checkpoint(dict(tensors), model.unet.config)),
    ):
        state = part.state_dict()
        first = converted.pop("conv_in.weight", None)
        assert all(torch.equal(state[key], value) for key, value in converted.items())
        assert state.keys() - converted.keys() == ({"conv_in.weight"} if first is not None else set())
        if first is not None:
            given = first.shape[1]
            assert torch.equal(state["conv_in.weight"][:, :given], first)
            assert state["conv_in.weight"].shape[1] == 9 and (state["conv_in.weight"][:, given:] == 0).all()


def test_the_widened_unet_predicts_what_the_narrow_one_did(imported, small):
    tensors, model = imported
    given = tensors["model.diffusion_model.input_blocks.0.0.weight"].shape[1]
    narrow = UNet2DConditionModel(**small["unet"] | {"in_channels": given}).eval()
    narrow.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), narrow.config))
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 256, 64, generator=generator)
    condition = model.inpainting_condition(torch.rand(1, 3, 64, 64, generator=generator), torch.ones(1, 1, 64, 64))
    with torch.no_grad():
        wide = model.unet(model.unet_input(latents, condition), 500, context).sample
        expected = narrow(torch.cat([latents, condition], 1)[:, :given], 500, context).sample
        other = model.unet(model.unet_input(latents, condition + 1), 500, context).sample
    assert torch.allclose(wide, expected, atol=1e-5)
    assert torch.allclose(wide, other, atol=1e-5) == (given == 4)


def test_the_model_runs_and_has_the_configs_settings(imported, small, scene):
    model = copy.deepcopy(imported[1])
    assert model.config.scheduler == "unipc" and model.scheduler.config.timestep_spacing == "leading"
    assert len(cross_attentions(model.unet)) == 16 and model.encoder_size == 224
    with torch.no_grad():
        cross_attentions(model.unet)[9].to_k.weight.mul_(30)  # random attention has no peak otherwise
    refined = refine_by_align(model, scene.image, scene.mask, scene.reference, scene.reference_mask)
    outside = scene.mask < 0.5
    assert torch.equal(refined.image[:, outside], scene.image[:, outside])


def test_further_channels_begin_at_zero(small, dinov2, tmp_path):
    """Of a config with features of the context: their weights are written, too."""
    wider = small | {"model": small["model"] | {"context_features": 8}, "unet": small["unet"] | {"in_channels": 17}}
    save_file(ldm(9), tmp_path / "sd.safetensors")
    import_sd15(tmp_path / "sd.safetensors", tmp_path / "model", dinov2, config=wider)
    model = RefineByAlign.load(tmp_path / "model")
    assert model.unet.conv_in.weight.shape[1] == 17 and (model.unet.conv_in.weight[:, 9:] == 0).all()
    assert {key.split(".")[0] for key in model.own_state()} == {"projector", "context_projector", "context_adapter"}


def test_a_ckpt_and_half_precision_give_the_same_model(small, dinov2, tmp_path):
    tensors = {key: value.half() for key, value in ldm(9).items()}
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "sd.ckpt")
    torch.save({"state_dict": tensors, "global_step": 3}, tmp_path / "sd.pt", _use_new_zipfile_serialization=False)  # as before PyTorch 1.6
    save_file(tensors, tmp_path / "sd.safetensors")
    models = []
    for suffix in ("ckpt", "pt", "safetensors"):
        import_sd15(tmp_path / f"sd.{suffix}", tmp_path / suffix, dinov2, config=small)
        models.append(RefineByAlign.load(tmp_path / suffix).state_dict())
    assert all(torch.equal(value, other[key]) for key, value in models[0].items() for other in models[1:])
    assert torch.equal(models[0]["unet.conv_in.bias"], tensors["model.diffusion_model.input_blocks.0.0.bias"].float())
    assert load_file(tmp_path / "ckpt" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.bias"].dtype == torch.float32


@pytest.mark.parametrize("former", [False, True], ids=["today's names", "former names"])
def test_a_folder_of_diffusers_gives_the_same_model(imported, small, dinov2, tmp_path, former):
    tensors, model = imported
    given = tensors["model.diffusion_model.input_blocks.0.0.weight"].shape[1]
    unet = UNet2DConditionModel(**small["unet"] | {"in_channels": given})
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), unet.config))
    unet.save_pretrained(tmp_path / "sd" / "unet")
    model.vae.save_pretrained(tmp_path / "sd" / "vae")
    if former:
        file = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {key.replace(f"attentions.0.{now}.", f"attentions.0.{then}."): value for key, value in state.items()}
        assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
        save_file(state, file, {"format": "pt"})
    assert not import_sd15(tmp_path / "sd", tmp_path / "model", dinov2, config=small)
    again = RefineByAlign.load(tmp_path / "model").state_dict()
    for part in ("unet", "vae", "encoder"):
        assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items() if key.startswith(part))


def test_a_folder_in_several_files_is_the_same_model_and_is_read_again(imported, small, dinov2, tmp_path, monkeypatch):
    tensors, model = imported
    monkeypatch.setattr(weights, "LARGEST_FILE", 2**20)
    save_file(tensors, tmp_path / "sd.safetensors")
    import_sd15(tmp_path / "sd.safetensors", tmp_path / "several", dinov2, config=small)
    assert all(len([*(tmp_path / "several" / part).glob("*-of-*.safetensors")]) > 1 for part in ("unet", "vae"))
    import_sd15(tmp_path / "several", tmp_path / "again", tmp_path / "several" / "encoder", config=small)
    for folder in ("several", "again"):
        state = RefineByAlign.load(tmp_path / folder).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_dinov2_folder_in_half_precision_is_not_rounded_again(small, dinov2, tmp_path):
    """Its config tells transformers to load in half; what is written is not."""
    encoder = read_dinov2(dinov2)
    with quiet():
        encoder.half().save_pretrained(tmp_path / "hub")
    assert "float16" in (tmp_path / "hub" / "config.json").read_text()
    other = {key: value.float() * 1.0001 for key, value in load_file(tmp_path / "hub" / "model.safetensors").items()}
    save_file(other, tmp_path / "hub" / "model.safetensors", {"format": "pt"})
    save_file(ldm(4), tmp_path / "sd.safetensors")
    import_sd15(tmp_path / "sd.safetensors", tmp_path / "model", tmp_path / "hub", config=small)
    written = load_file(tmp_path / "model" / "encoder" / "model.safetensors")
    assert written.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in written.items())
    loaded = RefineByAlign.load(tmp_path / "model").encoder
    assert loaded.dtype == torch.float32 and torch.equal(loaded.embeddings.position_embeddings, other["embeddings.position_embeddings"])
    assert str(tmp_path) not in (tmp_path / "model" / "encoder" / "config.json").read_text()


def test_the_seed_decides_on_the_mlp(imported, small, dinov2, tmp_path):
    tensors, model = imported
    save_file(tensors, tmp_path / "sd.safetensors")
    torch.manual_seed(77)
    before = torch.get_rng_state()
    for name, seed in (("same", 0), ("other", 1)):
        import_sd15(tmp_path / "sd.safetensors", tmp_path / name, dinov2, config=small, seed=seed)
    assert torch.equal(before, torch.get_rng_state())
    same, other = (RefineByAlign.load(tmp_path / name).projector[1].weight for name in ("same", "other"))
    assert torch.equal(same, model.projector[1].weight) and not torch.equal(other, same)
    assert not model.projector[1].weight.eq(0).any() and model.projector[0].weight.eq(1).all()


def test_what_is_wrong_with_a_checkpoint_is_named_and_nothing_is_written(small, dinov2, tmp_path):
    whole = ldm(4)
    key = "model.diffusion_model.output_blocks.5.2.conv.weight"

    def refused(tensors: dict, source=None) -> str:
        file = tmp_path / "sd.safetensors"
        save_file(tensors, file)
        with pytest.raises(InputError) as caught:
            import_sd15(file, tmp_path / "model", source or dinov2, config=small)
        assert [path.name for path in tmp_path.iterdir()] == ["sd.safetensors"]
        return caught.value.problem

    missing = {name: value for name, value in whole.items() if name != key}
    assert refused(missing) == f"in sd.safetensors {key} is missing"
    assert f"{key} is missing, and 1 more such" in refused(missing | {key.replace("conv", "op"): whole[key]})
    assert f"{key} is 64x64x1x1, not 64x64x3x3" in refused(whole | {key: torch.zeros(64, 64, 1, 1)})
    assert "label_emb.0.0.weight is of no known use" in refused(whole | {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(2)})
    assert "takes 8 channels" in refused(whole | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3)})
    assert "first_stage_model.quant_conv.bias is missing" in refused({name: value for name, value in whole.items() if name != "first_stage_model.quant_conv.bias"})
    assert "cannot be read" in refused(whole, tmp_path / "none.pth")


def test_a_file_that_is_cut_short_or_no_checkpoint_is_refused(small, dinov2, tmp_path):
    save_file(ldm(4), tmp_path / "sd.safetensors")
    os.truncate(tmp_path / "sd.safetensors", 100_000)
    (tmp_path / "sd.txt").write_text("")
    (tmp_path / "sd").mkdir()
    for name, problem in {"sd.safetensors": "cannot be read", "sd.txt": "no file of weights", "sd": "has no unet/", "none.ckpt": "does not exist"}.items():
        with pytest.raises(InputError, match=problem):
            import_sd15(tmp_path / name, tmp_path / "model", dinov2, config=small)


def test_nothing_is_overwritten(small, dinov2, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("mine")
    save_file(ldm(4), tmp_path / "sd.safetensors")
    with pytest.raises(InputError, match="exists"):
        import_sd15(tmp_path / "sd.safetensors", tmp_path / "mine", dinov2, config=small)
    with pytest.raises(InputError, match="does not exist"):
        import_sd15(tmp_path / "sd.safetensors", tmp_path / "no" / "model", dinov2, config=small)
    assert (tmp_path / "mine" / "photo.png").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    import_sd15(tmp_path / "sd.safetensors", tmp_path / "empty", dinov2, config=small)


@pytest.mark.parametrize("collage", [False, True], ids=["9 channels", "14 channels"])
def test_a_model_exported_and_imported_is_the_same(imported, small, tmp_path, collage):
    _, model = imported
    if collage:
        parts = small | {"model": small["model"] | {"collage": True, "alignment_layer": 8}, "unet": small["unet"] | {"in_channels": 14}}
        model = RefineByAlign(type(model.config)(**parts["model"]), model.vae, UNet2DConditionModel(**parts["unet"]), model.encoder, model.scheduler).eval()
        small = parts
    written = export_ldm(model, tmp_path / "out.safetensors")
    assert [path.name for path in written] == ["out.safetensors", "out.dinov2.safetensors", "out.mlp.safetensors"]
    assert {*tmp_path.iterdir()} == {*written} and all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in written)
    shapes = {key: tuple(value.shape) for key, value in load_file(written[0]).items()}
    assert shapes == checkpoints.ldm_unet(14 if collage else 9, **checkpoints.SMALL) | checkpoints.ldm_vae(32, checkpoints.SMALL["multiples"])
    import_sd15(written[0], tmp_path / "again", written[1], mlp=written[2], config=small | {"model": small["model"] | {"alignment_layer": 3}})
    again = RefineByAlign.load(tmp_path / "again")
    assert again.config == model.config and dict(again.scheduler.config) == dict(model.scheduler.config)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_model_with_parts_of_its_own_is_not_exported(tmp_path):
    with pytest.raises(InputError, match="an autoencoder of its own, context features, a convolutional stem"):
        export_ldm(RefineByAlign.load("rba-tiny"), tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


def test_another_models_mlp_is_refused(imported, small, dinov2, tmp_path):
    tensors, model = imported
    *_, mlp = export_ldm(model, tmp_path / "out.safetensors")
    torch.save(checkpoints.randomly(checkpoints.dinov2(128, 1, positions=4)), tmp_path / "wider.pth")
    with pytest.raises(InputError, match=r"projector\.0\.weight is 64, not 128"):
        import_sd15(tmp_path / "out.safetensors", tmp_path / "model", tmp_path / "wider.pth", mlp=mlp, config=small)
    with pytest.raises(InputError, match="does not tell the model's settings"):
        import_sd15(tmp_path / "out.safetensors", tmp_path / "model", dinov2, mlp=tmp_path / "out.safetensors", config=small)


def test_the_commands_do_the_same(imported, small, dinov2, tmp_path, monkeypatch, capsys):
    tensors, model = imported
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sd1x.json").write_text(json.dumps(small))
    monkeypatch.setattr("rba_core.model.CONFIGS", tmp_path / "configs")
    save_file(tensors, "sd.safetensors")
    assert cli.main(["convert", "sd15", "sd.safetensors", "model", "--dinov2", str(dinov2)]) == 0
    assert capsys.readouterr().out == "model  (left aside: 1 alphas_cumprod, 1 cond_stage_model, 2 model_ema)\n"
    assert cli.main(["convert", "to-ldm", "model", "out.safetensors"]) == 0
    assert capsys.readouterr().out == "out.safetensors\nout.dinov2.safetensors\nout.mlp.safetensors\n"
    assert cli.main(["convert", "sd15", "out.safetensors", "again", "--dinov2", "out.dinov2.safetensors", "--mlp", "out.mlp.safetensors"]) == 0
    assert capsys.readouterr().out == "again  (left aside: nothing)\n"
    first, again = (RefineByAlign.load(name).state_dict() for name in ("model", "again"))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert cli.main(["convert", "sd15", "sd.safetensors", "model", "--dinov2", str(dinov2)]) == 2
    assert capsys.readouterr().err == "rba: output: model exists; give a new folder\n"
