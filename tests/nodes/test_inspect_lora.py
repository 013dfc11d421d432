"""Inspect LoRA: any file from the loras folder, seen and left as it is, and the workflow that made it."""

import hashlib
import json
from pathlib import Path

import folder_paths
import pytest
import queueing
import torch
from safetensors.torch import save_file

from lora_workbench.nodes.host import folders
from lora_workbench.nodes.inspect_lora import LoraWorkbenchInspectLora

pytestmark = pytest.mark.comfy
GRAPH = {"3": {"class_type": "LoraWorkbenchTrainer", "inputs": {"name": "star", "steps": 0, "rank": 0}}}
OURS = {
    "lora_workbench.workflow": json.dumps(GRAPH),
    "lora_workbench.node": "3",
    "lora_workbench.settings": json.dumps(
        {"train": {"steps": 700, "learning_rate": 1e-4, "seed": 5}, "lora": {"rank": 8}}
    ),
}


@pytest.fixture
def loras(tmp_path, monkeypatch, comfyui):
    """The loras folder."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "loras/people").mkdir(parents=True)
    return tmp_path / "loras"


def write(loras, name="star.safetensors", entries=None):
    layer = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    save_file(tensors, loras / name, entries)


def look(lora="star.safetensors", write_workflow=False, lora_name=None):
    return queueing.run(LoraWorkbenchInspectLora, lora=lora, write_workflow=write_workflow, lora_name=lora_name)


def tree(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_it_says_draws_and_leaves_the_file_as_it_was(loras):
    write(loras)
    before = tree(loras)
    found = look()
    assert found["report"].startswith("star.safetensors\n")
    assert "rank: 2 (all 1)" in found["report"]
    batch, height, width, channels = found["chart"].shape
    assert (batch, width, channels) == (1, 960, 3) and height > 300
    assert found["workflow"] == ""
    assert tree(loras) == before


def test_report_and_chart_are_shown_in_the_node(loras):
    write(loras, entries=OURS)
    clone = LoraWorkbenchInspectLora.PREPARE_CLASS_CLONE(None)
    shown = clone.EXECUTE_NORMALIZED(lora="star.safetensors", write_workflow=True).ui
    assert shown["text"][0].startswith("star.safetensors\n")
    assert len(shown["images"]) == 1
    assert shown["lora_workbench_workflow"] == [
        {"filename": "star.json", "subfolder": "lora_workbench/workflows", "type": "output"}
    ]


def test_the_workflow_that_made_it_is_written_in_api_form_with_all_that_was_derived(loras):
    write(loras, "people/star.safetensors", OURS)
    found = look("people/star.safetensors", write_workflow=True)
    path = folders.output_folder() / "lora_workbench/workflows/people_star.json"
    assert found["workflow"] == str(path) and str(path) in found["report"]
    trainer = json.loads(path.read_text(encoding="utf-8"))["3"]
    assert trainer["class_type"] == "LoraWorkbenchTrainer"
    assert (trainer["inputs"]["steps"], trainer["inputs"]["rank"], trainer["inputs"]["seed"]) == (700, 8, 5)


def test_writing_the_same_workflow_again_writes_nothing(loras):
    write(loras, entries=OURS)
    look(write_workflow=True)
    path = folders.workflows_folder() / "star.json"
    before = path.stat().st_mtime_ns, path.stat().st_ino
    look(write_workflow=True)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


@pytest.mark.parametrize(
    "entries",
    [
        {},
        OURS | {"lora_workbench.node": "9"},
        OURS | {"lora_workbench.workflow": "[" * 50_000},
        OURS | {"lora_workbench.workflow": '{"3": {"inputs": []}}'},
        OURS | {"lora_workbench.settings": '{"train": 7}'},
        OURS | {"lora_workbench.workflow": '{"3": {"inputs": {"stop_after": 1, "settings": []}}}'},
        OURS | {"lora_workbench.workflow": '{"3": {"inputs": {"stop_after": 1, "settings": ["4"]}}, "4": {"a": 1}}'},
    ],
)
def test_a_file_that_does_not_say_how_it_was_made_is_refused_only_when_that_is_asked_for(entries, loras):
    write(loras, entries=entries)
    assert look()["report"]
    with pytest.raises(ValueError, match="'star.safetensors' does not hold the graph it was trained in"):
        look(write_workflow=True)
    assert not folders.workflows_folder().exists()


def test_half_a_character_in_it_is_no_obstacle(loras):
    write(loras, entries=OURS | {"lora_workbench.workflow": '{"3": {"inputs": {"name": "a\\ud800b"}}}'})
    written = json.loads(Path(look(write_workflow=True)["workflow"]).read_text(encoding="utf-8"))
    assert written["3"]["inputs"]["name"] == "a?b"


def test_a_folder_that_leads_out_of_comfyuis_output_is_not_written_to(loras, tmp_path):
    write(loras, entries=OURS)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "output").mkdir()
    (tmp_path / "output/lora_workbench").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of ComfyUI's output folder"):
        look(write_workflow=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../star.safetensors", "/etc/passwd", "C:\\star.safetensors", "gone.safetensors", "a\0b"]
)
def test_names_that_are_no_lora_files_are_refused(name, loras):
    write(loras.parent)
    with pytest.raises(ValueError, match="not in the loras folder|not the name of a LoRA file"):
        look(lora_name=name)


def test_a_wired_name_is_taken_instead_of_the_chosen_one(loras):
    write(loras)
    write(loras, "other.safetensors")
    assert look(lora_name="other.safetensors")["report"].startswith("other.safetensors\n")
    assert look(lora_name="")["report"].startswith("star.safetensors\n")
    with pytest.raises(ValueError, match="No LoRA is chosen"):
        look("none")


def test_another_file_of_the_same_name_is_another_input(loras):
    write(loras)
    first = LoraWorkbenchInspectLora.fingerprint_inputs("star.safetensors")
    assert LoraWorkbenchInspectLora.fingerprint_inputs("star.safetensors") == first
    write(loras, entries={"a": "b"})
    assert LoraWorkbenchInspectLora.fingerprint_inputs("star.safetensors") != first
