"""The caption review in ComfyUI's own page, worked by keyboard, down to the files on the disk."""

import re

import pytest

from toyworld import drawing

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
BUTTON = "Review captions"
PATIENCE = 120_000  # ms for ComfyUI's page to load
NODES = ("LoraWorkbenchDatasetLoader", "LoraWorkbenchAutoCaptioner")
# Until then the page may still put the last workflow in place of what a test adds.
LOADED = "() => app.extensionManager.workflow?.activeWorkflow && !document.querySelector('#splash-loader')"
ADD_NODES = """folder => {
    app.graph.clear();
    const loader = LiteGraph.createNode("LoraWorkbenchDatasetLoader");
    const captioner = LiteGraph.createNode("LoraWorkbenchAutoCaptioner");
    app.graph.add(loader);
    app.graph.add(captioner);
    captioner.pos = [loader.pos[0] + 500, loader.pos[1]];
    loader.connect(0, captioner, "dataset");
    loader.widgets.find(w => w.name === "folder").value = folder;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [-loader.pos[0] + 300, -loader.pos[1] + 150];
    app.canvas.setDirty(true, true);
}"""
ADD_LOADER = """folder => {
    const second = LiteGraph.createNode("LoraWorkbenchDatasetLoader");
    app.graph.add(second);
    second.pos = [-1000, 0];
    second.widgets.find(w => w.name === "folder").value = folder;
    const first = app.graph._nodes.find(n => n.comfyClass === second.comfyClass && n !== second);
    second.connect(0, first, "dataset");
}"""
DRAWN = """([type, name]) =>
    app.graph._nodes.find(n => n.comfyClass === type)?.widgets.find(w => w.name === name)?.last_y > 0"""
PLACE = """([type, name]) => {
    const node = app.graph._nodes.find(n => n.comfyClass === type), widget = node.widgets.find(w => w.name === name);
    const [x, y] = app.canvas.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]);
    const corner = app.canvas.canvas.getBoundingClientRect();
    return [x + corner.left, y + corner.top];
}"""


@pytest.fixture
def folder(server, request):
    """Eight drawn pictures with captions in a folder of the input folder."""
    name = re.sub(r"\W+", "_", request.node.name)
    place = server.folder / "input" / name
    drawing.write_training_folder(place, 8)
    return place


def show(page, typed):
    """Puts a Dataset Loader with that folder on the canvas, and an Auto-Captioner fed by it."""
    page.wait_for_function(LOADED, timeout=PATIENCE)
    page.keyboard.press("Escape")
    page.evaluate(ADD_NODES, typed)


def reload(page, new_nodes=False):
    """The same page once more, nodes drawn the classic or the new way."""
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(
        "wanted => window.app?.graph && LiteGraph.vueNodesMode === wanted", arg=new_nodes, timeout=PATIENCE
    )
    page.wait_for_function("() => 'LoraWorkbenchAutoCaptioner' in LiteGraph.registered_node_types", timeout=PATIENCE)


def press_button(page, node):
    if page.evaluate("() => LiteGraph.vueNodesMode"):
        page.get_by_role("button", name=BUTTON).nth(NODES.index(node)).click()
    else:
        page.wait_for_function(DRAWN, arg=[node, BUTTON])
        page.wait_for_timeout(500)  # the page may still be moving its parts into place
        page.mouse.click(*page.evaluate(PLACE, [node, BUTTON]))


def open_review(page, node=NODES[0]):
    press_button(page, node)
    dialog = page.get_by_role("dialog", name=BUTTON)
    dialog.wait_for()
    return dialog


def captions(folder):
    return {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))}


def chip(dialog, state):
    return dialog.get_by_role("group", name="Filter by state").get_by_role("button", name=state)


@pytest.fixture(params=[False, True], ids=["canvas", "nodes 2.0"])
def new_nodes(request, server):
    """Whether nodes are drawn the new way."""
    server.post("/settings", {"Comfy.VueNodes.Enabled": request.param})
    yield request.param
    server.post("/settings", {"Comfy.VueNodes.Enabled": False})


def test_the_button_of_either_node_opens_the_folder(page, folder, new_nodes):
    reload(page, new_nodes)
    show(page, folder.name)
    for node in NODES:
        dialog = open_review(page, node)
        assert dialog.get_by_role("option").count() == 8
        assert dialog.locator("header").get_by_title(str(folder)).inner_text() == folder.name
        dialog.get_by_role("option").first.locator("img").evaluate("image => image.decode()")
        page.keyboard.press("Escape")
        dialog.wait_for(state="detached")
    assert page.problems == []


def test_edit_three_captions_by_keyboard_replace_undo_reload_and_the_files_are_right(page, folder):
    show(page, folder.name)
    before = captions(folder)
    names = list(before)
    dialog = open_review(page)
    words = ["first caption, zork", "second caption, zork", "a zork, grün, third caption"]
    for name, caption in zip(names, words, strict=False):
        page.keyboard.press("Control+a")
        page.keyboard.type(caption)
        page.keyboard.press("Control+Enter")
        dialog.get_by_text(f"Accepted {name}.png").wait_for()
    expected = {**before, **dict(zip(names, words, strict=False))}
    assert captions(folder) == expected
    assert chip(dialog, "Reviewed").inner_text().split()[-1] == "3"

    page.keyboard.press("Control+h")
    page.keyboard.type("caption")
    page.keyboard.press("Tab")
    page.keyboard.type("words")
    dialog.get_by_text("Changes 3 captions.").wait_for()
    assert captions(folder) == expected
    dialog.get_by_role("button", name="Replace in 3 captions").press("Enter")
    dialog.get_by_text("Changed 3 captions.").wait_for()
    replaced = {name: caption.replace("caption", "words") for name, caption in expected.items()}
    assert captions(folder) == replaced

    page.keyboard.press("Escape")
    page.keyboard.press("Control+z")
    dialog.get_by_text("Took back the change of 3 captions.").wait_for()
    assert captions(folder) == expected
    page.keyboard.press("Control+z")
    dialog.get_by_text(f"Took back the change of {names[2]}.png").wait_for()
    expected[names[2]] = before[names[2]]
    assert captions(folder) == expected

    reload(page)
    show(page, folder.name)
    dialog = open_review(page)
    shown = dialog.get_by_role("option").locator(".lw-words p").all_inner_texts()
    assert shown == list(expected.values())
    assert chip(dialog, "Reviewed").inner_text().split()[-1] == "2"
    assert captions(folder) == expected
    assert page.problems == []


def test_what_is_typed_is_saved_when_another_picture_is_chosen_and_when_the_dialog_closes(page, folder):
    show(page, folder.name)
    dialog = open_review(page)
    page.keyboard.press("Control+a")
    page.keyboard.type("typed and left")
    dialog.get_by_text("After").wait_for()
    assert dialog.locator("ins").first.inner_text() and dialog.locator("del").first.inner_text()
    page.keyboard.press("Alt+ArrowDown")
    dialog.get_by_role("status").filter(has_text=re.compile("^Saved ")).wait_for()
    page.keyboard.press("Control+a")
    page.keyboard.type("typed and closed")
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert list(captions(folder).values())[:2] == ["typed and left", "typed and closed"]
    assert page.problems == []


def test_states_tags_and_words_filter_what_is_shown(page, folder):
    for number, path in enumerate(sorted(folder.glob("*.txt"))):
        path.write_text(f"zork, {'red' if number % 2 else 'blue'}, number {number}", encoding="utf-8")
    (folder / "extra.png").write_bytes((sorted(folder.glob("*.png"))[0]).read_bytes())
    show(page, folder.name)
    dialog = open_review(page)
    visible = dialog.get_by_role("option")
    assert visible.count() == 9
    chip(dialog, "Missing").click()
    assert visible.count() == 1
    chip(dialog, "All").click()
    cloud = dialog.get_by_role("navigation", name="Tags")
    assert cloud.get_by_role("button").first.inner_text().split() == ["zork", "8"]
    cloud.get_by_role("button", name="red").click()
    assert visible.count() == 4
    cloud.get_by_role("button", name="number 3").click()
    assert visible.count() == 1
    cloud.get_by_role("button", name="red").click()
    cloud.get_by_role("button", name="number 3").click()
    dialog.get_by_role("searchbox").fill("NUMBER 5")
    assert visible.count() == 1
    dialog.get_by_role("searchbox").fill("nowhere to be found")
    dialog.get_by_text("No picture passes the filter.").wait_for()
    assert page.problems == []


def test_the_grid_is_walked_with_the_arrow_keys_and_tab_stays_inside(page, folder):
    show(page, folder.name)
    dialog = open_review(page)
    options = dialog.get_by_role("option")
    options.first.focus()
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 7), ("Home", 0)):
        page.keyboard.press(key)
        page.wait_for_function(
            "place => document.activeElement === document.querySelectorAll('.lw-card')[place]", arg=place
        )
        assert options.nth(place).get_attribute("aria-selected") == "true"
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.getAttribute('aria-label')") == "Caption"
    for keys in ("Tab", "Shift+Tab"):
        for _ in range(60):
            page.keyboard.press(keys)
            assert page.evaluate("() => !!document.activeElement.closest('dialog.lw-review')")
    assert page.problems == []


def test_keys_and_pasted_text_in_the_dialog_do_not_reach_the_graph(page, folder):
    show(page, folder.name)
    queued = []
    page.on("request", lambda request: queued.append(request.url) if request.url.endswith("/prompt") else None)
    dialog = open_review(page)
    before = page.evaluate("() => app.graph._nodes.length")
    for key in ("Control+Enter", "Control+s", "Delete", "Backspace", "Control+v", "r", "q", "Control+m"):
        page.keyboard.press(key)
        page.wait_for_timeout(100)
    assert page.evaluate("() => app.graph._nodes.length") == before and queued == []
    assert dialog.is_visible() and page.get_by_role("dialog").count() == 1


def test_a_caption_that_changes_on_the_disk_is_shown_before_it_is_overwritten(page, folder):
    show(page, folder.name)
    dialog = open_review(page)
    first = sorted(folder.glob("*.txt"))[0]
    first.write_text("written by another program", encoding="utf-8")
    page.keyboard.press("Control+a")
    page.keyboard.type("typed here")
    page.keyboard.press("Control+s")
    dialog.get_by_text("was changed meanwhile").wait_for()
    assert first.read_text() == "written by another program"
    assert "another" in dialog.locator("del").first.inner_text()
    page.keyboard.press("Control+s")
    dialog.get_by_role("status").filter(has_text=re.compile("^Saved ")).wait_for()
    assert first.read_text() == "typed here\n"


def test_what_the_server_does_not_take_stays_with_its_picture_until_it_does(page, folder):
    show(page, folder.name)
    before = captions(folder)
    dialog = open_review(page)
    page.route("**/caption", lambda route: route.abort())
    page.keyboard.press("Control+a")
    page.keyboard.type("typed while the server is gone")
    page.keyboard.press("Control+Enter")
    dialog.get_by_text("ComfyUI does not answer").wait_for()
    assert dialog.get_by_role("option").first.get_by_text("Not saved").is_visible() and captions(folder) == before
    page.unroute("**/caption")
    page.keyboard.press("Alt+ArrowUp")
    assert dialog.get_by_role("textbox", name="Caption").input_value() == "typed while the server is gone"
    page.keyboard.press("Control+s")
    dialog.get_by_text(f"Saved {next(iter(before))}.png").wait_for()
    assert next(iter(captions(folder).values())) == "typed while the server is gone"
    assert page.problems == []


def test_of_several_folders_each_can_be_chosen(page, folder):
    other = folder.with_name(folder.name + "_2")
    drawing.write_training_folder(other, 3)
    show(page, folder.name)
    page.evaluate(ADD_LOADER, other.name)
    dialog = open_review(page, NODES[1])
    assert dialog.get_by_role("option").count() == 8 + 2  # the pictures, and the folders to choose from
    dialog.get_by_role("combobox", name="Folder").select_option(other.name)
    dialog.get_by_role("listbox", name="Pictures").get_by_role("option").nth(2).wait_for()
    page.wait_for_function("() => document.querySelectorAll('.lw-card').length === 3")
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached")
    assert page.problems == []


def test_without_a_folder_there_is_a_sentence(page):
    for typed, sentence in (("", "There is no folder yet"), ("no such folder", "does not exist")):
        show(page, typed)
        press_button(page, NODES[0])
        page.get_by_text(sentence).wait_for()
    assert page.get_by_role("dialog").count() == 0 and page.problems == []
