"""The pack in a real ComfyUI: a server on a free port with a base directory of its own, driven over HTTP.

Needs a ComfyUI: COMFYUI_PATH, or the one whose custom_nodes holds this pack, or ~/comfy/ComfyUI; and the Python that
runs it: COMFYUI_PYTHON, or its .venv or venv, or this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

import comfy_workflows
import numpy as np
import pytest
from PIL import Image
from processes import free_port

from rba_core import RefineByAlign, refine_by_align
from rba_core.imageio import to_bytes
from rba_core.shipped import SAMPLE, read_sample

PACK = Path(__file__).parent.parent
PATIENCE = 300
"""Seconds until something that should take a few is given up."""


def find_comfyui() -> Path | None:
    candidates = [PACK.parent.parent] if PACK.parent.name == "custom_nodes" else []
    candidates.append(Path.home() / "comfy" / "ComfyUI")
    if "COMFYUI_PATH" in os.environ:
        candidates = [Path(os.environ["COMFYUI_PATH"])]
    return next((path for path in candidates if (path / "main.py").is_file() and (path / "comfy_api").is_dir()), None)


def find_python(comfyui: Path) -> str:
    if "COMFYUI_PYTHON" in os.environ:
        return os.environ["COMFYUI_PYTHON"]
    return next((str(path) for path in (comfyui / ".venv/bin/python", comfyui / "venv/bin/python") if path.is_file()), sys.executable)


class Server:
    def __init__(self, comfyui: Path, base: Path):
        (base / "custom_nodes").mkdir(parents=True)
        (base / "custom_nodes" / "refine-by-align").symlink_to(PACK, target_is_directory=True)
        port = free_port()
        self.base, self.url, self.log_file = base, f"http://127.0.0.1:{port}", base / "server.log"
        with open(self.log_file, "w") as log:
            self.process = subprocess.Popen(
                [find_python(comfyui), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch",
                 "--base-directory", str(base), "--database-url", "sqlite:///:memory:"],
                cwd=comfyui, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.infos = self.wait(lambda: self.get("/object_info"), "start")

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def complaints(self) -> list[str]:
        return [line for line in self.log.splitlines() if any(word in line for word in ("WARNING", "ERROR", "Traceback", "IMPORT FAILED")) and "refine-by-align" in line]

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, content: dict):
        request = urllib.request.Request(self.url + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or "{}")

    def wait(self, question, what: str):
        """The first true answer."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if answer := question():
                    return answer
            except urllib.error.URLError:
                pass
            time.sleep(0.2)
        pytest.fail(f"ComfyUI did not {what}:\n{self.log[-4000:]}")

    def queue(self, prompt: dict) -> str:
        try:
            return self.post("/prompt", {"prompt": prompt})["prompt_id"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"ComfyUI refused the prompt: {error.read().decode()}")

    def finished(self, prompt_id: str) -> dict:
        return self.wait(lambda: self.get(f"/history/{prompt_id}").get(prompt_id), "finish the prompt")

    def run(self, prompt: dict) -> np.ndarray:
        """Queue a prompt with one SaveImage and give what it saved, `[H, W, 3]` uint8."""
        (saved,) = self.run_batch(prompt)
        return saved

    def run_batch(self, prompt: dict) -> list[np.ndarray]:
        entry = self.finished(self.queue(prompt))
        assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
        (saver,) = (number for number, node in prompt.items() if node["class_type"] == "SaveImage")
        return [np.asarray(Image.open(self.base / "output" / saved["subfolder"] / saved["filename"])) for saved in entry["outputs"][saver]["images"]]

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    comfyui = find_comfyui()
    if comfyui is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH")
    server = Server(comfyui, tmp_path_factory.mktemp("comfyui") / "base")
    yield server
    server.close()


@pytest.fixture(scope="session")
def sample():
    return read_sample()


@pytest.fixture(scope="session")
def expected(sample):
    """`expected(seed)`: the library's own result on the sample, as the command line writes it."""
    model = RefineByAlign.load()
    return cache(lambda seed: to_bytes(refine_by_align(model, *sample, seed=seed).image))


@pytest.fixture
def prompt(server):
    """`prompt(name, node type={input: value}, …)`: a shipped workflow in API format, with changes."""

    def load(name: str, **changes: dict) -> dict:
        converted = comfy_workflows.to_prompt(json.loads((PACK / "workflows" / f"{name}.json").read_text()), server.infos)
        for node in converted.values():
            node["inputs"] |= changes.get(node["class_type"], {})
        return converted

    return load


def assert_same(saved: np.ndarray, expected: np.ndarray) -> None:
    """Equal outside the mask; within it SaveImage truncates where the command line rounds."""
    difference = np.abs(saved.astype(int) - expected)
    inside = np.asarray(Image.open(SAMPLE / "mask.png").convert("L")) > 127
    assert difference[~inside].max() == 0
    assert difference[inside].max() <= 1
    assert (saved[inside] != np.asarray(Image.open(SAMPLE / "image.png").convert("RGB"))[inside]).any()
