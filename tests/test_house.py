"""Rules of the house that no other test sees."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

CORE = Path(__file__).parents[1] / "rba_core"
SOURCES = sorted(CORE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports; relative ones resolved to where they lead from `rba_core`."""
    package = ["rba_core", *path.relative_to(CORE).parts[:-1]]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_stands_without_comfyui_and_the_nodes(path):
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "execution", "server", "nodes"}, name
        assert top, f"{path.name} reaches above rba_core"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_imports_what_is_declared_and_nothing_more(path):
    declared = {"torch", "diffusers", "transformers", "safetensors", "numpy", "scipy", "einops", "PIL", "tqdm", "rba_core"}
    for folder, extras in {"bench": {"accelerate", "cv2", "lpips", "matplotlib", "rapidfuzz", "rapidocr"}, "data": {"matplotlib"}, "training": {"accelerate", "matplotlib"}}.items():
        if folder in path.parts:
            declared |= extras
    assert {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) <= declared


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_nothing_is_unpickled_but_weights(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("torch.load"):
            assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), ast.unparse(node)
    assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CORE)))
def test_nothing_is_evaluated_or_fetched(path):
    calls = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
    assert not {"eval", "exec", "os.system"} & calls
    assert not {"requests", "urllib.request", "huggingface_hub"} & imports(path) or path.name == "downloads.py"  # which runs when asked for
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
            assert any(k.arg == "local_files_only" and ast.unparse(k.value) == "True" for k in node.keywords), ast.unparse(node)


def test_what_is_required_has_a_floor_and_no_ceiling_and_comfyui_gets_the_same():
    project = tomllib.loads((CORE.parent / "pyproject.toml").read_text())["project"]
    assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", line) for line in project["dependencies"])
    assert not [line for extra in project["optional-dependencies"].values() for line in extra if re.search("<|==|~", line)]
    wanted = [line for line in (CORE.parent / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert wanted == [line for line in project["dependencies"] if not line.startswith("torch>")]


def test_the_sources_were_found():
    assert {"alignment.py", "cli.py", "pipeline.py"} <= {path.name for path in SOURCES}
