import json
import shutil

import pytest
import torch
from PIL import Image

from rba_core import cli
from rba_core.alignment import attend
from rba_core.bench import grid_search as grid
from rba_core.bench.dataset import BenchmarkSet
from rba_core.errors import InputError
from rba_core.reference_encoding import encode_reference
from rba_core.zoom_crop import zoom_crop


def test_one_pass_reads_what_attend_reads_at_each_layer(small_set, every_model):
    item = BenchmarkSet(small_set)[0]
    whole = encode_reference(every_model, item.reference, item.reference_mask)
    crop = zoom_crop(item.image, item.mask, 64, context=3)
    attentions = grid.attend_everywhere(every_model, crop, whole, 12, seed=3)
    assert len(attentions) == 16
    for layer in (0, 6, 9, 15):
        assert torch.allclose(attentions[layer], attend(every_model, crop, whole, layer=layer, timestep=12, seed=3), atol=1e-6)
    assert not torch.allclose(attentions[9], grid.attend_everywhere(every_model, crop, whole, 40, seed=3)[9], atol=1e-6)


@pytest.fixture
def faultless(small_set, monkeypatch):
    """Layer 5 at t = 10 points at M_gt of the first item, layer 2 at t = 30 at everything, the others nowhere."""
    wanted = BenchmarkSet(small_set)[0].correspondence

    def attend_everywhere(model, crop, whole, timestep, seed):
        maps = [torch.zeros(16, 16) for _ in range(16)]
        if timestep == 10:
            maps[5] = whole.to_tokens(wanted)
        else:
            maps[2] = torch.ones(16, 16)
        return [rows.flatten().expand(64, -1) for rows in maps]

    monkeypatch.setattr(grid, "attend_everywhere", attend_everywhere)


def test_gamma_is_the_mean_iou_and_flat_maps_count_nothing(small_set, model, faultless):
    seen = []
    results = grid.grid_search(small_set, model, (10, 30), limit=1, progress=lambda *done: seen.append(done))
    gamma = torch.tensor(results["gamma"])
    assert gamma.shape == (2, 16) and results["timesteps"] == [10, 30] and results["n"] == 1
    assert 0.3 < gamma[0, 5] <= 1 and gamma.count_nonzero() == 1
    assert results["dense"] == results["gamma"]  # cells that all look the same way agree on no map
    assert results["best"] == {"timestep": 10, "layer": 5, "miou": pytest.approx(float(gamma[0, 5]))}
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("options, problem", [({"limit": 0}, "limit: is 0"), ({"steps_of_t": ()}, "timesteps: are none"), ({"steps_of_t": (50,)}, "timestep: is 50")])
def test_bad_arguments(small_set, model, options, problem):
    with pytest.raises(InputError, match=problem):
        grid.grid_search(small_set, model, **options)


def test_a_set_without_correspondence(small_set, model, tmp_path):
    folder = shutil.copytree(small_set, tmp_path / "set")
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    (folder / "index.jsonl").write_text("\n".join(json.dumps({k: v for k, v in line.items() if k != "correspondence"}) for line in lines))
    with pytest.raises(InputError, match="no item with correspondence"):
        grid.grid_search(folder, model)


def test_the_command_writes_figures_pictures_and_the_choice(small_set, model_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    own = shutil.copytree(model_folder, tmp_path / "model")
    results = {"set": "small", "n": 2, "timesteps": [0, 24], "gamma": [[0.1] * 16, [0.2] * 15 + [0.3]], "dense": [[0.1] * 16, [0.2] * 15 + [0.4]], "best": {"timestep": 24, "layer": 15, "miou": 0.4}}
    asked = []
    monkeypatch.setattr(grid, "grid_search", lambda folder, model, steps, limit, seed, progress: asked.append((steps, limit, seed)) or results)
    command = ["bench", "grid-search", str(small_set), "--model", str(own), "--out", str(tmp_path / "out"), "--steps-of-t", "0,24", "--limit", "2"]
    before = json.loads((own / "config.json").read_text())
    assert cli.main(command) == 0
    assert asked == [([0, 24], 2, 0)]
    assert json.loads((own / "config.json").read_text()) == before
    assert json.loads((tmp_path / "out" / "grid.json").read_text()) == results | {"model": "model"}
    for name in (grid.HEAT_MAP, grid.CURVES):
        picture = Image.open(tmp_path / "out" / name).convert("RGB")
        assert len(picture.getcolors(picture.width * picture.height)) > 20
    assert cli.main([*command, "--write"]) == 0
    assert json.loads((own / "config.json").read_text()) == before | {"alignment_layer": 15, "alignment_timestep": 24}
    assert sorted(path.name for path in own.iterdir()) == sorted(path.name for path in model_folder.iterdir())
    capsys.readouterr()
    assert cli.main([*command, "--steps-of-t", "0,many"]) == 2
    assert capsys.readouterr().err.startswith("rba: timesteps: are '0,many'")
