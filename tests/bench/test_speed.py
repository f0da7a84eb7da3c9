import io
import json
from contextlib import redirect_stdout

import pytest
import torch

from rba_core import cli
from rba_core.alignment import cross_attentions
from rba_core.bench import speed
from rba_core.bench.report import markdown_table, write_report
from rba_core.errors import InputError
from rba_core.refinement import refine

NETWORKS = {"align", "alignment pass", "U-Net forward", "refine", "denoising loop", "VAE encode", "VAE decode"}
PIPELINE = {"diffusers pipeline"}
EIGHTH = {
    "model": {"image_size": 128},
    "vae": {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8, "sample_size": 128},
    "unet": {"sample_size": 16, "block_out_channels": [40, 80, 160, 160], "norm_num_groups": 8, "cross_attention_dim": 96},
    "encoder": {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6},
}


@pytest.fixture(scope="module", autouse=True)
def eighth():
    """Another size: Stable Diffusion 1's at an eighth of its widths, with crops of 128 px."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speed.SIZES, "eighth", EIGHTH)
        yield


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> tuple[dict, str]:
    """What the command writes and prints."""
    target, out = tmp_path_factory.mktemp("speed") / "speed.json", io.StringIO()
    with redirect_stdout(out):
        assert cli.main(["bench", "speed", *"--size eighth --device cpu --steps 3 --repeats 1 --warm-up 0 --channels-last --json".split(), str(target)]) == 0
    return json.loads(target.read_text()), out.getvalue()


@pytest.fixture(scope="module")
def small(command) -> dict:
    return command[0]


@pytest.fixture(scope="module")
def tiny() -> dict:
    return speed.measure_speed("tiny", repeats=1, warm_up=0)


@pytest.fixture(scope="module")
def full_size() -> tuple[speed.Case, dict]:
    """Stable Diffusion 1's size without storage."""
    scene, twin = speed.sample_scene(), speed.build("sd15", "meta", torch.bfloat16)
    return speed.Case.of(twin, scene, 1), speed.work_costs(twin, scene, 20)


def test_what_is_measured(small, tiny):
    assert set(small["variants"]) == {"eager", "channels-last"} and set(tiny["variants"]) == {"eager"}
    assert set(small["variants"]["eager"]["seconds"]) == set(speed.MEANINGS) == set(tiny["variants"]["eager"]["seconds"]) | PIPELINE
    assert not PIPELINE & set(tiny["variants"]["eager"]["seconds"]) and tiny["variants"]["eager"]["over_pipeline"] is None
    assert set(small["variants"]["channels-last"]["seconds"]) == NETWORKS | PIPELINE | {"encoder"}
    for results in (small, tiny):
        assert set(results["costs"]) == NETWORKS | {"encoder"}
        for figures in results["variants"].values():
            assert all(0 < own["least"] <= own["median"] <= own["most"] for own in figures["seconds"].values())
        assert results["peak_process_bytes"] > 4 * results["parameters"]["all"]
    counts = {work: own["n"] for work, own in small["variants"]["eager"]["seconds"].items()}
    assert counts == dict.fromkeys(speed.MEANINGS, 1) | {"alignment pass": 3, "U-Net forward": 3, "VAE encode": 4 + 2}


def test_passes_and_their_seconds_add_up(small, tiny):
    passes = {
        name: {work: {part: own["passes"] for part, own in parts.items() if part != "rest"} for work, parts in results["variants"]["eager"]["inside"].items()}
        for name, results in (("small", small), ("tiny", tiny))
    }
    assert passes["small"]["align"] == {"U-Net": 2, "VAE encode": 4, "VAE decode": 0, "encoder": 1}
    assert passes["small"]["refine"] == {"U-Net": 3, "VAE encode": 2, "VAE decode": 1, "encoder": 0}
    assert passes["tiny"]["align"] == {"U-Net": 2, "VAE encode": 4, "VAE decode": 0, "encoder": 3}
    assert passes["tiny"]["refine"] == {"U-Net": 1, "VAE encode": 3, "VAE decode": 1, "encoder": 1}
    figures = tiny["variants"]["eager"]  # of one round, so the medians are of the same calls
    for work in ("align", "refine"):
        parts = [own["seconds"] for own in figures["inside"][work].values()]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(figures["seconds"][work]["median"])
    overhead = figures["overhead"]
    assert overhead["whole"] == pytest.approx(overhead["networks"] + overhead["own"]) and overhead["networks"] > 0
    assert 0 < overhead["rest"] < overhead["default"] and overhead["default"] == pytest.approx(figures["seconds"]["refine"]["median"] / figures["inside"]["refine"]["U-Net"]["seconds"] - 1)


def test_the_yardstick_is_the_pipeline_of_diffusers(small):
    """The same crop, steps, sampler and guidance: as many passes of the same networks, in batches of two, the same mask and context."""
    model = speed.build("eighth", "cpu", torch.float32)
    case = speed.Case.of(model, speed.sample_scene(), 3)
    run, ours = (speed.timed(model, work, speed.Clock(model.device)) for work in (case.diffusers_pipeline, case.refine))
    theirs, own = ([call.arguments for call in each.calls["U-Net"]] for each in (run, ours))
    assert len(theirs) == len(own) == 3 and isinstance(case.pipeline.scheduler, type(speed.make_scheduler(model, "unipc")))
    for (sample, step, *_), (other, timestep, _) in zip(theirs, own):
        assert sample.shape == other.shape == (2, 9, 16, 16) and step == timestep
    assert case.diffusers_pipeline().shape == (3, 128, 128)
    seconds = small["variants"]["eager"]["seconds"]
    assert small["variants"]["eager"]["over_pipeline"] == pytest.approx(seconds["refine"]["median"] / seconds["diffusers pipeline"]["median"])
    assert "times as long as diffusers'" in speed.speed_sentences(small)[0]


def test_the_costs_of_the_whole_are_those_of_its_passes(small):
    costs, parts = small["costs"], small["variants"]["eager"]["inside"]
    for unit in ("flops", "weight_bytes"):
        assert costs["denoising loop"][unit] == 3 * costs["U-Net forward"][unit] * (2 if unit == "flops" else 1)  # guidance: a batch of two
        refined = sum(costs[part][unit] * parts["refine"][part]["passes"] for part in ("VAE encode", "VAE decode", "encoder"))
        assert costs["refine"][unit] == costs["denoising loop"][unit] + refined
        aligned = sum(costs[part][unit] * parts["align"][part]["passes"] for part in ("VAE encode", "encoder")) + 2 * costs["alignment pass"][unit]
        assert costs["align"][unit] == pytest.approx(aligned, rel=0.02)  # and the MLP's


def test_costs_of_stable_diffusion_1(full_size):
    case, costs = full_size
    assert costs["alignment pass"]["flops"] / costs["U-Net forward"]["flops"] == pytest.approx(0.4955, abs=1e-3)  # 0.6 at most is the aim
    assert costs["U-Net forward"]["flops"] == pytest.approx(818.5e9, rel=1e-3)
    assert costs["denoising loop"]["flops"] == 40 * costs["U-Net forward"]["flops"]
    weights = {part: sum(p.numel() for p in module.parameters()) for part, module in (("U-Net forward", case.model.unet), ("encoder", case.model.encoder))}
    assert costs["U-Net forward"]["weight_bytes"] == 2 * weights["U-Net forward"]
    assert costs["encoder"]["weight_bytes"] == pytest.approx(2 * weights["encoder"], rel=1e-3)


def test_later_layers_cost_more(full_size):
    case, costs = full_size
    last = len(cross_attentions(case.model.unet))
    flops = []
    for layer in (0, 4, 6, 9, 12, last - 1):
        flops.append(speed.cost(lambda: speed.attention_at(case.model.unet, layer, case.sample, torch.tensor([1], device="meta"), case.whole.embedding))["flops"])
    assert flops == sorted(set(flops)) and flops[3] == costs["alignment pass"]["flops"] and flops[-1] < costs["U-Net forward"]["flops"]


def test_stable_diffusion_2():
    model = speed.build("sd21", "meta", torch.bfloat16)
    assert {(attn.to_k.in_features, attn.inner_dim // attn.heads) for attn in cross_attentions(model.unet)} == {(1024, 64)}
    assert isinstance(model.unet.mid_block.attentions[0].proj_in, torch.nn.Linear) and model.projector[-1].out_features == 1024
    assert model.dtype == torch.bfloat16 and {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32 and model.scheduler.alphas_cumprod.device.type == "cpu"


def test_anydoor():
    model = speed.build("anydoor", "meta", torch.bfloat16)
    assert model.config.detail_encoder and model.config.steps == 50 and model.unet.config.in_channels == 4
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    read = speed.cost(speed.Case.of(model, speed.sample_scene(), 1).unet_forward)["weight_bytes"]
    assert read == pytest.approx(2 * sum(parameter.numel() for part in (model.unet, model.detail_encoder) for parameter in part.parameters()), rel=1e-3)


def test_the_bare_loop_takes_the_steps_of_refine():
    """With all of the crop free, nothing is imposed between the steps: the same latents come out."""
    model = speed.build("eighth", "cpu", torch.float32)
    case = speed.Case.of(model, speed.sample_scene(), 3)
    everywhere = speed.ZoomCrop(case.crop.image, torch.ones_like(case.crop.mask), case.crop.box)
    run = speed.timed(model, lambda: refine(model, everywhere, case.guide, steps=3), speed.Clock(model.device))
    case.inputs = [call.arguments for call in run.calls["U-Net"]]
    (latents,) = (call.arguments[0] for call in run.calls["VAE decode"])
    assert torch.equal(case.denoising_loop(), latents)


def test_a_model_is_left_as_it_was():
    model = speed.build("eighth", "cpu", torch.float32)
    before = dict(vars(model))
    with pytest.raises(ZeroDivisionError):
        speed.timed(model, lambda: (model.unet.config, 1 / 0), speed.Clock(model.device))
    assert vars(model) == before and isinstance(model.unet, speed.diffusers.UNet2DConditionModel)


def test_what_is_compiled(monkeypatch):
    """The U-Net, not in alignment. Compiling takes minutes, so another runs in its place."""
    called = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: speed.Watched(module, lambda part, *inputs, **named: (called.append(inputs), part(*inputs, **named))[1]))
    figures = speed.measure_speed("eighth", steps=2, repeats=1, warm_up=0, compile=True)["variants"]
    assert set(figures) == {"eager", "compile"} and len(called) == 2 * (3 + 2 + 2 + 2)  # a round to compile, a round that counts
    assert set(figures["compile"]["seconds"]) == {"U-Net forward", "refine", "denoising loop", "VAE encode", "VAE decode"} | PIPELINE and figures["compile"]["ratio"] is None
    assert figures["compile"]["inside"]["refine"]["U-Net"]["passes"] == 2


def test_floors_where_peaks_are_known(small):
    assert {cost["floor"] for cost in small["costs"].values()} == {None}
    assert "floor, s" not in speed.speed_table(small)[0]
    known = small | {"costs": {work: cost | {"floor": cost["flops"] / 1e12} for work, cost in small["costs"].items()}}
    assert speed.speed_table(known)[0][-1] == "floor, s"


@pytest.mark.parametrize(
    "options, message",
    [({"size": "sdxl"}, "size: 'sdxl' is not known; use one of tiny, sd15, sd21, anydoor"), ({"repeats": 0}, "repeats: is 0"), ({"steps": 0}, "steps: is 0"), ({"warm_up": -1}, "warm-up: is -1")],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(InputError, match=message):
        speed.measure_speed(**{"size": "tiny"} | options)


def test_what_the_command_writes_and_prints(command, tmp_path):
    results, out = command
    assert results["speed"] == "eighth" and results["denoising_steps"] == 3 and results["default_steps"] == 20 and results["random_weights"]
    assert results["device"] == "cpu" and results["dtype"] == "float32" and results["scheduler"] == "unipc" and results["guidance"] == 3
    assert results["machine"]["cpu"] and results["machine"]["threads"] == torch.get_num_threads() and results["machine"]["gpu"] is None
    assert set(results["versions"]) == {"python", "torch", "diffusers", "transformers"}
    assert out.startswith("eighth (random weights), ") and "| alignment pass | " in out and "over the model's 20 steps" in out
    (tmp_path / "speed.json").write_text(json.dumps(results))
    write_report([tmp_path], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "## Speed: eighth (random weights), " in page and all(line in page for line in markdown_table(speed.speed_table(results)))


def test_the_command_refuses(tmp_path, capsys):
    for options, problem in ((["--device", "cuda:99"], "device: 'cuda:99' is not available here"), (["--size", "sdxl"], "size: 'sdxl' is not known")):
        assert cli.main(["bench", "speed", *options, "--json", str(tmp_path / "none.json")]) == 2
        assert f"rba: {problem}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
