"""WD taggers, tiny and random, through timm and through onnxruntime."""

import importlib.util

import numpy as np
import pytest
import tiny_taggers
import torch
from PIL import Image

from lora_workbench.captioning import wd_tagger
from lora_workbench.captioning.tags import spaced
from lora_workbench.captioning.wd_tagger import Tag, as_input, open_tagger, read_tags, sure_tags

FACES = ["0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^"]
FACES += ["o_o", "u_u", "x_x", "|_|", "||_||"]


def picture(colour="red", size=(20, 20)):
    return Image.new("RGB", size, colour)


@pytest.fixture
def timm_folder(tmp_path):
    pytest.importorskip("timm")
    return tiny_taggers.write_timm(tmp_path / "wd-tiny")


@pytest.fixture
def onnx_folder(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return tiny_taggers.write_onnx_folder(tmp_path / "wd-onnx")


def without(monkeypatch, *packages):
    real = importlib.util.find_spec
    monkeypatch.setattr(wd_tagger.importlib.util, "find_spec", lambda name: None if name in packages else real(name))


# What the tags become


@pytest.mark.parametrize("face", FACES)
def test_faces_keep_their_underscores(face):
    assert spaced(face) == face


@pytest.mark.parametrize(
    "tag, written",
    [
        ("long_hair", "long hair"),
        ("1girl", "1girl"),
        ("saber_(fate)", "saber (fate)"),
        ("c.c.", "c.c."),
        ("k/da_(league_of_legends)", "k/da (league of legends)"),
    ],
)
def test_other_underscores_become_spaces_and_brackets_are_not_escaped(tag, written):
    assert spaced(tag) == written


def test_categories_are_read_by_column_whatever_the_order_of_rows_and_columns(tmp_path):
    path = tmp_path / "selected_tags.csv"
    path.write_text("\ufeffcount,category,name,tag_id\n5,4,saber,1\n4,0,solo,2\n3,9,explicit,3\n", encoding="utf-8")
    tags = read_tags(path)
    assert tags == [Tag("saber", "4"), Tag("solo", "0"), Tag("explicit", "9")]
    assert sure_tags(tags, np.array([0.9, 0.9, 0.9])) == ["saber", "solo"]


def test_names_are_put_first_and_need_to_be_surer_than_other_tags():
    tags = [Tag("general", "9"), Tag("solo", "0"), Tag("hat", "0"), Tag("saber", "4"), Tag("rin", "4"), Tag("sky", "0")]
    assert sure_tags(tags, np.array([0.99, 0.4, 0.8, 0.84, 0.86, 0.34])) == ["rin", "hat", "solo"]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\x00\x01", "name\nsolo\n"])
def test_what_is_no_list_of_tags_is_named(text, tmp_path):
    path = tmp_path / "selected_tags.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"selected_tags\.csv is not the list of tags"):
        read_tags(path)


# What the network sees


def test_a_picture_is_padded_to_a_white_square_and_turned_to_blue_green_red():
    pixels = as_input(picture((255, 0, 51), (40, 20)), 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.float32
    assert pixels[16, 16].tolist() == [51, 0, 255]
    assert pixels[0, 0].tolist() == pixels[31, 31].tolist() == [255, 255, 255]
    assert abs(pixels[:16].astype(int) - pixels[:15:-1].astype(int)).max() <= 1  # the picture is in the middle


def test_onnx_gets_colours_from_0_to_255_in_that_order(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    weights = np.zeros((3, len(tiny_taggers.ROWS)))
    weights[0, 1], weights[2, 2] = 0.02, 0.02  # "1girl" is blue, "long_hair" is red; sigmoid(0.02 * 255) = 0.994
    folder = tiny_taggers.write_onnx_folder(tmp_path / "wd", weights=weights)
    tagger = open_tagger(folder)
    scores = tagger._read(as_input(picture("red"), 32)[None])[0]
    assert scores == pytest.approx([0.5, 0.5, 1 / (1 + np.exp(-5.1)), 0.5, 0.5, 0.5], abs=1e-5)


def test_timm_and_onnx_agree_on_the_same_network(timm_folder, onnx_folder):
    """The network is the one of the ONNX file: the mean colour times its weights."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(onnx_folder / "model.onnx").graph
    weights = torch.from_numpy(onnx.numpy_helper.to_array(graph.initializer[0]).copy())

    class MeanColour(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(weights)

        def forward(self, pixels):  # -1 to 1, as networks of timm are trained
            return (pixels.mean((2, 3)) + 1) * 127.5 @ self.weights

    by_onnx, by_timm = open_tagger(onnx_folder), open_tagger(timm_folder)
    by_timm._read.module = MeanColour()
    pixels = np.stack([as_input(picture(colour), 32) for colour in ("red", "navy", "olive")])
    assert np.abs(by_onnx._read(pixels) - by_timm._read(pixels)).max() < 1e-6


# End to end


@pytest.mark.parametrize("kind", ["timm_folder", "onnx_folder"])
def test_a_tagger_folder_tags_pictures_the_same_alone_and_in_a_batch(kind, request):
    tagger = open_tagger(request.getfixturevalue(kind))
    pictures = [picture("red"), picture("blue", (30, 10)), picture("white", (7, 50))]
    together = [answer.text for answer in tagger.caption(pictures, "Describe it.")]
    assert together == [tagger.caption([one], "")[0].text for one in pictures]
    assert len(set(together)) > 1 and tagger.writes_tags and tagger.batch_size > 1
    assert all(set(text.split(", ")) <= {spaced(name) for name in tiny_taggers.NAMES} for text in together if text)
    tagger.close()
    assert tagger.network is None


def test_a_single_onnx_file_with_its_csv_is_a_tagger(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tiny_taggers.write_onnx(tmp_path / "wd-v1-4.onnx", batch=1)
    tiny_taggers.write_tags(tmp_path / "wd-v1-4.csv")
    tagger = open_tagger(path)
    assert tagger.batch_size == 1  # this file has no room for more
    assert tagger.caption([picture()], "")[0].text


def test_timm_is_preferred_and_onnxruntime_used_without_it(timm_folder, onnx_folder, monkeypatch):
    (timm_folder / "model.onnx").write_bytes((onnx_folder / "model.onnx").read_bytes())
    assert isinstance(open_tagger(timm_folder)._read, wd_tagger.TimmNetwork)
    without(monkeypatch, "timm")
    assert isinstance(open_tagger(timm_folder)._read, wd_tagger.OnnxNetwork)


def test_a_missing_package_is_one_sentence_that_says_how_to_get_it(tmp_path, monkeypatch):
    folder = tmp_path / "wd"
    tiny_taggers.write_tags(folder / "selected_tags.csv")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    without(monkeypatch, "timm", "onnxruntime")
    with pytest.raises(ImportError, match="wd needs the package timm: install it with 'pip install timm'"):
        open_tagger(folder)
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        open_tagger(folder)


def test_a_folder_without_weights_is_named(tmp_path):
    tiny_taggers.write_tags(tmp_path / "wd" / "selected_tags.csv")
    with pytest.raises(ValueError, match="The tagger folder wd holds neither model.safetensors"):
        open_tagger(tmp_path / "wd")


def test_a_list_that_belongs_to_another_model_is_noticed(onnx_folder):
    tiny_taggers.write_tags(onnx_folder / "selected_tags.csv", tiny_taggers.ROWS[:-1])
    with pytest.raises(ValueError, match="scores 6 tags, but its list has 5"):
        open_tagger(onnx_folder).caption([picture()], "")


def test_opening_and_tagging_leave_the_random_numbers_alone(timm_folder):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    open_tagger(timm_folder).caption([picture()], "")
    assert torch.equal(before, torch.get_rng_state())
