"""The Trainer's "Finish now" button, on the canvas and in Nodes 2.0."""

import json

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.browser]
BUTTON = "Finish now"
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
PLACE = """name => {
    const node = app.graph._nodes[0], widget = node.widgets.find(w => w.name === name), canvas = app.canvas;
    const [x, y] = canvas.convertOffsetToCanvas([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]);
    const corner = canvas.canvas.getBoundingClientRect();
    return [x + corner.left, y + corner.top];
}"""
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
}


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
    with trainer.expect_request("**/lora_workbench/finish") as asked:
        if trainer.evaluate("() => LiteGraph.vueNodesMode"):
            trainer.get_by_role("button", name=BUTTON).click()
        else:
            trainer.mouse.click(*trainer.evaluate(PLACE, BUTTON))
    node = trainer.evaluate("() => String(app.graph._nodes[0].id)")
    assert asked.value.method == "POST" and json.loads(asked.value.post_data) == {"node_id": node}
    response = asked.value.response()
    assert response.status == 200 and response.json() == {"finishing": node}
    trainer.get_by_text("The training stops after this step").wait_for()
    assert trainer.problems == []


def test_the_button_does_not_shift_what_is_saved(trainer):
    saved = trainer.evaluate("() => app.graph.serialize()")
    (node,) = saved["nodes"]
    assert node["widgets_values"][: len(VALUES)] == list(VALUES.values())
    assert not any(node["widgets_values"][len(VALUES) :])
    trainer.evaluate("saved => app.loadGraphData(saved, true, true)", saved)
    loaded = trainer.evaluate(WIDGETS)
    assert {name: loaded[name] for name in VALUES} == VALUES
    assert list(loaded)[-1] == BUTTON
    queued = trainer.evaluate("async () => (await app.graphToPrompt()).output")
    assert BUTTON not in queued[str(node["id"])]["inputs"]
    assert {name: queued[str(node["id"])]["inputs"][name] for name in VALUES} == VALUES
    assert trainer.problems == []
