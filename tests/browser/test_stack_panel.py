"""The panel on LoRA Stack Apply in ComfyUI's own page: rows that grow, presets, and a queue that applies them."""

import json

import asking
import example
import numpy
import pages
import pytest
from pictures import pixels
from PIL import Image
from playwright.sync_api import expect
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
PATIENCE = 45_000  # ms
FOLDER = "stacked"
STAR, HEART, PAPER = (f"{FOLDER}/{name}.safetensors" for name in ("star", "heart", "paper"))
SAYS = {
    "star": {"lora_workbench.strength": "0.8", "lora_workbench.trigger": "zork", "modelspec.trigger_phrase": "zork"},
    "heart": {"modelspec.trigger_phrase": "plim, a heart"},
    "paper": {},
}
PRESET = "for the tests"
PROMPT = "a red circle"
LOAD = """async graph => {
    await app.loadApiJson(graph, "stacked");
    const node = app.graph._nodes.find(node => node.comfyClass === "LoraWorkbenchStackApply");
    node.setSize([420, node.size[1]]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [300 - node.pos[0], 60 - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""
STACK = "app.graph._nodes.find(node => node.comfyClass === 'LoraWorkbenchStackApply')"
VALUE = f"name => {STACK}.widgets.find(widget => widget.name === name).value"
AGAIN = """async () => {
    const saved = JSON.parse(JSON.stringify(app.graph.serialize()));
    app.graph.clear();
    await app.loadGraphData(saved, true, true);
}"""


class Shown:
    """A page with a graph that draws through a Stack Apply node."""

    def __init__(self, page, server):
        self.page, self.server = page, server
        self.panel = page.locator(".lw-stack")
        self.rows = self.panel.locator(".lw-stack-row")
        self.chooser = page.get_by_role("dialog", name="Choose a LoRA")
        self.presets = page.get_by_role("dialog", name="Presets")

    def draw_nodes(self, new_nodes):
        pages.draw_nodes(self.page, new_nodes)

    def begin(self, rows=(), **inputs):
        """A graph of one node, which has these rows, and these values of other widgets."""
        self.load({"1": stack_with({"rows": json.dumps(list(rows)), **inputs})}, len(rows))

    def load(self, graph, rows):
        """A graph with one Stack Apply node that shows so many rows."""
        self.page.evaluate(LOAD, graph)
        expect(self.panel.get_by_role("button", name="Add LoRA")).to_be_visible()
        expect(self.rows).to_have_count(rows)

    @property
    def values(self):
        """What the node's widget holds, which is what is saved and queued."""
        return json.loads(self.page.evaluate(VALUE, "rows"))

    def names(self):
        return [row["lora"] for row in self.values]

    def button(self, name):
        return self.panel.get_by_role("button", name=name, exact=True)

    def push(self, name):
        """By keyboard, which is quick where nothing draws the page but the processor."""
        self.button(name).press("Enter")

    def row(self, name):
        return self.panel.get_by_role("listitem", name=name, exact=True)

    def strength(self, name, side="model"):
        return self.row(name).get_by_label(f"Strength for the {side}", exact=True)

    def add(self, typed, keys=()):
        """Choose a LoRA by typing a part of its name."""
        self.push("Add LoRA")
        self.chooser.get_by_role("combobox").fill(typed)
        for key in (*keys, "Enter"):
            self.page.keyboard.press(key)
        self.chooser.wait_for(state="detached")


@pytest.fixture(scope="module")
def opened(browser, server):
    """One page for all tests: loading one takes longer than they do."""
    folder = server.folder / "models" / "loras" / FOLDER
    asking.random_files(folder, {name: seed for seed, name in enumerate(SAYS)})
    for name, entries in SAYS.items():
        path = folder / f"{name}.safetensors"
        save_file(load_file(path), path, {"ss_base_model_version": "sdxl_base_v1-0", **entries})
    Image.new("RGB", (64, 64), (220, 40, 200)).save(folder / "star.png")
    context = browser.new_context(viewport={"width": 1300, "height": 1300})
    expect.set_options(timeout=PATIENCE)
    with pages.drawn(server, False):
        yield Shown(pages.opened(context, server, False, PATIENCE), server)
    context.close()


@pytest.fixture
def shown(opened, new_nodes):
    """The page, with what went wrong in it counted as the test's."""
    opened.page.problems.clear()
    yield opened
    assert opened.page.problems == []


def a_row(lora, model=None, clip=None, on=True, **blocks):
    return {"lora": lora, "model": model, "clip": clip, "on": on, **blocks}


def stack_with(inputs):
    """A Stack Apply node in API form."""
    # What is not given, a node of the same id would have from the one before it.
    empty = {"rows": "[]", **{f"lora_{number}": "none" for number in range(1, 5)}}
    return {"class_type": "LoraWorkbenchStackApply", "inputs": {**empty, **inputs}}


def drawing_with(rows):
    """A graph in API form, with numbers for ids, that draws with what a Stack Apply node hands on."""
    graph = example.sampling_graph(example.FAMILIES["sdxl"], PROMPT, seed=5)
    graph["stack"] = stack_with({"model": ["loader", 0], "clip": ["loader", 1], "rows": json.dumps(rows)})
    return numbered(through(graph, "stack"))


def chained(loras):
    """The same with a chain of Load LoRA nodes of (name, model, clip)."""
    graph = example.sampling_graph(example.FAMILIES["sdxl"], PROMPT, seed=5)
    last = "loader"
    for lora, model, clip in loras:
        names = {"lora_name": lora, "strength_model": model, "strength_clip": clip}
        graph[lora] = {"class_type": "LoraLoader", "inputs": {"model": [last, 0], "clip": [last, 1], **names}}
        last = lora
    return through(graph, last)


def through(graph, node):
    """The graph with the sampler and the prompts behind a node."""
    graph["sampler"]["inputs"] |= {"model": [node, 0], "steps": 4}
    for prompt in ("positive", "negative"):
        graph[prompt]["inputs"]["clip"] = [node, 1]
    return graph


def numbered(graph):
    numbers = {name: str(number) for number, name in enumerate(graph, 1)}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [numbers[value[0]], value[1]]
    return {numbers[name]: node for name, node in graph.items()}


def test_rows_are_added_moved_switched_off_and_removed(shown):
    shown.begin()
    assert shown.panel.get_by_text("No LoRA yet").is_visible()
    shown.add("star")
    shown.add("heart")
    shown.add(FOLDER, ["ArrowDown", "ArrowDown", "ArrowUp"])  # heart, paper and star, of which the second
    assert shown.names() == [STAR, HEART, PAPER]
    expect(shown.panel.locator(".lw-headline")).to_have_text("3 LoRAs on")
    expect(shown.panel.locator(".lw-figures")).to_have_text("strength 2.8 in all")

    handle = shown.row("paper").get_by_role("button", name="Move", exact=True)
    handle.press("ArrowUp")
    assert shown.names() == [STAR, PAPER, HEART]
    handle.press("ArrowUp")
    handle.press("ArrowUp")
    assert shown.names() == [PAPER, STAR, HEART]
    assert handle.evaluate("handle => handle === document.activeElement")

    shown.row("star").get_by_role("switch").press("Enter")
    assert [row["on"] for row in shown.values] == [True, False, True]
    expect(shown.panel.locator(".lw-headline")).to_have_text("2 of 3 LoRAs on")
    shown.push("All on")
    shown.push("All off")
    assert [row["on"] for row in shown.values] == [False] * 3

    shown.row("star").get_by_role("button", name="Remove").press("Enter")
    assert shown.names() == [PAPER, HEART]
    shown.row("paper").get_by_role("button", name="Remove").dblclick()
    assert shown.names() == [HEART], "the second click of a double click removes nothing more"


def test_a_row_is_dragged_to_its_place(shown):
    shown.begin([a_row(STAR), a_row(HEART), a_row(PAPER)])
    place = shown.page.evaluate(f"() => [...{STACK}.pos]")
    mouse, grip = shown.page.mouse, shown.row("star").get_by_role("button", name="Move", exact=True).bounding_box()
    below = shown.row("paper").bounding_box()
    mouse.move(grip["x"] + 5, grip["y"] + 10)
    mouse.down()
    mouse.move(grip["x"] + 5, below["y"] + below["height"] - 2, steps=4)
    expect(shown.rows.nth(2)).to_have_accessible_name("star")
    mouse.up()
    assert shown.names() == [HEART, PAPER, STAR]
    assert shown.page.evaluate(f"() => [...{STACK}.pos]") == place, "the node stayed where it was"


def test_strengths_are_the_recommended_ones_until_they_are_set(shown):
    shown.begin([a_row(STAR)])
    model, clip = shown.strength("star"), shown.strength("star", "CLIP")
    expect(model).to_have_attribute("placeholder", "0.8")
    model.press("ArrowUp")
    assert shown.values == [a_row(STAR, 0.85, 0.85)]
    model.fill("0,6")
    model.press("Enter")
    assert shown.values == [a_row(STAR, 0.6, 0.6)]
    assert not clip.is_visible()
    link = shown.row("star").get_by_role("button", name="Separate strength for the CLIP")
    link.press("Enter")
    clip.fill("-0.25")
    clip.press("Enter")
    assert shown.values == [a_row(STAR, 0.6, -0.25)]
    model.fill("nonsense")
    model.press("Enter")
    expect(model).to_have_value("0.6")
    link.press("Enter")
    assert shown.values == [a_row(STAR, 0.6, 0.6)]
    model.fill("")
    model.press("Enter")
    assert shown.values == [a_row(STAR)]


def test_a_strength_is_dragged_sideways(shown):
    shown.begin([a_row(STAR, 0.5, 0.5)])
    mouse, field = shown.page.mouse, shown.strength("star").bounding_box()
    mouse.move(field["x"] + 20, field["y"] + 10)
    mouse.down()
    mouse.move(field["x"] + 41, field["y"] + 10, steps=3)
    mouse.up()
    (row,) = shown.values
    assert row["model"] == row["clip"] == 0.7


def test_the_details_tell_of_the_file_and_take_blocks(shown):
    shown.begin([a_row(STAR, 1.2, 1.2)])
    shown.row("star").get_by_role("button", name="Trigger words, facts and blocks").press("Enter")
    details = shown.panel.locator(".lw-details")
    expect(details.locator(".lw-facts")).to_contain_text("SDXL · rank 3")
    expect(details.locator("img")).to_have_js_property("complete", True)
    assert details.locator("img").evaluate("image => image.naturalWidth > 0")
    details.get_by_role("button", name="zork").press("Enter")
    expect(details.get_by_text("copied")).to_be_visible()
    details.get_by_label("Blocks").fill("MID=0")
    details.get_by_label("Blocks").press("Enter")
    details.get_by_role("button", name="Take the recommended 0.8").press("Enter")
    assert shown.values == [a_row(STAR, blocks="MID=0")]


def test_a_preset_is_saved_loaded_and_deleted(shown):
    rows = [a_row(HEART, 0.4, 0.4), a_row(STAR, on=False, blocks="MID=0")]
    shown.begin(rows)
    name = shown.presets.get_by_role("textbox")
    shown.push("Presets")
    for unfit in ("a/b", "..", "nul"):
        name.fill(unfit)
        name.press("Enter")
        expect(shown.presets.locator(".lw-said")).to_contain_text(f"'{unfit}' cannot be the name of a file")
    name.fill(PRESET)
    name.press("Enter")
    expect(shown.presets.get_by_role("button", name=PRESET, exact=True)).to_be_visible()
    (path,) = shown.server.folder.glob(f"user/*/lora_workbench/stacks/{PRESET}.json")
    assert json.loads(path.read_text(encoding="utf-8")) == rows
    shown.page.keyboard.press("Escape")
    shown.presets.wait_for(state="detached")

    shown.begin([a_row(PAPER)])
    shown.push("Presets")
    shown.presets.get_by_role("button", name=PRESET, exact=True).press("Enter")
    shown.presets.wait_for(state="detached")
    assert shown.values == rows
    expect(shown.rows).to_have_count(2)

    shown.push("Presets")
    shown.presets.get_by_role("button", name=f"Delete {PRESET}", exact=True).press("Enter")
    shown.presets.get_by_role("button", name=f"Really delete {PRESET}").press("Enter")
    expect(shown.presets.get_by_text("None yet.")).to_be_visible()
    assert not path.exists()
    shown.page.keyboard.press("Escape")


def test_rows_outlive_the_workflow_file_and_undo_takes_a_change_back(shown):
    rows = [a_row(HEART, 0.4, 0.7), a_row(STAR, on=False, blocks="MID=0")]
    shown.begin(rows)
    shown.page.evaluate(AGAIN)
    expect(shown.rows).to_have_count(2)
    expect(shown.strength("heart", "CLIP")).to_have_value("0.7")
    assert shown.values == rows
    shown.row("heart").get_by_role("button", name="Remove").press("Enter")
    expect(shown.rows).to_have_count(1)
    shown.row("star").get_by_role("button", name="Move", exact=True).press("Control+z")
    expect(shown.rows).to_have_count(2)
    assert shown.values == rows
    shown.row("heart").get_by_role("switch").press("Enter")
    assert not shown.values[0]["on"], "what is shown is the panel of the node that undo has made"


def test_rows_outlive_a_reload_of_the_page(shown, new_nodes):
    shown.begin([a_row(HEART, 0.4, 0.4)])
    shown.strength("heart").press("ArrowDown")
    shown.page.wait_for_timeout(1500)  # until the page has put the workflow aside
    shown.page.reload(wait_until="domcontentloaded")
    pages.ready(shown.page, new_nodes)
    expect(shown.strength("heart")).to_have_value("0.35")
    assert shown.values == [a_row(HEART, 0.35, 0.35)]


def test_what_the_row_widgets_held_moves_into_the_rows_once(shown):
    old = {"lora_1": STAR, "strength_model_1": 0.9, "strength_clip_1": 0.3, "on_1": False, "lora_3": HEART}
    shown.load({"1": stack_with({**old, "rows": json.dumps([a_row(PAPER)])})}, 3)
    moved = [a_row(STAR, 0.9, 0.3, on=False), a_row(HEART, 1, 1), a_row(PAPER)]
    assert shown.values == moved
    assert shown.page.evaluate(VALUE, "lora_1") == shown.page.evaluate(VALUE, "lora_3") == "none"
    shown.page.evaluate(AGAIN)
    expect(shown.rows).to_have_count(3)
    assert shown.values == moved


def test_row_widgets_that_are_wired_stay_where_they_are(shown):
    stack = stack_with({"lora_1": PAPER, "lora_2": STAR, "lora_3": HEART, "strength_model_2": ["2", 0]})
    shown.load({"1": stack, "2": {"class_type": "PrimitiveFloat", "inputs": {"value": 0.25}}}, 1)
    assert shown.names() == [HEART]
    hidden = f"() => {STACK}.widgets.filter(widget => widget.hidden).map(widget => widget.name)"
    assert set(shown.page.evaluate(hidden)) & {"lora_1", "lora_2", "strength_model_2", "lora_3"} == {"lora_3"}
    assert [shown.page.evaluate(VALUE, name) for name in ("lora_1", "lora_2")] == [PAPER, STAR]


def test_a_row_whose_file_is_gone_says_so(shown):
    shown.begin([a_row("people/nobody.safetensors"), a_row("elsewhere/star.safetensors")])
    gone = shown.row("nobody")
    expect(gone.locator(".lw-row-note")).to_contain_text("'people/nobody.safetensors' is not in the loras folder")
    expect(gone).to_have_class("lw-stack-row lw-unusable")
    expect(shown.panel).to_have_attribute("data-status", "failed")
    expect(shown.row("star").locator(".lw-row-note")).to_contain_text(f"Found as '{STAR}'")
    gone.get_by_role("button", name="people/nobody").press("Enter")
    shown.page.keyboard.press("Escape")
    shown.chooser.wait_for(state="detached")
    gone.get_by_role("button", name="people/nobody").press("Enter")
    shown.chooser.get_by_role("combobox").fill("hea")
    shown.page.keyboard.press("Enter")
    assert shown.names() == [HEART, "elsewhere/star.safetensors"]
    expect(shown.panel).to_have_attribute("data-status", "finished")


def test_a_row_whose_file_cannot_be_read_says_so_before_the_queue_does(shown):
    path = shown.server.folder / "models" / "loras" / FOLDER / "broken.safetensors"
    path.write_bytes(b"no header at all")
    try:
        shown.begin([a_row(f"{FOLDER}/broken.safetensors")])
        expect(shown.row("broken").locator(".lw-row-note")).to_contain_text("'broken.safetensors' cannot be read")
        expect(shown.panel).to_have_attribute("data-status", "failed")
    finally:
        path.unlink()


def test_only_a_click_beside_a_window_closes_it(shown):
    shown.begin()
    mouse, add = shown.page.mouse, shown.button("Add LoRA").bounding_box()
    mouse.dblclick(add["x"] + 20, add["y"] + 10)
    window = shown.chooser.bounding_box()
    assert shown.chooser.get_by_role("option").first.get_attribute("aria-selected") == "true", "it begins at its top"
    mouse.click(window["x"] + 5, window["y"] + window["height"] / 2)
    mouse.move(window["x"] + 100, window["y"] + 30)
    mouse.down()
    mouse.move(window["x"] - 40, window["y"] + 30, steps=2)
    mouse.up()
    shown.page.wait_for_timeout(100)
    assert shown.chooser.is_visible()
    mouse.click(window["x"] - 40, window["y"] + 30)
    shown.chooser.wait_for(state="detached")


def test_values_set_from_outside_are_shown_as_they_are_or_not_at_all(shown):
    shown.begin([a_row(STAR, 0.6, 0.6)])
    write = f"value => {{ {STACK}.widgets.find(widget => widget.name === 'rows').value = value }}"
    shown.page.evaluate(write, json.dumps([a_row(STAR, 0.6, -0.25)]))
    expect(shown.strength("star", "CLIP")).to_have_value("-0.25")
    for entry in ({"model": "0.8"}, {"lora": 5}, {"blocks": ["MID"]}, None):
        shown.page.evaluate(write, json.dumps([a_row(STAR)]))
        expect(shown.rows).to_have_count(1)
        refused = json.dumps([entry and a_row(STAR) | entry])
        shown.page.evaluate(write, refused)
        expect(shown.panel.locator(".lw-said")).to_contain_text("cannot be read")
        expect(shown.rows).to_have_count(0)
        assert shown.page.evaluate(VALUE, "rows") == refused, "as it was"


def test_refreshing_lists_new_files(shown):
    shown.begin([a_row(f"{FOLDER}/new.safetensors")])
    expect(shown.row("new").locator(".lw-row-note")).to_be_visible()
    folder = shown.server.folder / "models" / "loras" / FOLDER
    (folder / "new.safetensors").write_bytes((folder / "paper.safetensors").read_bytes())
    try:
        shown.page.evaluate("() => app.refreshComboInNodes()")
        expect(shown.row("new").locator(".lw-row-note")).to_be_hidden()
        shown.push("Add LoRA")
        shown.chooser.get_by_role("combobox").fill(FOLDER)  # other tests leave files in other folders
        expect(shown.chooser.get_by_role("option")).to_have_text(["Hheart", "Nnew", "Ppaper", "star"])
        shown.page.keyboard.press("Escape")
        shown.chooser.wait_for(state="detached")
    finally:
        (folder / "new.safetensors").unlink()
        shown.page.evaluate("() => app.refreshComboInNodes()")


def test_the_panel_shifts_nothing_that_is_saved_or_queued(shown):
    rows = [a_row(STAR)]
    shown.begin(rows, missing="skip with a note", xray="full")
    given = shown.page.evaluate("async () => (await app.graphToPrompt()).output")
    (inputs,) = [node["inputs"] for node in given.values() if node["class_type"] == "LoraWorkbenchStackApply"]
    assert json.loads(inputs["rows"]) == rows
    assert (inputs["missing"], inputs["xray"]) == ("skip with a note", "full")
    assert "lora_workbench_panel" not in inputs
    shown.page.evaluate(AGAIN)
    assert [shown.page.evaluate(VALUE, name) for name in ("missing", "xray")] == ["skip with a note", "full"]


def test_ten_rows_fit_a_narrow_node(shown):
    inside = """() => {
        const box = document.querySelector(".lw-stack").getBoundingClientRect();
        return [...document.querySelectorAll(".lw-stack :is(.lw-stack-row, .lw-row-line > *, .lw-actions > *)")]
            .filter(part => part.checkVisibility())
            .every(part => { const own = part.getBoundingClientRect();
                return own.left >= box.left - 1 && own.right <= box.right + 1 && own.bottom <= box.bottom + 1; });
    }"""
    shown.begin([a_row((STAR, HEART, PAPER)[number % 3], 0.1 * number, 1.5) for number in range(10)])
    for width in (225, 260, 420):
        shown.page.evaluate(f"width => {STACK}.setSize([width, {STACK}.size[1]])", width)
        shown.page.wait_for_function(inside)


def finished(shown):
    """What the graph that was queued after those that were `done` has shown, once it has ended."""
    for _ in range(PATIENCE // 100):
        runs = json.loads(shown.server.get("/history?max_items=1")).values()
        for run in runs:
            if run["prompt"][1] not in shown.done:
                problems = [about.get("exception_message") for _, about in run["status"]["messages"]]
                assert run["status"]["status_str"] == "success", problems
                return run["outputs"]
        shown.page.wait_for_timeout(100)
    raise TimeoutError("The graph did not end.")


def test_why_comfyui_refuses_to_queue_the_rows_stands_in_the_node(shown):
    shown.load(drawing_with([a_row(STAR, blocks="IN04=much")]), 1)
    said = shown.panel.locator(".lw-said")
    shown.page.evaluate("() => app.queuePrompt(0, 1).catch(() => {})")
    expect(said).to_contain_text("blocks has 'IN04=much', which must say")
    expect(shown.panel).to_have_attribute("data-status", "failed")
    shown.page.keyboard.press("Escape")
    shown.row("star").get_by_role("switch").press("Enter")
    expect(said).to_be_hidden()
    shown.load(drawing_with([a_row(STAR)]), 1)
    expect(shown.panel).to_have_attribute("data-status", "finished")
    shown.page.wait_for_timeout(700)  # longer than from one look to the next
    assert not said.is_visible()


def test_the_queue_applies_the_rows_and_the_panel_shows_its_x_ray(shown):
    shown.done = {run["prompt"][1] for run in json.loads(shown.server.get("/history")).values()}
    shown.load(drawing_with([a_row(STAR), a_row(PAPER, on=False), a_row(HEART, -0.4, 0.3)]), 3)
    shown.row("star").get_by_role("button", name="Move", exact=True).press("ArrowDown")
    assert shown.names() == [PAPER, STAR, HEART]
    shown.page.evaluate("() => app.queuePrompt(0, 1)")
    outputs = finished(shown)
    (images,) = [output["images"] for output in outputs.values() if "images" in output]
    alone, both = (
        shown.server.submit(chained(loras)) for loras in ([(STAR, 0.8, 0.8)], [(STAR, 0.8, 0.8), (HEART, -0.4, 0.3)])
    )
    drawn = pixels(shown.server.image(images[0]))
    assert numpy.array_equal(drawn, pixels(shown.server.images(both, "images")[0]))
    assert not numpy.array_equal(drawn, pixels(shown.server.images(alone, "images")[0]))

    files, pairs = (shown.panel.locator(f".lw-xray table:nth-child({number}) tbody tr") for number in (1, 2))
    expect(files).to_have_count(2)
    assert files.first.locator("td").all_inner_texts()[:4] == ["star", "0.8", "SDXL", "3"]
    expect(pairs).to_contain_text("star · heart")
    shown.row("heart").get_by_role("button", name="Remove").press("Enter")
    shown.row("star").get_by_role("button", name="Move", exact=True).press("Control+z")
    expect(shown.rows).to_have_count(3)
    expect(files).to_have_count(2)

    shown.page.evaluate(f"() => {{ {STACK}.widgets.find(widget => widget.name === 'xray').value = 'off' }}")
    shown.page.evaluate("() => app.queuePrompt(0, 1)")
    expect(shown.panel.locator(".lw-xray")).to_be_hidden()
