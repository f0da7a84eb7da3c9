"""The pack in a real ComfyUI, driven over HTTP; see comfy_server.py for where it is looked for."""

from __future__ import annotations

import json
import time

import comfy_stand_in
import comfy_workflows
import numpy as np
import pytest
import torch
from comfy_server import assert_same
from PIL import Image

from rba_core import RefineByAlign, refine_by_align
from rba_core.alignment import align
from rba_core.imageio import to_bytes
from rba_core.overlay import overlay
from rba_core.pipeline import Settings
from rba_core.reference_encoding import encode_reference
from rba_core.zoom_crop import crop_for, zoom_crop


def test_every_node_is_described_as_the_stand_in_describes_it(server):
    for name, node in comfy_stand_in.node_classes().items():
        assert name in server.infos, server.log[-4000:]
        described = json.loads(json.dumps(comfy_stand_in.object_info(node)))
        assert {key: server.infos[name][key] for key in described} == described
    assert {name for name in server.infos if name.startswith("RBA_")} == set(comfy_stand_in.node_classes())


@pytest.mark.parametrize("name", ["quickstart", "step_by_step"])
def test_workflow_gives_the_library_s_result(server, prompt, expected, name):
    assert_same(server.run(prompt(name)), expected(0))


@pytest.mark.parametrize("path", sorted(comfy_workflows.WORKFLOWS.glob("*.json")), ids=lambda path: path.stem)
def test_workflow_fits_the_real_nodes(server, path):
    """But for those of packs that are not here, as they are written down."""
    assert comfy_workflows.problems(json.loads(path.read_text()), comfy_workflows.known_infos() | server.infos) == []


def cell(grid: np.ndarray, row: int, column: int, side: int = 384, padding: int = 4) -> np.ndarray:
    y, x = row * (side + padding), column * (side + padding)
    return grid[y : y + side, x : x + side].astype(int)


def in_a_cell(picture, side: int = 384) -> np.ndarray:
    """`[3, H, W]` as *Make Image Grid* draws it."""
    return np.asarray(Image.fromarray((picture.movedim(0, -1).numpy() * 255).astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)).astype(int)


def test_batch(server, prompt, sample):
    image, mask, *guide = sample
    saved = server.run_batch(prompt("batch", RBA_EditorCrop={"size": 512}))
    assert len(saved) == 3
    crop = zoom_crop(image, mask, 512, context=4)
    expected = to_bytes(refine_by_align(RefineByAlign.load(), crop.image, crop.mask, *guide).image)
    assert np.abs(saved[1].astype(int) - expected).max() <= 1


def test_compare(server, prompt, sample, expected):
    image, mask, *guide = sample
    grid = server.run(prompt("compare"))
    published = refine_by_align(RefineByAlign.load(), *sample, settings=Settings(dense=False, levels=1, register=False, detail_transfer=0)).image
    ours = torch.from_numpy(expected(0)).movedim(-1, 0) / 255
    for place, picture in (((0, 0), image), ((0, 2), ours), ((1, 0), published)):
        assert np.abs(cell(grid, *place) - in_a_cell(zoom_crop(picture, mask, 1024, context=2).image)).max() <= 4, place
    results = [cell(grid, *place) for place in ((0, 2), (1, 0), (1, 1), (1, 2))]
    assert all(np.abs(one - other).max() > 8 for index, one in enumerate(results) for other in results[:index])


def test_grid_search(server, prompt, sample):
    image, mask, reference, reference_mask = sample
    grid = server.run(prompt("grid_search"))
    model = RefineByAlign.load()
    whole, crop = encode_reference(model, reference, reference_mask), crop_for(model, image, mask, model.config.alignment_context)
    for row, column, layer, timestep in ((0, 0, 9, 10), (2, 1, 14, 30)):
        seen = whole.to_reference(align(model, crop, whole, layer=layer, timestep=timestep))
        drawn = zoom_crop(overlay(reference, seen / seen.max()), reference_mask, 1024, context=1).image
        assert np.abs(cell(grid, row, column) - in_a_cell(drawn)).max() <= 4, (layer, timestep)
    assert np.abs(cell(grid, 0, 0) - cell(grid, 2, 2)).max() > 20


def test_feature_alignment(server, prompt, sample, expected):
    """With the embedded model's encoder in the place of DINOv2: another way to the same region, and so to nearly the same picture."""
    changed = prompt("feature_alignment")
    (model,) = (number for number, node in changed.items() if node["class_type"] == "RBA_LoadModel")
    (loader,) = (number for number, node in changed.items() if node["class_type"] == "CLIPVisionLoader")
    del changed[loader]
    for node in changed.values():
        if node["class_type"] == "RBA_AlignDINOv2":
            node["inputs"] |= {"model": [model, 0]}
            del node["inputs"]["clip_vision"]
    saved, before = server.run(changed).astype(int), to_bytes(sample[0]).astype(int)
    inside = sample[1].numpy() > 0.5
    assert (saved[~inside] == before[~inside]).all()
    assert np.abs(saved - expected(0))[inside].mean() < np.abs(saved - before)[inside].mean() / 5


def test_blueprint_is_listed_and_gives_the_library_s_result(server, expected):
    (path,) = comfy_workflows.SUBGRAPHS.glob("*.json")
    (number,) = (number for number, entry in server.get("/global_subgraphs").items() if entry["name"] == path.stem and entry["source"] == "custom_node")
    assert server.get(f"/global_subgraphs/{number}")["data"] == path.read_text()
    workflow = comfy_workflows.blueprint_in_use(path, server.infos)
    assert comfy_workflows.problems(workflow, server.infos) == []
    assert_same(server.run(comfy_workflows.to_prompt(workflow, server.infos)), expected(0))


def test_error_is_the_library_s_one_line(server, prompt):
    empty = prompt("quickstart")
    empty["blank"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 64, "height": 64}}
    for node in empty.values():
        if node["class_type"] == "RBA_RefineByAlign":
            node["inputs"]["mask"] = ["blank", 0]
    entry = server.finished(server.queue(empty))
    (error,) = (content for kind, content in entry["status"]["messages"] if kind == "execution_error")
    assert error["exception_message"].strip() == "mask: is empty; paint over at least one pixel (white = selected)"
    assert error["node_type"] == "RBA_RefineByAlign"


def test_cancelled_run_leaves_the_next_one_right(server, prompt, expected):
    # at seed 1 nothing is in ComfyUI's cache of earlier results
    long = server.queue(prompt("quickstart", RBA_RefineByAlign={"seed": 1, "steps": 1000}))
    server.wait(lambda: any(entry[1] == long for entry in server.get("/queue")["queue_running"]), "start the prompt")
    time.sleep(2)
    # over and over: one that arrives just before the prompt begins is forgotten
    server.wait(lambda: server.post("/interrupt", {}) or server.get(f"/history/{long}"), "stop")
    kinds = [kind for kind, _ in server.finished(long)["status"]["messages"]]
    assert "execution_interrupted" in kinds
    assert_same(server.run(prompt("quickstart", RBA_RefineByAlign={"seed": 1})), expected(1))


def test_the_log_holds_no_complaint(server):
    # the empty mask's error, with its traceback, is told by ComfyUI as it should be
    assert [line for line in server.complaints() if "InputError" not in line and 'File "' not in line] == []
    assert "Loading weights" not in server.log
