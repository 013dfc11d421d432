"""Pictures and prompts as embeddings of a CLIP_VISION and of the CLIP that belongs to it."""

import comfy.clip_vision
import hosttoys
import pytest
import torch
from comfy.model_management import InterruptProcessingException, interrupt_current_processing

from lora_workbench.nodes.host.text_encoders import encoders_of
from lora_workbench.nodes.host.vision import embeddings, text_embeddings

pytestmark = pytest.mark.comfy
WIDTH = 64


def eye(seed=0, **settings):
    """A CLIP_VISION with random weights."""
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": WIDTH,
        **settings,
    }
    with torch.inference_mode():
        made = comfy.clip_vision.ClipVisionModel(config)
        random = torch.Generator().manual_seed(seed)
        for weight in made.model.parameters():
            drawn = torch.randn(weight.shape, generator=random)
            weight.copy_(drawn * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1 + 0.1 * drawn)
    return made


def picture(seed, height=48, width=48):
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_pictures_of_any_size_become_rows_of_length_1(kind):
    settings = {} if kind == "clip_vision_model" else {"model_type": kind, "hidden_act": "gelu_pytorch_tanh"}
    found = embeddings(eye(**settings), [picture(0), picture(1, 32, 80), picture(2, 90, 40)])
    assert found.shape == (3, WIDTH) and found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert (found @ found.t()).fill_diagonal_(0).max() < 0.9999, "different pictures differ"


def test_an_embedding_is_what_the_encoder_gives_whatever_else_is_asked_for():
    encoder = eye()
    pictures = [picture(seed) for seed in range(3)]
    together = embeddings(encoder, pictures)
    assert torch.equal(together[1:2], embeddings(encoder, [torch.cat([pictures[1], torch.zeros(48, 48, 1)], 2)]))
    with torch.inference_mode():
        theirs = encoder.encode_image(pictures[1][None])["image_embeds"][0]
    torch.testing.assert_close(together[1], theirs / theirs.norm())


def test_no_picture_is_a_sentence_and_cancel_ends_it():
    with pytest.raises(ValueError, match="no picture to compare"):
        embeddings(eye(), [])
    interrupt_current_processing()
    with pytest.raises(InterruptProcessingException):
        embeddings(eye(), [picture(0)])


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_texts_are_projected_and_the_clip_is_afterwards_as_before(kind):
    """FLUX hands its model the text before the projection, which lies in no space with pictures."""
    clip = hosttoys.clip(kind)
    with torch.inference_mode():
        before = clip.encode_from_tokens(clip.tokenize("a red circle"), return_pooled=True)
    found, reason = text_embeddings(clip, eye(), ["a red circle", "a (green:1.3) square"])
    assert reason == "" and found.shape == (2, WIDTH)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    with torch.inference_mode():
        after = clip.encode_from_tokens(clip.tokenize("a red circle"), return_pooled=True)
        if kind == "flux":
            projected = encoders_of(clip)["clip_l"].transformer.text_projection(before[1])[0]
            torch.testing.assert_close(found[0], projected / projected.norm())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_encoders_that_share_no_space_say_so():
    clip = hosttoys.clip("flux")
    assert "knows no words" in text_embeddings(clip, eye(model_type="siglip_vision_model"), ["a"])[1]
    unprojected = eye()
    unprojected.model.visual_projection = torch.nn.Identity()  # what ComfyUI makes of a file without one
    assert "has no projection" in text_embeddings(clip, unprojected, ["a"])[1]
    found, reason = text_embeddings(clip, eye(projection_dim=48), ["a"])
    assert found is None and "48 wide" in reason
    with torch.inference_mode():
        encoders_of(clip)["clip_l"].transformer.text_projection.weight.copy_(torch.eye(WIDTH))
    found, reason = text_embeddings(clip, eye(), ["a"])
    assert found is None and "belongs to this CLIP_VISION" in reason
