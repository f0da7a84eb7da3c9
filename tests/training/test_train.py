import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image
from processes import two_processes

from rba_core import model as model_module
from rba_core.cli import main
from rba_core.data.scenes import REFERENCE_FILL
from rba_core.errors import InputError
from rba_core.model import ModelConfig, RefineByAlign
from rba_core.training.train import LEGS, TRAINERS, read_plan, train

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
mlp_learning_rate = 2e-3
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
    (tmp_path / "plan.toml").write_text(PLAN.format(model="small", steps=2))
    return tmp_path / "plan.toml"


@pytest.fixture
def program(tmp_path, small_config):
    """`rba` as a script that knows "small", for processes of their own."""
    (tmp_path / "rba.py").write_text(
        "import os, sys\nfrom pathlib import Path\nfrom rba_core import cli, model\n"
        f"Path({str(tmp_path)!r}, 'process-' + os.environ.get('RANK', '')).touch()\n"
        f"model.CONFIGS = Path({str(model_module.CONFIGS)!r})\nsys.exit(cli.main(sys.argv[1:]))\n"
    )
    return tmp_path / "rba.py"


def environment(**more) -> dict:
    here = os.path.dirname(os.path.dirname(model_module.__file__))
    return os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": str(torch.get_num_threads()), "ACCELERATE_USE_CPU": "true", **more}


def count_steps(monkeypatch) -> list:
    steps = []
    usual = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        steps.append([group["lr"] for group in self.param_groups])
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return steps


def same(first: RefineByAlign, second: RefineByAlign) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_three_legs_give_a_model_folder_that_loads(plan, tmp_path, monkeypatch, capsys):
    steps = count_steps(monkeypatch)
    train(plan, tmp_path / "out")
    assert [len(rates) for rates in steps] == 2 * [1] + 2 * [1] + 2 * [2]
    assert all(mlp == pytest.approx(4 * unet) for unet, mlp in steps[4:])
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written == {"small", *(f"{leg}.{suffix}" for leg in LEGS for suffix in ("pt", "jsonl"))}
    assert json.loads(capsys.readouterr().out) == {"model": str(tmp_path / "out" / "small")}
    model = RefineByAlign.load(tmp_path / "out" / "small")
    assert isinstance(model.config, ModelConfig) and model.config.image_size == 64
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert (model.vae.scale != 1).all()
    for part, leg in (("encoder", "encoder"), ("vae", "autoencoder")):  # the refiner left them as they were
        stored = torch.load(tmp_path / "out" / f"{leg}.pt", weights_only=True)["average"]
        assert all(torch.equal(model.state_dict()[name], value) for name, value in stored.items() if name.startswith(f"{part}."))

    steps.clear()
    train(plan, tmp_path / "out")
    assert steps == [] and same(model, RefineByAlign.load(tmp_path / "out" / "small"))
    plan.write_text(plan.read_text().replace("[refiner]\nsteps = 2", "[refiner]\nsteps = 5"))
    train(plan, tmp_path / "out")
    assert len(steps) == 3 and not same(model, RefineByAlign.load(tmp_path / "out" / "small"))


def test_killed_in_the_middle_and_resumed_it_ends_with_the_same_bits(plan, program, tmp_path):
    plan.write_text(PLAN.format(model="small", steps=2).replace("[refiner]\nsteps = 2", "[refiner]\nsteps = 10\nsave_every = 3\nmicro_batch = 1"))
    command = [sys.executable, program, "train", "--config", plan, "-o", tmp_path / "killed"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    while not (tmp_path / "killed" / "refiner.pt").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert 0 < torch.load(tmp_path / "killed" / "refiner.pt", weights_only=True)["step"] < 10
    assert not (tmp_path / "killed" / "small").exists()
    train(plan, tmp_path / "killed")
    train(plan, tmp_path / "straight")
    assert same(*(RefineByAlign.load(tmp_path / name / "small") for name in ("killed", "straight")))
    for leg in LEGS:
        killed, straight = (torch.load(tmp_path / name / f"{leg}.pt", weights_only=True) for name in ("killed", "straight"))
        assert all(torch.equal(value, straight["module"][name]) for name, value in killed["module"].items())
        moments = zip(killed["optimiser"]["state"].values(), straight["optimiser"]["state"].values(), strict=True)
        assert all(torch.equal(a[name], b[name]) for a, b in moments for name in a)


def test_two_processes_train_as_one_does(program, tmp_path):
    text = PLAN.format(model="small", steps=2).replace("batch = 2", "batch = 4\nmicro_batch = 2\nwarmup = 1").replace("seed = 0", 'precision = "no"')
    (tmp_path / "plan.toml").write_text(text)
    command = [sys.executable, "-m", *two_processes(), program, "train", "--config", tmp_path / "plan.toml", "-o", tmp_path / "two"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "process-0").exists() and (tmp_path / "process-1").exists()
    assert done.stdout.count('{"model"') == 1
    train(tmp_path / "plan.toml", tmp_path / "one")
    for leg in LEGS:
        one, two = (torch.load(tmp_path / name / f"{leg}.pt", weights_only=True) for name in ("one", "two"))
        for kind in ("module", "average"):
            assert all(torch.allclose(value, two[kind][name], atol=1e-5) for name, value in one[kind].items()), leg
        for first, second in zip(one["optimiser"]["state"].values(), two["optimiser"]["state"].values(), strict=True):
            assert torch.allclose(first["exp_avg"], second["exp_avg"], rtol=1e-2, atol=1e-5)
        logs = [json.loads((tmp_path / name / f"{leg}.jsonl").read_text()) for name in ("one", "two")]
        assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_each_process_must_have_as_many_micro_batches(plan, tmp_path, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("rba_core.training.train.make_accelerator", lambda precision: SimpleNamespace(num_processes=2))
    with pytest.raises(InputError, match=r"\[encoder\] has 1 micro-batches a step for 2 processes"):
        train(plan, tmp_path / "out")


VALIDATED = "validate_every = {every}\nvalidation_items = 2\n"


def test_validation_leaves_pictures_log_and_plot_and_the_weights_as_they_would_be(plan, tmp_path):
    text = plan.read_text()
    plan.write_text(text.replace("[autoencoder]", VALIDATED.format(every=1) + "[autoencoder]") + VALIDATED.format(every=1))
    train(plan, tmp_path / "looked")
    plan.write_text(text)
    train(plan, tmp_path / "blind")
    assert same(*(RefineByAlign.load(tmp_path / name / "small") for name in ("looked", "blind")))
    for leg, measured in (("encoder", {"loss", "match", "back", "paint", "miou"}), ("refiner", {"loss", "denoise", "miou", "psnr"})):
        assert not (tmp_path / "blind" / f"{leg}.png").exists()
        assert Image.open(tmp_path / "looked" / f"{leg}.png").width > 400
        for step in (1, 2):
            sheet = np.asarray(Image.open(tmp_path / "looked" / f"{leg}-{step}.png"))
            assert sheet.shape == (20 + 2 * 198, 4 * 198, 3) and sheet.std() > 20
        entries = [json.loads(line) for line in (tmp_path / "looked" / f"{leg}.jsonl").read_text().splitlines()]
        seen = [entry["held-out"] for entry in entries if "held-out" in entry]
        assert [entry["step"] for entry in entries if "held-out" in entry] == [1, 2]
        assert all(measured <= set(figures) and np.isfinite(list(figures.values())).all() and 0 <= figures["miou"] <= 1 for figures in seen)
        assert seen[0]["loss"] != seen[1]["loss"]  # of other weights, though of the same scenes


def test_validating_may_be_turned_on_between_stop_and_resume_but_the_rates_may_not_change(plan, tmp_path, capsys):
    train(plan, tmp_path / "out", legs=["encoder"])
    text = plan.read_text()
    plan.write_text(text.replace("[autoencoder]", VALIDATED.format(every=1) + "[autoencoder]"))
    train(plan, tmp_path / "out", legs=["encoder"])
    plan.write_text(text.replace("learning_rate = 1e-3", "learning_rate = 2e-3"))
    assert rba_train("--config", str(plan), "-o", str(tmp_path / "out")) == 2
    assert re.search(r"rba: config: .*encoder.pt was begun with encoder.learning_rate 0.001, now it is 0.002; set it back", capsys.readouterr().err)


def test_a_leg_whose_predecessor_was_trained_further_is_refused_before_anything_is_trained(plan, tmp_path, monkeypatch):
    train(plan, tmp_path / "out")
    plan.write_text(plan.read_text().replace("steps = 2", "steps = 4", 1))
    steps = count_steps(monkeypatch)
    with pytest.raises(InputError, match="autoencoder.pt was begun with encoder.steps 2, now it is 4"):
        train(plan, tmp_path / "out")
    assert steps == []


def test_a_signal_ends_the_command_with_how_to_go_on(plan, tmp_path, monkeypatch, capsys):
    usual = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(SystemExit) as left:
        rba_train("--config", str(plan), "-o", str(tmp_path / "out"))
    assert left.value.code == 128 + signal.SIGTERM
    assert re.match(r"rba: stopped after step 1 of 2, .*encoder.pt; the same command goes on", capsys.readouterr().err.splitlines()[-1])


def test_a_leg_can_be_trained_alone_once_the_ones_before_are(plan, tmp_path):
    train(plan, tmp_path / "out", legs=["encoder"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"encoder.pt", "encoder.jsonl"}
    train(plan, tmp_path / "out", legs=["autoencoder", "refiner"])
    assert (tmp_path / "out" / "small" / "config.json").is_file()


def test_a_leg_before_its_predecessors_is_refused(plan, tmp_path):
    with pytest.raises(InputError, match="legs: 'encoder' has not been trained"):
        train(plan, tmp_path / "out", legs=["refiner"])


def without(text: str, *legs: str) -> str:
    return "".join(section for section in re.split(r"(?m)^(?=\[)", text) if not section.startswith(tuple(f"[{leg}]" for leg in legs)))


def test_parts_of_other_models_are_taken_over_and_need_no_leg(plan, tmp_path, monkeypatch):
    train(plan, tmp_path / "first")
    folder = tmp_path / "first" / "small"
    init = "".join(f'{part} = "{folder / part}"\n' for part in ("unet", "vae", "encoder"))
    plan.write_text(without(plan.read_text().replace("seed = 0", "seed = 1"), "encoder", "autoencoder") + f"[init]\n{init}")
    rates = [0.0]
    monkeypatch.setattr("rba_core.training.loop.share_of_rate", lambda *_: rates[0])
    train(plan, tmp_path / "second")
    first, second = (RefineByAlign.load(tmp_path / name / "small") for name in ("first", "second"))
    for part in ("unet", "vae", "encoder"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(first, part).state_dict().values(), getattr(second, part).state_dict().values()))
    assert not torch.equal(first.projector[1].weight, second.projector[1].weight)
    assert second.config.reference_fill == REFERENCE_FILL


def test_a_whole_model_can_be_gone_on_with(plan, tmp_path, monkeypatch):
    train(plan, tmp_path / "first")
    text = without(plan.read_text().replace('model = "small"', 'model = "mine"'), "encoder", "autoencoder")
    plan.write_text(text + f'[init]\nmodel = "{tmp_path / "first" / "small"}"\n')
    monkeypatch.setattr("rba_core.training.loop.share_of_rate", lambda *_: 0.0)
    train(plan, tmp_path / "second")
    assert same(RefineByAlign.load(tmp_path / "first" / "small"), RefineByAlign.load(tmp_path / "second" / "mine"))


def test_photos_are_added_to_the_plans(plan, tmp_path, monkeypatch):
    for name in ("photos", "more"):
        (tmp_path / name).mkdir()
    plan.write_text(plan.read_text().replace("[encoder]", f'photos = ["{tmp_path / "more"}"]\n[encoder]'))
    seen = []
    monkeypatch.setattr("rba_core.training.train.build_sampler", lambda data, *args, **kwargs: seen.append(data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(plan, tmp_path / "out", photos=str(tmp_path / "photos"))
    assert seen[0]["photos"] == [str(tmp_path / "more"), str(tmp_path / "photos")] and seen[0]["textures"] == 4
    assert "folders" not in seen[0]


def test_photos_are_shown_as_they_are_where_the_plan_has_a_share_of_folders(plan, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    plan.write_text(plan.read_text().replace("[encoder]", 'folders = ["mine"]\nfolders_share = 0.3\n[encoder]'))
    seen = []
    monkeypatch.setattr("rba_core.training.train.build_sampler", lambda data, *args, **kwargs: seen.append(data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(plan, tmp_path / "out", photos=str(tmp_path / "photos"))
    assert seen[0]["folders"] == ["mine", str(tmp_path / "photos")] and seen[0]["photos"] == [str(tmp_path / "photos")]


def rba_train(*options: str) -> int:
    return main(["train", *options])


GOOD = PLAN.format(model="small", steps=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model = ", "config: .* is not TOML"),
        ("[data]", "config: .* has no 'model'"),
        (GOOD.replace("texture_size = 64", ""), "config: .* lacks 'texture_size' in .data."),
        (GOOD.replace("texture_size = 64", "texture_size = 8"), "config: .* has texture_size = 8 in .data.; use a whole number, 16"),
        (GOOD.replace("[encoder]", "folder_share = 0.5\n[encoder]"), "config: .* has an unknown 'folder_share' in .data."),
        (GOOD.replace("[encoder]", "solids = 2\n[encoder]"), "config: .* has solids = 2 in .data.; use a share from 0 to 1"),
        (GOOD.replace("[encoder]", "folders_share = -0.1\n[encoder]"), "config: .* has folders_share = -0.1 in .data."),
        (GOOD.replace("[encoder]", 'folders = "mine"\n[encoder]'), "config: .* has folders = 'mine' in .data.; use a list of folders"),
        (GOOD.replace("[encoder]", 'folders = ["nowhere"]\n[encoder]'), "folders: nowhere is not a folder"),
        (GOOD.replace("[refiner]", "[retoucher]"), "config: .* has an unknown 'retoucher'"),
        (without(GOOD, "refiner"), "config: .* has no 'refiner'"),
        (without(GOOD, "encoder") + '[init]\nvae = "nowhere"', "config: .* has no 'encoder'"),
        (PLAN.format(model="giant", steps=1), "model config: 'giant' is not known"),
        (PLAN.format(model="a/b", steps=1), "config: .* has model = 'a/b'"),
        (GOOD.replace("crop = 64", ""), "config: .* lacks 'crop' in .autoencoder."),
        (GOOD.replace("crop = 64", "crop = 128"), "config: has crop = 128"),
        (GOOD.replace("ema = 0.9", "", 1), "config: .* lacks 'ema' in .encoder."),
        (GOOD + "speed = 3", "config: .* has an unknown 'speed' in .refiner."),
        (GOOD.replace("steps = 1", "steps = 0"), "config: .* has steps = 0 in .encoder.; use a whole number"),
        (GOOD.replace("ema = 0.9", "ema = 1"), "config: .* has ema = 1 in .encoder."),
        (GOOD.replace("learning_rate = 1e-3", "learning_rate = -1"), "config: .* has learning_rate = -1"),
        (GOOD + "layers = [17]", "config: .* has layers = "),
        (GOOD + 'schedule = "linear"', "config: .* has schedule = 'linear'"),
        (GOOD + "gradient_checkpointing = 1", "config: .* has gradient_checkpointing = 1"),
        (GOOD + "micro_batch = 3", "config: .* has batch = 2 and micro_batch = 3"),
        ('precision = "half"\n' + GOOD, "config: .* has precision = 'half'"),
        ('encoder = 3\n' + without(GOOD, "encoder"), "config: .* has encoder = "),
        (GOOD.replace("seed = 0", "seed = -1"), "config: .* has seed = -1"),
        (GOOD + '[init]\nclip = "a"', "config: .* has an unknown 'clip' in .init."),
        (GOOD + '[init]\nmodel = "a"\nvae = "b"', "config: .* has 'model' and more in .init."),
        (GOOD + '[init]\nmodel = "nowhere"', "model: 'nowhere' is neither a model folder"),
        (GOOD + '[init]\nunet = "nowhere"', "init: nowhere is no unet folder"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_told_in_one_line(tmp_path, small_config, monkeypatch, capsys, text, message):
    monkeypatch.setitem(TRAINERS, "encoder", lambda leg: None)  # what only the model can tell is told by the leg after it
    (tmp_path / "plan.toml").write_text(text)
    assert rba_train("--config", str(tmp_path / "plan.toml"), "-o", str(tmp_path / "out")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"rba: {message}", last), last
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_kind_is_told_in_one_line(plan, tmp_path, capsys):
    train(plan, tmp_path / "first")
    capsys.readouterr()
    plan.write_text(plan.read_text() + f'[init]\nunet = "{tmp_path / "first" / "small" / "vae"}"\n')
    assert rba_train("--config", str(plan), "-o", str(tmp_path / "second")) == 2
    assert re.match("rba: (init: .*vae cannot be read as unet|unet config: has 4 input channels)", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--config", "none.toml"], "config: none.toml does not exist; give a TOML file, or one of own-photos, rba-tiny, sd1x"),
        (["--legs", "encoder,decoder"], "legs: 'decoder' is not known"),
        (["--legs", "encoder", "--config", "own-photos"], "legs: own-photos has no .encoder."),
        (["--photos", "nowhere"], "photos: nowhere is not a folder"),
        (["--steps", "0"], "steps: is 0"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert rba_train(*options) == 2
    err = capsys.readouterr().err
    assert re.match(f"rba: {message}", err) and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_the_shipped_plans_can_be_read():
    plans = {path.stem.removeprefix("train-"): read_plan(path) for path in model_module.CONFIGS.glob("train-*.toml")}
    assert set(plans) == {"rba-tiny", "own-photos", "sd1x"}
    assert plans["rba-tiny"]["model"] == "rba-tiny" and set(LEGS) <= set(plans["rba-tiny"])
    paper = plans["sd1x"]["refiner"]
    assert paper["batch"] == 192 and paper["drop"] == 0.1 and paper["attention_weight"] == 0
    assert (paper["learning_rate"], paper["mlp_learning_rate"]) == (1e-5, 4e-5)
    assert all(paper["batch"] // paper["micro_batch"] % processes == 0 for processes in (1, 2, 4, 8))


def test_a_folder_of_ten_photos_trains_the_shipped_model(tmp_path, monkeypatch):
    """As it comes from a camera and a phone: of any size, some grey, some with alpha, some upright by EXIF alone, one no picture at all."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for index, mode in enumerate(["RGB", "L", "RGBA", "P", "RGB", "RGB", "CMYK", "RGB", "RGB", "RGB"]):
        picture = Image.fromarray(rng.integers(0, 256, (60 + 37 * index, 500 - 41 * index, 3), np.uint8)).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        suffix = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
        picture.save(tmp_path / "photos" / f"{index}.{suffix}", exif=exif)
    (tmp_path / "photos" / "notes.txt").write_text("a note")
    plan = tomllib.loads((model_module.CONFIGS / "train-own-photos.toml").read_text())
    text = (model_module.CONFIGS / "train-own-photos.toml").read_text().replace("textures = 300", "textures = 12").replace("batch = 16", "batch = 2")
    assert plan["init"] == {"model": "rba-tiny"}
    (tmp_path / "plan.toml").write_text(text.replace("validate_every = 100", "validate_every = 0"))
    assert rba_train("--config", str(tmp_path / "plan.toml"), "--photos", str(tmp_path / "photos"), "--steps", "2", "-o", str(tmp_path / "out")) == 0
    config = json.loads((model_module.PRETRAINED / "rba-tiny" / "config.json").read_text())
    assert RefineByAlign.load(tmp_path / "out" / "own-photos").config == ModelConfig(**config)


def test_rba_tiny_itself_goes_through_all_legs(tmp_path):
    (tmp_path / "plan.toml").write_text(PLAN.format(model="rba-tiny", steps=1))
    assert rba_train("--config", str(tmp_path / "plan.toml"), "-o", str(tmp_path / "out")) == 0
    config = json.loads((model_module.CONFIGS / "rba-tiny.json").read_text())["model"]
    assert RefineByAlign.load(tmp_path / "out" / "rba-tiny").config == ModelConfig(**config)
