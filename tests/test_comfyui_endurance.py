"""A real ComfyUI for longer: run after run, cancelled at any moment, fed with what is wrong, told to free its memory.

Short by default; RBA_ENDURANCE=50 makes 50 runs and a fifth as many cancels.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from comfy_server import SAMPLE, Server, assert_same, find_comfyui
from PIL import Image

RUNS = int(os.environ.get("RBA_ENDURANCE", 6))
WARM_UP = 3
"""Runs until every library holds what it will hold."""
WIDTH, HEIGHT = Image.open(SAMPLE / "image.png").size


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_folder):
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH")
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc to read a server's memory from")
    base = tmp_path_factory.mktemp("comfyui") / "base"
    shutil.copytree(model_folder, base / "models" / "refine_by_align" / "other")
    shutil.copytree(model_folder, base / "models" / "refine_by_align" / "cut")
    (base / "models" / "refine_by_align" / "cut" / "config.json").write_text("{")
    server = Server(comfyui, base)
    yield server
    server.close()


def megabytes(server: Server) -> float:
    """What the server holds in memory."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())[1]) / 1024


def test_memory_stays_flat_over_many_runs(server, prompt):
    held = []
    for seed in range(RUNS):
        server.run(prompt("quickstart", RBA_RefineByAlign={"seed": seed, "steps": 2}))
        held.append(megabytes(server))
    print(f"\nMB after each of {RUNS} runs: {' '.join(f'{each:.0f}' for each in held)}")
    assert max(held[WARM_UP:]) <= 1.05 * max(held[:WARM_UP])


def test_the_run_after_a_cancelled_one_is_right(server, prompt, expected):
    chance = random.Random(0)
    for seed in range(1000, 1000 + max(2, RUNS // 5)):
        long = server.queue(prompt("quickstart", RBA_RefineByAlign={"seed": seed, "steps": 1000}))
        server.wait(lambda: any(entry[1] == long for entry in server.get("/queue")["queue_running"]), "start the prompt")
        time.sleep(chance.uniform(0, 2))
        # over and over: one that arrives just before the prompt begins is forgotten
        server.wait(lambda: server.post("/interrupt", {}) or server.get(f"/history/{long}"), "stop")
        assert "execution_interrupted" in [kind for kind, _ in server.finished(long)["status"]["messages"]]
        assert_same(server.run(prompt("quickstart", RBA_RefineByAlign={"seed": seed})), expected(seed))


def blank_mask(value: float, width: int = WIDTH, height: int = HEIGHT) -> dict:
    return {"class_type": "SolidMask", "inputs": {"value": value, "width": width, "height": height}}


TINY = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
THREE = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 3, "color": 0}}
OTHER, CUT = ({"class_type": "RBA_LoadModel", "inputs": {"model_name": name, "dtype": "auto", "device": "default"}} for name in ("other", "cut"))

# what: (workflow, node, what it is given in place of what it had, how the error begins, node that tells it)
REFUSED = {
    "empty mask": ("quickstart", "RBA_RefineByAlign", {"mask": blank_mask(0)}, "mask: is empty; ", None),
    "wholly painted mask": ("quickstart", "RBA_RefineByAlign", {"mask": blank_mask(1)}, "mask: covers the whole image; ", None),
    "mask of another size": ("quickstart", "RBA_RefineByAlign", {"mask": blank_mask(1, 64, 48)}, f"mask: is 64 x 48, its image {WIDTH} x {HEIGHT}; ", None),
    "tiny image": ("quickstart", "RBA_RefineByAlign", {"image": TINY, "mask": blank_mask(1, 8, 8)}, "image: is only 8 x 8 pixels; ", None),
    "tiny reference": ("quickstart", "RBA_RefineByAlign", {"reference": TINY, "reference_mask": None}, "reference: is only 8 x 8 pixels; ", None),
    "reference mask empty": ("quickstart", "RBA_RefineByAlign", {"reference_mask": blank_mask(0)}, "reference mask: is empty; ", None),
    "reference mask of another size": ("quickstart", "RBA_RefineByAlign", {"reference_mask": blank_mask(1, 64, 48)}, "reference mask: is 64 x 48, its reference ", None),
    "a batch to references of another number": ("quickstart", "RBA_RefineByAlign", {"reference": THREE, "reference_mask": None, "mask": "RepeatMask"}, "mask: has 2 in its batch, reference has 3; ", None),
    "another model's reference": ("step_by_step", "RBA_EncodeReference", {"model": OTHER}, "reference: was encoded by another model; ", "RBA_Align"),
    "crop that is none": ("step_by_step", "RBA_Align", {"crop": THREE, "crop_mask": blank_mask(1, 64, 64)}, "crop: is 64 x 64; this model works at ", None),
    "damaged model": ("quickstart", "RBA_RefineByAlign", {"model": CUT}, "model: ", "RBA_LoadModel"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_told_in_one_line_on_its_node(server, prompt, what):
    name, kind, given, message, teller = REFUSED[what]
    spoilt = prompt(name)
    for node in [node for node in spoilt.values() if node["class_type"] == kind]:
        for entry, source in given.items():
            if source is None:
                del node["inputs"][entry]
            elif source == "RepeatMask":
                spoilt["both"] = {"class_type": "MaskToImage", "inputs": {"mask": node["inputs"][entry]}}
                spoilt["repeated"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["both", 0], "amount": 2}}
                spoilt[f"bad {entry}"] = {"class_type": "ImageToMask", "inputs": {"image": ["repeated", 0], "channel": "red"}}
                node["inputs"][entry] = [f"bad {entry}", 0]
            else:
                spoilt[f"bad {entry}"] = source
                node["inputs"][entry] = [f"bad {entry}", 0]
    entry = server.finished(server.queue(spoilt))
    (error,) = (content for kind_, content in entry["status"]["messages"] if kind_ == "execution_error")
    told = error["exception_message"].strip()
    assert told.startswith(message) and "\n" not in told and "; " in told, told
    assert error["node_type"] == (teller or kind)


def test_told_to_free_its_memory_it_reads_the_model_again(server, prompt, expected):
    """After all that, and with the library's result."""
    held = megabytes(server)
    server.post("/free", {"unload_models": True, "free_memory": True})
    assert_same(server.run(prompt("quickstart", RBA_RefineByAlign={"seed": 1000})), expected(1000))
    *_, last = server.get("/history").values()
    assert [content["nodes"] for kind, content in last["status"]["messages"] if kind == "execution_cached"] == [[]]
    print(f"\nMB: {held:.0f}, freed and after one more run {megabytes(server):.0f}")
    assert megabytes(server) <= 1.05 * held
