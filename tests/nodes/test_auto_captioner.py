"""LoRA Auto-Captioner, with a tiny random Qwen3-VL out of ComfyUI's own classes: its words are noise."""

import shutil

import comfy.model_management as mm
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.qwen3vl as qwen3vl
import pictures
import pytest
import queueing
import tiny_vlms
import torch
from captioners import Telling
from PIL import Image

from lora_workbench.captioning import asking, local_model
from lora_workbench.captioning.captioner import Answer
from lora_workbench.captioning.server import ServerCaptioner
from lora_workbench.nodes import auto_captioner
from lora_workbench.nodes.auto_captioner import LoraWorkbenchAutoCaptioner
from lora_workbench.nodes.host import caption_models, captions
from lora_workbench.training.dataset import REGULARIZATION, joined
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


def write(folder, trigger_word="zork", clip=None, dataset=None, **changes):
    dataset = dataset or scan(folder, trigger_word=trigger_word, hold_out=1)
    inputs = {"captioner": "trigger word only", "style": "automatic", "mode": "only missing", "clip": clip, **changes}
    return queueing.run(LoraWorkbenchAutoCaptioner, dataset=dataset, **inputs)


def files(folder):
    """The caption files with their time of change and content."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.txt")}


def words_in(picture):
    """The caption file of a picture without the trigger word."""
    return picture.with_suffix(".txt").read_text("utf-8").strip().removeprefix("zork, ")


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
    report = write(folder, dataset=dataset)["report"]
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
    assert write(folder)["report"] == "1 written, 2 kept (automatic), 0 kept (yours), 0 failed"


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
        assert example.caption.removeprefix("zork, ") == words_in(example.path)


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
    monkeypatch.setattr(asking, "LONGEST_SIDE", 128)
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


@pytest.fixture
def answering(vision_language, monkeypatch):
    """The vision-language model, its answers replaced by known ones; remembers what it was asked."""
    asked = []

    def generator_of(clip):
        assert clip is vision_language
        return lambda picture, instruction: asked.append(instruction) or "A woman, snow, a woman"

    monkeypatch.setattr(captions, "generator_of", generator_of)
    return asked


def describe(folder, clip, **changes):
    return write(folder, captioner="connected clip", clip=clip, **changes)


@pytest.mark.parametrize(
    "style, base, asked_for",
    [
        ("automatic", None, "short paragraph"),
        ("automatic", "sdxl", "comma-separated"),
        ("automatic", "flux", "short paragraph"),
        ("sentences", "sdxl", "short paragraph"),
        ("tags", "flux", "comma-separated"),
    ],
)
def test_the_style_or_the_clip_of_the_base_model_decides_what_is_asked(
    style, base, asked_for, folder, vision_language, answering
):
    base_clip = queueing.shared_models(base)[1] if base else None
    describe(folder, vision_language, style=style, base_clip=base_clip)
    assert len(answering) == 3 and all(asked_for in instruction for instruction in answering)
    is_tags = asked_for == "comma-separated"
    assert (folder / "1.txt").read_text() == ("zork, A woman, snow\n" if is_tags else "zork, A woman, snow, a woman\n")


def test_purpose_and_class_decide_what_is_asked_and_where_the_trigger_word_goes(folder, vision_language, answering):
    describe(folder, vision_language, purpose="person", class_word="woman", prefix="photo of", exclude="film grain")
    assert all("Call the person 'woman'" in instruction for instruction in answering)
    assert (folder / "1.txt").read_text() == "photo of zork woman, snow, a woman\n"


def test_own_words_are_asked_instead(folder, vision_language, answering):
    describe(folder, vision_language, instruction="Which animals are there?")
    assert set(answering) == {"Which animals are there?"}


def test_a_second_run_asks_nothing_whatever_the_mode_and_other_settings_ask_again(folder, vision_language, answering):
    for mode in ("replace everything", "replace automatic", "add after", "only missing"):
        describe(folder, vision_language, mode=mode)
    assert len(answering) == 3
    assert describe(folder, vision_language, mode="replace automatic", purpose="place")["report"].startswith(
        "0 written"
    )
    assert len(answering) == 6


def test_captions_of_a_model_can_be_replaced_and_yours_are_not(folder, vision_language, answering):
    (folder / "2.txt").write_text("mine")
    write(folder)
    assert describe(folder, vision_language, mode="replace automatic")["report"].startswith("2 written, 1 kept (yours)")
    assert (folder / "2.txt").read_text() == "mine"
    assert {path.name for path in (folder / ".caption_backups").glob("*/*.txt")} == {"1.txt", "3.txt"}


def test_file_names_become_captions(folder):
    (folder / "1.png").rename(folder / "red_fox-02.png")
    (folder / "2.png").rename(folder / "a woman_007.png")
    report = write(folder, captioner="file name", class_word="woman")["report"]
    assert report == "2 written, 0 kept (yours), 1 failed: 3.png: its name has no words"
    assert (folder / "red_fox-02.txt").read_text() == "zork woman, red fox\n"
    assert (folder / "a woman_007.txt").read_text() == "zork woman\n"


def test_each_concept_has_its_own_words_and_regularization_pictures_have_no_trigger_word(tmp_path):
    concept, others = tmp_path / "concept" / "5_zork star", tmp_path / "others" / "1_star"
    pictures.draw(concept / "a.png"), pictures.draw(others / "b.png")
    scanned = [scan(concept.parent, trigger_word="zork", hold_out=0), scan(others.parent, role=REGULARIZATION)]
    write(tmp_path, dataset=joined(scanned))
    assert (concept / "a.txt").read_text() == "zork star\n"
    assert (others / "b.txt").read_text() == "star\n"


def test_a_caption_in_a_table_is_yours(folder):
    (folder / "metadata.csv").write_text("file_name,caption\n1.png,from the table\n")
    assert write(folder)["report"] == "2 written, 1 kept (yours), 0 failed"
    assert not (folder / "1.txt").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"replace": "a b"}, "replace: 'a b' is not of the form"),
        ({"exclude": "/(a+)+/"}, "exclude: /.* cannot be used"),
    ],
)
def test_a_list_that_is_typed_wrong_is_named_before_anything_is_written(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        write(folder, **changes)
    assert files(folder) == {}


# Local models, servers and hints


@pytest.fixture
def local(monkeypatch):
    """Local models by name, each of which remembers whether it was opened and closed."""
    models = {
        "tagger": Telling("long_hair, 1girl, ^_^", batch_size=2, writes_tags=True, follows_instructions=False),
        "chat": Telling("This image shows a woman."),
        "blip": Telling("a woman", follows_instructions=False),
    }
    monkeypatch.setattr(caption_models, "names", lambda: list(models))
    monkeypatch.setattr(caption_models, "opened", lambda name, **_: models[name])
    return models


def test_what_is_painted_over_is_not_described(folder, local):
    """It looks at the pictures as training does, and again when that changes."""
    halves = Image.new("RGB", (64, 48), "red")
    halves.paste("blue", (32, 0, 64, 48))
    halves.save(folder / "1.png")
    mask = Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    mask.save(folder / "1_mask.png")
    for fill_masked, seen in ((False, [(0, 0, 255)]), (True, [(255, 0, 0)]), (True, [])):
        dataset = scan(folder, trigger_word="zork", resolution=64, hold_out=0, fill_masked=fill_masked)
        write(folder, dataset=dataset, captioner="local model", local_model="chat", mode="replace automatic")
        halved = [image for image in local["chat"].shown if image.getpixel((5, 20)) == (255, 0, 0)]
        assert [image.getpixel((60, 20)) for image in halved] == seen
        local["chat"].shown.clear()


def test_a_tagger_writes_tags_whatever_the_style_and_the_report_says_so(folder, local):
    result = write(folder, captioner="local model", local_model="tagger", style="sentences", keep_first="1girl")
    assert (folder / "1.txt").read_text() == "zork, 1girl, long hair, ^_^\n"
    first, remark = result["report"].splitlines()
    assert first == "3 written, 0 kept (yours), 0 failed" and remark.startswith("This model writes tags")
    assert [size for size, _ in local["tagger"].batches] == [1, 2] and local["tagger"].closed == 1


def test_a_model_that_cannot_be_told_what_to_leave_out_is_named(folder, local):
    report = write(folder, captioner="local model", local_model="blip", purpose="person")["report"]
    assert "This model cannot be told what to leave out" in report


def test_tags_are_hints_for_another_model(folder, local):
    write(folder, captioner="local model", local_model="chat", hints="tagger")
    assert (folder / "1.txt").read_text() == "zork, A woman.\n"
    assert all("long_hair, 1girl, ^_^" in question for _, question in local["chat"].batches)
    assert local["tagger"].closed == local["chat"].closed == 1


def test_no_model_is_opened_when_there_is_nothing_to_do(folder, local, monkeypatch):
    write(folder)
    monkeypatch.setattr(caption_models, "opened", pytest.fail)
    report = write(folder, captioner="local model", local_model="chat", hints="tagger")["report"]
    assert report == "0 written, 3 kept (automatic), 0 kept (yours), 0 failed"


def test_a_tiny_model_out_of_models_llm_captions_a_folder(folder, host_folder, monkeypatch):
    monkeypatch.setattr(local_model, "LONGEST_CAPTION_TOKENS", 6)
    model = tiny_vlms.write_blip(host_folder / "models" / "LLM" / "tiny-blip")
    try:
        report = write(folder, captioner="local model", local_model="tiny-blip")["report"]
    finally:
        shutil.rmtree(model)
    assert report == "3 written, 0 kept (yours), 0 failed"
    assert all(content.startswith(b"zork, ") for _, content in files(folder).values())


def test_no_local_model_is_refused(folder):
    with pytest.raises(ValueError, match="local_model is 'none': choose one, or copy its folder into .*LLM"):
        write(folder, captioner="local model")


def test_there_is_a_choice_of_local_models_and_of_those_to_download_with_licence_and_size(local):
    combos = {entry.id: entry for entry in LoraWorkbenchAutoCaptioner.GET_SCHEMA().inputs}
    options = combos["local_model"].options
    assert options == combos["hints"].options and options[:4] == ["none", "tagger", "chat", "blip"]
    assert options[4:] and all(" GB)" in option and "(" in option for option in options[4:])


@pytest.mark.parametrize("allowed", [{}, {"allow_download": False}, {"allow_download": True}])
def test_nothing_is_downloaded_unless_it_is_allowed(folder, local, monkeypatch, allowed):
    fetching = []

    def opened(name, fetch_missing):
        fetching.append(fetch_missing)
        return local[name]

    monkeypatch.setattr(caption_models, "opened", opened)
    write(folder, captioner="local model", local_model="chat", hints="tagger", **allowed)
    assert fetching == [allowed.get("allow_download", False)] * 2


def test_a_server_writes_captions_and_what_leaves_the_machine_is_said(folder, monkeypatch):
    asked = []

    def answer(server, images, instruction):
        asked.append(instruction)
        return [Answer("A woman.") for _ in images]

    monkeypatch.setattr(ServerCaptioner, "caption", answer)
    monkeypatch.setenv("CAPTION_KEY", "secret")
    server = {"captioner": "server", "server_model": "some-model", "key_variable": "CAPTION_KEY"}
    report = write(folder, server_address="https://example.com/v1", class_word="woman", **server)["report"]
    assert (folder / "1.txt").read_text() == "zork woman.\n"
    assert "example.com" in report and "secret" not in report
    assert "\n" not in write(folder, mode="replace automatic", **server)["report"]
    assert len(asked) == 6


def test_a_server_without_a_model_is_refused(folder):
    with pytest.raises(ValueError, match="No model is named for the captioning server"):
        write(folder, captioner="server")


def test_pictures_that_share_a_caption_file_are_trained_as_it_says(folder):
    pictures.draw(folder / "1.jpg", (64, 48), "red")
    result = queueing.run(
        LoraWorkbenchAutoCaptioner,
        dataset=scan(folder, trigger_word="zork"),
        captioner="trigger word only",
        style="sentences",
        mode="only missing",
        class_word="star",
    )
    assert {e.caption for e in result["dataset"].examples} == {"zork star"}
    assert result["dataset"].uncaptioned == ()
