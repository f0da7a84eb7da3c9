"""What every node has to say of itself."""

import inspect

import comfy_stand_in
import pytest

NODES = comfy_stand_in.node_classes()

every_node = pytest.mark.parametrize("node", NODES.values(), ids=NODES)


@every_node
def test_is_found_and_explained(node):
    schema = node.define_schema()
    assert schema.display_name and schema.category.split("/")[0] == "Refine by Align" and schema.search_aliases
    assert schema.description.endswith(".")
    for socket in (*schema.inputs, *schema.outputs):
        tooltip = socket.tooltip if hasattr(socket, "tooltip") else socket.options.get("tooltip", "")
        assert tooltip and tooltip.endswith("."), f"{schema.node_id}.{socket.id}"


@every_node
def test_ids_within_a_schema_are_unique(node):
    schema = node.define_schema()
    for sockets in (schema.inputs, schema.outputs):
        assert len({socket.id for socket in sockets}) == len(sockets)


@every_node
def test_execute_takes_the_inputs_of_the_schema(node):
    schema = node.define_schema()
    parameters = inspect.signature(node.execute).parameters
    assert set(parameters) == {entry.id for entry in schema.inputs}
    assert {name for name, parameter in parameters.items() if parameter.default is not parameter.empty} == {entry.id for entry in schema.inputs if entry.optional}


@every_node
def test_defaults_lie_in_their_ranges(node):
    for entry in node.define_schema().inputs:
        default = entry.options.get("default")
        if "min" in entry.options:
            assert entry.options["min"] <= default <= entry.options["max"], entry.id
        if "options" in entry.options and default is not None:
            assert default in entry.options["options"], entry.id


def test_defaults_are_the_library_s(nodes, defaults):
    settings, cleaning = nodes.refinement.Settings(), nodes.refinement.CleaningSettings()
    values = defaults(nodes.refinement.RefineByAlign)
    same = ("single_stage", "on_flat", "one_crop", "aligner", "dense", "levels", "register", "min_confidence", "detail_transfer", "feather", "colour_match")
    assert {name: values[name] for name in same} == {name: getattr(settings, name) for name in same}
    assert values["margin"] == settings.region_margin
    assert values["strength"] == -1 and settings.strength is None
    assert (values["threshold"], values["peak_support"], values["flatness"]) == (cleaning.threshold, cleaning.peak_support, cleaning.flatness)
