"""Every workflow file that ships with the pack, against the nodes' schemas."""

import copy
import json
from pathlib import Path

import comfy_stand_in
import comfy_workflows
import pytest
from PIL import Image

FILES = sorted(comfy_workflows.WORKFLOWS.glob("*.json"))
BLUEPRINTS = sorted(comfy_workflows.SUBGRAPHS.glob("*.json"))
PACKS = {
    "3d_pack": "ComfyUI-3D-Pack", "anydoor": "ComfyUI_AnyDoor", "idm_vton": "ComfyUI-IDM-VTON", "ipadapter_plus": "ComfyUI_IPAdapter_plus",
}  # fmt: skip
"""Folder of `node_infos` -> what the pack is called."""
INFOS = comfy_workflows.known_infos()


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.mark.parametrize("path", [*FILES, *BLUEPRINTS], ids=lambda path: path.stem)
def test_file_names_nothing_of_the_machine_it_was_made_on(path):
    text = path.read_text()
    assert not any(trace in text for trace in ("/root", "/home", "/Users", "/work", ":\\\\"))


@each_file
def test_file_fits_the_nodes(path):
    assert comfy_workflows.problems(json.loads(path.read_text()), INFOS) == []


@each_file
def test_note_says_what_it_needs(path):
    workflow = json.loads(path.read_text())
    notes = "\n".join(node["widgets_values"][0] for node in workflow["nodes"] if node["type"] in comfy_workflows.NOTES)
    assert notes, "says nothing of what it is for"
    used = {node["type"] for node in workflow["nodes"]}
    for info in Path(__file__).parent.glob("node_infos/*/*.json"):
        if info.stem in used and info.parent.name in PACKS:
            assert PACKS[info.parent.name] in notes
    models = {value for node in workflow["nodes"] for value in node.get("widgets_values") or [] if isinstance(value, str) and value.endswith(".safetensors")}
    assert not [model for model in models if model not in notes]


@each_file
def test_changed_settings_are_named_in_the_title(path):
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"].startswith("RBA_"):
            options = {name: entry[1] for name, entry in comfy_workflows.schema_inputs(INFOS[node["type"]]).items()}
            changed = {name: value for name, value in comfy_workflows.widget_values(node, INFOS[node["type"]]).items() if value != options[name].get("default", value)}
            assert [name for name in changed if name not in node.get("title", "")] == [], f"{node['type']}: {changed}"


@each_file
def test_thumbnail_is_there(path):
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert min(thumbnail.size) >= 256 and path.with_suffix(".jpg").stat().st_size < 100_000


def test_api_twins_are_current():
    """Else: python tests/comfy_workflows.py"""
    twins = comfy_workflows.twins()
    assert {file: file.read_text() for file in comfy_workflows.API.glob("*.json")} == twins


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_fits_the_nodes(path):
    workflow = comfy_workflows.blueprint_in_use(path, INFOS)
    assert comfy_workflows.problems(workflow, INFOS) == []
    prompt = comfy_workflows.to_prompt(workflow, INFOS)
    assert all(isinstance(value, list) and value[0] in prompt for node in prompt.values() for name, value in node["inputs"].items() if name in ("image", "mask", "model", "images"))


def test_bypass_and_mute():
    """A bypassed node hands its input of the same type on, or nothing; a muted one nothing."""
    workflow = json.loads((comfy_workflows.WORKFLOWS / "qwen_image_edit.json").read_text())
    prompt = comfy_workflows.to_prompt(workflow, INFOS)
    kinds = [node["class_type"] for node in prompt.values()]
    assert "LoraLoaderModelOnly" not in kinds and "MaskToImage" not in kinds
    inputs = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert prompt[inputs["ModelSamplingAuraFlow"]["model"][0]]["class_type"] == "UNETLoader"
    assert "image3" not in inputs["TextEncodeQwenImageEditPlus"] and "image2" in inputs["TextEncodeQwenImageEditPlus"]
    for node in workflow["nodes"]:
        node["mode"] = 0 if node["type"] != "VAEEncode" else comfy_workflows.NEVER
    inputs = {node["class_type"]: node["inputs"] for node in comfy_workflows.to_prompt(workflow, INFOS).values()}
    assert "image3" in inputs["TextEncodeQwenImageEditPlus"] and "latent_image" not in inputs["KSampler"]


def test_every_node_is_in_a_file():
    used = {node["type"] for path in FILES for node in json.loads(path.read_text())["nodes"]}
    assert set(comfy_stand_in.node_classes()) <= used


@pytest.fixture
def quickstart():
    return json.loads(next(path for path in FILES if path.stem == "quickstart").read_text())


def damage_type(workflow):
    workflow["nodes"][3]["type"] = "RBA_Renamed"


def damage_value(workflow):
    next(node for node in workflow["nodes"] if node["type"] == "RBA_LoadModel")["widgets_values"][0] = "not-there"


def damage_count(workflow):
    next(node for node in workflow["nodes"] if node["type"] == "RBA_RefineByAlign")["widgets_values"].append(1)


def damage_link(workflow):
    workflow["links"][0][5] = "LATENT"


def damage_input(workflow):
    next(node for node in workflow["nodes"] if node["type"] == "RBA_RefineByAlign")["inputs"][0]["link"] = None


def damage_place(workflow):
    workflow["nodes"][1]["pos"] = workflow["nodes"][0]["pos"]


def damage_group(workflow):
    x, y = workflow["nodes"][1]["pos"]
    workflow["groups"] = [{"title": "Cut", "bounding": [x + 10, y, 1000, 500]}]


@pytest.mark.parametrize("damage", [damage_type, damage_value, damage_count, damage_link, damage_input, damage_place, damage_group])
def test_damage_is_seen(quickstart, damage):
    damaged = copy.deepcopy(quickstart)
    damage(damaged)
    assert comfy_workflows.problems(damaged, INFOS)
