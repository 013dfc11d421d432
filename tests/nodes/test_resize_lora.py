"""The Resize LoRA node: a smaller file, and a report whose share is that of the weights ComfyUI loads."""

import re

import folder_paths
import loratoys
import pytest
import queueing
import torch
from safetensors.torch import load_file, save_file

from lora_workbench.nodes.host import loras
from lora_workbench.nodes.resize_lora import LoraWorkbenchResizeLora
from lora_workbench.training.description import read

pytestmark = pytest.mark.comfy
NAME = "people/a.safetensors"
SAID = {"modelspec.trigger_phrase": "zork", "ss_base_model_version": "flux1", "lora_workbench.strength": "0.8"}


@pytest.fixture
def folder(tmp_path, monkeypatch, comfyui):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "people").mkdir()
    model, clip, _ = queueing.shared_models("flux")
    tensors = loratoys.lora(model, clip, rank=16, alpha=8.0)
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, tmp_path / NAME, SAID)
    return tmp_path


def resize(**changes):
    inputs = {"lora": NAME, "name": "small", "by": "rank", "rank": 4, "energy": 0.5, "ratio": 0.7}
    return queueing.run(LoraWorkbenchResizeLora, **inputs | {"precision": "as it is"} | changes)


@pytest.mark.parametrize("by", ["rank", "energy", "ratio"])
def test_the_share_in_the_report_is_that_of_the_weights(by, folder):
    model = queueing.shared_models("flux")[0]
    clip = queueing.shared_models("flux")[1]
    made = resize(by=by)
    found = re.match(r"([\d.]+) (k|M)B -> ([\d.]+) (k|M)B keeps ([\d.]+) % of the effect\.", made["report"])
    assert found, made["report"]
    before, after = (path.stat().st_size for path in (folder / NAME, folder / made["lora_name"]))
    assert after < 0.8 * before
    sizes = [float(number) * {"k": 1e3, "M": 1e6}[unit] for number, unit in (found.group(1, 2), found.group(3, 4))]
    assert sizes == pytest.approx([before, after], rel=0.05)
    kept = float(found[5]) / 100
    (whole, whole_clip), (part, part_clip) = (
        loras.apply(model, clip, loras.read_lora(folder / name), 1.0, 1.0) for name in (NAME, made["lora_name"])
    )
    squares = [
        (loratoys.distance(one, bare) ** 2, loratoys.distance(other, bare) ** 2)
        for one, other, bare in ((part, whole, model), (part_clip.patcher, whole_clip.patcher, clip.patcher))
    ]
    share = (sum(one for one, _ in squares) / sum(other for _, other in squares)) ** 0.5
    assert share == pytest.approx(kept, abs=1e-3) and share < 0.95


def test_the_file_keeps_what_it_says_and_its_precision(folder):
    made = resize()
    said = read(folder / made["lora_name"])
    assert SAID.items() <= said.items() and said["ss_network_dim"] == "4"
    assert {tensor.dtype for tensor in load_file(folder / made["lora_name"]).values() if tensor.ndim} == {torch.float16}
    assert made["lora_stack"] == [("small.safetensors", 1.0, 1.0)]
    assert "rank 4." in made["report"]
    wide = resize(precision="fp32", name="wide")
    assert {tensor.dtype for tensor in load_file(folder / wide["lora_name"]).values()} == {torch.float32}


def test_ranks_that_diffusers_would_believe_are_not_kept(folder):
    said = {**SAID, "lora_adapter_metadata": '{"transformer.r": 16}'}
    save_file(load_file(folder / NAME), folder / "peft.safetensors", said)
    entries = read(folder / resize(lora="peft.safetensors", name="cut")["lora_name"])
    assert SAID.items() <= entries.items() and "lora_adapter_metadata" not in entries


def test_a_wired_name_wins_and_a_rank_that_is_high_enough_is_said(folder):
    made = resize(lora="none", lora_name="people\\a.safetensors", rank=64)
    assert "keeps 100 % of the effect" in made["report"] and "It did not become smaller" in made["report"]
    before, after = (load_file(folder / name) for name in (NAME, made["lora_name"]))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_cannot_be_resized_is_a_sentence(folder):
    with pytest.raises(ValueError, match="No LoRA is chosen: choose one from the list, or connect lora_name"):
        resize(lora="none")
    with pytest.raises(ValueError, match="is not the name of a LoRA file"):
        resize(lora_name="../outside.safetensors")
    (folder / "bad.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="The LoRA file 'bad.safetensors' cannot be read"):
        resize(lora="bad.safetensors")
