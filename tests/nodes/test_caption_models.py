"""Local caption models in a real ComfyUI: found where they are kept, loaded by its manager, and gone afterwards."""

import gc
import shutil
import time
import weakref

import comfy.model_management as mm
import folder_paths
import pytest
import queueing
import tiny_taggers
import tiny_vlms
import torch
from PIL import Image

from lora_workbench.captioning import local_model
from lora_workbench.captioning.captioner import Answer
from lora_workbench.nodes.host import caption_models
from lora_workbench.nodes.host.caption_models import ManagedCaptioner

pytestmark = pytest.mark.comfy
KEPT_BY_TRANSFORMERS = 24
"""Bytes: the mean and the deviation of three colours, in a cache of the picture processors that is bounded."""
RED, BLUE = Image.new("RGB", (64, 48), "red"), Image.new("RGB", (30, 40), "blue")


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_model, "LONGEST_CAPTION_TOKENS", 6)
        yield


@pytest.fixture(scope="module")
def models(host_folder):
    """ComfyUI's models/LLM with a chat model, a BLIP and a tagger."""
    folder = host_folder / "models" / "LLM"
    tiny_vlms.write_llava(folder / "Joy" / "tiny-llava")
    tiny_vlms.write_blip(folder / "tiny-blip")
    tiny_taggers.write_tags(folder / "tiny-wd" / "selected_tags.csv")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def nothing_loaded(comfyui):
    mm.unload_all_models()
    mm.interrupt_current_processing(False)
    yield
    mm.interrupt_current_processing(False)


def tensor_bytes() -> int:
    """How much the tensors in this process hold, on the CPU and on the GPU."""
    gc.collect()
    tensors = (found for found in gc.get_objects() if isinstance(found, torch.Tensor))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def once(name: str) -> None:
    """Open a model, use it and close it."""
    captioner = caption_models.opened(name)
    captioner.caption([RED], "Describe this picture.")
    captioner.close()


def test_models_are_found_where_people_keep_them(models, host_folder):
    tagger = host_folder / "custom_nodes" / "ComfyUI-WD14-Tagger" / "models"
    tiny_taggers.write_tags(tagger / "wd-v1-4-moat.csv")
    (tagger / "wd-v1-4-moat.onnx").write_bytes(b"")
    before = {name: list(paths) for name, (paths, _) in folder_paths.folder_names_and_paths.items()}
    try:
        assert caption_models.names() == ["Joy/tiny-llava", "tiny-blip", "tiny-wd", "wd-v1-4-moat.onnx"]
    finally:
        shutil.rmtree(tagger.parent)
    assert {name: list(paths) for name, (paths, _) in folder_paths.folder_names_and_paths.items()} == before


def test_a_folder_that_another_pack_or_a_yaml_registered_is_looked_at_too(models, tmp_path, monkeypatch):
    tiny_taggers.write_tags(tmp_path / "elsewhere" / "selected_tags.csv")
    tiny_taggers.write_tags(tmp_path / "tiny-blip" / "selected_tags.csv")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "LLM", ([str(tmp_path)], set()))
    assert caption_models.names() == ["elsewhere", "Joy/tiny-llava", "tiny-blip", "tiny-wd"]


@pytest.mark.parametrize("name", ["gone", "../LLM/tiny-blip", "/etc", ""])
def test_only_a_model_that_is_listed_can_be_opened(name, models):
    with pytest.raises(ValueError, match=r"The caption model .* is not there. Put it into .*LLM"):
        caption_models.opened(name)


def test_nothing_is_fetched_unless_the_user_wishes_it(models, monkeypatch):
    asked = []

    def fetch(download, folder, checkpoint):
        asked.append((download.repository, folder))
        return tiny_taggers.write_onnx_folder(folder / download.name)

    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(caption_models, "fetch", fetch)
    label = next(label for label in caption_models.offered() if "wd-vit-tagger-v3" in label)
    with pytest.raises(
        ValueError, match=r"'wd-vit-tagger-v3' is not there\. Allow the download of SmilingWolf/.*apache"
    ):
        caption_models.opened(label)
    assert asked == []
    for _ in range(2):  # the second time it is there
        assert caption_models.opened(label, fetch_missing=True).caption([RED], "")[0].text
    assert asked == [("SmilingWolf/wd-vit-tagger-v3", models)]
    assert caption_models.opened(label).writes_tags
    shutil.rmtree(models / "wd-vit-tagger-v3")


@pytest.mark.parametrize("name", ["Joy/tiny-llava", "tiny-blip"])
def test_a_model_is_loaded_by_the_memory_manager_and_gone_afterwards(name, models):
    once(name)  # what transformers keeps for good is there now
    before, loaded = tensor_bytes(), len(mm.current_loaded_models)
    gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    captioner = caption_models.opened(name)
    network = weakref.ref(captioner._captioner.network)
    answers = captioner.caption([RED, BLUE], "Describe this picture.")
    assert all(answer.text for answer in answers) and len(mm.current_loaded_models) == loaded + 1
    assert network().device.type == mm.get_torch_device().type and tensor_bytes() > before
    del answers
    captioner.close()
    assert network() is None
    assert len(mm.current_loaded_models) == loaded
    assert tensor_bytes() <= before + KEPT_BY_TRANSFORMERS
    assert (torch.cuda.memory_allocated() if torch.cuda.is_available() else 0) <= gpu


def test_a_model_that_comfyui_unloaded_meanwhile_goes_on(models):
    captioner = caption_models.opened("Joy/tiny-llava")
    first = captioner.caption([RED], "Describe this picture.")
    mm.unload_all_models()
    assert captioner.caption([RED], "Describe this picture.") == first
    captioner.close()


def test_cancel_works_while_a_model_writes(models):
    captioner = caption_models.opened("Joy/tiny-llava")
    queueing.interrupt()
    with pytest.raises(mm.InterruptProcessingException):
        captioner.caption([RED], "Describe this picture.")
    captioner.close()


class _Narrow:
    """A captioner with room for two pictures."""

    batch_size, writes_tags, follows_instructions, network = 8, False, True, None

    def __init__(self):
        self.asked = []

    def caption(self, images, instruction):
        self.asked.append(len(images))
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return [Answer(f"{image.width} wide") for image in images]

    def close(self):
        pass


def test_a_batch_that_does_not_fit_is_halved_and_so_are_those_after_it():
    narrow = _Narrow()
    captioner = ManagedCaptioner(narrow)
    pictures = [Image.new("RGB", (number + 1, 1)) for number in range(7)]
    assert [answer.text for answer in captioner.caption(pictures, "")] == [f"{n + 1} wide" for n in range(7)]
    assert captioner.batch_size == 2 and narrow.asked[:3] == [7, 4, 2]


def test_a_picture_that_does_not_fit_alone_is_an_error():
    narrow = _Narrow()
    narrow.caption = lambda images, instruction: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        ManagedCaptioner(narrow).caption([RED], "")


def test_waiting_for_a_server_ends_when_cancel_is_pressed(comfyui):
    started = time.monotonic()
    queueing.interrupt()
    with pytest.raises(mm.InterruptProcessingException):
        caption_models.server("http://localhost:1", "toy", "")._wait(30)
    assert time.monotonic() - started < 5
    caption_models.wait(0.01)
