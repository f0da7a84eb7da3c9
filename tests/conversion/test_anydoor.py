import json
import stat

import checkpoints
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from rba_core import cli
from rba_core.conversion import anydoor, export_ldm, import_anydoor, weights
from rba_core.errors import InputError
from rba_core.model import RefineByAlign, imagenet_normalised

BESIDE = {"betas": torch.ones(5), "alphas_cumprod": torch.ones(5), "sqrt_alphas_cumprod": torch.ones(5), "posterior_variance": torch.ones(5)}


@pytest.fixture(scope="module")
def tensors() -> dict:
    return checkpoints.randomly(checkpoints.anydoor(checkpoints.SMALL21, (32, (1, 1, 1, 2)), (128, 2)))


@pytest.fixture(scope="module")
def imported(small_anydoor, tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("anydoor")
    save_file(tensors | BESIDE, folder / "anydoor.safetensors")
    assert import_anydoor(folder / "anydoor.safetensors", folder / "model", config=small_anydoor) == dict.fromkeys(BESIDE, 1)
    return folder / "model"


@pytest.fixture(scope="module")
def model(imported) -> RefineByAlign:
    return RefineByAlign.load(imported)


def same(one: RefineByAlign, other: RefineByAlign) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_at_full_size_names_and_shapes_are_anydoors():
    model = RefineByAlign.from_config("anydoor", device="meta")
    parts = anydoor.published(model)
    shapes = {name: tuple(shape) for own in parts.values() for name, _, shape in own.values()}
    assert shapes == checkpoints.anydoor(checkpoints.SD21)
    assert [len({name for name, *_ in parts[part].values()}) for part in ("unet", "vae", "detail_encoder", "encoder", "projector")] == [686, 248, 340, 567, 2]
    assert all(parameter.is_meta for parameter in model.parameters())
    taken = {part: sum(torch.Size(shape).numel() // (1 if third is None else 3) for _, third, shape in own.values()) for part, own in parts.items()}
    assert taken == {part: sum(parameter.numel() for parameter in getattr(model, part).parameters()) for part in parts}
    assert {attn.heads for attn in [model.unet.up_blocks[1].attentions[2].transformer_blocks[0].attn2]} == {20}


def test_every_weight_is_where_diffusers_own_conversion_puts_it(model, tensors):
    for part, converted in (
        (model.unet, convert_ldm_unet_checkpoint(dict(tensors), model.unet.config)),
        (model.vae, convert_ldm_vae_checkpoint(dict(tensors), model.vae.config)),
    ):
        state = part.state_dict()
        assert state.keys() == converted.keys() and all(torch.equal(state[key], value) for key, value in converted.items())


def test_the_detail_encoders_blocks_are_where_diffusers_own_conversion_puts_a_unets(model, tensors):
    unet = {key.replace("control_model.", "model.diffusion_model."): value for key, value in tensors.items() if key.startswith("control_model.")}
    decoder = {key: value for key, value in tensors.items() if key.startswith(("model.diffusion_model.output_blocks", "model.diffusion_model.out."))}
    converted = convert_ldm_unet_checkpoint(unet | decoder, model.unet.config)
    state = model.detail_encoder.state_dict()
    like = [key for key in state if not key.startswith("controlnet_")]
    assert len(like) > 200 and all(torch.equal(state[key], converted[key]) for key in like)


@torch.no_grad()
def test_unet_and_detail_encoder_compute_what_is_published(model, tensors):
    generator = torch.Generator().manual_seed(1)
    hint, latents = torch.rand(2, 4, 64, 64, generator=generator) * 2 - 1, torch.randn(2, 4, 8, 8, generator=generator)
    context, timesteps = torch.randn(2, 257, 64, generator=generator), torch.tensor([981, 37])
    computed = checkpoints.Published(tensors)
    residuals = computed.residuals(hint, timesteps, context)
    found = model.detail_encoder(hint, timesteps, context)
    found = [*found["down_block_additional_residuals"], found["mid_block_additional_residual"]]
    assert len(found) == len(residuals) == 13
    for ours, theirs in zip(found, residuals):
        assert ours.shape == theirs.shape and theirs.std() > 0.05
        assert (ours - theirs).abs().max() < 1e-4
    sample = torch.cat([latents, torch.nn.functional.pixel_unshuffle(hint, 8)], 1)
    noise, expected = model.unet(sample, timesteps, context).sample, computed.noise(latents, timesteps, context, residuals)
    assert expected.std() > 0.05 and (noise - expected).abs().max() < 1e-4
    without = computed.noise(latents, timesteps, context, [torch.zeros_like(residual) for residual in residuals])
    assert (expected - without).abs().max() > 0.1


@torch.no_grad()
def test_tokens_are_dinov2s_with_its_class_token_through_one_layer(model, tensors):
    state = {key.removeprefix("cond_stage_model.model."): value for key, value in tensors.items() if key.startswith("cond_stage_model.model.")}
    pictures = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    tokens = checkpoints.dinov2_tokens(state, imagenet_normalised(pictures))
    expected = tokens @ tensors["cond_stage_model.projector.weight"].T + tensors["cond_stage_model.projector.bias"]
    found = model.embed(pictures)
    assert found.shape == (1, 257, 64) and (found - expected).abs().max() < 1e-4 < 0.01 * expected.std()
    black = model.unconditional(found.expand(3, -1, -1))
    assert black.shape == (3, 257, 64) and torch.equal(black[1:2], model.embed(torch.zeros_like(pictures)))


def test_ckpt_and_safetensors_give_the_same_folder_in_the_checkpoints_precision(small_anydoor, tensors, tmp_path):
    half = {key: value.half() for key, value in tensors.items()}
    save_file(half, tmp_path / "pruned.safetensors")
    optimizer = {"state": {0: {"exp_avg": torch.ones(9)}}, "param_groups": [{"lr": 1e-5}]}
    torch.save({"epoch": 1, "global_step": 8687, "state_dict": half | BESIDE, "optimizer_states": [optimizer], "lr_schedulers": []}, tmp_path / "anydoor.ckpt")
    assert not import_anydoor(tmp_path / "pruned.safetensors", tmp_path / "a", config=small_anydoor)
    assert import_anydoor(tmp_path / "anydoor.ckpt", tmp_path / "b", config=small_anydoor) == dict.fromkeys(BESIDE, 1)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert [str(path) for path in files if path.suffix == ".safetensors"] == [
        "detail_encoder/diffusion_pytorch_model.safetensors", "encoder/model.safetensors", "projector.safetensors",
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
        assert stat.S_IMODE((tmp_path / "a" / path).stat().st_mode) & 0o444 == 0o444
    assert {value.dtype for value in load_file(tmp_path / "a" / "encoder" / "model.safetensors").values()} == {torch.float16}
    model = RefineByAlign.load(tmp_path / "a")
    assert model.dtype == torch.float32 and torch.equal(model.projector.bias, half["cond_stage_model.projector.bias"].float())


def test_a_folder_in_several_files_is_the_same_model(small_anydoor, tensors, model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "LARGEST_FILE", 2**20)
    save_file(tensors, tmp_path / "anydoor.safetensors")
    import_anydoor(tmp_path / "anydoor.safetensors", tmp_path / "model", config=small_anydoor)
    assert all(len([*(tmp_path / "model" / part).glob("*-of-*.safetensors")]) > 1 for part in ("unet", "detail_encoder", "encoder"))
    assert same(RefineByAlign.load(tmp_path / "model"), model)


def test_a_model_saved_again_is_the_same(model, tmp_path):
    model.save(tmp_path / "again")
    again = RefineByAlign.load(tmp_path / "again")
    assert again.config == model.config and again.config.detail_encoder and again.config.steps == 50 and again.config.guidance == 5
    assert same(again, model)
    (tmp_path / "again" / "detail_encoder" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        RefineByAlign.load(tmp_path / "again")


def test_what_is_wrong_with_a_checkpoint_is_named_and_nothing_is_written(small_anydoor, tensors, tmp_path, monkeypatch):
    (tmp_path / "anydoor.safetensors").touch()

    def refused(state: dict) -> str:
        monkeypatch.setattr(anydoor, "open_weights", lambda name, file: state)
        with pytest.raises(InputError) as caught:
            import_anydoor(tmp_path / "anydoor.safetensors", tmp_path / "model", config=small_anydoor)
        assert caught.value.name == "checkpoint" and [path.name for path in tmp_path.iterdir()] == ["anydoor.safetensors"]
        return caught.value.problem

    keys = [
        "model.diffusion_model.output_blocks.5.2.conv.weight", "control_model.zero_convs.3.0.weight", "control_model.input_hint_block.14.bias", "cond_stage_model.projector.weight",
        "cond_stage_model.model.blocks.1.attn.qkv.weight", "first_stage_model.quant_conv.bias",
    ]  # fmt: skip
    for key in keys:
        missing = {name: value for name, value in tensors.items() if name != key}
        assert refused(missing) == f"in anydoor.safetensors {key} is missing"
        assert f"{key} is missing, and 1 more such" in refused(missing | {key.replace("model.", "module.", 1): tensors[key]})
        shape = "x".join(map(str, tensors[key].shape))
        assert f"{key} is 3, not {shape}" in refused(missing | {key: torch.zeros(3)})
    assert "control_model.label_emb.weight is of no known use" in refused(tensors | {"control_model.label_emb.weight": torch.zeros(2)})


def test_other_checkpoints_and_folders_are_refused(small_anydoor, tensors, tmp_path):
    save_file(tensors, tmp_path / "anydoor.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("mine")
    for checkpoint, folder, problem in (("anydoor.safetensors", "mine", "exists"), ("anydoor.safetensors", "no/model", "does not exist"), ("none.ckpt", "new", "does not exist")):
        with pytest.raises(InputError, match=problem):
            import_anydoor(tmp_path / checkpoint, tmp_path / folder, config=small_anydoor)
    torch.save({"state_dict": tensors, "callbacks": UNet2DConditionModel}, tmp_path / "code.ckpt")
    with pytest.raises(InputError, match="holds more than weights"):
        import_anydoor(tmp_path / "code.ckpt", tmp_path / "new", config=small_anydoor)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anydoor.safetensors", "code.ckpt", "mine"]


def test_it_is_no_model_for_a_plain_checkpoint(model, tmp_path):
    with pytest.raises(InputError, match="a detail encoder"):
        export_ldm(model, tmp_path / "out.safetensors")


def test_the_command_does_the_same(small_anydoor, tensors, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "anydoor.json").write_text(json.dumps(small_anydoor))
    monkeypatch.setattr("rba_core.model.CONFIGS", tmp_path / "configs")
    save_file(tensors | {"betas": torch.ones(5)}, "anydoor.safetensors")
    assert cli.main(["convert", "anydoor", "anydoor.safetensors", "model"]) == 0
    assert capsys.readouterr().out == "model  (left aside: 1 betas)\n"
    assert same(RefineByAlign.load("model"), model)
    assert cli.main(["convert", "anydoor", "anydoor.safetensors", "model"]) == 2
    assert capsys.readouterr().err == "rba: output: model exists; give a new folder\n"
