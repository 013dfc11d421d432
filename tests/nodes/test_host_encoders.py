"""Pictures and captions are encoded as at inference: the same latents, the same words, nothing cut or weighted."""

import comfy.sdxl_clip
import comfy.text_encoders.qwen_image
import hosttoys
import pytest
import torch
from comfy.model_management import OOM_EXCEPTION, InterruptProcessingException, interrupt_current_processing

from lora_workbench.nodes.host.encoders import GraphEncoder
from lora_workbench.nodes.host.text_encoders import literal_tokens

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])


def encoder_of(kind, clip=None):
    patcher = hosttoys.model(kind)
    return GraphEncoder(patcher, clip or hosttoys.clip(kind), hosttoys.autoencoder(patcher))


def pixels():
    return torch.rand(96, 128, 3, generator=torch.Generator().manual_seed(0))


@both_families
@pytest.mark.parametrize("caption", ["a red circle on a blue background", "", "Zoë's 星, 100 %"])
def test_a_caption_is_encoded_as_the_prompt_will_be(kind, caption):
    clip = hosttoys.clip(kind)
    ours, theirs = encoder_of(kind, clip).text(caption), hosttoys.at_inference(clip, caption)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


@both_families
def test_brackets_in_a_caption_are_letters_and_not_prompt_weights(kind):
    """Trap 16."""
    clip, caption = hosttoys.clip(kind), "a (red:1.5) circle, [old], (zork)"
    ours = encoder_of(kind, clip).text(caption)
    escaped = hosttoys.at_inference(clip, caption.replace("(", r"\(").replace(")", r"\)"))
    weighted = hosttoys.at_inference(clip, caption)
    assert torch.equal(ours["cross_attn"], escaped["cross_attn"])
    assert not torch.equal(ours["cross_attn"], weighted["cross_attn"])


@pytest.mark.parametrize("caption", ["a (red:1.5) circle, (zork)", r"a \(red\) circle", "a red circle"])
def test_brackets_are_letters_to_tokenizers_of_chat_models_too(caption):
    """Qwen-Image's disables weights itself and refuses to be told."""
    clip = hosttoys.clip("sdxl").clone()
    clip.tokenizer = comfy.text_encoders.qwen_image.QwenImageTokenizer()
    with pytest.raises(TypeError, match="disable_weights"):
        clip.tokenize(caption, disable_weights=True)
    ((*tokens,),) = literal_tokens(clip, caption).values()
    assert tokens == clip.tokenize(caption)["qwen25_7b"]
    assert caption.replace("\\", "") in clip.tokenizer.decode([token for token, _ in tokens[0]])


def test_brackets_are_letters_to_tokenizers_that_know_weights_and_cannot_be_told():
    class Stubborn(comfy.sdxl_clip.SDXLTokenizer):
        def tokenize_with_weights(self, text, return_word_ids=False):
            return super().tokenize_with_weights(text, return_word_ids)

    clip, caption = hosttoys.clip("sdxl").clone(), r"a (red:1.5) circle, \(zork\)"
    told = literal_tokens(clip, caption)
    clip.tokenizer = Stubborn()
    assert literal_tokens(clip, caption) == told != clip.tokenize(caption)


@pytest.mark.parametrize(("kind", "at_least"), [("sdxl", 154), ("flux", 100)])
def test_a_long_caption_is_not_cut(kind, at_least):
    """Trap 15: T5 is not limited to 77 tokens, and CLIP takes long text in several parts."""
    caption = "a red circle and a blue square and " * 16 + "a green star"
    ours, shortened = (encoder_of(kind).text(text) for text in (caption, caption.removesuffix("a green star")))
    assert len(ours["cross_attn"]) >= at_least
    longest = min(len(ours["cross_attn"]), len(shortened["cross_attn"]))
    assert not torch.equal(ours["cross_attn"][:longest], shortened["cross_attn"][:longest])


@both_families
def test_what_is_encoded_can_be_trained_with_and_saved(kind):
    with torch.inference_mode():  # where nodes run
        encoder = encoder_of(kind)
        encoded = {**encoder.text("a red circle"), "latents": encoder.latents(pixels())}
    for tensor in encoded.values():
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.isfinite().all()


@both_families
def test_latents_are_in_the_models_own_space(kind):
    patcher = hosttoys.model(kind)
    vae = hosttoys.autoencoder(patcher)
    latents = GraphEncoder(patcher, hosttoys.clip(kind), vae).latents(pixels())
    with torch.inference_mode():
        expected = patcher.model.process_latent_in(vae.encode(pixels()[None]))[0]
    assert torch.equal(latents, expected)
    assert latents.shape == (16 if kind == "flux" else 4, 12, 16)


def test_a_vae_that_runs_out_of_memory_does_not_fall_back_to_tiles():
    """Trap 23: tiles give other latents, and the cache would keep them."""
    patcher = hosttoys.model("sdxl")
    vae = hosttoys.autoencoder(patcher)
    encoder = GraphEncoder(patcher, hosttoys.clip("sdxl"), vae)

    def out_of_memory(x):
        raise OOM_EXCEPTION("out of memory")

    vae.first_stage_model.encode = out_of_memory
    with pytest.raises(MemoryError, match="tiles would give other latents: free memory, or lower the resolution"):
        encoder.latents(pixels())


@both_families
def test_the_users_vae_and_clip_are_left_as_they_were(kind):
    patcher = hosttoys.model(kind)
    clip, vae = hosttoys.clip(kind), hosttoys.autoencoder(patcher)
    before = dict(vae.__dict__), dict(clip.__dict__), dict(clip.cond_stage_model.__dict__)
    encoder = GraphEncoder(patcher, clip, vae)
    encoder.latents(pixels())
    encoder.text("a (red:1.3) circle")
    assert (vae.__dict__, clip.__dict__, clip.cond_stage_model.__dict__) == before


def test_the_keys_say_which_encoders_made_the_files():
    """Promise 9: another encoder is another key, the same one loaded again is the same."""
    first, again = encoder_of("sdxl"), encoder_of("sdxl")
    assert (first.latents_key, first.text_key) == (again.latents_key, again.text_key)
    with torch.inference_mode():
        other = hosttoys.clip("sdxl", seed=7)
    skipping = hosttoys.clip("sdxl").clone()
    skipping.clip_layer(-1)
    keys = {encoder_of("sdxl", clip).text_key for clip in (hosttoys.clip("sdxl"), other, skipping)}
    assert len(keys) == 3
    assert encoder_of("sdxl").latents_key != encoder_of("flux").latents_key


def test_a_clip_that_skips_layers_encodes_as_it_does_at_inference():
    skipping = hosttoys.clip("sdxl").clone()
    skipping.clip_layer(-1)
    ours = encoder_of("sdxl", skipping).text("a red circle")["cross_attn"]
    assert torch.equal(ours, hosttoys.at_inference(skipping, "a red circle")["cross_attn"])
    assert not torch.equal(ours, encoder_of("sdxl").text("a red circle")["cross_attn"])


@pytest.mark.parametrize(
    ("context", "pooled", "words"),
    [(2048, 64, "text 128 wide.*takes 2048"), (128, 1280, "pooled text 64 wide.*takes 1280")],
)
def test_a_clip_of_another_model_is_refused_in_one_sentence(context, pooled, words):
    with pytest.raises(ValueError, match=f"{words}: wire the CLIP that belongs to the model\\.$"):
        encoder_of("sdxl").check("SDXL", context, pooled)
    encoder_of("sdxl").check("SDXL", 128, 64)


def test_cancel_is_noticed_before_every_picture_and_every_caption():
    encoder = encoder_of("sdxl")
    for encode in (lambda: encoder.latents(pixels()), lambda: encoder.text("a red circle")):
        interrupt_current_processing(True)
        with pytest.raises(InterruptProcessingException):
            encode()
