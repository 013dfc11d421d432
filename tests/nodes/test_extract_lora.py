"""The Extract LoRA node: what was put on a model comes back as a file, from loaded models and from files."""

import math

import folder_paths
import hosttoys
import loratoys
import pytest
import queueing
import torch
from comfy_api.latest import io
from safetensors.torch import load_file, save_file

from lora_workbench.lora_files.layers import layers_of
from lora_workbench.nodes.extract_lora import LoraWorkbenchExtractLora
from lora_workbench.nodes.host import loras
from lora_workbench.training.description import read

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", ["sdxl", "flux"])


@pytest.fixture
def folder(tmp_path, monkeypatch, comfyui):
    for name in ("loras", "checkpoints", "diffusion_models"):
        (tmp_path / name).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], {".safetensors"}))
        folder_paths.filename_list_cache.pop(name, None)
    return tmp_path


def extract(**changes):
    inputs = {"file": "none", "file_base": "none", "name": "back", "rank": 8, "energy": 1.0, "precision": "fp16"}
    return queueing.run(LoraWorkbenchExtractLora, **inputs | changes)


def error(path, tensors):
    """How far a file is from the LoRA it should be, relative to that."""
    found, wanted = layers_of(load_file(path)), layers_of(tensors)
    assert found.keys() == wanted.keys()
    apart = [(found[name].change() - layer.change()).norm().item() for name, layer in wanted.items()]
    return math.hypot(*apart) / math.hypot(*(layer.norm() for layer in wanted.values()))


@every_kind
@pytest.mark.parametrize("precision, most", [("fp16", 1e-3), ("fp32", 1e-5)])
def test_a_lora_on_loaded_models_comes_back_as_a_file_that_does_the_same(kind, precision, most, folder):
    model, clip, _ = queueing.shared_models(kind)
    tensors = loratoys.lora(model, clip, rank=3, alpha=1.5)
    patched, patched_clip = loras.apply(model, clip, tensors, 1.0, 1.0)
    given = {"model": patched, "model_base": model, "clip": patched_clip, "clip_base": clip}
    made = extract(**given, precision=precision)
    path = folder / "loras" / made["lora_name"]
    assert error(path, tensors) < most
    assert "rank 3, keeps 100 % of the difference" in made["report"]
    again, again_clip = loras.apply(model, clip, loras.read_lora(path), 1.0, 1.0)
    assert loratoys.apart(again, patched, model) < most
    assert loratoys.apart(again_clip.patcher, patched_clip.patcher, clip.patcher) < most
    assert read(path)["ss_base_model_version"] == {"sdxl": "sdxl_base_v1-0", "flux": "flux1"}[kind]


def checkpoint(folder, name, model, tensors, dtype):
    """A model's weights, with a LoRA in them, as Stability's and ComfyUI's checkpoints are saved."""
    layers, stored = layers_of(tensors), {}
    for key, weight in model.model.state_dict().items():
        layer = layers.get(
            f"lora_unet_{key.removeprefix('diffusion_model.').removesuffix('.weight').replace('.', '_')}"
        )
        weight = weight.float() + (layer.change().view_as(weight) if layer and key.endswith(".weight") else 0)
        stored[f"model.{key}"] = weight.to(dtype).contiguous()
    save_file(stored, folder / "checkpoints" / name)


@every_kind
@pytest.mark.parametrize("dtype, most", [(torch.float16, 1e-3), (torch.float8_e4m3fn, 0.15)])
def test_a_lora_between_two_files_comes_back(kind, dtype, most, folder):
    model = hosttoys.model(kind, storage=dtype, compute=torch.float32)
    tensors = loratoys.lora(model)
    checkpoint(folder, "base.safetensors", model, {}, dtype)
    checkpoint(folder, "tuned.safetensors", model, tensors, dtype)
    made = extract(file="checkpoints/tuned.safetensors", file_base="checkpoints/base.safetensors", precision="fp32")
    path = folder / "loras" / made["lora_name"]
    assert error(path, tensors) < most
    assert ("stored as float8_e4m3fn: about 26 % of the difference is rounding" in made["report"]) == (most > 0.1)
    assert read(path)["lora_workbench.extracted"] == "checkpoints/tuned.safetensors - checkpoints/base.safetensors"


def test_a_share_of_energy_gives_lower_ranks(folder):
    model = queueing.shared_models("sdxl")[0]
    patched, _ = loras.apply(model, None, loratoys.lora(model, rank=8), 1.0, 0.0)
    made = extract(model=patched, model_base=model, energy=0.6)
    ranks = {layer.rank for layer in layers_of(load_file(folder / "loras" / made["lora_name"])).values()}
    assert max(ranks) < 8 and len(ranks) > 1 and f"ranks {min(ranks)} to {max(ranks)}" in made["report"]
    said = float(made["report"].split("keeps ")[1].split(" %")[0]) / 100
    assert 0.6**0.5 <= said < 0.9


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "There is nothing to compare: connect model and model_base, or choose file and file_base"),
        ({"model": 1}, "Only one of model and model_base is given"),
        ({"clip_base": 1}, "Only one of clip and clip_base is given"),
        ({"file": "checkpoints/a.safetensors"}, "Only one of file and file_base is given"),
        ({"model": 1, "model_base": 1, "file": "checkpoints/a", "file_base": "checkpoints/a"}, "Both files and loaded"),
    ],
)
def test_half_a_pair_is_a_sentence(given, said, folder):
    with pytest.raises(ValueError, match=said):
        extract(**given)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints/../loras/a.safetensors",
        "loras/a.safetensors",
        "checkpoints//etc/passwd.safetensors",
        "checkpoints\\..\\a.safetensors",
        "checkpoints/a.ckpt",
        "checkpoints/gone.safetensors",
        "/etc/passwd",
        "checkpoints/a\0.safetensors",
        "checkpoints",
    ],
)
def test_names_from_a_workflow_reach_only_model_files(name, folder):
    save_file({"x.weight": torch.ones(1, 1)}, folder / "loras" / "a.safetensors")
    (folder / "checkpoints" / "a.ckpt").write_bytes(b"")
    assert "is not in the checkpoints or diffusion_models folder" in LoraWorkbenchExtractLora.validate_inputs(file=name)
    with pytest.raises(ValueError, match="is not in the checkpoints or diffusion_models folder"):
        extract(file=name, file_base=name)


def test_model_files_are_listed_with_their_folder(folder):
    (folder / "checkpoints" / "old").mkdir()
    for name in ("checkpoints/old/a.safetensors", "diffusion_models/b.safetensors"):
        save_file({"x.weight": torch.ones(1, 1)}, folder / name)
    inputs = {entry.id: entry for entry in LoraWorkbenchExtractLora.define_schema().inputs}
    listed = [name.replace("\\", "/") for name in inputs["file"].options]
    assert listed == ["none", "checkpoints/old/a.safetensors", "diffusion_models/b.safetensors"]
    assert LoraWorkbenchExtractLora.validate_inputs(file=listed[1], file_base=listed[2]) is True


def test_the_patched_model_keeps_its_weights(folder):
    model = queueing.shared_models("sdxl")[0]
    patched, _ = loras.apply(model, None, loratoys.lora(model), 1.0, 0.0)
    before = queueing.portrait(model)
    extract(model=patched, model_base=model)
    assert queueing.portrait(model) == before


def test_what_is_written_into_pictures_says_nothing_of_where_the_files_lie(folder):
    (folder / "checkpoints" / "some.safetensors").write_bytes(b"anything")
    clone = LoraWorkbenchExtractLora.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "1"}})
    told = clone.fingerprint_inputs(file="checkpoints/some.safetensors", file_base="none")
    assert "checkpoints/some.safetensors" in str(told) and str(folder) not in str(told)
    (folder / "checkpoints" / "some.safetensors").write_bytes(b"anything else")
    assert clone.fingerprint_inputs(file="checkpoints/some.safetensors", file_base="none") != told
