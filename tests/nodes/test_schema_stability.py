"""Saved workflows hold ids, and widget values by their order: what they rest on is in `schemas.json`.

    python tests/nodes/test_schema_stability.py     writes it anew

Nodes, inputs and outputs may be added, an input's text, range and options may grow. What else changes breaks graphs that people
have: keep the old id or input and add a new one, or register a NodeReplace (`io.NodeReplace`, `ComfyAPI.node_replacement`) from the
old one in the same commit.
"""

import json
import sys
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("schemas.json")
KEPT = ("default", "min", "max", "step", "options", "control_after_generate", "forceInput")
OPEN = {("RBA_LoadModel", "model_name")}
"""Combos whose options depend on what the user has."""

if __name__ == "__main__":
    sys.path[:0] = [str(SNAPSHOT.parents[2]), str(SNAPSHOT.parents[1])]

import comfy_stand_in  # noqa: E402


def described(node) -> dict:
    schema = node.define_schema()
    inputs = {}
    for entry in sorted(schema.inputs, key=lambda entry: entry.optional):  # the frontend puts optional ones last
        kept = {key: entry.options[key] for key in KEPT if key in entry.options and not (key == "options" and (schema.node_id, entry.id) in OPEN)}
        inputs[entry.id] = {"type": entry.io_type, "optional": entry.optional} | kept
    return {"inputs": inputs, "outputs": [[output.id, output.io_type] for output in schema.outputs]}


def schemas() -> dict:
    return {name: described(node) for name, node in sorted(comfy_stand_in.node_classes().items())}


def text(found: dict) -> str:
    """A line an input, so that a change of one shows as one."""
    nodes = []
    for name, node in found.items():
        inputs = ",\n".join(f"   {json.dumps(entry)}: {json.dumps(options)}" for entry, options in node["inputs"].items())
        nodes.append(f' {json.dumps(name)}: {{\n  "inputs": {{\n{inputs}\n  }},\n  "outputs": {json.dumps(node["outputs"])}\n }}')
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def broken(before: dict, now: dict) -> list[str]:
    """What of a saved workflow no longer fits, in words."""
    found = [f"{name} is gone" for name in before if name not in now]
    for name in before.keys() & now.keys():
        was, has = before[name]["inputs"], now[name]["inputs"]
        for entry, options in was.items():
            if entry not in has:
                found.append(f"{name}.{entry} is gone")
                continue
            found += [f"{name}.{entry}: {key} was {options.get(key)!r}, is {has[entry].get(key)!r}" for key in ("type", "default", "control_after_generate", "forceInput") if options.get(key) != has[entry].get(key)]
            found += [f"{name}.{entry} has no option {option!r} any more" for option in options.get("options", ()) if option not in has[entry].get("options", [option])]
            if options["optional"] and not has[entry]["optional"]:
                found.append(f"{name}.{entry} is needed now")
            if "min" in options and not (has[entry]["min"] <= options["min"] and options["max"] <= has[entry]["max"]):
                found.append(f"{name}.{entry} no longer takes {options['min']} to {options['max']}")
        found += [f"{name}.{entry} is new and needed" for entry, options in has.items() if entry not in was and not options["optional"] and "default" not in options and "options" not in options]
        widgets = [entry for entry in was if "default" in was[entry] or "options" in was[entry] or was[entry]["type"] == "COMBO"]
        if [entry for entry in has if entry in widgets] != widgets or [entry for entry in has if ("default" in has[entry] or has[entry]["type"] == "COMBO")][: len(widgets)] != widgets:
            found.append(f"{name}: widgets {widgets} no longer come first and in this order")
        if now[name]["outputs"][: len(before[name]["outputs"])] != before[name]["outputs"]:
            found.append(f"{name}: outputs {before[name]['outputs']} no longer come first and in this order")
    return sorted(found)


def test_saved_workflows_still_fit():
    assert broken(json.loads(SNAPSHOT.read_text()), schemas()) == [], "workflows that people saved break: see the top of this file for what to do"


def test_snapshot_is_up_to_date():
    assert SNAPSHOT.read_text() == text(schemas()), "nodes changed in a way that breaks nobody: run python tests/nodes/test_schema_stability.py and commit schemas.json"


def test_what_breaks_is_seen():
    before = schemas()

    def change(name, **inputs):
        return before | {name: before[name] | {"inputs": before[name]["inputs"] | inputs}}

    align = before["RBA_Align"]["inputs"]
    assert broken(before, before) == []
    assert broken(before, {name: node for name, node in before.items() if name != "RBA_Stitch"}) == ["RBA_Stitch is gone"]
    assert broken(before, change("RBA_Align", seed=align["seed"] | {"default": 1})) == ["RBA_Align.seed: default was 0, is 1"]
    assert broken(before, change("RBA_Align", layer=align["layer"] | {"max": 8})) == ["RBA_Align.layer no longer takes -1 to 15"]
    assert broken(before, change("RBA_Align", crop=align["crop"] | {"type": "LATENT"})) == ["RBA_Align.crop: type was 'IMAGE', is 'LATENT'"]
    assert broken(before, change("RBA_Align", more={"type": "IMAGE", "optional": False})) == ["RBA_Align.more is new and needed"]
    assert broken(before, change("RBA_Align", more={"type": "IMAGE", "optional": True})) == []
    assert broken(before, change("RBA_Align", more={"type": "INT", "optional": False, "default": 0, "min": 0, "max": 9})) == []
    (shorter := dict(align)).pop("layer")
    first = {"new": {"type": "INT", "optional": False, "default": 0, "min": 0, "max": 9}} | align
    assert "RBA_Align.layer is gone" in broken(before, before | {"RBA_Align": before["RBA_Align"] | {"inputs": shorter}})
    assert any("no longer come first" in problem for problem in broken(before, before | {"RBA_Align": before["RBA_Align"] | {"inputs": first}}))
    assert any("outputs" in problem for problem in broken(before, before | {"RBA_Align": before["RBA_Align"] | {"outputs": before["RBA_Align"]["outputs"][::-1]}}))


if __name__ == "__main__":
    SNAPSHOT.write_text(text(schemas()))
