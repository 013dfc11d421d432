"""Captions with new words are read as ComfyUI reads a prompt with `embedding:<name>`, bit for bit."""

import comfy.sd1_clip
import hosttoys
import pytest
import torch
from safetensors.torch import save_file

from lora_workbench.nodes.host.encoders import GraphEncoder
from lora_workbench.nodes.host.new_tokens import NewTokens
from lora_workbench.training.embeddings import MOST_DECAY, bundled, worded

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])
WORDS = {"zork": "", "blib": "red star"}


@pytest.fixture(scope="module")
def clips():
    return {kind: hosttoys.clip(kind) for kind in ("sdxl", "flux")}


@pytest.fixture(scope="module")
def model():
    return hosttoys.model("sdxl")


def plain(model, clip, text):
    return GraphEncoder(model, clip, hosttoys.autoencoder(model)).text(text)


def with_words(model, clip, text, words=WORDS, count=2):
    tokens = NewTokens(clip, words, count, seed=3)
    return GraphEncoder(model, clip, hosttoys.autoencoder(model), tokens).text(text)


def assert_equal(ours, theirs):
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@both_families
@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("a zork on a blue background", 1),
        ("Zork", 3),
        ("a red zork's hat, (zork). Blib!", 9),
        ("a star, " * 24 + "a zork, a circle", 3),
        ("a star, " * 36 + "a zork, a circle", 9),
    ],
)
def test_a_caption_is_read_as_the_prompt_with_the_embedding_file_will_be(
    kind, count, caption, clips, model, host_folder
):
    clip, names = clips[kind], {"zork": "new run/z", "blib": "new run/b"}
    names = {trigger: name.replace(" ", "_") for trigger, name in names.items()}
    rows = NewTokens(clip, WORDS, count, seed=3).rows()
    (host_folder / "models" / "embeddings" / "new_run").mkdir(parents=True, exist_ok=True)
    for trigger, name in names.items():
        save_file(rows[trigger], host_folder / "models" / "embeddings" / f"{name}.safetensors")
    ours = with_words(model, clip, caption, count=count)
    # In a prompt brackets are weights unless they are escaped, in a caption they are letters.
    assert_equal(ours, hosttoys.at_inference(clip, worded(caption, names).replace("(", r"\(").replace(")", r"\)")))


@both_families
def test_new_words_say_something_else_than_the_trigger_word_did(kind, clips, model):
    ours, theirs = with_words(model, clips[kind], "a zork"), plain(model, clips[kind], "a zork")
    assert not torch.equal(ours["pooled_output"], theirs["pooled_output"])


@both_families
def test_a_caption_without_the_trigger_word_says_what_it_said(kind, clips, model):
    caption = "a (red:1.5) circle and zorks"
    assert_equal(with_words(model, clips[kind], caption), plain(model, clips[kind], caption))


@both_families
def test_a_lora_file_with_the_rows_in_it_works_as_an_embedding(kind, clips, model, host_folder):
    rows = NewTokens(clips[kind], {"zork": ""}, 2, seed=3).rows()
    folder = host_folder / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    save_file(bundled(rows), folder / "from_a_lora.safetensors")
    ours = with_words(model, clips[kind], "a zork", {"zork": ""})
    assert_equal(ours, hosttoys.at_inference(clips[kind], "a embedding:from_a_lora"))


def test_t5_is_told_the_trigger_word_itself(clips, model):
    ours, theirs = with_words(model, clips["flux"], "zork"), plain(model, clips["flux"], "zork")
    assert torch.equal(ours["cross_attn"], theirs["cross_attn"])
    assert not torch.equal(ours["pooled_output"], theirs["pooled_output"])


def test_a_word_with_a_class_begins_as_its_class(clips, model):
    ours = with_words(model, clips["sdxl"], "a blib here")
    torch.testing.assert_close(ours, plain(model, clips["sdxl"], "a red star here"), rtol=1e-4, atol=1e-5)


def test_a_word_is_spared_the_weight_decay_of_layers(clips):
    adapters = NewTokens(clips["sdxl"], {"zork": ""}, 2, 0).adapters(rate=1.0)
    assert [adapter.most_decay for adapter in adapters] == [MOST_DECAY] * 2


def test_what_a_word_begins_as_is_a_function_of_the_seed(clips):
    rows = [NewTokens(clips["sdxl"], {"zork": ""}, 2, seed).rows()["zork"] for seed in (1, 1, 2)]
    for name in ("clip_l", "clip_g"):
        first, again, other = (each[name] for each in rows)
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert not first.is_inference() and first.shape == (2, 64)


def test_embeddings_that_a_caption_names_itself_are_still_found(clips, model, host_folder):
    folder = host_folder / "models" / "embeddings"
    folder.mkdir(exist_ok=True)
    random = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    save_file({"clip_l": random, "clip_g": -random}, folder / "own.safetensors")
    ours = with_words(model, clips["sdxl"], "embedding:own star")
    assert_equal(ours, hosttoys.at_inference(clips["sdxl"], "embedding:own star"))
    assert not torch.equal(ours["pooled_output"], plain(model, clips["sdxl"], "star")["pooled_output"])


@both_families
def test_the_users_clip_and_tokenizers_are_left_as_they_were(kind, clips, model):
    clip = clips[kind]
    parts = [clip, clip.tokenizer, clip.tokenizer.clip_l, clip.cond_stage_model]
    before = [dict(vars(part)) for part in parts]
    with_words(model, clip, "a zork")
    assert [vars(part) for part in parts] == before


def test_the_cache_tells_new_words_from_old_ones(clips, model):
    def key(*arguments):
        tokens = NewTokens(clips["sdxl"], *arguments) if arguments else None
        return GraphEncoder(model, clips["sdxl"], hosttoys.autoencoder(model), tokens).text_key

    given = ({"zork": ""}, 2, 1)
    assert key(*given) == key(*given)
    others = [(), ({"zork": "star"}, 2, 1), ({"zorg": ""}, 2, 1), ({"zork": ""}, 3, 1), ({"zork": ""}, 2, 2)]
    assert key(*given) not in [key(*other) for other in others]


def test_a_clip_that_reads_no_embeddings_is_refused(clips):
    clip = hosttoys.clip("sdxl")
    clip.tokenizer.clip_g.embedding_directory = None
    with pytest.raises(ValueError, match=r"loaded without a folder for embeddings.*or set new_tokens to 0\.$"):
        NewTokens(clip, {"zork": ""}, 1, seed=0)


def test_a_clip_without_encoders_that_learn_words_is_refused(clips):
    clip = clips["flux"].clone()
    clip.tokenizer = comfy.sd1_clip.SD1Tokenizer(name="t5xxl", tokenizer=type(clips["flux"].tokenizer.t5xxl))
    with pytest.raises(ValueError, match=r"neither a CLIP-L nor a CLIP-G.*set new_tokens to 0\.$"):
        NewTokens(clip, {"zork": ""}, 1, seed=0)
