"""The picture of a LoRA file: what it shows is where it must be."""

import numpy as np
import pytest
import torch
from PIL import ImageColor
from safetensors.torch import save_file

from lora_workbench.lora_files import inspection_chart
from lora_workbench.lora_files.inspection import inspection
from lora_workbench.lora_files.inspection_chart import COLOURS, SHARES, picture
from lora_workbench.lora_files.opening import open_lora
from lora_workbench.training.figures import RED, WIDTH


def pair(tensors, name, size=1.0):
    tensors[f"{name}.lora_down.weight"] = torch.eye(2, 8)
    tensors[f"{name}.lora_up.weight"] = size * torch.eye(8, 2)


@pytest.fixture
def draw(tmp_path):
    """Writes a file and draws it, as an array (height, width, 3)."""

    def drawn(tensors):
        save_file(tensors, tmp_path / "star.safetensors")
        return np.asarray(picture(inspection(open_lora(tmp_path / "star.safetensors"))))

    return drawn


def coloured(image, colour, above=None):
    """Whether each pixel has that colour, in the rows above."""
    return (image[:above] == ImageColor.getrgb(colour)).all(-1)


def plot(image, colour):
    """Where a part's colour stands among the bars."""
    bottom = inspection_chart.HEAD + inspection_chart.PLOT
    return coloured(image, colour, bottom)[inspection_chart.HEAD + 8 :]


def test_a_bar_is_as_high_as_the_norm_of_its_block(draw):
    tensors = {}
    for number, size in enumerate((1.0, 2.0, 4.0)):
        pair(tensors, f"lora_unet_double_blocks_{number}_img_attn_qkv", size)
    blue = plot(draw(tensors), COLOURS["attention"])
    heights = blue.sum(0)[blue.any(0)]
    found = sorted({int(height) for height in heights})
    assert len(found) == 3
    assert found[2] / found[0] == pytest.approx(4, rel=0.05) and found[2] / found[1] == pytest.approx(2, rel=0.05)


def test_a_bar_is_divided_by_the_squares_of_its_parts(draw):
    tensors = {}
    pair(tensors, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 1.0)
    pair(tensors, "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_2", 3.0**0.5)
    image = draw(tensors)
    blue, amber = (plot(image, COLOURS[part]).sum(0).max() for part in ("attention", "feed-forward"))
    assert amber / blue == pytest.approx(3, rel=0.05)


def test_the_shares_fill_the_width_by_the_squares_of_the_networks(draw):
    tensors = {}
    pair(tensors, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 3.0**0.5)
    pair(tensors, "lora_te1_text_model_encoder_layers_0_mlp_fc1", 1.0)
    image = draw(tensors)[inspection_chart.HEAD + inspection_chart.PLOT + 40 :]
    model, text = (coloured(image, SHARES[network]).sum(1).max() for network in ("model", "clip_l"))
    assert model / text == pytest.approx(3, rel=0.03)
    assert model + text == pytest.approx(WIDTH - inspection_chart.LEFT - inspection_chart.MARGIN, abs=12)


def test_a_warning_and_a_mark_say_that_a_layer_is_dead(draw):
    tensors = {}
    for number in range(4):
        pair(tensors, f"lora_unet_double_blocks_{number}_img_attn_qkv")
    sound = draw(tensors)
    tensors["lora_unet_double_blocks_2_img_attn_qkv.lora_up.weight"].zero_()
    dead = draw(tensors)
    assert not coloured(sound, RED).any()
    assert coloured(dead, RED).any()
    assert dead.shape[0] > sound.shape[0]


@pytest.mark.parametrize("count", [1, 57, 900])
def test_all_blocks_fit_however_many_there_are(draw, count):
    tensors = {}
    for number in range(count):
        pair(tensors, f"lora_unet_single_blocks_{number}_linear1")
        pair(tensors, f"lora_te1_text_model_encoder_layers_{number}_mlp_fc1", 0.5)
    image = draw(tensors)
    assert image.shape[1] == WIDTH
    assert not plot(image, COLOURS["attention and feed-forward"])[:, -inspection_chart.MARGIN :].any()
    assert plot(image, COLOURS["feed-forward"]).any()


@pytest.mark.parametrize(
    "tensors",
    [
        {"noise": torch.ones(2)},
        {"lora_unet_double_blocks_0_img_attn_qkv.oft_blocks": torch.ones(2, 3, 3)},
        {"a.lora_down.weight": torch.zeros(2, 8), "a.lora_up.weight": torch.zeros(8, 2)},
        {"a.lora_down.weight": torch.full((2, 8), torch.nan), "a.lora_up.weight": torch.ones(8, 2)},
        {"a.lora_down.weight": torch.full((2, 8), 3e38), "a.lora_up.weight": torch.full((8, 2), 3e38)},
        {"a.lora_down.weight": torch.full((2, 8), 3e38), "a.lora_up.weight": torch.full((8, 2), 1e-30)},
        {
            "a.alpha": torch.tensor(3e38),
            "a.lora_down.weight": torch.ones(1, 8),
            "a.lora_up.weight": torch.ones(8, 1) * 9,
        },
    ],
    ids=["no layer", "nothing to measure", "nothing changed", "not finite", "huge", "huge times small", "huge alpha"],
)
def test_a_file_with_nothing_to_show_still_has_a_picture(draw, tensors):
    assert draw(tensors).shape[1] == WIDTH
