"""Workflow files as the frontend saves them: what is wrong with one, and the prompt that the frontend would queue.

Run as a program, it writes the shipped workflows in API format, for headless use: python tests/comfy_workflows.py
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

PACK = Path(__file__).parent.parent
WORKFLOWS, SUBGRAPHS, API = PACK / "workflows", PACK / "subgraphs", PACK / "workflows" / "api"

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
VIEWS = {"IMAGECOMPARE"}
"""Of inputs that the frontend shows a result in: nothing is saved of them, and nothing that matters is queued."""
NOTES = {"MarkdownNote", "Note"}
NEVER, BYPASS = 2, 4
FROM_OUTSIDE, TO_OUTSIDE = -10, -20
"""Node ids in a subgraph's links."""
MODELS = (".safetensors", ".ckpt", ".png")
"""Files that the user has, not every list of `/object_info`."""
TITLE_HEIGHT = 30


def schema_inputs(info: dict, entries: list[dict] = ()) -> dict[str, tuple[str, dict]]:
    """Input id -> (type, options) in the order of the node, required ones first. `info` as in `/object_info`.

    entries     the inputs of a saved node: says how far the inputs that grow have grown
    """
    found = {}
    for kind in ("required", "optional"):
        for name, (io_type, *options) in info["input"].get(kind, {}).items():
            options = dict(options[0]) if options else {}
            if io_type == "COMFY_AUTOGROW_V3":
                ((grown, *rest),) = options["template"]["input"]["required"].values()
                found |= {entry["name"]: (grown, *(rest or [{}])) for entry in entries if entry["name"].startswith(f"{name}.")}
                continue
            if isinstance(io_type, list):  # a combo of the older node API
                io_type, options["options"] = "COMBO", io_type
            found[name] = io_type, options
    return found


def widget_values(node: dict, info: dict) -> dict[str, object]:
    """Input id -> value. The file holds a bare list, in which what follows a seed says how it changes."""
    left, values = list(node.get("widgets_values") or []), {}
    if left[-1:] == [None]:
        # as long as there are widgets and forced inputs, the list is taken for an old version's, and the forced inputs' are dropped
        left.pop()
    for name, (io_type, options) in schema_inputs(info).items():
        if io_type in WIDGET_TYPES and not options.get("forceInput"):
            values[name] = left.pop(0)
            if options.get("control_after_generate", io_type == "INT" and name in ("seed", "noise_seed")):
                assert left.pop(0) in ("fixed", "increment", "decrement", "randomize"), f"{name} of node {node['id']}"
            if options.get("image_upload"):
                assert left.pop(0) == "image", f"{name} of node {node['id']}"
    assert not left, f"node {node['id']} has {len(left)} widget values too many"
    return values


def opened(workflow: dict) -> dict:
    """The workflow with its subgraphs' nodes in their places. Ids of what was inside: "the subgraph's:its own"."""
    definitions = {subgraph["id"]: subgraph for subgraph in workflow.get("definitions", {}).get("subgraphs", [])}
    if not definitions:
        return workflow
    nodes, links = [], {link[0]: list(link) for link in workflow["links"]}
    for node in copy.deepcopy(workflow["nodes"]):
        if node["type"] not in definitions:
            nodes.append(node)
            continue
        inside = copy.deepcopy(definitions[node["type"]])
        within = {part["id"]: part for part in inside["nodes"]}
        numbers = {entry["name"]: entry["link"] for entry in node["inputs"] if entry["link"] is not None}
        arriving = {slot: links[numbers[port["name"]]] for slot, port in enumerate(inside["inputs"]) if port["name"] in numbers}
        for part in inside["nodes"]:
            part["id"] = f"{node['id']}:{part['id']}"
            for entry in part.get("inputs", []):
                entry["link"] = None
            for output in part.get("outputs", []):
                output["links"] = []
        for link in inside["links"]:
            source, target = link["origin_id"], link["target_id"]
            if target == TO_OUTSIDE:
                for number in list(links):
                    if links[number][1:3] == [node["id"], link["target_slot"]]:
                        links[number][1:3] = [within[source]["id"], link["origin_slot"]]
                        within[source]["outputs"][link["origin_slot"]]["links"].append(number)
                continue
            entry = within[target]["inputs"][link["target_slot"]]
            if source == FROM_OUTSIDE and link["origin_slot"] not in arriving:
                continue
            number = f"{node['id']}:{link['id']}"
            start = arriving[link["origin_slot"]][1:3] if source == FROM_OUTSIDE else [within[source]["id"], link["origin_slot"]]
            links[number] = [number, *start, within[target]["id"], link["target_slot"], link["type"]]
            entry["link"] = number
        nodes += inside["nodes"]
    return workflow | {"nodes": nodes, "links": [link for link in links.values() if any(node["id"] == link[3] for node in nodes)]}


def to_prompt(workflow: dict, infos: dict[str, dict]) -> dict[str, dict]:
    """The API format: node id -> class and inputs."""
    workflow = opened(workflow)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}

    def source(number) -> list | None:
        """Where a link starts; through what is bypassed, by the first input of the same type; `None` = nowhere."""
        _, start, slot, _, _, io_type = links[number]
        if nodes[start].get("mode") == NEVER:
            return None
        if nodes[start].get("mode") == BYPASS:
            through = [entry["link"] for entry in nodes[start]["inputs"] if entry["type"] == io_type and entry["link"] is not None]
            return source(through[0]) if through else None
        return [str(start), slot]

    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node.get("mode") in (NEVER, BYPASS):
            continue
        linked = {entry["name"]: source(entry["link"]) for entry in node["inputs"] if entry["link"] is not None}
        views = {name: "" for name, (io_type, _) in schema_inputs(infos[node["type"]]).items() if io_type in VIEWS}
        inputs = widget_values(node, infos[node["type"]]) | views | {name: start for name, start in linked.items() if start}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def problems(workflow: dict, infos: dict[str, dict]) -> list[str]:
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    found = _overlaps(workflow["nodes"]) + _groups(workflow) + _graph_problems(opened(workflow), infos)
    for subgraph in subgraphs:
        found += [f"{subgraph['name']}: {problem}" for problem in _overlaps(subgraph["nodes"])]
        found += [f"{subgraph['name']} is nowhere"] if not any(node["type"] == subgraph["id"] for node in workflow["nodes"]) else []
    return found


def _graph_problems(workflow: dict, infos: dict[str, dict]) -> list[str]:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    found = []
    for node in nodes.values():
        name = f"node {node['id']} ({node['type']})"
        if node["type"] in NOTES:
            continue
        if node["type"] not in infos:
            found.append(f"{name} is not known")
            continue
        found += [f"{name}: {problem}" for problem in _node_problems(node, infos[node["type"]])]
    for number, source, source_slot, target, target_slot, io_type in workflow["links"]:
        if source not in nodes or target not in nodes:
            found.append(f"link {number} has a loose end")
            continue
        output, entry = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        if output["type"] != io_type or entry["type"] not in (io_type, "*"):
            found.append(f"link {number} of type {io_type} joins {output['type']} to {entry['type']}")
        if "definitions" not in workflow and (entry["link"] != number or number not in output["links"]):
            found.append(f"link {number} is not what its ends hold")
    return found


def _node_problems(node: dict, info: dict) -> list[str]:
    found = []
    entries = {entry["name"]: entry for entry in node["inputs"]}
    inputs = schema_inputs(info, node["inputs"])
    for name, entry in entries.items():
        if name not in inputs or inputs[name][0] != entry["type"]:
            found.append(f"has an input {name} of type {entry['type']}, the node has not")
    for name in info["input"]["required"]:
        connected = any(entries[entry]["link"] is not None for entry in entries if entry == name or entry.startswith(f"{name}."))
        if not connected and inputs.get(name, ("grows",))[0] not in WIDGET_TYPES | VIEWS:
            found.append(f"{name} is not connected")
    outputs = [(output["name"], output["type"]) for output in node["outputs"]]
    if outputs != list(zip(info["output_name"], info["output"], strict=True)):
        found.append(f"has outputs {outputs}, the node {info['output_name']} of {info['output']}")
    try:
        values = widget_values(node, info)
    except (AssertionError, IndexError) as error:
        return [*found, f"has widget values that do not fit its widgets ({error})"]
    return found + [f"{name} is {value!r}" for name, value in values.items() if not _allowed(value, *inputs[name])]


def _allowed(value: object, io_type: str, options: dict) -> bool:
    if io_type == "COMBO":
        return value in options["options"] or not options["options"] or str(value).endswith(MODELS)  # an empty list: of files, and none is there
    if io_type in ("STRING", "BOOLEAN"):
        return isinstance(value, str if io_type == "STRING" else bool)
    number = int if io_type == "INT" else (int, float)
    return isinstance(value, number) and not isinstance(value, bool) and options.get("min", value) <= value <= options.get("max", value)


def _sides(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def _overlaps(nodes: list[dict]) -> list[str]:
    found = []
    for index, one in enumerate(nodes):
        left, top, right, bottom = _sides(one)
        for other in nodes[index + 1 :]:
            x0, y0, x1, y1 = _sides(other)
            if left < x1 and x0 < right and top < y1 and y0 < bottom:
                found.append(f"nodes {one['id']} and {other['id']} overlap")
    return found


def _groups(workflow: dict) -> list[str]:
    """Groups must not overlap, nor cut through a node."""
    groups, found = workflow.get("groups", []), []
    for index, group in enumerate(groups):
        x, y, width, height = group["bounding"]
        for node in workflow["nodes"]:
            left, top, right, bottom = _sides(node)
            touches = left < x + width and x < right and top < y + height and y < bottom
            if touches and not (x <= left and right <= x + width and y <= top and bottom <= y + height):
                found.append(f"node {node['id']} stands on the border of group {group['title']!r}")
        for other in groups[index + 1 :]:
            x0, y0, w, h = other["bounding"]
            if x < x0 + w and x0 < x + width and y < y0 + h and y0 < y + height:
                found.append(f"groups {group['title']!r} and {other['title']!r} overlap")
    return found


def blueprint_in_use(path: Path, infos: dict[str, dict]) -> dict:
    """The blueprint as it drops into a graph: the sample before it, SaveImage behind it."""
    workflow = json.loads(path.read_text())
    (host,) = workflow["nodes"]
    sample = {"id": 101, "type": "RBA_Sample", "pos": [-400, 0], "size": [300, 200], "inputs": [], "outputs": []}
    for slot, (io_type, name) in enumerate(zip(infos["RBA_Sample"]["output"], infos["RBA_Sample"]["output_name"])):
        entry = next(index for index, entry in enumerate(host["inputs"]) if entry["name"] == name)
        sample["outputs"].append({"name": name, "type": io_type, "links": [slot + 1]})
        host["inputs"][entry]["link"] = slot + 1
        workflow["links"].append([slot + 1, 101, slot, host["id"], entry, io_type])
    saver = {
        "id": 102, "type": "SaveImage", "pos": [500, 0], "size": [300, 200], "inputs": [{"name": "images", "type": "IMAGE", "link": 9}],
        "outputs": [{"name": "images", "type": "IMAGE", "links": None}], "widgets_values": ["blueprint"],
    }  # fmt: skip
    host["outputs"][0]["links"] = [9]
    workflow["links"].append([9, host["id"], 0, 102, 0, "IMAGE"])
    workflow["nodes"] += [sample, saver]
    return workflow


def known_infos() -> dict[str, dict]:
    """`/object_info` of this pack, and of what is written down of the others."""
    import comfy_stand_in

    others = {path.stem: json.loads(path.read_text()) for path in (PACK / "tests" / "node_infos").glob("*/*.json")}
    return others | {name: comfy_stand_in.object_info(node) for name, node in comfy_stand_in.node_classes().items()}


def twins() -> dict[Path, str]:
    """File -> content of every workflow in API format."""
    infos = known_infos()
    return {API / path.name: json.dumps(to_prompt(json.loads(path.read_text()), infos), indent=1) + "\n" for path in sorted(WORKFLOWS.glob("*.json"))}


if __name__ == "__main__":
    API.mkdir(exist_ok=True)
    wanted = twins()
    for file in set(API.glob("*.json")) - set(wanted):
        file.unlink()
    for file, content in wanted.items():
        file.write_text(content)
