"""Workflow files as the frontend saves them: what is wrong with one, and the prompt that the frontend would queue."""

from __future__ import annotations

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
VIEWS = {"IMAGECOMPARE"}
"""Of inputs that the frontend shows a result in: nothing is saved of them, and nothing that matters is queued."""
NOTES = {"MarkdownNote", "Note"}
TITLE_HEIGHT = 30


def schema_inputs(info: dict) -> dict[str, tuple[str, dict]]:
    """Input id -> (type, options) in the order of the node, required ones first. `info` as in `/object_info`."""
    found = {}
    for kind in ("required", "optional"):
        for name, (io_type, *options) in info["input"].get(kind, {}).items():
            options = dict(options[0]) if options else {}
            if isinstance(io_type, list):  # a combo of the older node API
                io_type, options["options"] = "COMBO", io_type
            found[name] = io_type, options
    return found


def widget_values(node: dict, info: dict) -> dict[str, object]:
    """Input id -> value. The file holds a bare list, in which what follows a seed says how it changes."""
    left, values = list(node.get("widgets_values") or []), {}
    for name, (io_type, options) in schema_inputs(info).items():
        if io_type in WIDGET_TYPES and not options.get("forceInput"):
            values[name] = left.pop(0)
            if options.get("control_after_generate"):
                assert left.pop(0) in ("fixed", "increment", "decrement", "randomize"), f"{name} of node {node['id']}"
    assert not left, f"node {node['id']} has {len(left)} widget values too many"
    return values


def to_prompt(workflow: dict, infos: dict[str, dict]) -> dict[str, dict]:
    """The API format: node id -> class and inputs."""
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": widget_values(node, infos[node["type"]])
            | {name: "" for name, (io_type, _) in schema_inputs(infos[node["type"]]).items() if io_type in VIEWS}
            | {entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None},
        }
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    }


def problems(workflow: dict, infos: dict[str, dict]) -> list[str]:
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
        if entry["link"] != number or number not in output["links"]:
            found.append(f"link {number} is not what its ends hold")
    return found + _overlaps(workflow["nodes"])


def _node_problems(node: dict, info: dict) -> list[str]:
    found = []
    inputs, entries = schema_inputs(info), {entry["name"]: entry for entry in node["inputs"]}
    for name, entry in entries.items():
        if name not in inputs or inputs[name][0] != entry["type"]:
            found.append(f"has an input {name} of type {entry['type']}, the node has not")
    for name in info["input"]["required"]:
        if inputs[name][0] not in WIDGET_TYPES | VIEWS and (name not in entries or entries[name]["link"] is None):
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
        return value in options["options"]
    if io_type in ("STRING", "BOOLEAN"):
        return isinstance(value, str if io_type == "STRING" else bool)
    number = int if io_type == "INT" else (int, float)
    return isinstance(value, number) and not isinstance(value, bool) and options["min"] <= value <= options["max"]


def _overlaps(nodes: list[dict]) -> list[str]:
    def sides(node):
        (x, y), (width, height) = node["pos"], node["size"]
        return x, y - TITLE_HEIGHT, x + width, y + height

    found = []
    for index, one in enumerate(nodes):
        left, top, right, bottom = sides(one)
        for other in nodes[index + 1 :]:
            x0, y0, x1, y1 = sides(other)
            if left < x1 and x0 < right and top < y1 and y0 < bottom:
                found.append(f"nodes {one['id']} and {other['id']} overlap")
    return found
