import checkpoints
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from rba_core.conversion import ReferenceEncoder, export_ldm
from rba_core.errors import InputError
from rba_core.model import RefineByAlign, read_config


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A narrow model and the checkpoint that it was exported to."""
    parts = read_config("sd1x")
    widths = [checkpoints.SMALL["width"] * multiple for multiple in checkpoints.SMALL["multiples"]]
    torch.manual_seed(0)
    model = RefineByAlign.from_config(parts | {
        "unet": parts["unet"] | {"block_out_channels": widths, "cross_attention_dim": 48},
        "vae": parts["vae"] | {"block_out_channels": widths},
        "encoder": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 224, "patch_size": 14},
    })  # fmt: skip
    return model, export_ldm(model, tmp_path_factory.mktemp("exported") / "model.safetensors")


@torch.no_grad()
def test_encodes_as_the_whole_model(exported):
    model, (_, dinov2, mlp) = exported
    pictures = torch.rand(2, 3, 224, 224)
    for encoder in (ReferenceEncoder.load(mlp), ReferenceEncoder.load(mlp, dinov2)):
        assert torch.equal(encoder.embed(pictures), model.embed(pictures))
        assert encoder.config == model.config and encoder.stride == model.stride and encoder.encoder_size == model.encoder_size
        assert torch.equal(encoder.noise_step(3), model.noise_step(3))


def test_has_no_unet_and_no_autoencoder(exported):
    encoder = ReferenceEncoder.load(exported[1][2])
    held = sum(weight.numel() for weight in encoder.parameters())
    assert held == sum(weight.numel() for part in (exported[0].encoder, exported[0].projector) for weight in part.parameters())
    for use in (lambda: encoder.unet, lambda: encoder.encode_image(torch.zeros(1, 3, 64, 64))):
        with pytest.raises(InputError, match="^model: is a reference encoder alone, without a U-Net"):
            use()


def test_an_mlp_of_another_encoder(exported, tmp_path):
    Dinov2Model(Dinov2Config(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=14)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="^mlp: in model.mlp.safetensors projector.0.weight is 64, not 128"):
        ReferenceEncoder.load(exported[1][2], tmp_path / "model.safetensors")
