"""The graph in the files a node makes, and from a file back to a graph."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from comfy.cli_args import args
from PIL import Image

from lora_workbench.nodes.host.graph import Graph
from lora_workbench.nodes.host.reproduction import workflow_of
from lora_workbench.nodes.pictures import png_bytes
from lora_workbench.training.config import LoraConfig, ObjectiveConfig, TrainConfig
from lora_workbench.training.description import OURS, description, read
from lora_workbench.training.families import SDXL
from lora_workbench.training.lora_file import write
from nodes import SaveImage

pytestmark = pytest.mark.comfy

PROMPT = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "base.safetensors"}, "_meta": {"title": "x"}},
    "2": {"class_type": "LoraWorkbenchDatasetLoader", "inputs": {"folder": "C:/pictures/zork", "images": ["6", 0]}},
    "3": {
        "class_type": "LoraWorkbenchTrainer",
        "inputs": {
            "model": ["1", 0],
            "dataset": ["2", 0],
            "settings": ["5", 0],
            "steps": 0,
            "name": "star",
            "rank": 0,
            "stop_after": 20.0,
        },
    },
    "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 5], "filename_prefix": "private"}},
    "5": {"class_type": "LoraWorkbenchTrainingSettings", "inputs": {"warmup": 100.0}},
    "6": {
        "class_type": "Fetch",
        "inputs": {"api_key": "abc", "url": "https://me:pw@host/x", "text": "a, sk-" + "a" * 30},
    },
}
WORKFLOW = {"nodes": [{"id": 3, "type": "LoraWorkbenchTrainer"}], "links": []}


@pytest.fixture
def graph(comfyui) -> Graph:
    return Graph.of(SimpleNamespace(prompt=PROMPT, extra_pnginfo={"workflow": WORKFLOW}, unique_id="3"))


def test_a_picture_carries_the_graph_exactly_as_save_image_writes_it(graph, tmp_path):
    saver = SaveImage()
    saver.output_dir = str(tmp_path)
    saver.save_images(torch.zeros(1, 8, 8, 3), "theirs", PROMPT, {"workflow": WORKFLOW})
    (theirs,) = tmp_path.iterdir()
    ours = Image.open(io.BytesIO(png_bytes(Image.new("RGB", (8, 8)), graph.png_info())))
    assert ours.text == Image.open(theirs).text and set(ours.text) == {"prompt", "workflow"}


def test_why_a_node_ran_again_is_no_part_of_its_graph(comfyui):
    ran_again = {node: {**facts, "is_changed": ["star 2 of 4"]} for node, facts in PROMPT.items()}
    assert Graph.of(SimpleNamespace(prompt=ran_again, extra_pnginfo={}, unique_id="3")).prompt == PROMPT


def test_a_user_who_wants_no_metadata_gets_none(graph, monkeypatch, comfyui):
    monkeypatch.setattr(args, "disable_metadata", True)
    empty = Graph.of(SimpleNamespace(prompt=PROMPT, extra_pnginfo={"workflow": WORKFLOW}, unique_id="3"))
    assert empty == Graph() and empty.png_info() is None and empty.needed() == {}


def test_a_lora_carries_what_its_training_needs_and_nothing_else(graph):
    needed = graph.needed()
    assert set(needed) == {"1", "2", "3", "5", "6"}
    assert needed["2"]["inputs"] == PROMPT["2"]["inputs"]
    assert needed["1"] == {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "base.safetensors"}}


def test_keys_and_passwords_never_get_into_a_lora(graph):
    inputs = graph.needed()["6"]["inputs"]
    assert inputs == {"api_key": "", "url": "https://@host/x", "text": "a, "}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_variable", "OPENAI_API_KEY"),
        ("trigger_word", "zork"),
        ("token_normalization", "none"),
        ("folder", "/home/me/my-secret-garden"),
        ("text", "a girl with a key, a ski-jump"),
        ("author", "me"),
    ],
)
def test_ordinary_words_are_left_alone(name, value, comfyui):
    graph = Graph({"1": {"class_type": "Node", "inputs": {name: value}}}, {}, "1")
    assert graph.needed()["1"]["inputs"] == {name: value}


def test_loops_and_missing_nodes_in_a_graph_do_no_harm(comfyui):
    prompt = {"1": {"class_type": "A", "inputs": {"x": ["2", 0]}}, "2": {"class_type": "B", "inputs": {"x": ["1", 0]}}}
    assert set(Graph(prompt, {}, "1").needed()) == {"1", "2"}
    assert Graph(prompt, {}, "9").needed() == {}


# Back from a file


def written(path, graph, lora, **train):
    config = TrainConfig(steps=740, learning_rate=2e-4, warmup=37, seed=5, **train)
    entries = description(
        title="star",
        family=SDXL,
        prediction="eps",
        lora=lora,
        config=config,
        triggers={},
        resolution=1024,
        captions=[],
        step=100,
        settings={"save_every": 74},
        workflow=graph.needed(),
        node=graph.node,
    )
    write(path, {"a": torch.ones(2)}, entries)
    return path


@pytest.fixture
def lora(graph, tmp_path):
    return written(tmp_path / "star.safetensors", graph, LoraConfig(rank=8))


def test_the_graph_of_a_file_holds_everything_that_was_derived(lora):
    again = workflow_of(lora, name="star again")
    trainer = again["3"]["inputs"]
    expected = {"steps": 740, "learning_rate": 2e-4, "rank": 8, "save_every": 74, "seed": 5, "name": "star again"}
    assert expected.items() <= trainer.items() and trainer["model"] == ["1", 0]
    assert json.loads(json.dumps(again)) == again


def test_a_time_box_is_not_opened_again(lora):
    again = workflow_of(lora)
    assert again["3"]["inputs"]["stop_after"] == 0.0 and again["5"]["inputs"] == {
        "warmup": 37,
        "weight_decay": 0.01,
        "timesteps": "automatic",
    }


def test_what_the_kind_decided_is_settled(graph, tmp_path):
    path = tmp_path / "star.safetensors"
    again = workflow_of(written(path, graph, LoraConfig(kind="oft"), weight_decay=4.0))
    assert again["5"]["inputs"]["weight_decay"] == 4.0 and "lokr_factor" not in again["5"]["inputs"]
    assert workflow_of(written(path, graph, LoraConfig(kind="lokr")))["5"]["inputs"]["lokr_factor"] == 0


def test_the_noise_levels_that_the_preset_chose_are_settled(graph, tmp_path):
    style = ObjectiveConfig(timesteps="style")
    again = workflow_of(written(tmp_path / "star.safetensors", graph, LoraConfig(), objective=style))
    assert again["5"]["inputs"]["timesteps"] == "style"


def test_a_lokr_of_an_earlier_version_is_divided_as_it_was(graph, tmp_path):
    path = written(tmp_path / "star.safetensors", graph, LoraConfig(kind="lokr"))
    entries = read(path)
    settings = json.loads(entries[f"{OURS}settings"])
    del settings["lora"]["lokr_factor"]
    write(path, {"a": torch.ones(2)}, entries | {f"{OURS}settings": json.dumps(settings)})
    assert workflow_of(path)["5"]["inputs"]["lokr_factor"] == -1


def test_a_file_without_its_graph_says_what_to_do(tmp_path):
    path = tmp_path / "other.safetensors"
    write(path, {"a": torch.ones(2)}, {"ss_output_name": "other"})
    with pytest.raises(ValueError, match="^The LoRA file 'other.safetensors' does not hold the graph .* preview"):
        workflow_of(path)
