"""Help pages and translations of the nodes: complete, and of inputs and outputs that exist.

    python tests/nodes/test_help.py     writes locales/en and what a page has from its schema: title, description, tables

A new node needs: its text in locales/zh and locales/ja (`nodeDefs.json`, the keys of locales/en), web/docs/<node_id>.md and
web/docs/<node_id>/{zh,ja}.md with a picture web/docs/img/<node_id>.jpg under the title, and prose under that.
"""

import json
import re
import sys
from pathlib import Path

PACK = Path(__file__).parents[2]
DOCS, LOCALES = PACK / "web" / "docs", PACK / "locales"
HEADINGS = {
    "en": ("Inputs", "Outputs", "Name", "Type", "What it is", "optional"),
    "zh": ("输入", "输出", "名称", "类型", "说明", "可选"),
    "ja": ("入力", "出力", "名前", "型", "説明", "任意"),
}

if __name__ == "__main__":
    sys.path[:0] = [str(PACK), str(PACK / "tests")]

import comfy_stand_in  # noqa: E402
import pytest  # noqa: E402

NODES = comfy_stand_in.node_classes()
every_node = pytest.mark.parametrize("name", NODES)
every_language = pytest.mark.parametrize("language", HEADINGS)


def english() -> dict:
    """`nodeDefs.json` as the frontend takes it, from the schemas. Names of inputs are not translated: messages and pages name them."""
    found = {}
    for name, node in NODES.items():
        schema = node.define_schema()
        found[name] = {"display_name": schema.display_name, "description": schema.description}
        if schema.inputs:
            found[name]["inputs"] = {entry.id: {"tooltip": entry.options["tooltip"]} for entry in schema.inputs}
        if schema.outputs:
            found[name]["outputs"] = {str(index): {"tooltip": output.tooltip} for index, output in enumerate(schema.outputs)}
    return found


def texts(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def page_of(name: str, language: str) -> Path:
    return DOCS / f"{name}.md" if language == "en" else DOCS / name / f"{language}.md"


def prose(page: str, language: str) -> str:
    """What was written by hand: from the picture to the tables."""
    start = page.index("![")
    ends = [page.index(f"\n## {heading}\n") for heading in HEADINGS[language][:2] if f"\n## {heading}\n" in page]
    return page[start : min(ends, default=len(page))].strip()


def written(name: str, language: str, by_hand: str) -> str:
    schema, text = NODES[name].define_schema(), texts(language)[name]
    inputs, outputs, *columns, optional = HEADINGS[language]
    head = f"| {' | '.join(columns)} |\n| --- | --- | --- |\n"
    parts = [f"# {text['display_name']}", text["description"], by_hand]
    if schema.inputs:
        rows = [f"| `{entry.id}` | {entry.io_type}{f' ({optional})' if entry.optional else ''} | {text['inputs'][entry.id]['tooltip']} |" for entry in schema.inputs]
        parts += [f"## {inputs}", head + "\n".join(rows)]
    if schema.outputs:
        rows = [f"| `{output.id}` | {output.io_type} | {text['outputs'][str(index)]['tooltip']} |" for index, output in enumerate(schema.outputs)]
        parts += [f"## {outputs}", head + "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def keys(tree, above=()) -> set[tuple]:
    return {above} if not isinstance(tree, dict) else {key for name, branch in tree.items() for key in keys(branch, (*above, name))}


def test_english_is_that_of_the_schemas():
    assert texts("en") == english(), "run python tests/nodes/test_help.py and commit locales/en"


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_translations_are_whole_and_of_what_exists(language):
    wanted, found = keys(english()), keys(texts(language))
    assert wanted - found == set(), "not translated"
    assert found - wanted == set(), "of nothing that exists"


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_translations_are_of_their_language(language):
    letters = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]"}[language]
    for name, text in texts(language).items():
        for key in keys(text):
            value = text
            for part in key:
                value = value[part]
            assert re.search(letters, value), (name, key)


@every_language
def test_frontend_reads_no_placeholder_into_names_and_descriptions(language):
    for name, text in texts(language).items():
        assert not set("{}@|") & set(text["display_name"] + text["description"]), name


@every_language
@every_node
def test_page(name, language):
    """Its tables have all inputs and outputs, and no others; what its prose names in code exists."""
    page = page_of(name, language).read_text(encoding="utf-8")
    assert page == written(name, language, prose(page, language)), "run python tests/nodes/test_help.py and commit web/docs"
    by_hand = prose(page, language)
    assert by_hand.startswith("![") and f"](img/{name}.jpg)" in by_hand and len(by_hand) > 90
    schema = NODES[name].define_schema()
    known = {socket.id for node in NODES.values() for socket in (*node.define_schema().inputs, *node.define_schema().outputs)} | {option for entry in schema.inputs for option in map(str, entry.options.get("options", ()))}
    for code in re.findall(r"`([a-z_]+)`", by_hand):
        assert code in known | {"refine_by_align"}, code


@every_language
@every_node
def test_page_names_what_the_english_one_names(name, language):
    named = [set(re.findall(r"`([^`]+)`", prose(page_of(name, each).read_text(encoding="utf-8"), each))) for each in ("en", language)]
    assert named[0] == named[1]


def test_no_page_is_of_a_node_that_is_gone():
    assert {path.stem for path in DOCS.glob("*.md")} == {path.name for path in DOCS.iterdir() if path.is_dir()} - {"img"} == {path.stem for path in (DOCS / "img").iterdir()} == set(NODES)


def test_pictures_are_small():
    sizes = [path.stat().st_size for path in (DOCS / "img").iterdir()]
    assert max(sizes) <= 60_000 and sum(sizes) < 1_500_000


def test_scripts_put_no_foreign_text_in_the_page_and_ask_only_for_pictures():
    for path in (PACK / "web").glob("*.js"):
        script = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "fetch(", "XMLHttpRequest", "WebSocket", "http://", "https://"):
            assert word not in script, (path.name, word)
        assert set(re.findall(r"apiURL\(`([^?`]*)", script)) <= {"/view"}
        assert set(re.findall(r'from "([^"]*)"', script)) <= {"../../scripts/app.js", "../../scripts/api.js"}


if __name__ == "__main__":
    (LOCALES / "en").mkdir(parents=True, exist_ok=True)
    (LOCALES / "en" / "nodeDefs.json").write_text(json.dumps(english(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for language in HEADINGS:
        for name in NODES:
            path = page_of(name, language)
            if path.exists():
                path.write_text(written(name, language, prose(path.read_text(encoding="utf-8"), language)), encoding="utf-8")
