"""The example workflows in the real frontend."""

import json

import example
import pytest
import workflow

pytestmark = [pytest.mark.comfy, pytest.mark.browser]


@pytest.mark.parametrize("file", sorted(example.WORKFLOWS.glob("*.json")), ids=lambda file: file.stem)
def test_the_frontend_queues_what_our_converter_says(page, object_info, file):
    saved = json.loads(file.read_text(encoding="utf-8"))
    page.evaluate("saved => app.loadGraphData(saved, true, true)", saved)
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    assert known(queued, object_info) == known(workflow.to_api(saved, object_info), object_info)
    assert page.problems == []


def test_a_workflow_saved_before_the_last_widgets_were_there_gets_their_defaults(page, object_info):
    saved = json.loads((example.WORKFLOWS / "train_pick_generate.json").read_text(encoding="utf-8"))
    whole = known(workflow.to_api(saved, object_info), object_info)
    loader = next(node for node in saved["nodes"] if node["type"] == "LoraWorkbenchDatasetLoader")
    del loader["widgets_values"][-1]
    page.evaluate("saved => app.loadGraphData(saved, true, true)", saved)
    assert known(page.evaluate("async () => (await app.graphToPrompt()).output"), object_info) == whole


def known(prompt: dict, object_info: dict) -> dict[str, tuple[str, dict]]:
    """Class and inputs of every node; a few nodes get widgets from the frontend that their schema does not know."""
    schemas = {node: dict(workflow.inputs(object_info[part["class_type"]])) for node, part in prompt.items()}
    return {
        node: (part["class_type"], {name: value for name, value in part["inputs"].items() if name in schemas[node]})
        for node, part in prompt.items()
    }
