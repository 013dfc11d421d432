"""Local caption models of every kind, tiny and random, each opened from a folder and asked."""

import os
import pickle
import shutil
import socket

import numpy as np
import pytest
import tiny_taggers
import tiny_vlms
import torch
from PIL import Image

from lora_workbench.captioning import local_model
from lora_workbench.captioning.opening import find_models, kind_of, open_local

pytest.importorskip("transformers")
CHATS = ("qwen3_vl", "qwen25_vl", "llava", "gemma3")
KINDS = (*CHATS, "florence", "blip", "blip2")
PICTURES = [
    Image.new("RGB", (64, 48), "red"),
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (70, 50, 3), dtype=np.uint8)),
    Image.new("RGB", (40, 40), "blue"),
]
JOYCAPTION = (
    "{% for message in messages %}{{ '<|user|>' }}{% if loop.first %}{{ '<image>' }}{% endif %}"
    "{{ message['content'] | trim }}{% endfor %}{{ '<|answer|>' }}"
)


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_model, "LONGEST_CAPTION_TOKENS", 8)
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"a connection to {address} was opened")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """kind -> its model folder, written when it is first asked for."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            made[kind] = getattr(tiny_vlms, f"write_{kind}")(tmp_path_factory.mktemp("models") / kind)
        return made[kind]

    return folder_of


@pytest.fixture(scope="module")
def captioner_of(folder_of):
    """kind -> its captioner, opened when it is first asked for."""
    opened = {}
    return lambda kind: (
        opened.setdefault(kind, None) or opened.update({kind: open_local(folder_of(kind))}) or opened[kind]
    )


@pytest.fixture
def copy_of(folder_of, tmp_path):
    """kind -> a model folder of that kind that the test may spoil."""
    return lambda kind: shutil.copytree(folder_of(kind), tmp_path / kind)


def ask(captioner, pictures=PICTURES, instruction="Describe this picture."):
    answers = captioner.caption(pictures, instruction)
    assert not any(answer.error for answer in answers)
    return [answer.text for answer in answers]


# Every kind


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_captioned_the_same_alone_and_in_a_batch(kind, captioner_of):
    captioner = captioner_of(kind)
    together = ask(captioner)
    assert len(together) == 3 and all(together) and len(set(together)) > 1
    assert together == [ask(captioner, [picture])[0] for picture in PICTURES]
    assert captioner.batch_size > 1 and not captioner.writes_tags


@pytest.mark.parametrize("kind", KINDS)
def test_an_instruction_is_followed_where_that_is_promised(kind, captioner_of):
    captioner = captioner_of(kind)
    assert captioner.follows_instructions == (kind in CHATS)
    assert (ask(captioner) != ask(captioner, instruction="What is it?")) == captioner.follows_instructions


@pytest.mark.parametrize("kind", KINDS)
def test_captions_neither_change_nor_depend_on_random_numbers(kind, folder_of):
    said = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        said.append(ask(open_local(folder_of(kind)), PICTURES[:1]))
        assert torch.equal(before, torch.get_rng_state())
    assert said[0] == said[1]


def test_a_model_that_is_closed_holds_no_network(folder_of):
    captioner = open_local(folder_of("blip"))
    captioner.close()
    assert captioner.network is None


def test_weights_are_in_the_data_type_that_is_asked_for(folder_of):
    captioner = open_local(folder_of("llava"), torch.bfloat16)
    assert {parameter.dtype for parameter in captioner.network.parameters()} == {torch.bfloat16}
    assert all(ask(captioner))


@pytest.mark.parametrize("version, name", [("4.50.3", "torch_dtype"), ("4.56.0", "dtype"), ("5.23.0", "dtype")])
def test_the_data_type_has_its_name_in_each_transformers(version, name):
    assert local_model.dtype_argument(version) == name


# Chat models


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen25_vl"])
def test_padding_at_the_right_would_spoil_a_batch(kind, captioner_of, monkeypatch):
    """Shows that the test of batches above is one: with the padding that a folder is loaded with, it fails."""
    captioner = captioner_of(kind)
    alone = [ask(captioner, [picture])[0] for picture in PICTURES]
    monkeypatch.setattr(captioner._processor.tokenizer, "padding_side", "right")
    assert ask(captioner) != alone


def test_a_template_that_places_the_picture_by_itself_is_given_text_alone(tmp_path):
    folder = tiny_vlms.write_llava(tmp_path / "joycaption", JOYCAPTION)
    captioner = open_local(folder)
    assert captioner._question("Describe it.") == "<|user|><image>Describe it.<|answer|>"
    assert all(ask(captioner))


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_a_text_begins_once(kind, captioner_of, monkeypatch):
    from lora_workbench.captioning import chat_model

    captioner, seen = captioner_of(kind), []
    monkeypatch.setattr(chat_model, "generate", lambda network, inputs: seen.append(inputs) or inputs["input_ids"])
    ask(captioner, PICTURES[:1])
    tokenizer = captioner._processor.tokenizer
    assert (seen[0]["input_ids"] == tokenizer.bos_token_id).sum() == (kind == "gemma3")  # Llava's template has none


@pytest.mark.parametrize(
    "template, error",
    [("", "has no chat template"), ("{{ messages[0]['role'] }}", "has no place for a picture")],
)
def test_a_model_that_cannot_be_asked_about_a_picture_is_named(template, error, copy_of):
    folder = copy_of("llava")
    for path in folder.glob("chat_template*"):
        path.unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"model llava {error}"):
        open_local(folder)


def test_large_pictures_are_shrunk_before_they_are_read(captioner_of, monkeypatch):
    captioner = captioner_of("llava")
    seen, processor = [], captioner._processor
    monkeypatch.setattr(captioner, "_processor", _Watched(processor, seen))
    ask(captioner, [Image.new("RGB", (3000, 1000))])
    assert seen == [(1024, 341)]


class _Watched:
    """A processor that notes the size of each picture."""

    def __init__(self, processor, seen):
        self.processor, self.seen = processor, seen

    def __call__(self, images, **arguments):
        self.seen += [image.size for (image,) in images]
        return self.processor(images=images, **arguments)

    def __getattr__(self, name):
        return getattr(self.processor, name)


# Florence-2


def test_florence_does_the_task_that_is_named_and_describes_at_length_otherwise(captioner_of, monkeypatch):
    captioner, asked = captioner_of("florence"), []
    processor = captioner._processor
    monkeypatch.setattr(
        captioner, "_processor", lambda text, **rest: asked.append(text) or processor(text=text, **rest)
    )
    captioner._processor.batch_decode = processor.batch_decode
    for instruction in ("Describe this picture.", " <CAPTION> ", "<GENERATE_TAGS>", ""):
        ask(captioner, PICTURES[:1], instruction)
    assert asked == [["<MORE_DETAILED_CAPTION>"], ["<CAPTION>"], ["<GENERATE_TAGS>"], ["<MORE_DETAILED_CAPTION>"]]


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_florence_in_the_first_layout_is_the_same_network(weights, tmp_path):
    original = tiny_vlms.write_legacy_florence(tmp_path / "Florence-2-tiny", weights)
    captioner = open_local(tmp_path / "Florence-2-tiny")
    assert len(captioner._processor.tokenizer) == original.config.text_config.vocab_size + 1
    expected = original.state_dict()
    for name, tensor in captioner.network.state_dict().items():
        assert torch.equal(tensor[: len(expected[name])], expected[name]), name
    by_translated = ask(captioner)
    original.resize_token_embeddings(len(captioner._processor.tokenizer), mean_resizing=False)
    with torch.no_grad():
        original.get_input_embeddings().weight[-1] = 0
    captioner.network = original.eval()
    assert ask(captioner) == by_translated and len(set(by_translated)) > 1


# Weights and code


def test_weights_in_torchs_own_format_caption_as_safetensors_do(copy_of, captioner_of):
    folder = copy_of("blip")
    (path,) = folder.glob("*.safetensors")
    from safetensors.torch import load_file

    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()
    assert ask(open_local(folder)) == ask(captioner_of("blip"))


def test_safetensors_are_preferred(copy_of, captioner_of):
    folder = copy_of("blip")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert ask(open_local(folder)) == ask(captioner_of("blip"))


class _Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["blip", "legacy_florence"])
def test_a_weight_file_with_code_in_it_is_refused_and_not_run(kind, copy_of, tmp_path):
    if kind == "blip":
        folder = copy_of("blip")
    else:
        folder = tmp_path / kind
        tiny_vlms.write_legacy_florence(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    torch.save({"weight": _Attack(tmp_path / "was-run")}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ValueError, match=f"The model {kind} cannot be opened"):
        open_local(folder)
    assert not (tmp_path / "was-run").exists()


def test_the_code_of_a_model_folder_is_never_run(copy_of, captioner_of):
    import json

    folder = copy_of("llava")
    for name in ("configuration_own", "modeling_own", "processing_own"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of a model folder was run')")
    own = {"AutoConfig": "configuration_own.Own", "AutoModelForImageTextToText": "modeling_own.Own"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "auto_map": {"AutoProcessor": "processing_own.Own"}}))
    assert ask(open_local(folder)) == ask(captioner_of("llava"))
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": own, "model_type": "own"}))
    with pytest.raises(ValueError, match=r"kind 'own', which transformers \S+ does not know without program code"):
        open_local(folder)


@pytest.mark.parametrize("kind", ["qwen3_vl", "florence", "blip"])
def test_a_folder_without_weights_is_named(kind, copy_of):
    folder = copy_of(kind)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=rf"The model {kind} cannot be opened with transformers \S+: "):
        open_local(folder)


# Which models there are


def test_models_are_found_by_what_they_are_up_to_three_levels_down(tmp_path, folder_of):
    base = tmp_path / "LLM"
    shutil.copytree(folder_of("blip"), base / "named-anything")
    shutil.copytree(folder_of("llava"), base / "Joy" / "Caption" / "beta")
    shutil.copytree(folder_of("llava"), base / "too" / "far" / "down" / "llava")
    shutil.copytree(folder_of("llava"), base / ".hidden")
    tiny_taggers.write_tags(base / "wd" / "selected_tags.csv")
    tiny_taggers.write_tags(base / "flat" / "wd-v1-4.csv")
    (base / "flat" / "wd-v1-4.onnx").write_bytes(b"")
    (base / "flat" / "alone.onnx").write_bytes(b"")
    (base / "text-only").mkdir()
    (base / "text-only" / "config.json").write_text('{"model_type": "qwen3", "hidden_size": 8}')
    (base / "broken").mkdir()
    (base / "broken" / "config.json").write_text("[")
    found = find_models(base)
    assert list(found) == ["flat/wd-v1-4.onnx", "Joy/Caption/beta", "named-anything", "wd"]
    assert [kind_of(path) for path in found.values()] == ["tagger", "chat", "BLIP", "tagger"]
    assert find_models(tmp_path / "nowhere") == {}


def test_a_folder_that_is_no_caption_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match="There is no caption model in"):
        open_local(tmp_path)
