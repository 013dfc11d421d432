"""The "Finish now" button in the Trainer's panel, on the canvas and in Nodes 2.0."""

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
BUTTON, PANEL = "Finish now", "lora_workbench_panel"
ADD_TRAINER = """values => {
    app.graph.clear();
    const node = LiteGraph.createNode("LoraWorkbenchTrainer");
    app.graph.add(node);
    for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value;
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [-node.pos[0] + 500, -node.pos[1] + 200];
    app.canvas.setDirty(true, true);
}"""
WIDGETS = "() => Object.fromEntries(app.graph._nodes[0].widgets.map(w => [w.name, w.value]))"
VALUES = {
    "name": "my star",
    "preset": "style",
    "steps": 120,
    "learning_rate": 0.0003,
    "rank": 8,
    "save_every": 30,
    "preview_prompts": "zork\na zork in the snow",
    "seed": 7,
    "resume": "start over",
    "stop_after": 20.0,
    "start_from": "nothing",
}


TRAINING = {
    "id": "1a",
    "number": 1,
    "name": "my star",
    "status": "training",
    "phase": "Training",
    "step": 3,
    "total": 120,
    "asked": [],
    "possible": ["finish", "save", "preview", "pause"],
    "plan": "",
    "message": "",
    **{key: [] for key in ("loss", "smoothed", "validation", "rate", "previews", "notes")},
}
"""What the panel is told, so that it shows its buttons; the server itself trains nothing."""


@pytest.fixture(params=[False, True], ids=["canvas", "nodes 2.0"])
def trainer(request, server, page):
    """A page with one Trainer in it, drawn the classic or the new way."""
    server.post("/settings", {"Comfy.VueNodes.Enabled": request.param})
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function("wanted => window.app?.graph && LiteGraph.vueNodesMode === wanted", arg=request.param)
    page.wait_for_function("() => 'LoraWorkbenchTrainer' in LiteGraph.registered_node_types")
    page.keyboard.press("Escape")
    page.evaluate(ADD_TRAINER, VALUES)
    page.wait_for_timeout(500)
    yield page
    server.post("/settings", {"Comfy.VueNodes.Enabled": False})


def test_the_button_asks_the_server_to_finish(trainer):
    node = trainer.evaluate("() => String(app.graph._nodes[0].id)")
    trainer.route("**/lora_workbench/training/*", lambda route: route.fulfill(json={**TRAINING, "node_id": node}))
    assert not trainer.get_by_role("button", name=BUTTON).is_visible(), "nothing trains yet"
    trainer.evaluate("() => app.graph._nodes[0].onConfigure(app.graph._nodes[0].serialize())")
    with trainer.expect_request("**/lora_workbench/training/*/finish") as asked:
        trainer.get_by_role("button", name=BUTTON).click()
    assert asked.value.method == "POST" and asked.value.url.endswith(f"/training/{node}/finish")
    assert asked.value.response().status == 409
    trainer.get_by_text(f"Node {node} is not training now, so there is nothing to finish").wait_for()
    assert trainer.problems == []


def test_the_panel_does_not_shift_what_is_saved(trainer):
    saved = trainer.evaluate("() => app.graph.serialize()")
    (node,) = saved["nodes"]
    assert node["widgets_values"][: len(VALUES)] == list(VALUES.values())
    assert not any(node["widgets_values"][len(VALUES) :])
    trainer.evaluate("saved => app.loadGraphData(saved, true, true)", saved)
    loaded = trainer.evaluate(WIDGETS)
    assert {name: loaded[name] for name in VALUES} == VALUES
    assert list(loaded)[-1] == PANEL
    queued = trainer.evaluate("async () => (await app.graphToPrompt()).output")
    assert PANEL not in queued[str(node["id"])]["inputs"]
    assert {name: queued[str(node["id"])]["inputs"][name] for name in VALUES} == VALUES
    assert trainer.problems == []
