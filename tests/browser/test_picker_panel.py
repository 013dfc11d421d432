"""The Picker's panel in ComfyUI's own page: on states made up for it, and on a queue that really waits."""

import json
import re
from urllib.parse import parse_qs, urlparse

import numpy
import pages
import pytest
from asking import picking_graph, random_files
from pictures import pixels
from playwright.sync_api import expect

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
PATIENCE = 60_000  # ms
SUGGESTED = 600
PROMPTS = ["zork", "a red circle", "zork in the snow"]
COLUMNS = [None, 500, 600, 700]


def lora(step):
    return f"star/star_{step:06d}.safetensors"


def a_file(step, percent, **facts):
    about = {
        "lora": lora(step),
        "label": f"step {step:,}",
        "step": step,
        "percent": percent,
        "training_percent": step / 30,
    }
    return {
        **about,
        "suggested": step == SUGGESTED,
        "safe": False,
        "broken": "",
        "bytes": 2**20,
        "kept": False,
        **facts,
    }


def a_cell(step, prompt, strength=1.0):
    url = f"/view?filename=cell_{step or 0}_{prompt}_{strength}.png&type=output&v=1"
    return {"lora": lora(step) if step else None, "strength": strength, "prompt": prompt, "url": url}


FILES = [
    a_file(200, None, broken="not a number", training_percent=None),
    a_file(400, 7.25),
    a_file(500, 11.4, safe=True),
    a_file(600, 12.1, safe=True),
    a_file(700, 11.8, safe=True),
    a_file(1200, -3.5),
    {**a_file(1200, 11.9), "lora": "star/star_ema.safetensors", "label": "step 1,200, EMA"},
]
CELLS = [a_cell(step, prompt) for prompt in range(len(PROMPTS)) for step in COLUMNS]
VERDICT = {"kind": "levelled off", "confidence": "high", "reason": "Files 500 to 700 are equal within measuring error."}
ASKING = {
    "name": "star",
    "id": "1a",
    "status": "asking",
    "phase": "Waiting for your choice",
    "done": None,
    "of": None,
    "message": "",
    "verdict": VERDICT,
    "files": FILES,
    "prompts": PROMPTS,
    "cells": CELLS,
    "picked": None,
    "seconds_left": 1520.0,
}
PICKED = {**ASKING, "status": "picked", "phase": "", "picked": lora(700), "seconds_left": None}
ADD_PICKER = """async () => {
    app.graph.clear();
    const made = LiteGraph.createNode("LoraWorkbenchCheckpointPicker");
    app.graph.add(made);
    made.widgets.find(widget => widget.name === "pick").value = "ask me";
    made.setSize([520, made.size[1]]);
    await app.loadGraphData(app.graph.serialize(), true, true); // which a reload brings back
    const [node] = app.graph._nodes;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [300 - node.pos[0], 40 - node.pos[1]];
    app.canvas.setDirty(true, true);
    return String(node.id);
}"""
TELL = "state => app.api.dispatchCustomEvent('lora_workbench.picking', state)"
DOT = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde"
    b"\x00\x00\x00\x0cIDATx\x9cc\xf8\xcf\xc0\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82"
)


class Shown:
    """A page with a Picker on it, and the server's part in it, played."""

    def __init__(self, page):
        self.page = page
        self.panel = page.locator(".lw-picking")
        self.frames = self.panel.locator(".lw-pick-frame")
        self.dialog = page.get_by_role("dialog", name="Picture")
        self.asked, self.refusal, self.number = [], None, 0

    def draw_nodes(self, new_nodes):
        """Put one Picker into the page, drawn the new way or not."""
        self.state = {"id": "0", "status": "idle"}
        self.page.unroute_all()
        self.page.route("**/view?*", lambda route: route.fulfill(body=DOT, content_type="image/png"))
        self.page.route("**/lora_workbench/picker/**", self.answer)
        pages.draw_nodes(self.page, new_nodes)
        self.node = self.page.evaluate(ADD_PICKER)

    def answer(self, route):
        if route.request.method == "GET":
            return route.fulfill(json=self.state)
        self.asked.append((route.request.url.rsplit("/", 1)[1], json.loads(route.request.post_data or "null")))
        return route.fulfill(
            status=409 if self.refusal else 200, json={"error": self.refusal, "kept": "star.safetensors"}
        )

    def tell(self, state, **facts):
        """An event with this state, as the server sends it."""
        self.number += 1
        self.state = {**state, "node_id": self.node, "number": self.number, **facts}
        self.page.evaluate(TELL, self.state)
        self.asked.clear()

    def begin(self, state, **facts):
        """The state, of a picking that nothing was done with yet."""
        self.refusal = None
        self.tell(state, id=f"{self.number + 1:x}", **facts)

    def button(self, name):
        return self.panel.get_by_role("button", name=name, exact=True)

    def push(self, name):
        """By keyboard, which is quick where nothing draws the page but the processor."""
        self.button(name).press("Enter")

    def said(self, text):
        expect(self.panel.locator(".lw-said")).to_contain_text(text)

    def use_in_dialog(self):
        self.dialog.locator(".lw-viewer-action").press("Enter")

    def was_asked(self, *requests):
        self.page.wait_for_function("() => true")  # routes are answered while something is waited for
        self.page.wait_for_timeout(200)
        meant = {"id": self.state["id"]}
        assert self.asked == [(action, body and {**body, **meant}) for action, body in requests]


@pytest.fixture(scope="module")
def opened(browser, server):
    """One page for all tests: loading one takes longer than they do."""
    context = browser.new_context(viewport={"width": 1300, "height": 1300})
    with pages.drawn(server, False):
        yield Shown(pages.opened(context, server, False, PATIENCE))
    context.close()


@pytest.fixture
def shown(opened, new_nodes):
    """The page, with what went wrong in it counted as the test's."""
    opened.page.problems.clear()
    yield opened
    assert opened.page.evaluate("() => app.graph._nodes.length") == 1, "a key reached the graph"
    assert opened.page.problems == []


def cell_of(frame):
    """The step and the prompt of a picture, from its address: 0 is the untrained model."""
    name = parse_qs(urlparse(frame.locator("img").get_attribute("src")).query)["filename"][0]
    return tuple(map(int, re.match(r"cell_(\d+)_(\d+)", name).groups()))


def test_the_panel_says_what_is_done_and_what_was_decided(shown):
    shown.begin(ASKING, status="measuring", phase="Measuring step 400", done=2, of=7, files=[], cells=[], verdict=None)
    shown.panel.get_by_text("Measuring step 400 · 2 of 7").wait_for()
    assert not shown.panel.locator(".lw-panel-body").is_visible()
    shown.tell(ASKING)
    shown.panel.get_by_text("Files 500 to 700 are equal within measuring error.").wait_for()
    assert shown.panel.locator(".lw-verdict > *").all_inner_texts()[:2] == ["Levelled off", "high confidence"]
    assert shown.panel.locator(".lw-broken").inner_text() == "Left out: step 200 (not a number)."
    assert shown.panel.locator(".lw-figures").inner_text() == "25 min left, then step 600"

    legend = shown.panel.locator(".lw-legend")
    assert re.sub(r"\s+", " ", legend.inner_text()) == "step 600 held-out +12 % training +20 %"
    assert shown.panel.locator(".lw-file-point").count() == 6 and shown.panel.locator(".lw-average").count() == 1
    assert len(shown.panel.locator("path.lw-kept-out").get_attribute("d").split("L")) == 6, "from 0 through five steps"
    shown.panel.locator(".lw-plot").focus()
    shown.page.keyboard.press("ArrowLeft")
    assert re.sub(r"\s+", " ", legend.inner_text()) == "step 1,200 held-out −3.5 % training +40 %"
    shown.page.keyboard.press("ArrowLeft")
    assert legend.inner_text().startswith("step 700")

    shown.tell(ASKING, status="measuring", phase="Measuring strengths", picked=lora(700))
    shown.panel.get_by_text("Picked step 700 · Measuring strengths").wait_for()
    shown.tell(ASKING, status="failed", message="The grid needs a VAE: connect one.")
    shown.said("The grid needs a VAE: connect one.")


def test_pictures_come_into_the_grid_one_by_one_and_stay(shown):
    shown.begin(ASKING, status="drawing", phase="", files=[], cells=[CELLS[1], CELLS[0]])
    heads = shown.panel.locator(".lw-pick-head b")
    expect(heads).to_have_text(["untrained", "star_000500"])
    shown.tell(ASKING, status="drawing", phase="", done=3, of=12, cells=[CELLS[3], CELLS[1], CELLS[0]])
    expect(heads).to_have_text(["untrained", "step 500", "step 700"])
    assert shown.panel.locator(".lw-headline").inner_text() == "Drawing · 3 of 12"
    expect(shown.panel.locator(".lw-pick-row")).to_have_text(PROMPTS)
    assert shown.panel.locator(".lw-pick-empty").count() == 6
    shown.frames.nth(2).evaluate("frame => { frame.known = frame.firstChild.known = true }")
    shown.tell(ASKING, status="drawing", cells=[*CELLS, a_cell(600, 0, 0.8)])
    expect(heads).to_have_text(["untrained", "step 500", "step 600 at 0.8", "step 600", "step 700"])
    assert [cell_of(frame)[0] for frame in shown.frames.all()[:5]] == [0, 500, 600, 600, 700]
    assert shown.frames.nth(4).evaluate("frame => frame.known && frame.firstChild.known")
    assert shown.panel.locator(".lw-pick-empty").count() == 2
    assert shown.panel.locator(".lw-pick-head span").all_inner_texts()[1:4] == ["+11 %", "+12 % ★", "+12 % ★"]


def test_the_picture_that_is_clicked_is_the_file_that_is_used(shown):
    shown.begin(ASKING)
    expect(shown.button("Use step 600")).to_be_visible()
    shown.frames.nth(1).focus()
    shown.page.keyboard.press("ArrowRight")
    shown.page.keyboard.press("ArrowDown")
    shown.page.keyboard.press("Enter")
    line = shown.dialog.locator(".lw-viewer-line")
    expect(line).to_contain_text("step 600")
    expect(line).to_contain_text("a red circle")
    shown.page.keyboard.press("ArrowRight")
    expect(line).to_contain_text("step 700")
    assert "cell_700_1" in shown.dialog.locator("img").get_attribute("src")
    shown.page.keyboard.press("Home")
    expect(line).to_contain_text("untrained")
    assert not shown.dialog.locator(".lw-viewer-action").is_visible(), "the untrained model is no choice"
    shown.page.keyboard.press("Escape")
    shown.dialog.wait_for(state="detached")
    shown.was_asked()

    shown.refusal = "Node 1 is not asking now, so nothing can be chosen: queue it first."
    shown.frames.nth(3).press("Enter")
    shown.use_in_dialog()
    shown.said(shown.refusal)
    shown.was_asked(("choose", {"lora": lora(700)}))
    shown.tell(PICKED)
    shown.panel.get_by_text("Picked step 700").wait_for()
    assert not shown.button("Use step 700").is_visible()


def test_files_that_are_not_in_the_grid_can_be_used_too(shown):
    shown.begin(ASKING, cells=[], prompts=[])
    choice = shown.panel.get_by_label("Checkpoint", exact=True)
    assert choice.input_value() == lora(600)
    assert choice.locator("option").all_inner_texts()[0] == "step 400 · +7.3 %", "broken ones are left out"
    assert not shown.button("Blind vote").is_visible(), "there are no pictures"
    choice.select_option(label="step 1,200, EMA · +12 %")
    shown.push("Use step 1,200, EMA")
    shown.was_asked(("choose", {"lora": "star/star_ema.safetensors"}))


def test_a_blind_vote_tells_the_files_only_afterwards(shown):
    shown.begin(ASKING)
    shown.push("Blind vote")
    expect(shown.frames).to_have_count(9)
    assert shown.frames.locator("span").all_inner_texts() == ["A", "B", "C"] * 3
    told = shown.panel.evaluate(
        "panel => panel.innerText + [...panel.querySelectorAll('[title], [aria-label]')]"
        ".filter(part => part.checkVisibility()).map(part => part.title + part.ariaLabel).join()"
    )
    assert not re.search(r"[4-7]00", told.replace("then step 600", "")) and "untrained" not in told
    assert shown.button("Reveal").get_attribute("aria-disabled") == "true"
    cells = [cell_of(frame) for frame in shown.frames.all()]
    assert sorted(cells) == sorted((step, prompt) for step in (500, 600, 700) for prompt in range(3))

    for prompt, step in enumerate((700, 500, 700)):
        at = cells.index((step, prompt))
        if prompt == 0:
            shown.frames.nth(at).press("Enter")
        else:  # the dialog has gone on to the first picture of the next prompt
            for _ in range(at % 3):
                shown.page.keyboard.press("ArrowRight")
        expect(shown.dialog.locator(".lw-viewer-action")).to_have_text(f"Vote for {'ABC'[at % 3]}")
        shown.use_in_dialog()
    shown.dialog.wait_for(state="detached")
    shown.said("step 700 got 2 of 3 votes, step 500 1.")
    hearts = [cell_of(frame) for frame in shown.frames.all() if frame.locator("span").inner_text()]
    assert hearts == [(700, 0), (500, 1), (700, 2)]
    shown.was_asked()
    shown.push("Use step 700")
    shown.was_asked(("choose", {"lora": lora(700)}))


def test_deleting_says_which_and_how_large_and_wants_a_second_push(shown):
    files = [{**file, "kept": file["step"] == 500} for file in FILES]
    shown.begin(PICKED, files=files)
    others = [file for file in files if file["lora"] not in (lora(500), lora(700))]
    shown.push("Delete the others")
    shown.said(
        "This deletes step 200 · step 400 · step 600 · step 1,200 · step 1,200, EMA (5 MB) for good and keeps step 700."
    )
    shown.push("Delete nothing")
    expect(shown.button("Delete the others")).to_be_visible()
    shown.push("Delete the others")
    shown.was_asked()
    shown.push("Delete 5 files, 5 MB")
    shown.said("Deleted 5 files, 5 MB.")
    shown.was_asked(("delete", {"loras": [file["lora"] for file in others], "bytes": 5 * 2**20}))
    shown.tell(PICKED, files=[file for file in files if file not in others])
    expect(shown.button("Delete the others")).not_to_be_visible()


def test_the_pick_is_kept_and_the_node_asks_again(shown):
    shown.begin(PICKED)
    shown.push("Keep")
    shown.said("Kept as star.safetensors in the loras folder.")
    shown.was_asked(("keep", {"lora": lora(700)}))
    shown.tell(PICKED, files=[{**file, "kept": file["step"] == 700} for file in FILES])
    expect(shown.button("Kept")).to_have_attribute("aria-disabled", "true")
    shown.push("Ask again")
    shown.said("Queue again, and you are asked once more.")
    shown.was_asked(("again", None))
    shown.page.evaluate("() => app.graph._nodes[0].widgets.find(widget => widget.name === 'pick').value = 'last'")
    shown.tell(PICKED)
    expect(shown.button("Ask again")).not_to_be_visible()
    shown.page.evaluate("() => app.graph._nodes[0].widgets.find(widget => widget.name === 'pick').value = 'ask me'")


def test_the_panel_shifts_nothing_that_is_saved_or_queued(shown):
    values = shown.page.evaluate("() => app.graph._nodes[0].serialize().widgets_values")
    given = shown.page.evaluate("async () => (await app.graphToPrompt()).output")[shown.node]["inputs"]
    assert values[0] == given["pick"] == "ask me"
    assert "lora_workbench_panel" not in given and not any(value == "lora_workbench_panel" for value in values)


def test_the_panel_fits_a_narrow_node_and_a_light_theme(shown):
    inside = """() => {
        const box = document.querySelector(".lw-picking").getBoundingClientRect();
        const parts = ".lw-picking :is(.lw-actions > *, .lw-plot, .lw-legend, .lw-pick-grid, .lw-verdict)";
        return [...document.querySelectorAll(parts)]
            .filter(part => part.checkVisibility())
            .every(part => { const own = part.getBoundingClientRect();
                return own.left >= box.left - 1 && own.right <= box.right + 1 && own.bottom <= box.bottom + 1; });
    }"""
    shown.begin(ASKING)
    for width in (225, 400, 700):
        shown.page.evaluate("width => app.graph._nodes[0].setSize([width, app.graph._nodes[0].size[1]])", width)
        shown.page.wait_for_timeout(500)
        assert shown.page.evaluate(inside), width
    colour = "() => getComputedStyle(document.querySelector('.lw-picking .lw-headline')).color"
    dark = shown.page.evaluate(colour)
    for name, waited in (("light", "!=="), ("dark", "===")):
        shown.page.evaluate("name => app.extensionManager.setting.set('Comfy.ColorPalette', name)", name)
        shown.page.wait_for_function(f"dark => ({colour})() {waited} dark", arg=dark)


def test_the_panel_outlives_a_reload(shown, new_nodes):
    shown.begin(ASKING)
    shown.panel.get_by_text("Which one?").wait_for()
    shown.page.wait_for_timeout(1500)  # until the page has put the workflow aside
    shown.page.reload(wait_until="domcontentloaded")
    pages.ready(shown.page, new_nodes)
    shown.panel.get_by_text("Which one?").wait_for()
    expect(shown.frames).to_have_count(len(CELLS))


# A queue that really waits

LIVE = "asked_in_the_panel"
LIVE_STEPS = (2, 4, 6)
LIVE_PROMPT = "a red circle"
LOAD = """async graph => {
    await app.loadApiJson(graph, "asked");
    const node = app.graph._nodes.find(node => node.comfyClass === "LoraWorkbenchCheckpointPicker");
    node.setSize([520, node.size[1]]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [300 - node.pos[0], 40 - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""


@pytest.fixture(scope="module")
def live_graph(server):
    """A graph that draws with what the Picker hands on, of three LoRA files with random weights."""
    random_files(server.folder / "models" / "loras" / LIVE, {f"{step:06d}": step for step in LIVE_STEPS})
    graph = picking_graph(LIVE_PROMPT, folder=LIVE, effort="standard", grid="shortlist")
    numbers = {name: str(number) for number, name in enumerate(graph, 1)}
    renamed = json.loads(json.dumps(graph))
    for node in renamed.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [numbers[value[0]], value[1]]
    return {numbers[name]: node for name, node in renamed.items()}


def finished(page, server, picker, wanted):
    """The history of the graph that has picked, once it is there."""
    for _ in range(PATIENCE // 100):
        for run in json.loads(server.get("/history?max_items=1")).values():
            if run["prompt"][2].get(picker, {}).get("inputs", {}).get("at_step") == wanted:
                return run
        page.wait_for_timeout(100)
    raise TimeoutError("The graph did not go on.")


def test_the_picture_that_is_voted_for_blindly_belongs_to_the_lora_that_draws_the_next_one(
    opened, new_nodes, server, live_graph
):
    page, wanted = opened.page, LIVE_STEPS[1 if new_nodes else 0]
    page.problems.clear()
    page.unroute_all()
    (picker,) = [number for number, node in live_graph.items() if "Picker" in node["class_type"]]
    graph = {
        **live_graph,
        picker: {**live_graph[picker], "inputs": {**live_graph[picker]["inputs"], "at_step": wanted}},
    }
    page.evaluate(LOAD, graph)
    opened.panel.get_by_text("Nothing picked yet").wait_for()
    page.evaluate("() => app.queuePrompt(0, 1)")

    opened.panel.get_by_text("Which one?").wait_for()
    expect(opened.frames).to_have_count(1 + len(LIVE_STEPS))
    told = json.loads(server.get(f"/lora_workbench/picker/{picker}"))
    (file,) = [file for file in told["files"] if file["step"] == wanted]
    (cell,) = [cell for cell in told["cells"] if cell["lora"] == file["lora"]]
    opened.push("Blind vote")
    expect(opened.frames).to_have_count(len(LIVE_STEPS))
    addresses = [frame.locator("img").get_attribute("src") for frame in opened.frames.all()]
    (at,) = [at for at, address in enumerate(addresses) if cell["url"] in address]
    opened.frames.nth(at).press("Enter")
    opened.use_in_dialog()
    opened.said(f"{file['label']} got 1 of 1 vote.")
    opened.push(f"Use {file['label']}")

    opened.panel.get_by_text(f"Picked {file['label']}", exact=True).wait_for()
    run = finished(page, server, picker, wanted)
    assert run["status"]["status_str"] == "success"
    (shown,) = [output["images"] for node, output in run["outputs"].items() if node != picker]
    assert numpy.array_equal(pixels(server.image(shown[0])), pixels(server.get(cell["url"])))
    others = {each["url"] for each in told["cells"]} - {cell["url"]}
    assert not any(numpy.array_equal(pixels(server.image(shown[0])), pixels(server.get(other))) for other in others)

    opened.push("Keep")
    opened.panel.get_by_text(re.compile(r"Kept as .*\.safetensors in the loras folder")).wait_for()
    kept = re.search(r"Kept as (\S+) in", opened.panel.locator(".lw-said").inner_text())[1]
    folder = server.folder / "models" / "loras"
    assert (folder / kept).read_bytes() == (folder / file["lora"]).read_bytes()
    expect(opened.button("Kept")).to_be_visible()
    opened.push("Ask again")
    opened.said("Queue again, and you are asked once more.")
    page.evaluate("() => app.queuePrompt(0, 1)")
    opened.panel.get_by_text("Which one?").wait_for()
    server.become_idle()
    opened.panel.get_by_text("Cancelled", exact=True).wait_for()
    assert page.problems == []
