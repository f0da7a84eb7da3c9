"""Every workflow file that ships with the pack, against the nodes' schemas."""

import copy
import json
from pathlib import Path

import comfy_stand_in
import comfy_workflows
import pytest

FILES = sorted((Path(__file__).parent.parent / "workflows").glob("*.json"))

OTHERS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "node_infos").glob("*/*.json")}
"""Nodes of ComfyUI and of other packs, as their `/object_info` describes them; a folder a pack."""
INFOS = OTHERS | {name: comfy_stand_in.object_info(node) for name, node in comfy_stand_in.node_classes().items()}
INFOS["RBA_LoadReferenceEncoder"]["input"]["required"]["encoder_name"][1]["options"] = ["rba-sd15"]  # none comes with the pack


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_fits_the_nodes(path):
    workflow = json.loads(path.read_text())
    assert comfy_workflows.problems(workflow, INFOS) == []
    assert any(node["type"] in comfy_workflows.NOTES for node in workflow["nodes"]), "says nothing of what it is for"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_names_nothing_of_the_machine_it_was_made_on(path):
    text = path.read_text()
    assert not any(trace in text for trace in ("/root", "/home", "/Users", "/work", ":\\\\"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_leaves_the_settings_at_their_defaults(path):
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"].startswith("RBA_"):
            options = {name: entry[1] for name, entry in comfy_workflows.schema_inputs(INFOS[node["type"]]).items()}
            changed = {name: value for name, value in comfy_workflows.widget_values(node, INFOS[node["type"]]).items() if value != options[name].get("default", value)}
            assert changed == {}, node["type"]


def test_every_node_is_in_a_file():
    used = {node["type"] for path in FILES for node in json.loads(path.read_text())["nodes"]}
    assert {name for name in INFOS if name not in OTHERS} <= used


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


@pytest.mark.parametrize("damage", [damage_type, damage_value, damage_count, damage_link, damage_input, damage_place])
def test_damage_is_seen(quickstart, damage):
    damaged = copy.deepcopy(quickstart)
    damage(damaged)
    assert comfy_workflows.problems(damaged, INFOS)
