import json

import pytest
import torch
from diffusers import AutoencoderKL

from rba_core import cli
from rba_core.bench import memory, speed
from rba_core.bench.report import markdown_table, write_report
from rba_core.errors import InputError

EIGHTH = {
    "model": {"image_size": 128},
    "vae": {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8, "sample_size": 128},
    "unet": {"sample_size": 16, "block_out_channels": [40, 80, 160, 160], "norm_num_groups": 8, "cross_attention_dim": 96},
    "encoder": {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[dict, str]:
    """What is counted of Stable Diffusion 1 at an eighth of its widths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speed.SIZES, "eighth", EIGHTH)
        target = tmp_path_factory.mktemp("memory") / "memory.json"
        assert cli.main(["bench", "memory", "--size", "eighth", "--json", str(target)]) == 0
    return json.loads(target.read_text()), target


def test_what_is_alive_is_counted():
    given = torch.zeros(1000)

    def work():
        one = given + 1
        view = one.view(10, 100)[2:]
        two = view * 2
        del one, view
        return two + given[:800].view(8, 100)

    assert memory.peak_of(work, "cpu") == 4 * (1000 + 800)  # a view takes nothing, and the first is gone before the last is made


def test_a_device_without_storage_takes_what_one_with_storage_does():
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, block_out_channels=[16, 32, 32], norm_num_groups=8)
    picture = torch.rand(1, 3, 64, 64)
    real = memory.peak_of(lambda: vae.encode(picture).latent_dist.mode(), "cpu")
    vae, picture = vae.to("meta"), picture.to("meta")
    assert real == memory.peak_of(lambda: vae.encode(picture).latent_dist.mode())
    assert real >= 2 * 4 * 16 * 64 * 64  # a layer and the next at full resolution


def test_fused_attention_makes_no_matrix():
    cells = torch.zeros(1, 2, 500, 8, device="meta")
    assert memory.peak_of(lambda: torch.nn.functional.scaled_dot_product_attention(cells, cells, cells)) == cells.nbytes


def test_the_parts_add_up(small):
    results, _ = small
    model = speed.RefineByAlign.from_config({part: config | EIGHTH.get(part, {}) for part, config in speed.read_config("sd1x").items()}, device="meta")
    full, half = results["precisions"]["fp32"], results["precisions"]["half"]
    assert full["weights"]["all"] == sum(value.nbytes for value in model.state_dict().values())
    assert full["weights"]["U-Net"] == 4 * sum(value.numel() for value in model.unet.parameters())
    for part in full["weights"]:
        assert half["weights"][part] * 2 == full["weights"][part]
    assert all(0.4 < half["peaks"][work] / full["peaks"][work] < 0.8 for work in memory.WORK)


def test_what_saves_memory_does(small):
    for own in small[0]["precisions"].values():
        peaks, totals = own["peaks"], own["totals"]
        assert peaks["U-Net, batch of one"] < 0.7 * peaks["U-Net, batch of two"]
        assert peaks["refine, guidance in two passes"] <= peaks["refine, guidance in one batch"]
        assert peaks["VAE decode"] * 3.5 < peaks["VAE decode, 2 x the side"]
        assert peaks["VAE decode, 2 x the side, in tiles"] < 0.5 * peaks["VAE decode, 2 x the side"]
        assert own["weights"]["all"] < totals["all on the GPU"] and totals["--low-memory"] < totals["all on the GPU"]


def test_the_page(small, tmp_path):
    results, file = small
    write_report([file], tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "## Memory: eighth (random weights), crops of 128 px" in page
    assert all(line in page for table in memory.memory_tables(results) for line in markdown_table(table))


def test_which_cards_fit():
    results = {"precisions": {"half": {"weights": {}, "peaks": dict.fromkeys(memory.WORK, 0), "totals": {"one": 7.5 * 2**30, "other": 6.9 * 2**30}}}}
    _, settings = memory.memory_tables(results)
    assert settings[1:] == [["half, one", "7.5", "no", "fits", "fits"], ["half, other", "6.9", "fits", "fits", "fits"]]


def test_an_unknown_size():
    with pytest.raises(InputError, match="size: 'sdxl' is not known"):
        memory.measure_memory("sdxl")
