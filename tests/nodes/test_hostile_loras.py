"""Every node that reads a LoRA file, given files that nobody should have made: a sentence, and nothing is touched."""

import time
from types import SimpleNamespace

import folder_paths
import hostilefiles
import oddfiles
import pytest
import queueing
import torch

from lora_workbench.nodes.convert_lora import FORMS, LoraWorkbenchConvertLora
from lora_workbench.nodes.inspect_lora import LoraWorkbenchInspectLora
from lora_workbench.nodes.merge_loras import LoraWorkbenchMergeLoras
from lora_workbench.nodes.resize_lora import LoraWorkbenchResizeLora
from lora_workbench.nodes.stack_apply import LoraWorkbenchStackApply

pytestmark = pytest.mark.comfy
LONGEST_WAIT = 20.0  # seconds for one file; measured: below 1
ODD = 60


@pytest.fixture
def folder(tmp_path, monkeypatch, comfyui):
    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    (tmp_path / "outside").write_text("as it was")
    return folder


def run(node, *args, **given):
    """What the node answers, as ComfyUI calls it."""
    called = type(node.__name__, (node,), {"hidden": SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None)})
    with torch.inference_mode():
        return called.execute(*args, **given).args


def inspect(name):
    return run(LoraWorkbenchInspectLora, name, False)


def convert(name, form="diffusers", alpha="keep"):
    return run(LoraWorkbenchConvertLora, name, "new", form, alpha, "as it is")


def resize(name):
    settings = {"by": "rank", "rank": 1, "energy": 0.9, "ratio": 0.1, "precision": "as it is"}
    return run(LoraWorkbenchResizeLora, name, "new", **settings)


def merge(name, method="concatenate"):
    settings = {"method": method, "rank": 1, "density": 0.5, "seed": 0, "precision": "as it is"}
    return run(LoraWorkbenchMergeLoras, "new", **settings, lora_1=name, lora_2=name, weight_1=1.0, weight_2=1.0)


def stack(name):
    model, clip, _ = queueing.shared_models("flux")
    return run(LoraWorkbenchStackApply, model, clip, lora_stack=[(name, 1.0, 1.0)])


NODES = (inspect, convert, resize, merge, stack)


@pytest.mark.parametrize("use", NODES, ids=lambda use: use.__name__)
def test_a_thousand_hostile_files_are_a_sentence_each_in_every_node(folder, use):
    files = hostilefiles.files()
    for number, (_, data) in enumerate(files):
        (folder / f"{number}.safetensors").write_bytes(data)
    before = hostilefiles.digest_of(folder)
    for number, (kind, _) in enumerate(files):
        if kind == "not_finite" and use is inspect:
            use(f"{number}.safetensors")  # it lists such values
            continue
        start = time.perf_counter()
        with pytest.raises(ValueError, match=rf"'{number}\.safetensors'"):
            use(f"{number}.safetensors")
        assert time.perf_counter() - start < LONGEST_WAIT, kind
    assert hostilefiles.digest_of(folder) == before
    assert (folder.parent / "outside").read_text() == "as it was"


@pytest.mark.parametrize("use", NODES, ids=lambda use: use.__name__)
def test_files_that_make_no_sense_are_used_or_refused_in_a_sentence(folder, use):
    answers = {True: 0, False: 0}
    for number, data in enumerate(oddfiles.odd_files(ODD)):
        path = folder / f"odd_{number}.safetensors"
        path.write_bytes(data)
        start = time.perf_counter()
        try:
            use(path.name)
            answers[True] += 1
        except ValueError as error:
            assert str(error).isprintable() and str(error).endswith(".") and len(str(error)) < 1000
            answers[False] += 1
        assert time.perf_counter() - start < LONGEST_WAIT
        assert path.read_bytes() == data
    assert answers[use in (inspect, stack)]
    assert (folder.parent / "outside").read_text() == "as it was"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", ["keep", "fold"])
def test_every_conversion_answers_files_that_make_no_sense(folder, form, alpha):
    for number, data in enumerate(oddfiles.odd_files(30)):
        (folder / f"odd_{number}.safetensors").write_bytes(data)
        try:
            convert(f"odd_{number}.safetensors", form, alpha)
        except ValueError as error:
            assert str(error).endswith(".")
