"""LoRA Auto-Captioner, with a tiny random Qwen3-VL out of ComfyUI's own classes: its words are noise."""

import comfy.model_management as mm
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.qwen3vl as qwen3vl
import pictures
import pytest
import queueing
import torch
from PIL import Image

from lora_workbench.nodes import auto_captioner
from lora_workbench.nodes.auto_captioner import LoraWorkbenchAutoCaptioner
from lora_workbench.nodes.host import captions
from lora_workbench.training.folder import scan

pytestmark = pytest.mark.comfy
VISION = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "deepstack_visual_indexes": [0, 1], "num_heads": 2}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def vision_language(comfyui):
    """A CLIP, as Load CLIP gives it for a Qwen3-VL, with random weights that make it look at the picture."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_4b", VISION)
        target = comfy.supported_models_base.ClipTarget(
            qwen3vl.tokenizer("qwen3vl_4b"), qwen3vl.te(model_type="qwen3vl_4b")
        )
        options = {"dtype": torch.float32, "load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
        clip = comfy.sd.CLIP(target, model_options={**options, "qwen3vl_4b_model_config": TEXT})
        random = torch.Generator().manual_seed(3)
        for weight in clip.cond_stage_model.parameters():
            drawn = torch.randn(weight.shape, generator=random)
            weight.copy_(drawn * 0.3 if weight.ndim > 1 else 1 + 0.1 * drawn)
        return clip


@pytest.fixture
def folder(tmp_path, comfyui):
    for name, colour in (("1.png", "red"), ("2.png", "blue"), ("3.png", "green")):
        pictures.draw(tmp_path / name, (64, 48), colour)
    return tmp_path


def write(folder, trigger_word="zork", captioner="trigger word only", clip=None, style="automatic"):
    dataset = scan(folder, trigger_word=trigger_word, hold_out=1)
    inputs = {"captioner": captioner, "style": style, "mode": "only missing", "clip": clip}
    return queueing.run(LoraWorkbenchAutoCaptioner, dataset=dataset, **inputs)


def files(folder):
    """The caption files with their time of change and content."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.txt")}


def answer(clip, colour, size=(64, 48)):
    return captions.generator_of(clip)(Image.new("RGB", size, colour), "Describe this picture.")


# Trigger word only


def test_missing_captions_are_written_and_reach_the_dataset(folder):
    (folder / "2.txt").write_text("zork on a table")
    before = files(folder)
    result = write(folder)
    assert result["report"] == "2 written, 1 kept (yours), 0 failed"
    assert files(folder).pop("2.txt") == before["2.txt"]
    assert (folder / "1.txt").read_text() == (folder / "3.txt").read_text() == "zork\n"
    known = {e.path.name: e.caption for e in (*result["dataset"].examples, *result["dataset"].held_out)}
    assert known == {"1.png": "zork", "2.png": "zork on a table", "3.png": "zork"}
    assert result["dataset"].uncaptioned == () and result["dataset"].notes == scan(folder).notes


def test_a_folder_with_all_captions_needs_no_trigger_word_and_is_not_touched(folder):
    for number in range(1, 4):
        (folder / f"{number}.txt").write_bytes(b"\xef\xbb\xbfmy own words  \r\n")
    before = files(folder)
    result = write(folder, trigger_word="")
    assert result["report"] == "0 written, 3 kept (yours), 0 failed"
    assert files(folder) == before
    assert {example.caption for example in result["dataset"].examples} == {"my own words"}


def test_without_a_trigger_word_it_says_what_to_do(folder):
    result = write(folder, trigger_word="")
    assert "0 written, 0 kept (yours), 3 failed" in result["report"]
    assert "there is no trigger word" in result["report"] and "LoRA Dataset Loader" in result["report"]
    assert files(folder) == {}
    assert len(result["dataset"].uncaptioned) == 3


def test_a_picture_that_vanished_does_not_stop_the_others(folder):
    dataset = scan(folder, trigger_word="zork", hold_out=0)
    (folder / "1.png").unlink()
    inputs = {"captioner": "trigger word only", "style": "automatic", "mode": "only missing"}
    report = queueing.run(LoraWorkbenchAutoCaptioner, dataset=dataset, **inputs)["report"]
    assert report.startswith("2 written, 0 kept (yours), 1 failed: 1.png: cannot be read as a picture")


def test_cancel_keeps_what_is_done(folder, monkeypatch):
    done = []

    def cancel_after_the_second():
        done.append(None)
        if len(done) == 2:
            queueing.interrupt()
        mm.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(auto_captioner, "throw_if_cancelled", cancel_after_the_second)
    with pytest.raises(mm.InterruptProcessingException):
        write(folder)
    assert len(files(folder)) == 2
    assert write(folder)["report"] == "1 written, 2 kept (yours), 0 failed"


# A connected CLIP


def test_a_vision_language_model_captions_a_folder(folder, vision_language, monkeypatch):
    monkeypatch.setattr(captions, "LONGEST_CAPTION_TOKENS", 6)
    (folder / "2.txt").write_text("mine")
    before = files(folder)
    result = write(folder, captioner="connected clip", clip=vision_language)
    assert result["report"].startswith("2 written, 1 kept (yours), 0 failed")
    written = files(folder)
    assert written.pop("2.txt") == before["2.txt"]
    for example in (*result["dataset"].examples, *result["dataset"].held_out):
        assert example.caption.startswith("zork, ")
        assert example.caption.removeprefix("zork, ") == example.path.with_suffix(".txt").read_text("utf-8").strip()


def test_its_answer_is_the_one_of_the_generate_text_node(vision_language, monkeypatch):
    from comfy_extras.nodes_textgen import TextGenerate

    from lora_workbench.nodes.pictures import to_image

    monkeypatch.setattr(captions, "LONGEST_CAPTION_TOKENS", 8)
    picture = Image.new("RGB", (64, 48), "red")
    with torch.inference_mode():
        expected = TextGenerate.execute(
            vision_language, "Describe this picture.", 8, {"sampling_mode": "off"}, image=to_image(picture)
        ).args[0]
    assert answer(vision_language, "red") == expected


def test_the_same_picture_gets_the_same_words_and_another_one_others(vision_language, monkeypatch):
    monkeypatch.setattr(captions, "LONGEST_CAPTION_TOKENS", 8)
    red = answer(vision_language, "red")
    assert isinstance(red, str) and red
    assert answer(vision_language, "red") == red
    assert answer(vision_language, "blue") != red


def test_large_pictures_are_shrunk_before_they_are_read(vision_language, monkeypatch):
    seen, real = [], captions.to_image
    monkeypatch.setattr(captions, "LONGEST_CAPTION_TOKENS", 1)
    monkeypatch.setattr(captions, "LONGEST_SIDE", 128)
    monkeypatch.setattr(captions, "to_image", lambda picture: seen.append(picture.size) or real(picture))
    answer(vision_language, "red", (512, 256))
    assert seen[-1] == (128, 64)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_the_clip_of_an_image_model_is_refused(kind, folder):
    with pytest.raises(
        ValueError, match="only encodes text and cannot describe pictures: load a vision-language model"
    ):
        write(folder, captioner="connected clip", clip=queueing.shared_models(kind)[1])
    assert files(folder) == {}


def test_a_model_that_writes_but_cannot_see_is_refused(vision_language, monkeypatch):
    blind = lambda text, **_: {"qwen3vl_4b": [[(1, 1.0), (2, 1.0)]]}  # noqa: E731
    monkeypatch.setattr(vision_language, "tokenize", blind)
    with pytest.raises(ValueError, match="writes text but cannot look at pictures"):
        captions.generator_of(vision_language)


def test_no_clip_is_refused(folder):
    with pytest.raises(ValueError, match="no clip is connected: connect a vision-language model"):
        write(folder, captioner="connected clip")


@pytest.mark.parametrize(
    "style, asked_for",
    [("automatic", "short paragraph"), ("sentences", "short paragraph"), ("tags", "comma-separated")],
)
def test_the_style_decides_what_is_asked(style, asked_for, folder, monkeypatch):
    asked = []

    def generator_of(clip):
        return lambda picture, instruction: asked.append(instruction) or "fox, snow, fox"

    monkeypatch.setattr(captions, "generator_of", generator_of)
    write(folder, captioner="connected clip", clip=object(), style=style)
    assert len(asked) == 3 and all(asked_for in instruction for instruction in asked)
    assert (folder / "1.txt").read_text().strip() == ("fox, snow" if style == "tags" else "fox, snow, fox")
