"""The nodes that make LoRAs of LoRAs, one behind the other in a real ComfyUI, with nothing wired behind the last."""

import comfy_server
import loratoys
import pytest
import queueing
from safetensors.torch import load_file, save_file

from lora_workbench.lora_files.layers import layers_of

pytestmark = pytest.mark.comfy

GRAPH = {
    "base": {"class_type": "ToyWorldSDXL", "inputs": {}},
    "load": {
        "class_type": "LoraLoader",
        "inputs": {
            "model": ["base", 0],
            "clip": ["base", 1],
            "lora_name": "bench_source.safetensors",
            "strength_model": 1.0,
            "strength_clip": 1.0,
        },
    },
    "extract": {
        "class_type": "LoraWorkbenchExtractLora",
        "inputs": {
            "model": ["load", 0],
            "model_base": ["base", 0],
            "clip": ["load", 1],
            "clip_base": ["base", 1],
            "file": "none",
            "file_base": "none",
            "name": "bench/back",
            "rank": 8,
            "energy": 1.0,
            "precision": "fp16",
        },
    },
    "resize": {
        "class_type": "LoraWorkbenchResizeLora",
        "inputs": {
            "lora": "none",
            "lora_name": ["extract", 1],
            "name": "bench/small",
            "by": "rank",
            "rank": 2,
            "energy": 1.0,
            "ratio": 0.0,
            "precision": "as it is",
        },
    },
    "merge": {
        "class_type": "LoraWorkbenchMergeLoras",
        "inputs": {
            "lora_stack": ["resize", 0],
            "lora_1": "bench_source.safetensors",
            "weight_1": -1.0,
            "lora_2": "none",
            "weight_2": 1.0,
            "name": "bench/rest",
            "method": "concatenate",
            "rank": 0,
            "density": 0.5,
            "seed": 0,
            "precision": "fp32",
        },
    },
}


def test_extract_resize_and_merge_follow_one_another_and_are_not_done_twice(server):
    loras = server.folder / "models" / "loras"
    model, clip, _ = queueing.shared_models("sdxl")
    tensors = loratoys.lora(model, clip, rank=3)
    save_file(tensors, loras / "bench_source.safetensors")
    run = server.submit(GRAPH)
    assert run.status == "success", run.error
    rest = layers_of(load_file(loras / "bench" / "rest.safetensors"))
    for name, layer in layers_of(tensors).items():
        third = layer.factors().reduced(3)[0].up[:, 2].square().sum()  # what rank 2 leaves of rank 3
        assert rest[name].norm() == pytest.approx(third.item(), rel=0.02, abs=1e-3 * layer.norm())
    again = server.submit(GRAPH)
    assert again.status == "success" and not set(again.executed()) & {"extract", "resize", "merge"}
    assert sorted(path.name for path in (loras / "bench").iterdir()) == [
        "back.safetensors",
        "rest.safetensors",
        "small.safetensors",
    ]


def test_a_file_that_was_deleted_is_made_again_and_the_others_stay(server):
    loras = server.folder / "models" / "loras"
    assert server.submit(GRAPH).status == "success"
    before = (loras / "bench" / "rest.safetensors").read_bytes()
    (loras / "bench" / "rest.safetensors").unlink()
    run = server.submit(GRAPH)
    assert run.status == "success" and run.executed() == ["merge"]
    assert (loras / "bench" / "rest.safetensors").read_bytes() == before
    (loras / "bench" / "back.safetensors").unlink()
    assert set(server.submit(GRAPH).executed()) >= {"extract", "resize", "merge"}
    assert server.submit(GRAPH).executed() == []
    assert len(list((loras / "bench").iterdir())) == 3


def test_a_name_that_no_file_can_have_is_told_before_anything_runs(server):
    making = ("extract", "resize", "merge")
    graph = {node: {**GRAPH[node], "inputs": {**GRAPH[node]["inputs"], "name": "../out"}} for node in making}
    with pytest.raises(comfy_server.GraphRefused) as refusal:
        server.submit({**GRAPH, **graph})
    lines = str(refusal.value).splitlines()
    for node in making:
        told = [line for line in lines if f"({node})" in line]
        assert "name '../out' cannot be the name of a LoRA file: use letters and digits" in told[0]
