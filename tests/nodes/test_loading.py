import sys

import pytest
import torch


@pytest.fixture
def model_root(nodes, monkeypatch, tmp_path):
    """An empty `models/refine_by_align`."""
    monkeypatch.setitem(sys.modules["folder_paths"].folder_names_and_paths, "refine_by_align", ([str(tmp_path)], {"folder"}))
    return tmp_path


def add_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def options(nodes):
    return nodes.loading.LoadModel.define_schema().inputs[0].options["options"]


def test_shipped_model_comes_first_then_the_user_s(nodes, model_root):
    add_model(model_root / "mine")
    (model_root / "no model").mkdir()
    add_model(model_root / ".mine-partly-written")
    assert options(nodes) == ["rba-tiny", "mine"]


def test_extra_model_paths(nodes, model_root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    add_model(elsewhere / "theirs")
    sys.modules["folder_paths"].add_model_folder_path("refine_by_align", str(elsewhere))
    assert options(nodes) == ["rba-tiny", "theirs"]


def test_shipped_model_is_not_hidden_by_one_of_its_name(nodes, model_root):
    add_model(model_root / "rba-tiny")
    assert nodes.loading.model_folders()["rba-tiny"] == str(nodes.loading.PRETRAINED / "rba-tiny")


def test_loads_a_model_folder(nodes, model_root, model_folder, model):
    (model_root / "small").symlink_to(model_folder, target_is_directory=True)
    (patcher,) = nodes.loading.LoadModel.execute("small", "auto", "default").args
    network = patcher.model.network
    assert not network.training and network.dtype == torch.float32
    weights, expected = network.state_dict(), model.state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_precision(nodes, model_root, model_folder, name, dtype):
    (model_root / "small").symlink_to(model_folder, target_is_directory=True)
    (patcher,) = nodes.loading.LoadModel.execute("small", name, "cpu").args
    assert patcher.model.network.dtype == dtype
    assert patcher.load_device == patcher.offload_device == torch.device("cpu")


@pytest.mark.parametrize("faster, dtype", [(True, torch.float16), (False, torch.float32)])
def test_a_server_that_stores_weights_in_fp8_computes_ours_in_more(nodes, model_root, model_folder, monkeypatch, faster, dtype):
    management = sys.modules["comfy.model_management"]
    monkeypatch.setattr(management, "unet_dtype", lambda device, parameters, supported_dtypes: torch.float8_e4m3fn)
    monkeypatch.setattr(management, "should_use_fp16", lambda device, parameters: faster)
    (model_root / "small").symlink_to(model_folder, target_is_directory=True)
    (patcher,) = nodes.loading.LoadModel.execute("small", "auto", "default").args
    assert patcher.model.network.dtype == dtype


def test_unreadable_model_says_what_to_do(nodes, model_root):
    add_model(model_root / "broken")
    with pytest.raises(ValueError, match="^model: .*broken.* cannot be read .*copy the folder again"):
        nodes.loading.LoadModel.execute("broken", "auto", "default")


def test_sample(nodes):
    image, mask, reference, reference_mask = nodes.loading.Sample.execute().args
    for picture, selection in ((image, mask), (reference, reference_mask)):
        assert picture.shape == (*selection.shape, 3) and len(picture) == 1
        assert 0 <= picture.min() < picture.max() <= 1
        assert set(selection.unique().tolist()) == {0.0, 1.0}


def test_model_whose_files_change_is_read_again(nodes, model_folder, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(nodes.loading, "model_folders", lambda: {"small": str(tmp_path), "other": str(model_folder)})

    def fingerprint(name="small"):
        return nodes.loading.LoadModel.fingerprint_inputs(name, "auto", "default")

    before = fingerprint()
    assert fingerprint() == before != fingerprint("other")
    (tmp_path / "config.json").write_text("{ }")
    changed = fingerprint()
    assert changed != before
    (tmp_path / "weights.safetensors").write_text("")
    assert fingerprint() != changed
