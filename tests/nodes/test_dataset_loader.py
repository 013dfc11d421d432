"""LoRA Dataset Loader: a folder as a user types it, read again whenever it has changed."""

import asyncio
import os
import shutil
import time
import unicodedata

import comfy.model_management as mm
import execution
import hosttoys
import numpy as np
import pictures
import pytest
import queueing
import torch
from PIL import Image

from lora_workbench.nodes.dataset_loader import LoraWorkbenchDatasetLoader
from lora_workbench.nodes.host import folders
from lora_workbench.training.augmentation import Augmentation
from lora_workbench.training.folder import scan
from lora_workbench.training.images import open_image
from lora_workbench.training.wording import Wording

pytestmark = pytest.mark.comfy


@pytest.fixture
def folder(tmp_path, comfyui):
    for number in range(3):
        pictures.draw(tmp_path / f"{number}.png", (96, 64), caption=f"picture {number}")
    return tmp_path


def load(folder, **changes):
    """The node's outputs; its inputs are lists, as the executor hands them over."""
    inputs = {"folder": str(folder), "trigger_word": "zork", "resolution": 256, "repeats": 1, "hold_out": -1, **changes}
    listed = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
    return queueing.run(LoraWorkbenchDatasetLoader, **listed)


def fingerprint(folder, **linked):
    """As the executor asks for it: what is connected to other nodes is None."""
    given = {"folder": (str(folder),), "trigger_word": ("zork",), "resolution": (256,)}
    return LoraWorkbenchDatasetLoader.fingerprint_inputs(**given, **linked)


def noise(path, seed, size=256):
    """A picture unlike any other, with a caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rough = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(rough).resize((size, size), Image.Resampling.NEAREST).save(path)
    path.with_suffix(".txt").write_text(f"a star {seed}")


def test_it_gives_the_dataset_the_sheet_and_the_report(folder):
    result = load(folder, repeats=3)
    assert [example.caption for example in result["dataset"].examples] == [f"zork, picture {n}" for n in range(3)]
    assert {example.repeats for example in result["dataset"].examples} == {3}
    sheet = result["contact_sheet"]
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.shape[3] == 3 and sheet.dtype == torch.float32
    assert 0 <= sheet.min() < sheet.max() <= 1
    assert result["report"].startswith(f"3 pictures in {folder}\nTrained on: 3 pictures, 9 in an epoch")


def test_the_sheet_is_shown_on_the_node(folder):
    node = LoraWorkbenchDatasetLoader.PREPARE_CLASS_CLONE(None)
    shown = node.EXECUTE_NORMALIZED(folder=[str(folder)], resolution=[256]).ui.as_dict()["images"]
    assert [image["type"] for image in shown] == ["temp"]


def test_hold_out_is_automatic_or_a_count(folder):
    for number in range(3):
        noise(folder / f"{number}.png", number)
    assert len(load(folder)["dataset"].held_out) == 0
    assert len(load(folder, hold_out=2)["dataset"].held_out) == 2
    for number in range(3, 10):
        noise(folder / f"{number}.png", number)
    assert len(load(folder)["dataset"].held_out) == 2
    with pytest.raises(ValueError, match="hold_out must lie between 0 and 9"):
        load(folder, hold_out=10)


def test_folders_are_found_as_they_are_typed(folder, host_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    relative = pictures.draw(host_folder / "input" / "my cats" / "1.png", caption="a cat").parent
    for typed, meant in (
        (f'"{folder}"', folder),
        (f" {folder}{os.sep} ", folder),
        (f"~/{folder.name}", folder),
        ("my cats", relative),
        ("\u201cmy cats\u201d", relative),
    ):
        assert load(typed)["dataset"].folder == meant
        assert fingerprint(typed) == fingerprint(meant)


@pytest.mark.parametrize(
    "typed, error, said",
    [
        ("{}/gone", FileNotFoundError, "does not exist: check the path for typing errors"),
        ("{}/0.txt", ValueError, "is a file: give the folder it lies in"),
        ("{}/empty", ValueError, "has no pictures: put files such as .png, .jpg or .webp into it"),
    ],
)
def test_a_wrong_folder_is_told_in_one_sentence(typed, error, said, folder):
    (folder / "empty").mkdir()
    with pytest.raises(error, match=said):
        load(typed.format(folder))


def test_the_folder_is_read_again_after_every_change(folder):
    seen = [fingerprint(folder)]
    (folder / "0.txt").write_text("another caption")
    seen.append(fingerprint(folder))
    pictures.draw(folder / "3.png")
    seen.append(fingerprint(folder))
    (folder / "3.png").unlink()
    (folder / "1.txt").unlink()
    seen.append(fingerprint(folder))
    pictures.draw(folder / "10_more" / "4.png")
    seen.append(fingerprint(folder))
    os.utime(folder / "10_more" / "4.png", ns=(1, 1))
    seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen)
    assert fingerprint(folder) == seen[-1]
    assert fingerprint(folder / "gone") == fingerprint(folder / "gone")


def test_a_big_folder_stays_quick(tmp_path, comfyui):
    for number in range(1500):
        noise(tmp_path / f"{number}.png", number, 64)
    started = time.process_time()
    fingerprint(tmp_path)
    assert time.process_time() - started < 1
    result = load(tmp_path)
    assert time.process_time() - started < 15
    assert len(result["dataset"].examples) + len(result["dataset"].held_out) == 1500
    assert result["contact_sheet"].shape[1] < 8000


@pytest.mark.parametrize(
    "typed",
    [
        "Kätzchen im Schnee/älter",
        "Kätzchen im Schnee\\älter",
        '"Kätzchen im Schnee\\älter\\"',
        "\tKätzchen im Schnee/älter \n",
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_umlauts_spaces_and_backslashes_are_understood_however_they_are_written(host_folder, typed, form):
    folder = host_folder / "input" / "Kätzchen im Schnee" / "älter"
    pictures.draw(folder / "1.png", caption="x")
    dataset = load(unicodedata.normalize(form, typed))["dataset"]
    assert dataset.folder.samefile(folder) and len(dataset.examples) == 1


def test_a_folder_saved_before_there_were_more_inputs_is_read_as_before(folder):
    clone = LoraWorkbenchDatasetLoader.PREPARE_CLASS_CLONE(None)
    with torch.inference_mode():
        dataset, *_ = clone.EXECUTE_NORMALIZED(folder=[str(folder)], trigger_word=["zork"]).args
    same = load(folder, resolution=1024)["dataset"]
    assert dataset == same and dataset == scan(folder, trigger_word="zork")


def test_every_setting_reaches_the_dataset(folder):
    settings = {
        "extra_resolutions": "128, 192",
        "largest_enlargement": 2.0,
        "background": " #808080",
        "weight": 0.5,
        "shuffle_tags": True,
        "keep_first": 2,
        "tag_dropout": 0.1,
        "caption_dropout": 0.05,
        "variants": 4,
        "crop_jitter": 0.1,
        "flip": True,
        "colour": 0.05,
        "fill_masked": True,
    }
    first = next(folder.glob("*.png"))
    first.with_name(f"{first.stem}_mask.png").write_bytes(first.read_bytes())
    dataset = load(folder, **settings)["dataset"]
    assert dataset.resolutions == (128, 192, 256) and dataset.background == "#808080"
    assert [e.fill_masked for e in dataset.examples if e.mask] == [True]
    assert dataset.largest_enlargement == 2.0 and {e.weight for e in dataset.examples} == {0.5}
    assert dataset.wording == Wording(True, 2, 0.1, 0.05) and dataset.augmentation == Augmentation(4, 0.1, True, 0.05)


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"extra_resolutions": "big"}, "extra_resolutions is 'big'"),
        ({"background": "sky"}, "background is 'sky'"),
        ({"folder": " "}, "folder is empty: type the folder"),
        ({"flip": True, "variants": 1}, "variants is 1"),
    ],
)
def test_a_setting_that_cannot_be_is_told_in_one_sentence(folder, setting, said):
    with pytest.raises(ValueError, match=said):
        load(**{"folder": folder, **setting})


def test_loaders_in_a_row_make_one_dataset_of_several_concepts(folder, tmp_path_factory):
    places = [pictures.draw(tmp_path_factory.mktemp(name) / "1.png", caption=f"a {name}").parent for name in "abc"]
    first = load(places[0], trigger_word="blip", repeats=5)["dataset"]
    second = load(places[1], role="regularization", weight=0.5, dataset=first)["dataset"]
    third = load(places[2], role="validation", dataset=second)["dataset"]
    whole = load(folder, dataset=third)
    assert [(e.caption, e.repeats, e.weight, e.role) for e in whole["dataset"].examples[:2]] == [
        ("blip, a a", 5, 1.0, "train"),
        ("a b", 1, 0.5, "regularization"),
    ]
    assert len(whole["dataset"].examples) == 5 and [e.caption for e in whole["dataset"].held_out] == ["zork, a c"]
    assert whole["dataset"].trigger_word == "blip, zork" and whole["dataset"].folder == folder


@pytest.fixture
def handed_over(host_folder):
    """Two pictures, their captions and masks as other nodes hand them over, and where they are kept."""
    torch.manual_seed(0)
    mask = torch.zeros(1, 64, 96)
    mask[:, :, :48] = 1
    given = {
        "images": [torch.rand(1, 64, 96, 3), torch.rand(1, 64, 96, 3)],
        "captions": ["a star", "a moon"],
        "masks": [mask, mask],
    }
    kept = host_folder / "output" / "lora_workbench" / "datasets"
    yield given, kept
    shutil.rmtree(kept, ignore_errors=True)


def test_pictures_from_other_nodes_become_a_dataset(handed_over):
    given, kept = handed_over
    dataset = load("../../nowhere", **given)["dataset"]
    assert dataset.folder.parent == kept and [e.caption for e in dataset.examples] == ["zork, a star", "zork, a moon"]
    assert all(e.mask for e in dataset.examples)
    pixels = np.asarray(open_image(dataset.examples[0].path))
    assert np.array_equal(pixels, (given["images"][0][0].numpy() * 255).astype(np.uint8))
    assert load("", **given)["dataset"] == dataset and len(list(kept.iterdir())) == 1


def test_a_batch_of_pictures_is_as_good_as_a_list(handed_over):
    given, _ = handed_over
    batch = {
        "images": [torch.cat(given["images"])],
        "captions": given["captions"],
        "masks": [torch.cat(given["masks"])],
    }
    assert load("", **batch)["dataset"] == load("", **given)["dataset"]


def test_edited_captions_of_handed_over_pictures_are_noticed_and_new_pictures_are_no_edit(handed_over):
    given, _ = handed_over
    before = fingerprint("", images=(None,))
    folder = load("", **given)["dataset"].folder
    assert fingerprint("", images=(None,)) == before
    (folder / "00001.txt").write_text("a better caption")
    assert fingerprint("", images=(None,)) != before
    assert load("", **given)["dataset"].examples[0].caption == "zork, a better caption"


@pytest.mark.parametrize("name", ["captions", "masks"])
def test_captions_or_masks_without_pictures_are_refused(folder, handed_over, name):
    with pytest.raises(ValueError, match=f"{name} is connected but images is not: connect images too"):
        load(folder, **{name: handed_over[0][name]})


def test_cancelling_stops_the_reading(folder):
    queueing.interrupt()
    with pytest.raises(mm.InterruptProcessingException):
        load(folder)


def test_of_a_huge_folder_only_so_many_files_are_watched_and_changes_still_show(tmp_path, comfyui):
    for number in range(30):
        (tmp_path / f"{number}.txt").touch()
    few = folders.folder_state(tmp_path, most=10)
    assert len(few) == 11 and few == folders.folder_state(tmp_path, most=10)
    os.utime(tmp_path, ns=(5, 5))  # as adding or removing a file does
    assert folders.folder_state(tmp_path, most=10) != few
    assert len(folders.folder_state(tmp_path)) == 30


def test_a_folder_that_another_node_names_is_read_every_time(folder):
    given = {"folder": (None,), "trigger_word": ("zork",)}
    seen = [LoraWorkbenchDatasetLoader.fingerprint_inputs(**given) for _ in range(2)]
    assert seen[0] != seen[1]


def test_a_link_that_goes_in_circles_does_not_stop_the_reading(folder):
    (folder / "round.png").symlink_to(folder / "round.png")
    assert fingerprint(folder) == fingerprint(folder)
    assert len(load(folder)["dataset"].examples) == 3


def test_files_that_are_not_read_do_not_count_as_changes(folder):
    before = fingerprint(folder)
    (folder / ".caption_log.json").write_text("{}")
    pictures.draw(folder / ".caption_backups" / "1.png")
    assert fingerprint(folder) == before
    pictures.draw(folder / "2_zork" / "masks" / "1.png")
    assert fingerprint(folder) != before


def test_the_executor_hands_its_inputs_over_as_the_node_expects_them(folder):
    """Through ComfyUI's own functions: widgets come as lists, what is connected is unknown to the fingerprint."""

    def ask(function, **inputs):
        inputs = {"folder": str(folder), "trigger_word": "zork", "resolution": 64, **inputs}
        data, _, v3 = execution.get_input_data(inputs, LoraWorkbenchDatasetLoader, "3", None)
        call = execution._async_map_node_over_list("1", "3", LoraWorkbenchDatasetLoader, data, function, v3_data=v3)
        (answer,) = asyncio.run(call)
        return answer

    dataset, sheet, report = ask("EXECUTE_NORMALIZED").args
    assert len(dataset.examples) == 3 and sheet.shape[0] == 1 and report.startswith("3 pictures")
    assert ask("fingerprint_inputs") == fingerprint(folder)
    assert ask("fingerprint_inputs", images=["4", 0]) != fingerprint(folder)


def test_what_is_odd_is_told_in_the_report_and_drawn_on_the_sheet(tmp_path, comfyui):
    for number in range(4):
        noise(tmp_path / f"{number}.png", number)
    plain = load(tmp_path)
    (tmp_path / "3.txt").write_text("I'm sorry, I cannot describe this picture.")
    odd = load(tmp_path)
    assert "3.png" in odd["report"] and odd["report"] != plain["report"]
    assert not torch.equal(odd["contact_sheet"], plain["contact_sheet"])


def test_no_picture_is_held_out_whose_twin_is_trained_on(tmp_path, comfyui):
    for number in range(12):
        noise(tmp_path / f"{number}.png", number)
    held = [example.path.name for example in load(tmp_path)["dataset"].held_out]
    noise(tmp_path / "twin.png", int(held[0].removesuffix(".png")))
    dataset = load(tmp_path)["dataset"]
    assert len(dataset.held_out) == 2
    assert not {held[0], "twin.png"} & {example.path.name for example in dataset.held_out}
    assert "twin.png" in [example.path.name for example in dataset.examples]


def test_tokens_are_counted_by_the_connected_clip(folder):
    (folder / "0.txt").write_text("star " * 200)
    assert "in one piece" not in load(folder)["report"]
    told = load(folder, clip=hosttoys.clip("sdxl"))["report"]
    assert "1 of 3 captions" in told and "75 tokens" in told
