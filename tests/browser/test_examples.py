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
    converted = workflow.to_api(saved, object_info)
    assert {node: (part["class_type"], part["inputs"]) for node, part in queued.items()} == {
        node: (part["class_type"], part["inputs"]) for node, part in converted.items()
    }
    assert page.problems == []
