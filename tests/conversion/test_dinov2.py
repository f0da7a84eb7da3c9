import copy
import json

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersModel

from rba_core.conversion import export_ldm
from rba_core.conversion.dinov2 import layout, read_dinov2
from rba_core.errors import InputError
from rba_core.model import RefineByAlign, imagenet_normalised, positioned

SIZES = {"small": (384, 12, False), "base": (768, 12, False), "large": (1024, 24, False), "giant": (1536, 40, True)}


@pytest.fixture(params=[False, True], ids=["mlp", "swiglu"])
def original(request) -> dict:
    return checkpoints.randomly(checkpoints.dinov2(128, 3, request.param, positions=5))


@pytest.mark.parametrize("size", SIZES)
def test_the_layout_is_the_original_repositorys_at_every_published_size(size):
    width, depth, swiglu = SIZES[size]
    config = Dinov2Config(hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, use_swiglu_ffn=swiglu, image_size=518)
    entries, published = [*layout(config)], checkpoints.dinov2(width, depth, swiglu)
    stacked = {theirs: (3 * shape[0], *shape[1:]) if third is not None else shape for _, theirs, third, shape in entries}
    assert stacked == published
    assert len(published) == 7 + 14 * depth
    with torch.device("meta"):
        model = Dinov2Model(config)
    assert sum(torch.Size(shape).numel() for *_, shape in entries) == sum(parameter.numel() for parameter in model.parameters())


def test_the_original_layout_gives_the_originals_tokens(original, tmp_path):
    torch.save(original, tmp_path / "dinov2_pretrain.pth")
    model = read_dinov2(tmp_path / "dinov2_pretrain.pth")
    assert not model.training and model.dtype == torch.float32
    pictures = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = checkpoints.dinov2_tokens(original, pictures), model(pictures).last_hidden_state
    assert found.shape == (2, 26, 128)
    assert (found - expected).abs().max() < 1e-4 < 0.1 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
@pytest.mark.parametrize("side", [224, 280, 518, 560])
def test_positions_are_resampled_as_published(side, registers, tmp_path):
    """For any grid, whatever transformers does with them; by another rule for DINOv2 with registers."""
    state = checkpoints.randomly(checkpoints.dinov2(64, 2))
    if registers:
        state["register_tokens"] = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(7))
    torch.save(state, tmp_path / "dinov2.pth")
    encoder = copy.deepcopy(positioned(read_dinov2(tmp_path / "dinov2.pth")))
    pictures = torch.randn(1, 3, side, side + 14, generator=torch.Generator().manual_seed(3))[..., :side]
    expected, found = checkpoints.dinov2_tokens(state, pictures), encoder(pictures).last_hidden_state
    assert found.shape == (1, (side // 14) ** 2 + 1 + 4 * registers, 64)
    assert (found - expected).abs().max() < 1e-4 < 0.1 * expected.std()
    wide = pictures[:, :, : 14 * 10]
    assert (encoder(wide).last_hidden_state - checkpoints.dinov2_tokens(state, wide)).abs().max() < 1e-4


@torch.no_grad()
def test_positions_in_half_precision_and_on_the_stored_grid(tmp_path):
    state = checkpoints.randomly(checkpoints.dinov2(64, 1, positions=16))
    torch.save(state, tmp_path / "dinov2.pth")
    embeddings = positioned(read_dinov2(tmp_path / "dinov2.pth")).embeddings
    assert embeddings.interpolate_pos_encoding(torch.zeros(1, 257, 64), 224, 224) is embeddings.position_embeddings
    whole = embeddings.interpolate_pos_encoding(torch.zeros(1, 101, 64), 140, 140)
    half = embeddings.to(torch.bfloat16).interpolate_pos_encoding(torch.zeros(1, 101, 64), 140, 140)
    assert half.dtype == torch.bfloat16 and half.shape == whole.shape == (1, 101, 64) and (half - whole).abs().max() < 0.02 * whole.std()


def test_every_layout_gives_the_same_model(original, tmp_path):
    torch.save(original, tmp_path / "a.pth")
    first = read_dinov2(tmp_path / "a.pth")
    first.save_pretrained(tmp_path / "hub")
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    assert {ours: tuple(value.shape) for ours, value in hub.items()} == {ours: shape for ours, _, _, shape in layout(first.config)}
    save_file(hub | {"naf.x": torch.zeros(1)}, tmp_path / "clip_vision.safetensors")
    save_file({key: value.contiguous() for key, value in original.items()}, tmp_path / "original.safetensors")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "config.json").write_text((tmp_path / "hub" / "config.json").read_text())
    for number, keys in enumerate([[*hub][:9], [*hub][9:]]):
        save_file({key: hub[key] for key in keys}, tmp_path / "shards" / f"model-{number}.safetensors")
    for source in ("hub", "shards", "clip_vision.safetensors", "original.safetensors", "hub/model.safetensors"):
        model = read_dinov2(tmp_path / source)
        assert model.state_dict().keys() == first.state_dict().keys()
        assert all(torch.equal(value, first.state_dict()[key]) for key, value in model.state_dict().items()), source
        assert all(getattr(model.config, key) == getattr(first.config, key) for key in ("num_attention_heads", "image_size", "use_swiglu_ffn", "layer_norm_eps"))


def test_what_is_wrong_with_a_file_is_named(original, tmp_path):
    def refused(state: dict, name: str = "dinov2.pth") -> str:
        torch.save(state, tmp_path / name)
        with pytest.raises(InputError) as caught:
            read_dinov2(tmp_path / name)
        assert caught.value.name == "dinov2"
        return caught.value.problem

    missing = {key: value for key, value in original.items() if key != "blocks.1.ls2.gamma"}
    assert refused(missing) == "in dinov2.pth blocks.1.ls2.gamma is missing"
    assert "blocks.1.ls2.gamma is missing, and 1 more such" in refused(missing | {"blocks.1.ls2.scale": original["blocks.1.ls2.gamma"]})
    assert "blocks.0.attn.qkv.weight is 128x128, not 384x128" in refused(original | {"blocks.0.attn.qkv.weight": torch.zeros(128, 128)})
    assert "head.weight is of no known use" in refused(original | {"head.weight": torch.zeros(2)})
    assert "register_tokens is 1x4x64, not 1x4x128" in refused(original | {"register_tokens": torch.zeros(1, 4, 64)})
    assert "pos_embed is missing" in refused({f"teacher.{key}" if key == "pos_embed" else key: value for key, value in original.items()})
    assert "holds more than weights" in refused({"model": Dinov2Config()})
    with pytest.raises(InputError, match="cannot be read"):
        read_dinov2(tmp_path / "none.safetensors")


@torch.no_grad()
def test_registers_are_read_and_their_tokens_dropped(original, tmp_path):
    """The same from the original layout, from a folder and in a model; against the original's forward pass, registers behind the class token."""
    original = original | {"register_tokens": torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(7))}
    torch.save(original, tmp_path / "dinov2_reg4_pretrain.pth")
    encoder = read_dinov2(tmp_path / "dinov2_reg4_pretrain.pth")
    assert isinstance(encoder, Dinov2WithRegistersModel) and encoder.config.num_register_tokens == 4
    pictures = torch.randn(2, 3, 70, 70, generator=torch.Generator().manual_seed(1))
    expected = checkpoints.dinov2_tokens(original, pictures)
    assert expected.shape == (2, 30, 128) and (encoder(pictures).last_hidden_state - expected).abs().max() < 1e-4 < 0.1 * expected.std()
    encoder.save_pretrained(tmp_path / "hub")
    again = read_dinov2(tmp_path / "hub").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in encoder.state_dict().items())


@torch.no_grad()
def test_a_model_with_registers(model, tmp_path):
    state = checkpoints.randomly(checkpoints.dinov2(64, 1)) | {"register_tokens": torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(7))}
    torch.save(state, tmp_path / "dinov2.pth")
    with_registers = RefineByAlign(model.config, model.vae, model.unet, read_dinov2(tmp_path / "dinov2.pth"), model.scheduler).eval()
    with_registers.save(tmp_path / "model")
    loaded, pictures = RefineByAlign.load(tmp_path / "model"), torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    tokens = loaded.tokens(pictures)
    assert tokens.shape == (1, 256, 64) and torch.allclose(tokens, with_registers.tokens(pictures), atol=1e-6)
    assert torch.equal(loaded.tokens(pictures, class_token=True)[:, 1:], tokens)
    assert torch.equal(tokens, loaded.encoder(imagenet_normalised(pictures)).last_hidden_state[:, 5:])
    with pytest.raises(InputError, match="registers in DINOv2"):
        export_ldm(with_registers, tmp_path / "out.safetensors")


def test_a_folders_config_must_fit_its_weights(original, tmp_path):
    torch.save(original, tmp_path / "a.pth")
    read_dinov2(tmp_path / "a.pth").save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(InputError, match=r"encoder\.layer\.3\.attention\.attention\.query\.weight is missing"):
        read_dinov2(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").unlink()
    with pytest.raises(InputError, match="has no config.json"):
        read_dinov2(tmp_path / "hub")
