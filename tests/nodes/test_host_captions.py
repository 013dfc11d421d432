"""Which CLIPs can describe pictures, and why the others cannot: tiny random ones out of ComfyUI's own classes."""

import io

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.llama as llama
import comfy.text_encoders.lt as lt
import comfy.text_encoders.qwen3vl as qwen3vl
import comfy.text_encoders.qwen35 as qwen35
import comfy.text_encoders.qwen_image as qwen_image
import pytest
import queueing
import torch
from PIL import Image

from lora_workbench.nodes.host import captions
from lora_workbench.nodes.host.captions import generator_of, why_not

pytestmark = pytest.mark.comfy
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EYES = {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2}
SMALL_GEMMA_EYES = {
    **llama.GEMMA3_VISION_CONFIG,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def clip_of(comfyui, monkeypatch):
    """(tokenizer, text encoder, its config's name) -> a CLIP, as Load CLIP would give it, without weights."""

    def clip_of(tokenizer, encoder, name, config=TEXT, **tokenizer_data):
        options = {"dtype": torch.float32, "load_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
        target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
        with torch.inference_mode():
            return comfy.sd.CLIP(
                target, model_options={**options, f"{name}_model_config": config}, tokenizer_data=tokenizer_data
            )

    monkeypatch.setattr(captions, "LONGEST_CAPTION_TOKENS", 4)
    return clip_of


def fill(clip):
    """Random weights that make what it writes depend on the picture."""
    random = torch.Generator().manual_seed(3)
    with torch.inference_mode():
        for weight in clip.cond_stage_model.parameters():
            drawn = torch.randn(weight.shape, generator=random)
            weight.copy_(drawn * 0.3 if weight.ndim > 1 else 1 + 0.1 * drawn)


def assert_it_captions(clip):
    assert why_not(clip) == ""
    fill(clip)
    generate = generator_of(clip)
    red, blue = (generate(Image.new("RGB", (64, 48), colour), "Describe it.") for colour in ("red", "blue"))
    assert isinstance(red, str) and red != blue
    assert generate(Image.new("RGB", (64, 48), "red"), "Describe it.") == red


def test_qwen3_vl_captions(clip_of, monkeypatch):
    monkeypatch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_4b", {**EYES, "deepstack_visual_indexes": [0, 1]})
    assert_it_captions(clip_of(qwen3vl.tokenizer("qwen3vl_4b"), qwen3vl.te(model_type="qwen3vl_4b"), "qwen3vl_4b"))


def test_qwen3_5_captions(clip_of, monkeypatch, comfyui):
    if not (comfyui / "comfy" / "text_encoders" / "qwen35_tokenizer" / "vocab.json").is_file():
        pytest.skip("this ComfyUI checkout is without the words of Qwen3.5")
    monkeypatch.setitem(qwen35.QWEN35_MODELS, "qwen35_08b", {"vision": EYES})
    layers = ["linear_attention", "full_attention", "linear_attention"]
    config = {**TEXT, "num_hidden_layers": 3, "layer_types": layers, "head_dim": 128}
    config |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    assert_it_captions(
        clip_of(qwen35.tokenizer("qwen35_08b"), qwen35.te(model_type="qwen35_08b"), "qwen35_08b", config)
    )


def sentence_pieces() -> torch.Tensor:
    """A tokenizer for Gemma, small, with the file format of its own."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["describe this picture of a red circle on a blue background."] * 50),
        model_writer=file,
        vocab_size=60,
        hard_vocab_limit=False,
        bos_id=2,
        eos_id=1,
        pad_id=0,
        unk_id=3,
        minloglevel=2,
    )
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def test_gemma_3_loaded_alone_captions(clip_of, monkeypatch):
    monkeypatch.setattr(llama.Gemma3_12B_Config, "vision_config", SMALL_GEMMA_EYES)
    clip = clip_of(lt.Gemma3_12BTokenizer, lt.gemma3_te(), "", spiece_model=sentence_pieces())
    assert why_not(clip) == ""
    fill(clip)
    with torch.inference_mode():  # it may only choose words that this tokenizer has
        clip.cond_stage_model.transformer.model.embed_tokens.weight[
            clip.tokenizer.tokenizer.tokenizer.vocab_size() :
        ] = 0
    assert isinstance(generator_of(clip)(Image.new("RGB", (64, 48), "red"), "Describe it."), str)


def test_a_language_model_inside_another_text_encoder_is_refused(clip_of, monkeypatch):
    """As ComfyUI wraps Gemma for LTX-2, under a name of its own and with more beside it."""
    monkeypatch.setattr(llama.Gemma3_12B_Config, "vision_config", SMALL_GEMMA_EYES)
    clip = clip_of(lt.Gemma3_12BTokenizer, lt.gemma3_te(), "", spiece_model=sentence_pieces())
    video = torch.nn.Module()
    video.gemma3_12b = clip.cond_stage_model
    monkeypatch.setattr(clip, "cond_stage_model", video)
    assert why_not(clip).startswith("keeps its language model inside the text encoder of another model")


def test_qwen2_5_vl_is_refused_because_comfyui_cannot_let_it_write(clip_of, monkeypatch):
    class Eyes(llama.qwen_vl.Qwen2VLVisionTransformer):
        def __init__(self, hidden_size, **settings):
            super().__init__(32, intermediate_size=64, num_heads=2, num_layers=1, **settings)

    monkeypatch.setattr(llama.qwen_vl, "Qwen2VLVisionTransformer", Eyes)
    clip = clip_of(qwen_image.QwenImageTokenizer, qwen_image.te(), "qwen25_7b")
    assert why_not(clip) == "looks at pictures for an image model, but ComfyUI cannot let it write"


def test_a_model_that_was_cut_short_is_refused(clip_of, monkeypatch):
    monkeypatch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_32b", {**EYES, "deepstack_visual_indexes": [0, 1]})
    clip = clip_of(qwen3vl.tokenizer("qwen3vl_32b"), qwen3vl.te(model_type="qwen3vl_32b"), "qwen3vl_32b")
    assert why_not(clip) == "has lost the layers that write, because its image model does without them"


def test_a_qwen3_without_eyes_is_refused(clip_of):
    import comfy.text_encoders.flux as flux

    clip = clip_of(flux.KleinTokenizer, flux.klein_te(model_type="qwen3_4b"), "qwen3_4b")
    assert why_not(clip) == "writes text but cannot look at pictures"


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_a_text_encoder_is_refused(kind, comfyui):
    clip = queueing.shared_models(kind)[1]
    assert why_not(clip) == "only encodes text and cannot describe pictures"
    with pytest.raises(ValueError, match="load a vision-language model such as Qwen3-VL, Qwen3.5 or Gemma 3 or 4 with"):
        generator_of(clip)


def test_a_comfyui_that_is_too_old_is_named():
    assert "too old" in why_not(object())
