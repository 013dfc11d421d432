"""What a run leaves behind in a real ComfyUI, and that nothing of it is ever lost."""

import io
import json
import random

import chaos
import example
import pytest
import workflow
from PIL import Image
from safetensors.torch import load_file

from lora_workbench.nodes.host.reproduction import workflow_of
from lora_workbench.training.description import OURS, read
from toyworld import drawing

pytestmark = pytest.mark.comfy

PROMPT = f"{drawing.TRIGGER} on a green background"


@pytest.fixture(scope="module")
def trained(server, object_info):
    """The saved workflow of a short training that was queued as the browser does, and its folders."""
    drawing.write_training_folder(server.folder / "input" / "run_pictures", 5)
    saved = example.toy_workflow(
        example.FAMILIES["sdxl"],
        object_info,
        folder="run_pictures",
        trigger_word=drawing.TRIGGER,
        prompt=PROMPT,
        trainer={"name": "left_behind", "steps": 4, "save_every": 2, "rank": 0},
    )
    run = server.submit(workflow.to_api(saved, object_info), workflow=saved)
    assert run.status == "success", run.error
    return saved, server.folder / "models" / "loras", server.folder / "output" / "lora_workbench" / "runs"


def test_from_one_file_the_run_can_be_done_again_with_the_same_result(trained, server):
    _, loras, _ = trained
    first = loras / "left_behind" / "left_behind_000004.safetensors"
    again = workflow_of(first, name="done_again")
    run = server.submit(again)
    assert run.status == "success", run.error
    second = loras / "done_again" / "done_again_000004.safetensors"
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert read(first)["sshs_model_hash"] == read(second)["sshs_model_hash"]
    assert read(first)[f"{OURS}dataset"] == read(second)[f"{OURS}dataset"]


def test_every_preview_is_the_workflow_and_every_lora_has_its_cover(trained, server, object_info):
    saved, loras, runs = trained
    prompt = workflow.to_api(saved, object_info)
    previews = sorted((runs / "left_behind" / "previews").glob("*.png"))
    assert [path.name[:6] for path in previews] == ["000000", "000002", "000004"]
    for path in previews:
        text = Image.open(path).text
        assert json.loads(text["workflow"]) == saved
        assert {node: value["inputs"] for node, value in json.loads(text["prompt"]).items()} == {
            node: value["inputs"] for node, value in prompt.items()
        }
    for preview, lora in zip(previews[1:], sorted((loras / "left_behind").glob("*.safetensors")), strict=True):
        assert lora.with_suffix(".preview.png").read_bytes() == preview.read_bytes()


def test_comfyuis_own_model_list_shows_the_cover(trained, server):
    """`/experiment/models/preview` is what its model browser asks."""
    places = {folder["name"]: folder for folder in json.loads(server.get("/experiment/models"))}
    assert "loras" in places
    shown = server.get("/experiment/models/preview/loras/0/left_behind%2Fleft_behind_000004.safetensors")
    assert Image.open(io.BytesIO(shown)).size == (example.SIZE, example.SIZE)


def test_a_server_killed_at_random_moments_ends_with_the_undisturbed_files(comfyui, tmp_path):
    """The short form of `python tools/chaos.py`: promises 4 and 5 against SIGKILL."""
    with chaos.World(comfyui, tmp_path, example.FAMILIES["sdxl"], steps=6, save_every=2) as world:
        tally = chaos.chaos(world, kills=3, moments=random.Random(5))
    assert tally.kills == 3 and tally.rounds >= 1
