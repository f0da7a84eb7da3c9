import json
import shutil

import pytest
import torch

from rba_core import model as model_module
from rba_core.cli import main
from rba_core.errors import InputError
from rba_core.model import ModelConfig, RefineByAlign
from rba_core.training.train import LEGS, train

PLAN = """
model = "{model}"
seed = 0

[data]
textures = 4
texture_size = 64
redrawn_per_step = 1

[encoder]
steps = {steps}
batch = 2
learning_rate = 1e-3
ema = 0.9

[autoencoder]
steps = {steps}
batch = 2
crop = 64
learning_rate = 1e-3
ema = 0.9

[refiner]
steps = {steps}
batch = 2
learning_rate = 5e-4
mlp_learning_rate = 1e-3
ema = 0.9
"""


@pytest.fixture
def small_config(tmp_path, monkeypatch):
    """A config "small", the topology of rba-tiny at tiny widths."""
    folder = shutil.copytree(model_module.CONFIGS, tmp_path / "configs")
    parts = json.loads((folder / "rba-tiny.json").read_text())
    parts["model"] |= {"image_size": 64, "context_features": 8, "encoder_stem": 8}
    parts["vae"] |= {"luma": 4, "chroma": 1, "width": 4, "latent_channels": 6}
    parts["unet"] |= {
        "sample_size": 8, "in_channels": 6 + 1 + 6 + 1 + 6 + 8, "out_channels": 6, "block_out_channels": [16, 16, 32, 32],
        "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 8,
    }  # fmt: skip
    parts["encoder"] |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 8}
    (folder / "small.json").write_text(json.dumps(parts))
    monkeypatch.setattr(model_module, "CONFIGS", folder)


@pytest.fixture
def plan(tmp_path, small_config):
    (tmp_path / "plan.toml").write_text(PLAN.format(model="small", steps=3))
    return tmp_path / "plan.toml"


def count_steps(monkeypatch) -> list:
    steps = []
    usual = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        steps.append(1)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return steps


def test_three_legs_give_a_model_folder_that_loads(plan, tmp_path, monkeypatch, capsys):
    steps = count_steps(monkeypatch)
    train(plan, tmp_path / "out")
    assert len(steps) == 9
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"encoder.pt", "autoencoder.pt", "refiner.pt", "small"}
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "out" / "small")}
    model = RefineByAlign.load(tmp_path / "out" / "small")
    assert isinstance(model.config, ModelConfig) and model.config.image_size == 64
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (model.vae.scale != 1).all()


def test_running_again_trains_nothing_and_gives_the_same_model(plan, tmp_path, monkeypatch):
    train(plan, tmp_path / "out")
    first = RefineByAlign.load(tmp_path / "out" / "small")
    steps = count_steps(monkeypatch)
    train(plan, tmp_path / "out")
    again = RefineByAlign.load(tmp_path / "out" / "small")
    assert steps == []
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))


def test_the_same_plan_gives_the_same_model(plan, tmp_path):
    models = []
    for name in ("a", "b"):
        train(plan, tmp_path / name)
        models.append(RefineByAlign.load(tmp_path / name / "small"))
    assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()))


def test_a_leg_can_be_trained_alone_once_the_ones_before_are(plan, tmp_path):
    train(plan, tmp_path / "out", legs=["encoder"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"encoder.pt"}
    train(plan, tmp_path / "out", legs=["autoencoder", "refiner"])
    assert (tmp_path / "out" / "small" / "config.json").is_file()


def test_a_leg_before_its_predecessors_is_refused(plan, tmp_path):
    with pytest.raises(InputError, match="legs: 'encoder' has not been trained"):
        train(plan, tmp_path / "out", legs=["refiner"])


def test_the_refiner_leaves_encoder_and_autoencoder_as_they_were(plan, tmp_path):
    train(plan, tmp_path / "out")
    stored = {leg: torch.load(tmp_path / "out" / f"{leg}.pt", weights_only=True)["average"] for leg in LEGS}
    for part, leg in (("encoder", "encoder"), ("vae", "autoencoder")):
        for name, value in stored[leg].items():
            if name.startswith(f"{part}."):
                assert torch.equal(stored["refiner"][f"model.{name}"], value), name


def test_photos_are_used_as_textures(plan, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.fromarray(np.full((80, 90, 3), (200, 30, 90), np.uint8)).save(tmp_path / "photos" / "a.png")
    seen = []
    monkeypatch.setattr("rba_core.training.train.TextureBank", lambda count, size, seed, photos, progress: seen.append(photos) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(plan, tmp_path / "out", photos=str(tmp_path / "photos"))
    assert len(seen[0]) == 1 and seen[0][0].shape == (80, 90, 3)


def rba_train(*options: str) -> int:
    return main(["train", *options])


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = ", "config: .* is not TOML"),
        ("[data]", "config: .* has no 'autoencoder'"),
        (PLAN.format(model="small", steps=1).replace("[refiner]", "[retoucher]"), "config: .* has no 'refiner'"),
        (PLAN.format(model="giant", steps=1), "model config: 'giant' is not known"),
        (PLAN.format(model="small", steps=1).replace("texture_size = 64", ""), "config: .*texture_size"),
        (PLAN.format(model="small", steps=1).replace("crop = 64", ""), "config: .*crop"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_told_in_one_line(tmp_path, small_config, capsys, text, message):
    import re

    (tmp_path / "plan.toml").write_text(text)
    assert rba_train("--config", str(tmp_path / "plan.toml"), "-o", str(tmp_path / "out")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"rba: {message}", last), last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "none.toml"], "config: none.toml does not exist"),
        (["--legs", "encoder,decoder"], "legs: 'decoder' is not known"),
        (["--photos", "nowhere"], "photos: nowhere is not a folder"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert rba_train(*options) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rba: {message}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_shipped_plan_is_whole():
    import tomllib

    plan = tomllib.loads((model_module.CONFIGS / "train-rba-tiny.toml").read_text())
    example = tomllib.loads(PLAN.format(model="rba-tiny", steps=1))
    assert plan["model"] == "rba-tiny"
    assert {name: set(plan[name]) for name in ("data", *LEGS)} == {name: set(example[name]) for name in ("data", *LEGS)}


def test_rba_tiny_itself_goes_through_all_legs(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(model="rba-tiny", steps=1))
    assert rba_train("--config", str(tmp_path / "plan.toml"), "-o", str(tmp_path / "out")) == 0
    config = json.loads((model_module.CONFIGS / "rba-tiny.json").read_text())["model"]
    assert RefineByAlign.load(tmp_path / "out" / "rba-tiny").config == ModelConfig(**config)
