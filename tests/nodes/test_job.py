"""What cannot be trained is refused in one sentence, before any picture or caption is encoded."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import comfy.model_base
import comfy.supported_models
import pytest
import queueing
import torch
from PIL import Image
from safetensors.torch import load, load_file

from lora_workbench.nodes import disk
from lora_workbench.nodes.host import folders
from lora_workbench.training.presets import ExpertSettings
from toyworld.node_pack import models

pytestmark = pytest.mark.comfy
on_both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])
on_sdxl = pytest.mark.parametrize("kind", ["sdxl"])


def refusal(trainer, **changes) -> str:
    """The sentence with which the Trainer refuses, after making sure that nothing was encoded or written."""
    with pytest.raises((ValueError, OSError)) as error:
        trainer.queue(**changes)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence and "Traceback" not in sentence
    assert trainer.asked.pictures == [] and set(trainer.asked.texts) <= {""}
    assert not list(trainer.output.rglob("*.safetensors")) and not list(trainer.loras.rglob("*.safetensors"))
    return sentence


# Values


@on_both_families
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": -3}, "steps is -3, but must be between 1 and 1000000."),
        ({"steps": 2_000_000}, "steps is 2000000, "),
        ({"rank": -1}, "rank is -1, but must be between 1 and 1024."),
        ({"rank": 5000}, "rank is 5000, "),
        ({"learning_rate": 11.0}, "learning_rate is 11.0, but must be between 1e-08 and 10.0."),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001, "),
        ({"save_every": -1}, "save_every is -1, "),
        ({"preset": "animal"}, "preset is 'animal', but must be one of 'character', 'object', "),
        ({"settings": ExpertSettings(batch_size=0)}, "batch_size is 0, "),
        ({"settings": ExpertSettings(layers="all")}, "layers is 'all', but must be one of "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_out_of_range_is_named_with_its_range(trainer, change, words):
    assert refusal(trainer, **change).startswith(words)


@on_sdxl
@pytest.mark.parametrize("name", ["", "  ", "..", "con", "NUL.txt", "///"])
def test_a_name_that_cannot_be_a_file_is_refused(trainer, name):
    assert refusal(trainer, name=name).startswith(f"name '{name}' cannot be a file name: use letters and digits")


@on_sdxl
@pytest.mark.parametrize("name", ["../x", "C:\\x", "/etc/x", "a/../../x", "..\\..\\x", "~/x", "x\0y"])
def test_a_name_that_is_a_path_stays_inside_its_folders(trainer, tmp_path, name):
    outputs = trainer.queue(name=name, steps=1)
    folder = outputs["lora_name"].replace("\\", "/").split("/")
    assert len(folder) == 2 and not set(folder[0]) & set('/\\:*?"<>|\0') and not folder[0].startswith(".")
    assert [path.parent.parent for path in trainer.loras.rglob("*.safetensors")] == [trainer.loras]
    assert {path.name for path in trainer.runs.iterdir()} == {folder[0]}
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "output", "loras"}


# Pictures


@on_sdxl
def test_a_folder_without_pictures_is_named(trainer, tmp_path):
    (tmp_path / "nothing").mkdir()
    trainer.folder = tmp_path / "nothing"
    assert "nothing has no pictures: put files such as .png" in refusal(trainer)


@on_sdxl
def test_a_dataset_without_pictures_to_train_on_is_named(trainer):
    empty = replace(trainer.dataset(), examples=())
    assert refusal(trainer, dataset=empty) == (
        f"The dataset '{trainer.folder}' has no picture to train on: add some, or hold out fewer."
    )


def cut_in_half(path):
    Image.effect_noise((128, 128), 90).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@on_both_families
def test_a_picture_that_breaks_after_the_folder_was_read_is_named_before_any_other_is_encoded(trainer):
    dataset = trainer.dataset()
    cut_in_half(trainer.folder / "3.png")
    assert "3.png cannot be read as a picture" in refusal(trainer, dataset=dataset)


@on_sdxl
def test_a_picture_that_cannot_be_read_is_noted_and_the_others_are_trained_on(trainer):
    cut_in_half(trainer.folder / "3.png")
    assert any("3.png cannot be read as a picture" in note for note in trainer.dataset().notes)
    assert "Pictures: 3 trained, 0 held out." in trainer.queue(steps=1)["report"]


@on_sdxl
def test_a_folder_in_which_no_picture_can_be_read_is_named(trainer):
    for path in trainer.folder.glob("*.png"):
        cut_in_half(path)
    sentence = refusal(trainer)
    assert sentence.startswith("None of the pictures in ") and ".png cannot be read as a picture" in sentence


@on_sdxl
def test_a_picture_that_was_deleted_since_the_folder_was_read_is_named(trainer):
    dataset = trainer.dataset()
    (trainer.folder / "2.png").unlink()
    sentence = refusal(trainer, dataset=dataset)
    assert "2.png cannot be read" in sentence and "load the dataset again" in sentence


# The disk


@on_sdxl
@pytest.mark.parametrize("which", ["loras", "output"])
def test_a_folder_that_cannot_be_written_is_named(trainer, which):
    """A file in its place cannot be written as a folder by anyone, not even by root."""
    place = getattr(trainer, which)
    place.write_text("")
    with pytest.raises(OSError, match="cannot be written .*: allow writing to it") as error:
        trainer.queue()
    assert str(place) in str(error.value) and trainer.asked.pictures == []


@on_sdxl
def test_a_path_too_long_for_windows_is_said_before_training_and_leaves_the_name_free(trainer, monkeypatch):
    def touch(path, real=Path.touch, **how):
        if len(str(path)) > 259:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        real(path, **how)

    monkeypatch.setattr(Path, "touch", touch)
    room = (259 - len(f"{trainer.loras}//_000004.safetensors")) // 2
    sentence = refusal(trainer, name="n" * (room + 4))
    assert (
        f"in '{trainer.loras}' is " in sentence and " characters too long for this system: shorten the name" in sentence
    )
    over = int(sentence.split(" is ")[1].split()[0])
    assert 7 <= over <= 8 and not any(trainer.loras.iterdir())
    monkeypatch.undo()
    assert Path(trainer.queue(name="n" * (room + 4), steps=1)["lora_name"]).parent.name == "n" * (room + 4)


@on_sdxl
def test_a_trigger_word_too_long_for_a_file_is_said_before_training(trainer):
    words = {"trigger_word": "\u5b57" * 90}
    dataset = trainer.dataset()
    examples = [*dataset.examples[:-1], replace(dataset.examples[-1], **words)]
    sentence = refusal(
        trainer, dataset=replace(dataset, examples=tuple(examples)), settings=ExpertSettings(new_tokens=1)
    )
    assert " bytes, too many for the disk of " in sentence and sentence.endswith(
        "shorten the name or the trigger word."
    )


@on_sdxl
def test_a_new_run_whose_words_would_replace_those_of_another_is_refused_and_older_ones_go_on(trainer, monkeypatch):
    words = {"settings": ExpertSettings(new_tokens=1)}
    trainer.queue(name="my star", steps=1, **words)
    (embedding,) = folders.embeddings_folder().glob("my_star/*")
    kept = embedding.read_bytes()
    with pytest.raises(
        ValueError, match=r"^The new words of 'my_star' .* those of 'my star', .*: choose another name\.$"
    ):
        trainer.queue(name="my_star", steps=1, seed=6, **words)
    assert embedding.read_bytes() == kept
    with monkeypatch.context() as older:
        older.setattr(disk, "_check_words", lambda job: None)
        trainer.queue(name="my_star", steps=1, seed=6, **words)
    assert trainer.queue(name="my_star", steps=2, seed=6, **words)["lora_name"] == "my_star/my_star_000002.safetensors"
    assert embedding.read_bytes() != kept


@on_sdxl
@pytest.mark.parametrize("file", ["star_000001.safetensors", "preview.safetensors", "mine.safetensors"])
def test_embeddings_of_the_users_own_are_never_written_over(trainer, file):
    name = f"own {file.partition('.')[0]}"
    words, folder = {"settings": ExpertSettings(new_tokens=1)}, folders.embeddings_folder() / name.replace(" ", "_")
    folder.mkdir()
    (folder / file).write_bytes(b"the user's own")
    assert refusal(trainer, name=name, steps=1, **words).endswith("choose another name, or move them.")
    assert (folder / file).read_bytes() == b"the user's own" and len(list(folder.iterdir())) == 1
    trainer.queue(name=name, steps=1)  # without new words nothing is written there
    (folder / file).unlink()
    trainer.queue(name=name, steps=1, seed=2, **words)


@on_sdxl
def test_a_run_whose_state_was_deleted_keeps_its_files_and_a_new_one_begins(trainer):
    trainer.queue(steps=4, save_every=2)
    kept = {path: path.read_bytes() for path in (trainer.loras / "star").iterdir()}
    for path in (trainer.runs / "star").glob("state*.safetensors"):
        path.unlink()
    assert "Nothing to train" in trainer.queue(steps=4, save_every=2)["report"]
    report = trainer.queue(steps=6, save_every=2)["report"]
    assert "Trained 6 steps, up to step 6." in report and "The state of 'star' is gone" in report
    assert {path: path.read_bytes() for path in (trainer.loras / "star").iterdir()} == kept
    assert "Nothing to train" in trainer.queue(steps=6, save_every=2)["report"]


@on_sdxl
@pytest.mark.parametrize("step", [2, 4])
def test_a_lora_file_that_cannot_be_read_is_set_aside_and_the_newest_written_again(trainer, step):
    trainer.queue(steps=4, save_every=2)
    newest, damaged = trainer.lora(4).read_bytes(), trainer.lora(step)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    report = trainer.queue(steps=4, save_every=2)["report"]
    assert f"The file 'star/star_00000{step}.safetensors' could not be read" in report
    assert damaged.with_name(f"{damaged.name}.damaged").is_file()
    assert set(load_file(trainer.lora(4))) == set(load(newest))
    assert trainer.lora(2).exists() == (step == 4)
    assert "Trained 2 steps, up to step 6." in trainer.queue(steps=6, save_every=2)["report"]


@on_sdxl
def test_the_longest_name_in_any_script_is_trained(trainer):
    name = trainer.queue(name="\u661f" * 300, steps=1, settings=ExpertSettings(ema=0.9))["lora_name"]
    assert (trainer.loras / name).is_file() and len(Path(name).name.encode()) > 100


@on_both_families
def test_a_disk_that_is_too_small_is_named_with_what_is_missing(trainer, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(2**40, 2**40 - 2**20, 2**20))
    sentence = refusal(trainer, save_every=1, steps=5000)
    assert sentence.startswith(f"The disk of '{trainer.loras}' has 1 MB free, but this training writes about ")
    assert sentence.endswith("free some space, or raise save_every.")


@on_sdxl
@pytest.mark.parametrize(
    "settings", [{}, {"conv_rank": 8, "text_encoder_rate": 1.0}, {"kind": "loha", "ema": 0.9}], ids=str
)
def test_the_disk_is_asked_for_what_the_files_and_states_come_to(trainer, monkeypatch, settings):
    asked, needed = [], disk.needed
    monkeypatch.setattr(disk, "needed", lambda job: asked.append(needed(job)) or asked[-1])
    trainer.queue(steps=2, save_every=1, settings=ExpertSettings(save_precision="fp32", **settings))
    ((files, work),) = asked
    written = sum(path.stat().st_size - len(metadata(path)) for path in trainer.loras.rglob("*.safetensors"))
    assert 0.7 * written < files <= written
    assert work >= sum(path.stat().st_size for path in trainer.state().parent.glob("state*.safetensors"))


@on_sdxl
def test_a_run_that_goes_on_asks_for_no_room_that_it_has_taken(trainer, monkeypatch):
    asked, needed = [], disk.needed
    monkeypatch.setattr(disk, "needed", lambda job: asked.append(needed(job)) or asked[-1])
    trainer.queue(steps=2, save_every=1)
    trainer.queue(steps=3, save_every=1)
    (files, work), (files_of_one, states) = asked
    assert files_of_one == files / 2
    pictures, texts = (len(list(folders.cache_folder().glob(f"{kind}/*.safetensors"))) for kind in ("latents", "text"))
    assert work - states == pictures * disk.LARGEST_LATENTS + texts * disk.LARGEST_TEXT > 0


def metadata(path) -> bytes:
    """The header of a file: the toy's layers are so small that it is the larger part."""
    with open(path, "rb") as file:
        return file.read(8 + int.from_bytes(file.read(8), "little"))


@on_sdxl
def test_with_nothing_left_to_train_a_full_disk_is_no_hindrance(trainer, monkeypatch):
    trainer.queue(steps=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: pytest.fail("nothing is written"))
    assert "Nothing to train" in trainer.queue(steps=1)["report"]


# Models


def another_model(name: str):
    """A tiny MODEL of a family, or a variant, that cannot be trained."""
    tiny, kinds = dict(models.TINY_SDXL), comfy.model_base.ModelType
    config, kind = {
        "refiner": (comfy.supported_models.SDXLRefiner(tiny), comfy.model_base.SDXLRefiner),
        "SDXL with a wider pooled text": (
            comfy.supported_models.SDXL({**tiny, "adm_in_channels": 96 + 6 * 256}),
            comfy.model_base.SDXL,
        ),
        "inpainting SDXL": (comfy.supported_models.SDXL({**tiny, "in_channels": 9}), comfy.model_base.SDXL),
        "FLUX Fill": (comfy.supported_models.Flux({**models.TINY_FLUX, "in_channels": 96}), comfy.model_base.Flux),
    }[name]
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode():
        base = kind(config, device="cpu") if name == "FLUX Fill" else kind(config, model_type=kinds.EPS, device="cpu")
    cpu = torch.device("cpu")
    return models.PATCHER(base, load_device=cpu, offload_device=cpu)


@on_sdxl
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refiner", "This MODEL is a SDXLRefiner, which only finishes pictures that another model began, "),
        ("inpainting SDXL", "This SDXL MODEL is an inpainting, editing or control variant, "),
        ("FLUX Fill", "This FLUX.1 MODEL is an inpainting, editing or control variant, "),
    ],
)
def test_a_model_that_cannot_be_trained_is_named(trainer, name, words):
    assert refusal(trainer, model=another_model(name)).startswith(words)


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [
        ("sdxl", "flux", "The CLIP gives text 64 wide, but this SDXL model takes 128: wire the CLIP that belongs to"),
        ("flux", "sdxl", "The CLIP gives text 128 wide, but this FLUX.1 model takes 64: wire the CLIP that belongs to"),
    ],
)
def test_a_clip_of_another_family_is_refused(trainer, other, words):
    _, clip, _ = queueing.shared_models(other)
    counted, _, asked = queueing.counted(clip, trainer.vae)
    assert refusal(trainer, clip=counted).startswith(words)
    assert asked.texts == [""]


@on_sdxl
def test_a_clip_whose_pooled_text_has_another_width_is_refused(trainer):
    sentence = refusal(trainer, model=another_model("SDXL with a wider pooled text"))
    assert sentence.startswith("The CLIP gives a pooled text 64 wide, but this SDXL model takes 96: wire the CLIP")


@on_both_families
def test_a_vae_of_another_family_is_refused(kind, trainer):
    _, _, vae = queueing.shared_models({"sdxl": "flux", "flux": "sdxl"}[kind])
    words = {"sdxl": "16 channels, but this SDXL model takes 4", "flux": "4 channels, but this FLUX.1 model takes 16"}
    sentence = refusal(trainer, vae=vae)
    assert words[kind] in sentence and sentence.endswith("wire the VAE that belongs to the model.")


# Runs


@on_sdxl
def test_fewer_steps_than_the_first_checkpoint_is_explained(trainer):
    trainer.queue(steps=4, save_every=4)
    with pytest.raises(ValueError) as error:
        trainer.queue(steps=3, save_every=4)
    assert str(error.value) == (
        "The first checkpoint of the run 'star' is at step 4, so there is none within 3 steps: "
        "ask for more steps, or set resume to 'start over'."
    )


@on_sdxl
def test_files_that_were_deleted_are_written_again_from_the_state_and_training_goes_on_from_it(trainer):
    asked = {"save_every": 1, "settings": ExpertSettings(ema=0.9, new_tokens=1)}
    trainer.queue(name="whole", steps=3, **asked)
    trainer.queue(steps=2, **asked)
    files = [trainer.lora(2), trainer.lora(2).with_stem("star_000002_ema")]
    before = [load_file(path) for path in files]
    shutil.rmtree(trainer.loras / "star")
    outputs = trainer.queue(steps=2, **asked)
    assert "The LoRA files of this run were gone: that of step 2 was written again." in outputs["report"]
    assert "File proved: " in outputs["report"] and outputs["lora_name"] == "star/star_000002.safetensors"
    assert [entry.step for entry in outputs["checkpoints"].entries] == [2]
    for path, tensors in zip(files, before, strict=True):
        assert_same(load_file(path), tensors)
    shutil.rmtree(trainer.loras / "star")
    trainer.queue(steps=3, **asked)
    assert_same(load_file(trainer.lora(3)), load_file(trainer.lora(3, "whole")))


def assert_same(some, others):
    assert some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


@on_sdxl
def test_files_that_no_state_holds_are_missed_in_one_sentence(trainer):
    trainer.queue(steps=2)
    shutil.rmtree(trainer.loras / "star")
    with pytest.raises(
        ValueError, match=r"are gone from .*: ask for 2 steps, and that step is written again, or .*\.$"
    ):
        trainer.queue(steps=1)
    for state in (trainer.runs / "star").glob("state*"):
        state.unlink()
    with pytest.raises(
        ValueError, match=r"^The files of the run 'star' are gone from .*: set resume to 'start over'\.$"
    ):
        trainer.queue(steps=2)
    assert trainer.queue(steps=1, resume="start over")["lora_name"] == "star_v2/star_v2_000001.safetensors"


@on_sdxl
def test_what_masks_leave_out_makes_another_training_only_where_there_are_masks(trainer):
    other = ExpertSettings(mask_floor=0.5)
    trainer.queue(steps=1)
    assert trainer.queue(steps=1, settings=other)["report"].startswith("LoRA 'star'\n")
    (trainer.folder / "masks").mkdir()
    Image.new("L", (128, 128), 255).save(trainer.folder / "masks" / "0.png")
    assert any(example.mask for example in trainer.dataset().examples)
    names = [trainer.queue(steps=1, settings=wanted)["lora_name"] for wanted in (ExpertSettings(), other)]
    assert [name.split("/")[0] for name in names] == ["star_v2", "star_v3"]


@on_sdxl
def test_checkpoints_are_made_every_so_many_steps_and_at_the_end(trainer):
    outputs = trainer.queue(steps=5, save_every=2)
    assert [entry.step for entry in outputs["checkpoints"].entries] == [2, 4, 5]


@on_both_families
@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_the_file_has_the_precision_that_was_asked_for(trainer, precision, dtype):
    from lora_workbench.nodes.host import loras

    trainer.queue(steps=1, settings=ExpertSettings(save_precision=precision))
    tensors = loras.read_lora(trainer.lora(1))
    # Alpha is one number, which need not be rounded.
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")} == {dtype}
