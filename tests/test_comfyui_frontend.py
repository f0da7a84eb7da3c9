"""What people do with the nodes, done in a real ComfyUI's own frontend with mouse and keyboard, in a headless Chromium.

Skipped where there is no ComfyUI (see comfy_server.py) or no Chromium on the PATH.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium, find_chromium
from comfy_server import SAMPLE, assert_same
from PIL import Image

WORKFLOWS = Path(__file__).parent.parent / "workflows"
READY = "!!(window.app?.graph && window.LiteGraph && LiteGraph.registered_node_types.RBA_RefineByAlign && !document.querySelector('#splash-loader'))"
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Workflow.Persist": False, "Comfy.VueNodes.Enabled": False, "Comfy.Graph.CanvasInfo": False}
EVENTS = ["execution_start", "execution_cached", "executing", "execution_success", "execution_error", "execution_interrupted"]
ENDS = ["execution_success", "execution_error", "execution_interrupted"]
TITLE = 12
"""Of a node: pixels that its title's middle lies above it."""


class Frontend(Chromium):
    """The graph as a person sees it; nodes are named by their class."""

    def start(self, url: str) -> None:
        self.open(url, "window.complaints = []; for (const kind of ['error', 'unhandledrejection']) addEventListener(kind, e => complaints.push(String(e.message ?? e.reason)))")
        self.wait(READY, 120)
        time.sleep(1)  # what is pressed at once is not heard
        self.ask(f"window.seen = []; for (const kind of {json.dumps(EVENTS)}) app.api.addEventListener(kind, e => seen.push([kind, e.detail?.nodes ?? e.detail?.node_id ?? e.detail]))")

    def load(self, name: str, **changes: dict) -> None:
        """A shipped workflow, with widgets changed: `RBA_RefineByAlign={"steps": 4}`."""
        self.ask(f"app.loadGraphData({(WORKFLOWS / f'{name}.json').read_text()})")
        for kind, values in changes.items():
            for widget, value in values.items():
                self.ask(f"{self.node(kind)}.widgets.find(w => w.name === {json.dumps(widget)}).value = {json.dumps(value)}")

    def node(self, kind: str) -> str:
        return f"app.graph.nodes.find(n => n.type === {json.dumps(kind)})"

    def widget(self, kind: str, name: str) -> str:
        return f"{self.node(kind)}?.widgets.find(w => w.name === {json.dumps(name)})"

    def spot(self, kind: str, point: str) -> tuple[float, float]:
        """Pixels of the window of a point of a node, in JavaScript over `n`: "[60, 20]" from its corner."""
        return tuple(self.ask(
            f"(() => {{ const n = {self.node(kind)}, c = app.canvas, r = c.canvas.getBoundingClientRect(), p = {point};"
            " const [x, y] = c.ds.convertOffsetToCanvas([n.pos[0] + p[0], n.pos[1] + p[1]]); return [x + r.x, y + r.y] })()"
        ))  # fmt: skip

    def focus(self, kind: str) -> None:
        """Full size, the node near the window's corner."""
        self.ask(f"(() => {{ const n = {self.node(kind)}, c = app.canvas; c.ds.scale = 1; c.ds.offset[0] = 500 - n.pos[0]; c.ds.offset[1] = 150 - n.pos[1]; c.draw(true, true) }})()")
        time.sleep(0.3)

    def select(self, kind: str) -> None:
        self.focus(kind)
        self.click_at(*self.spot(kind, f"[60, -{TITLE}]"))
        self.wait(f"app.canvas.selectedItems.has({self.node(kind)})")

    def click_text(self, selector: str, text: str) -> None:
        """On the first element of a selector that holds this text, when there is one."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].find(e => e.innerText.trim() === {json.dumps(text)} && e.getClientRects().length)"
        self.wait(f"!!{found}")
        self.ask(f"{found}.scrollIntoView({{ block: 'center' }})")
        time.sleep(0.3)
        self.click_at(*self.ask(f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])({found}.getBoundingClientRect())"))

    def press_run(self) -> None:
        self.ask("seen.length = 0")
        self.click("[data-testid=queue-button]")

    def run(self) -> list[str]:
        """Press Run; the classes of the nodes that ran, in their order."""
        self.press_run()
        self.wait(f"seen.some(([kind]) => {json.dumps(ENDS)}.includes(kind))", 120)
        assert self.ask("seen.some(([kind]) => kind === 'execution_success')"), self.ask("JSON.stringify(seen.at(-1))")
        return self.ask("seen.filter(([kind, node]) => kind === 'executing' && node).map(([, node]) => app.graph.getNodeById(node)?.type ?? node)")

    def put_down(self, x: float, y: float) -> None:
        """A node that the search made: it hangs on the mouse, and the click that ends that is heard by nothing else."""
        self.mouse("Moved", x + 5, y + 5, button="none")
        for _ in range(2):
            self.click_at(x, y)
            time.sleep(0.6)

    def prompt(self) -> dict:
        return self.ask("app.graphToPrompt().then(made => made.output)")


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("the frontend is tried in a Chromium or Chrome, and there is none on the PATH")
    server.post("/settings", SETTINGS)
    folder = tmp_path_factory.mktemp("browser")
    browser = Frontend(find_chromium(), folder / "profile", folder, (1600, 900))
    browser.start(server.url)
    yield browser
    if browser.process.poll() is None:
        browser.process.terminate()
        browser.process.wait(20)


def saved(server) -> np.ndarray:
    """The picture that was saved last."""
    return np.asarray(Image.open(max((server.base / "output").rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)))


def test_the_template_opens_from_the_browser_of_templates(page):
    page.click_text("button", "Tem­plates") if page.ask("!document.querySelector('[role=dialog]')") else None
    page.click_text("[role=dialog] span", "refine-by-align")
    page.click_text("[role=dialog] *", "quickstart")
    page.wait(f"!!{page.node('RBA_RefineByAlign')} && !document.querySelector('[role=dialog]')")
    assert page.ask("app.graph.nodes.every(n => n.type in LiteGraph.registered_node_types && !n.has_errors)")


def test_the_run_button_gives_the_library_s_picture(page, server, expected):
    page.load("quickstart")
    ran = page.run()
    assert ran.index("RBA_RefineByAlign") < ran.index("SaveImage")
    page.wait(f"{page.node('SaveImage')}.imgs?.[0]?.naturalWidth === 768")
    assert_same(saved(server), expected(0))


def test_a_second_run_is_cached(page):
    page.load("quickstart")
    page.run()
    assert page.run() == []


def test_a_changed_widget_runs_what_hangs_on_it(page):
    page.load("quickstart")
    page.run()
    page.focus("RBA_RefineByAlign")
    arrow = page.spot("RBA_RefineByAlign", f"[n.size[0] - 25, {page.widget('RBA_RefineByAlign', 'steps')}.last_y + 12]")
    page.click_at(*arrow)
    page.wait(f"{page.widget('RBA_RefineByAlign', 'steps')}.value === 1")
    ran = page.run()
    assert "RBA_RefineByAlign" in ran and "SaveImage" in ran and "RBA_Sample" not in ran and "RBA_LoadModel" not in ran


def test_cancel_stops_a_long_run_and_the_next_one_is_right(page, server, expected):
    page.load("quickstart", RBA_RefineByAlign={"seed": 1, "steps": 1000})
    page.press_run()
    page.wait(f"seen.some(([kind, node]) => kind === 'executing' && node == {page.node('RBA_RefineByAlign')}.id)", 60)
    page.wait("!document.querySelector('[aria-label=\"Cancel current run\"]').disabled")
    page.click("[aria-label='Cancel current run']")
    page.wait("seen.some(([kind]) => kind === 'execution_interrupted')", 120)
    page.load("quickstart", RBA_RefineByAlign={"seed": 1})
    page.run()
    assert_same(saved(server), expected(1))


def test_an_error_is_shown_on_its_node_in_words(page):
    page.load("quickstart")
    page.ask(f"""(() => {{ const mask = LiteGraph.createNode('SolidMask'); app.graph.add(mask); mask.widgets[0].value = 0;
        const node = {page.node("RBA_RefineByAlign")}; mask.connect(0, node, node.inputs.findIndex(i => i.name === 'mask')) }})()""")
    page.press_run()
    page.wait("seen.some(([kind]) => kind === 'execution_error')", 60)
    assert page.ask(f"seen.find(([kind]) => kind === 'execution_error')[1] == {page.node('RBA_RefineByAlign')}.id")
    page.click_text("button", "View details")
    page.wait("/mask: is empty; paint over at least one pixel/.test(document.body.innerText)")
    page.click("[aria-label='Toggle properties panel']")


def test_saved_and_reopened_it_is_the_same(page, server):
    page.load("quickstart", RBA_RefineByAlign={"seed": 77, "detail_transfer": 0.5})
    before = page.prompt()
    page.press("s", "Control")
    page.wait("!!document.querySelector('[role=dialog] input')")
    page.press("a", "Control")
    page.write("kept")
    page.press("Enter")
    kept = server.base / "user" / "default" / "workflows" / "kept.json"
    server.wait(kept.exists, "save the workflow")
    page.start(server.url)
    page.click("[aria-label^=Workflows]")
    page.click_text(".editable-text span", "kept")
    page.wait(f"{page.widget('RBA_RefineByAlign', 'seed')}?.value === 77")
    assert page.prompt() == before
    page.click("[aria-label^=Workflows]")


def test_a_widget_takes_a_link(page):
    page.load("quickstart")
    page.focus("RBA_RefineByAlign")
    page.ask(f"""(() => {{ const seed = LiteGraph.createNode('PrimitiveInt'); app.graph.add(seed);
        const node = {page.node("RBA_RefineByAlign")}; seed.pos = [node.pos[0] - 380, node.pos[1] + 420]; seed.widgets[0].value = 5; app.canvas.bringToFront(seed); app.canvas.draw(true, true) }})()""")
    time.sleep(0.5)
    start = page.spot("PrimitiveInt", "[n.size[0] - 10, 14]")
    page.drag(start, page.spot("RBA_RefineByAlign", "n.inputs.find(i => i.name === 'seed').pos"))
    page.wait(f"{page.node('RBA_RefineByAlign')}.inputs.find(i => i.name === 'seed').link != null")
    (made,) = (node for node in page.prompt().values() if node["class_type"] == "RBA_RefineByAlign")
    assert made["inputs"]["seed"] == [str(page.ask(f"{page.node('PrimitiveInt')}.id")), 0]
    assert "RBA_RefineByAlign" in page.run()


def test_a_muted_node_does_not_run(page):
    page.load("quickstart", RBA_RefineByAlign={"seed": 11})
    page.select("RBA_CorrespondencePreview")
    page.press("m", "Control")
    page.wait(f"{page.node('RBA_CorrespondencePreview')}.mode === 2")
    assert "RBA_CorrespondencePreview" not in page.run()
    page.press("m", "Control")
    page.wait(f"{page.node('RBA_CorrespondencePreview')}.mode === 0")
    assert "RBA_CorrespondencePreview" in page.run()


def test_a_bypassed_node_lets_the_image_through(page, server):
    page.load("quickstart")
    page.select("RBA_RefineByAlign")
    page.press("b", "Control")
    page.wait(f"{page.node('RBA_RefineByAlign')}.mode === 4")
    assert "RBA_RefineByAlign" not in page.run()
    assert (saved(server) == np.asarray(Image.open(SAMPLE / "image.png").convert("RGB"))).all()


def test_a_node_collapses_and_runs(page, server, expected):
    page.load("quickstart", RBA_RefineByAlign={"seed": 1})
    page.select("RBA_RefineByAlign")
    page.press("c", "Alt")
    page.wait(f"{page.node('RBA_RefineByAlign')}.flags.collapsed === true")
    page.run()
    assert_same(saved(server), expected(1))


def test_a_node_becomes_a_subgraph_that_runs_and_unpacks(page, server, expected):
    page.load("quickstart", RBA_RefineByAlign={"seed": 0})
    page.select("RBA_RefineByAlign")
    page.wait("!!document.querySelector('[data-testid=convert-to-subgraph-button]')")
    page.click("[data-testid=convert-to-subgraph-button]")
    page.wait("app.graph.nodes.some(n => n.isSubgraphNode?.())")
    page.run()
    assert_same(saved(server), expected(0))
    page.wait("document.querySelector('[data-testid=convert-to-subgraph-button]')?.getAttribute('aria-label').startsWith('Unpack')")
    page.click("[data-testid=convert-to-subgraph-button]")
    page.wait(f"!!{page.node('RBA_RefineByAlign')}")
    page.run()
    assert_same(saved(server), expected(0))


def test_a_deleted_node_comes_back(page):
    page.load("quickstart")
    before = page.prompt()
    page.select("RBA_RefineByAlign")
    page.press("Delete")
    page.wait(f"!{page.node('RBA_RefineByAlign')}")
    page.press("z", "Control")
    page.wait(f"!!{page.node('RBA_RefineByAlign')}")
    assert page.prompt() == before


def test_a_copied_node_keeps_its_settings(page):
    page.load("quickstart", RBA_RefineByAlign={"detail_transfer": 0.25})
    page.select("RBA_RefineByAlign")
    page.press("c", "Control")
    page.press("v", "Control")
    page.wait("app.graph.nodes.filter(n => n.type === 'RBA_RefineByAlign').length === 2")
    assert page.ask("app.graph.nodes.filter(n => n.type === 'RBA_RefineByAlign').map(n => n.widgets.find(w => w.name === 'detail_transfer').value)") == [0.25, 0.25]


def test_a_search_in_a_person_s_words_finds_the_node(page):
    page.ask("app.graph.clear()")
    for count in (1, 2):
        for event in ("mousePressed", "mouseReleased"):
            page.call("Input.dispatchMouseEvent", type=event, x=900, y=500, button="left", clickCount=count)
    page.wait("document.activeElement?.placeholder === 'Add a node...'")
    for words, kind in (("cross attention map", "RBA_Align"), ("uncrop", "RBA_Stitch"), ("fix logo", "RBA_RefineByAlign")):
        page.press("a", "Control")
        page.write(words)
        title = page.ask(f"LiteGraph.registered_node_types.{kind}.title")
        option = f"[...document.querySelectorAll('[role=option]')].find(e => e.innerText.trim().startsWith({json.dumps(title)}))"
        page.wait(f"!!{option}")
    time.sleep(0.7)  # while one types, what is found moves
    page.click_at(*page.ask(f"(({{x, y, width, height}}) => [x + width / 4, y + height / 2])({option}.getBoundingClientRect())"))
    page.wait(f"!!{page.node(kind)}")
    page.put_down(900, 500)


def test_a_mask_painted_in_the_mask_editor_is_what_changes(page, server):
    shutil.copy(SAMPLE / "image.png", server.base / "input" / "product.png")
    page.load("quickstart", RBA_RefineByAlign={"seed": 0})
    page.ask("app.refreshComboInNodes()")
    page.ask(f"""(() => {{ const picture = LiteGraph.createNode('LoadImage'), node = {page.node("RBA_RefineByAlign")}; app.graph.add(picture);
        picture.pos = [node.pos[0], node.pos[1] + 1500]; const chosen = picture.widgets.find(w => w.name === 'image'); chosen.value = 'product.png'; chosen.callback('product.png');
        for (const [slot, name] of [[0, 'image'], [1, 'mask']]) picture.connect(slot, node, node.inputs.findIndex(i => i.name === name)) }})()""")
    page.wait(f"{page.node('LoadImage')}.imgs?.[0]?.naturalWidth === 768")
    page.select("LoadImage")
    page.wait("!!document.querySelector('[aria-label^=\"Open Mask Editor\"]')")
    page.click("[aria-label^='Open Mask Editor']")
    drawn = "[...document.querySelectorAll('[role=dialog] canvas')].find(c => c.width === 768 && c.getBoundingClientRect().width > 300)"
    page.wait(f"!!{drawn}")
    time.sleep(1)
    x, y, side = page.ask(f"(({{x, y, width}}) => [x, y, width])({drawn}.getBoundingClientRect())")
    for line in range(6):
        page.drag((x + 0.34 * side, y + (0.44 + 0.025 * line) * side), (x + 0.52 * side, y + (0.44 + 0.025 * line) * side), steps=20)
    page.click_text("button", "Save")
    page.wait(f"/painted-masked/.test({page.widget('LoadImage', 'image')}.value)")
    page.run()
    before, after = np.asarray(Image.open(SAMPLE / "image.png").convert("RGB")).astype(int), saved(server).astype(int)
    rows, columns = np.nonzero(np.abs(after - before).max(-1))
    assert len(rows) > 1000
    assert 0.3 < columns.min() / 768 and columns.max() / 768 < 0.56 and 0.4 < rows.min() / 768 and rows.max() / 768 < 0.61


def test_a_node_s_help_opens(page):
    page.load("quickstart")
    page.select("RBA_RefineByAlign")
    page.wait("!!document.querySelector('[data-testid=info-button]')")
    page.click("[data-testid=info-button]")
    page.wait("/Paint the mask tightly over what is wrong/.test(document.body.innerText)")
    page.wait("[...document.querySelectorAll('img')].some(i => /RBA_RefineByAlign/.test(i.src) && i.naturalWidth > 0)")
    page.click("[aria-label='Toggle properties panel']")


def test_the_viewer_shows_where_the_model_looks(page):
    page.load("look_and_score")
    page.run()
    viewer = f"{page.widget('RBA_CorrespondenceViewer', 'viewer')}.element"
    page.focus("RBA_CorrespondenceViewer")
    page.wait(f"{viewer}.querySelector('canvas').width > 1")
    crop, reference = (f"{viewer}.querySelectorAll('canvas')[{index}]" for index in range(2))
    plain = page.ask(f"{reference}.toDataURL()")
    x, y, width, height = page.ask(f"(({{x, y, width, height}}) => [x, y, width, height])({crop}.getBoundingClientRect())")
    shown = []
    for share in (0.3, 0.6):
        page.mouse("Moved", x + share * width, y + height / 2, button="none")
        page.wait(f"/%/.test({viewer}.innerText)")
        time.sleep(0.2)
        shown.append(page.ask(f"{reference}.toDataURL()"))
    assert len({plain, *shown}) == 3
    page.mouse("Moved", x - 200, y - 100, button="none")
    page.wait(f"{reference}.toDataURL().length === {len(plain)}")


def test_the_blueprint_drops_in_runs_and_opens(page, server, expected):
    page.load("quickstart")
    page.ask(f"app.graph.remove({page.node('RBA_RefineByAlign')}); app.canvas.ds.offset[0] -= 3000; app.canvas.draw(true, true)")
    for count in (1, 2):
        for event in ("mousePressed", "mouseReleased"):
            page.call("Input.dispatchMouseEvent", type=event, x=700, y=300, button="left", clickCount=count)
    page.wait("document.activeElement?.placeholder === 'Add a node...'")
    page.write("refine by align")
    option = "[...document.querySelectorAll('[role=option]')].find(e => /^Refine by Align\\s+Blueprint/.test(e.innerText.trim()))"
    page.wait(f"!!{option}")
    time.sleep(0.7)  # while one types, what is found moves
    page.click_at(*page.ask(f"(({{x, y, width, height}}) => [x + width / 4, y + height / 2])({option}.getBoundingClientRect())"))
    page.wait("app.graph.nodes.some(n => n.isSubgraphNode?.())")
    page.put_down(700, 300)
    page.ask(f"""(() => {{ const whole = app.graph.nodes.find(n => n.isSubgraphNode?.()), sample = {page.node("RBA_Sample")}, saver = {page.node("SaveImage")};
        const entry = name => whole.inputs.findIndex(i => i.name === name);
        for (const name of ['image', 'mask', 'reference', 'reference_mask']) sample.connect(sample.outputs.findIndex(o => o.name === name), whole, entry(name));
        if (entry('model') >= 0) {page.node("RBA_LoadModel")}.connect(0, whole, entry('model'));
        whole.connect(whole.outputs.findIndex(o => o.type === 'IMAGE'), saver, 0) }})()""")
    page.run()
    assert_same(saved(server), expected(0))
    page.ask("app.canvas.openSubgraph(app.graph.nodes.find(n => n.isSubgraphNode?.()).subgraph)")
    page.wait("app.canvas.graph.nodes.some(n => n.type === 'RBA_Align')")
    page.ask("app.canvas.setGraph(app.graph)")


def test_a_saved_picture_dropped_on_the_canvas_brings_its_graph(page, server):
    page.load("quickstart", RBA_RefineByAlign={"seed": 123})
    page.run()
    newest = max((server.base / "output").rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    page.ask("app.graph.clear()")
    page.ask(f"""fetch('/view?filename={newest.name}&type=output&subfolder={newest.parent.relative_to(server.base / "output")}'.replace('subfolder=.', 'subfolder=')).then(r => r.blob()).then(blob => {{
        const dropped = new DataTransfer(); dropped.items.add(new File([blob], 'picture.png', {{ type: 'image/png' }}));
        document.querySelector('#graph-canvas').dispatchEvent(new DragEvent('drop', {{ dataTransfer: dropped, bubbles: true, cancelable: true }})) }})""")
    page.wait(f"{page.widget('RBA_RefineByAlign', 'seed')}?.value === 123")


def test_nodes_2_0_run_and_fold_what_is_advanced(page, server, expected):
    page.ask("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.load("quickstart", RBA_RefineByAlign={"seed": 1})
        page.focus("RBA_RefineByAlign")
        page.wait("/detail_transfer/.test(document.body.innerText)")
        assert not page.ask("/peak_support/.test(document.body.innerText)")
        page.run()
        assert_same(saved(server), expected(1))
    finally:
        page.ask("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_before_and_after_slide_over_each_other(page):
    page.ask("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    try:
        page.load("look_and_score")
        page.run()
        page.focus("ImageCompare")
        before = "document.querySelector('img[alt=\"Before image\"]')"
        page.wait(f"{before}?.naturalWidth === 768")
        x, y, width, height = page.ask(f"(({{x, y, width, height}}) => [x, y, width, height])({before}.getBoundingClientRect())")
        for share in (0.25, 0.75):
            page.mouse("Moved", x + share * width, y + height / 2, button="none")
            page.wait(f"Math.abs(parseFloat({before}.style.clipPath.split(' ')[1]) - {100 * (1 - share)}) < 2")
    finally:
        page.ask("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


def test_the_page_complained_of_nothing(page):
    assert page.ask("complaints") == []
