"""The panel on LoRA Trainer in ComfyUI's own page: on a training that really runs, and on states made up for it."""

import json
import re

import example
import pages
import pytest

from toyworld import drawing

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
TRAINER = "LoraWorkbenchTrainer"
STEPS = 100_000  # never reached
LOAD = "saved => app.loadGraphData(saved, true, true)"
LOOK_AT_IT = """() => {
    const node = app.graph._nodes.find(node => node.comfyClass === "LoraWorkbenchTrainer");
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [200 - node.pos[0], 40 - node.pos[1]];
    app.canvas.setDirty(true, true);
}"""
HEIGHT = "() => app.graph._nodes.find(node => node.comfyClass === 'LoraWorkbenchTrainer').size[1]"
STATUS = "wanted => wanted.includes(document.querySelector('.lw-training')?.dataset.status)"
GROWN = """before => {
    const path = document.querySelector(".lw-training .lw-plot path.lw-raw");
    const curve = path?.getAttribute("d") ?? "";
    return curve.split("L").length > 2 && curve !== before && path.getBoundingClientRect().width > 0 && curve;
}"""
DRAWN = "number => document.querySelectorAll('.lw-training .lw-frame img')[number]?.naturalWidth > 0"
STEP_BEYOND = """before => {
    const found = /step ([\\d,]+)/.exec(document.querySelector(".lw-training .lw-headline")?.textContent ?? "");
    const step = found && Number(found[1].replaceAll(",", ""));
    return step > before && step;
}"""


@pytest.fixture(params=[False, True], ids=["canvas", "nodes 2.0"])
def new_nodes(request, server):
    """Whether nodes are drawn the new way."""
    with pages.drawn(server, request.param):
        yield request.param


@pytest.fixture
def visit(browser, server, new_nodes):
    """Opens ComfyUI in a browser of its own; `page.problems` collects uncaught errors."""
    contexts = []

    def visited():
        contexts.append(browser.new_context(viewport={"width": 1600, "height": 1300}))
        return pages.opened(contexts[-1], server, new_nodes)

    yield visited
    for context in contexts:
        context.close()


def load(page, saved):
    """Put a workflow into the page, with the Trainer in sight."""
    page.evaluate(LOAD, saved)
    page.evaluate(LOOK_AT_IT)


def button(page, name):
    return page.locator(".lw-training").get_by_role("button", name=name)


def push(page, name):
    """Push a button of the panel by keyboard: where the page shows it after a reload is ComfyUI's to say."""
    button(page, name).press("Enter")


def frames(page):
    return page.locator(".lw-training .lw-frame")


# A training that really runs


@pytest.fixture
def saved(server, object_info, new_nodes):
    """The example workflow on the toy world, with far more steps than a test can wait for."""
    name = f"panel_{'new' if new_nodes else 'classic'}"
    drawing.write_training_folder(server.folder / "input" / name, 4)
    trainer = {"name": name, "steps": STEPS, "save_every": STEPS}
    prompt = f"{drawing.TRIGGER} on a green background"
    sdxl = example.FAMILIES["sdxl"]
    return example.toy_workflow(
        sdxl, object_info, folder=name, trigger_word=drawing.TRIGGER, prompt=prompt, trainer=trainer
    )


def test_the_panel_shows_and_steers_a_training_and_outlives_a_reload(visit, server, saved, new_nodes):
    page, (trainer,) = visit(), [node for node in saved["nodes"] if node["type"] == TRAINER]
    load(page, saved)
    files = server.folder / "models" / "loras" / trainer["widgets_values"][0]
    page.get_by_text("Not trained yet").wait_for()
    assert not button(page, "Finish now").is_visible()
    small = page.evaluate(HEIGHT)
    page.evaluate("() => app.queuePrompt(0, 1)")

    curve = page.wait_for_function(GROWN, arg="").json_value()
    page.wait_for_function(GROWN, arg=curve)
    assert frames(page).all_inner_texts() == ["untrained"]
    page.evaluate(LOOK_AT_IT)
    page.wait_for_function(DRAWN, arg=0)
    assert re.search(r"(s/step|steps/s) · .+ left · .+B", page.locator(".lw-training .lw-figures").inner_text())
    if not new_nodes:
        assert page.evaluate(HEIGHT) > small + 150

    push(page, "Preview now")
    frames(page).nth(1).wait_for()
    assert re.fullmatch(r"step [\d,]+", frames(page).nth(1).inner_text())
    page.wait_for_function(DRAWN, arg=1)

    assert not list(files.glob("*.safetensors"))
    push(page, "Save now")
    for _ in range(300):  # the server hears of it when it comes round to it
        if any(files.glob("*.safetensors")):
            break
        page.wait_for_timeout(100)
    page.wait_for_function(STEP_BEYOND, arg=step_of(page) + 1)
    (file,) = files.glob("*.safetensors")
    assert 0 < int(file.stem.rsplit("_", 1)[1]) < STEPS

    push(page, "Pause")
    page.wait_for_function(STATUS, arg=["paused"])
    step = step_of(page)
    page.wait_for_timeout(1500)
    told = json.loads(server.get(f"/lora_workbench/training/{trainer['id']}"))
    assert step_of(page) == step == told["step"] and told["status"] == "paused"

    page.reload(wait_until="domcontentloaded")
    pages.ready(page, new_nodes)
    page.wait_for_function(STATUS, arg=["paused"])  # the page has put the workflow back by itself
    page.evaluate(LOOK_AT_IT)
    assert frames(page).count() >= 2 and step_of(page) == step
    other = visit()
    load(other, saved)
    push(other, "Continue")  # the second browser steers it too
    for each in (page, other):
        each.wait_for_function(STEP_BEYOND, arg=step)
        assert each.evaluate(GROWN, curve) and frames(each).count() >= 2

    push(page, "Finish now")
    for each in (page, other):
        each.wait_for_function(STATUS, arg=["finished"])
        assert "queue again to go on" in each.locator(".lw-training .lw-said").inner_text()
        assert button(each, "Finish now").get_attribute("aria-disabled") == "true"
        assert each.problems == []


def step_of(page):
    return int(re.search(r"step ([\d,]+)", page.locator(".lw-training .lw-headline").inner_text())[1].replace(",", ""))


# States made up for it


SHOWN = {
    "node_id": "1",
    "name": "star",
    "run": "star",
    "id": "1a",
    "number": 7,
    "status": "training",
    "phase": "Training",
    "done": None,
    "of": None,
    "step": 120,
    "total": 1000,
    "seconds_per_step": 0.42,
    "seconds_left": 369.6,
    "learning_rate": 1e-4,
    "memory": {"kind": "GPU", "used": 7.1 * 2**30, "peak": 8 * 2**30, "free": 4 * 2**30},
    "plan": "1000 steps at learning rate 0.0001, rank 16",
    "message": "",
    "asked": [],
    "paused": False,
    "possible": ["finish", "save", "preview", "pause"],
    "loss": [[step, 0.1 + step % 7 / 100] for step in range(1, 121)],
    "smoothed": [[step, 0.2 - step / 1000] for step in range(5, 121, 10)],
    "validation": [[0, 0.21], [60, 0.17], [120, 0.15]],
    "rate": [[step, 1e-4] for step in range(1, 121)],
    "previews": [
        {"step": step, "prompt": prompt, "url": f"/view?filename={step}{prompt[0]}.png&type=output&v=1"}
        for step in (0, 60, 120)
        for prompt in ("zork", "a red circle")
    ],
    "notes": [{"step": 80, "text": "The rate was halved."}],
}
ADD_TRAINER = """() => {
    app.graph.clear();
    const node = LiteGraph.createNode("LoraWorkbenchTrainer");
    app.graph.add(node);
    node.widgets.find(widget => widget.name === "name").value = "star";
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [300 - node.pos[0], 60 - node.pos[1]];
    node.onConfigure?.(node.serialize());
}"""
DOT = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde"
    b"\x00\x00\x00\x0cIDATx\x9cc\xf8\xcf\xc0\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82"
)


@pytest.fixture
def shown(visit):
    """A page with a Trainer that shows SHOWN; `page.asked` collects what its buttons ask."""
    page = visit()
    page.asked = []
    page.route("**/view?*", lambda route: route.fulfill(body=DOT, content_type="image/png"))

    def answer(route):
        if route.request.method == "POST":
            page.asked.append(route.request.url.split("/lora_workbench/")[1])
            sentence = "Node 1 is paused: continue first, then save."
            return route.fulfill(status=409 if "save" in page.asked[-1] else 200, json={"error": sentence})
        return route.fulfill(json=SHOWN)

    page.route("**/lora_workbench/training/**", answer)
    page.evaluate(ADD_TRAINER)
    page.get_by_text("Training · step 120 of 1,000").wait_for()
    return page


def test_every_part_of_the_panel_says_what_it_should_and_works_by_keyboard(shown):
    node = shown.evaluate("() => String(app.graph._nodes[0].id)")
    panel = shown.locator(".lw-training")
    assert panel.locator(".lw-figures").inner_text() == "0.42 s/step · 6 min left · 7.1 GB"
    assert panel.locator(".lw-figures").get_attribute("title") == "GPU: 7.1 GB used, 8.0 GB at most so far, 4.0 GB free"
    assert panel.locator(".lw-notes").inner_text() == "step 80 The rate was halved."
    legend = panel.locator(".lw-legend")
    assert "smoothed 0.085" in legend.inner_text() and "held-out 0.15" in legend.inner_text()

    box = panel.locator(".lw-plot").bounding_box()
    shown.mouse.move(box["x"] + 40, box["y"] + box["height"] / 2)
    panel.locator(".lw-at").wait_for()
    assert re.match(r"step (\d|1\d)\b", legend.inner_text())
    shown.mouse.move(0, 0)
    panel.locator(".lw-plot").focus()
    shown.keyboard.press("ArrowLeft")
    assert legend.inner_text().startswith("step 120")
    shown.keyboard.press("ArrowLeft")
    assert legend.inner_text().startswith("step 115")

    assert frames(shown).all_inner_texts() == ["untrained", "step 60", "step 120"]
    frames(shown).first.focus()
    shown.keyboard.press("ArrowRight")
    shown.keyboard.press("Enter")
    dialog = shown.get_by_role("dialog", name="Preview")
    line = dialog.locator(".lw-viewer-line")
    assert "step 60" in line.inner_text() and "zork" in line.inner_text()
    shown.keyboard.press("ArrowRight")
    assert "step 120" in line.inner_text()
    shown.keyboard.press("ArrowDown")
    assert "step 120" in line.inner_text() and "a red circle" in line.inner_text()
    shown.keyboard.press("Home")
    assert "untrained" in line.inner_text()
    assert "filename=0a.png" in dialog.locator("img").get_attribute("src")
    shown.keyboard.press("Escape")
    dialog.wait_for(state="detached")

    for name, action in (("Finish now", "finish"), ("Preview now", "preview"), ("Pause", "pause")):
        assert button(shown, name).get_attribute("title")
        button(shown, name).focus()
        shown.keyboard.press("Enter")
        shown.wait_for_timeout(200)
        assert shown.asked[-1] == f"training/{SHOWN['node_id']}/{action}"
    button(shown, "Save now").click()
    panel.get_by_text("Node 1 is paused: continue first, then save.").wait_for()
    assert shown.evaluate("() => app.graph._nodes.length") == 1, "no key reached the graph"
    assert node and shown.problems == []


def test_the_panel_fits_a_narrow_node_and_a_light_theme(shown, new_nodes):
    inside = """() => {
        const box = document.querySelector(".lw-training").getBoundingClientRect();
        return [...document.querySelectorAll(".lw-training button:not(.lw-frame), .lw-plot, .lw-legend")]
            .every(part => { const own = part.getBoundingClientRect();
                return own.left >= box.left - 1 && own.right <= box.right + 1 && own.bottom <= box.bottom + 1; });
    }"""
    for width in (225, 400, 700):
        shown.evaluate("width => app.graph._nodes[0].setSize([width, app.graph._nodes[0].size[1]])", width)
        shown.wait_for_timeout(500)
        assert shown.evaluate(inside), width
    colours = "() => getComputedStyle(document.querySelector('.lw-training .lw-headline')).color"
    dark = shown.evaluate(colours)
    shown.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    shown.wait_for_function(f"dark => ({colours})() !== dark", arg=dark)
    shown.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
    assert shown.problems == []
