"""Datasets that use everything, through the Trainer: masks, regularization, variants, wordings and several sizes."""

import json
from dataclasses import replace

import pytest
import queueing
import safetensors.torch
import torch
from PIL import Image

from lora_workbench.nodes import session
from lora_workbench.training.augmentation import Augmentation
from lora_workbench.training.batches import Batches
from lora_workbench.training.dataset import REGULARIZATION, joined
from lora_workbench.training.folder import scan
from lora_workbench.training.presets import ExpertSettings
from lora_workbench.training.wording import Wording

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])
EVERYTHING = {
    "resolutions": (64, 128),
    "wording": Wording(shuffle_tags=True, tag_dropout=0.3, caption_dropout=0.3),
    "augmentation": Augmentation(variants=3, crop_jitter=0.5, flip=True, colour=0.2),
}
KEPT_OUTSIDE = ExpertSettings(mask_floor=0.0, mask_preservation=1.0)


def with_masks(trainer) -> None:
    """Gives every picture a mask of its left half."""
    for path in list(trainer.folder.glob("*.png")):
        with Image.open(path) as picture:
            mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, mask.width // 2, mask.height))
        mask.save(path.with_name(f"{path.stem}_mask.png"))


def regularization(trainer):
    folder = queueing.draw_folder(trainer.folder.parent / "class", 2)
    for path in folder.glob("*.txt"):
        path.write_text("a shape, plain", encoding="utf-8")
    return scan(folder, role=REGULARIZATION, weight=0.5, resolution=queueing.RESOLUTION)


@both_families
def test_a_run_with_everything_on_resumes_to_the_file_of_one_that_never_stopped(kind, trainer, tmp_path, monkeypatch):
    with_masks(trainer)
    dataset = joined([regularization(trainer), trainer.dataset(**EVERYTHING, fill_masked=True)])
    trainer.queue(dataset=dataset, steps=3, save_every=100, settings=KEPT_OUTSIDE)
    outputs = trainer.queue(dataset=dataset, steps=6, save_every=100, settings=KEPT_OUTSIDE)
    assert "4 trained, 2 for regularization, 0 held out" in outputs["report"]
    previewed = {"", "zork, picture 0"}
    assert trainer.asked.pictures == [] and set(trainer.asked.texts) <= previewed, "the rest had been encoded"
    resumed = queueing.sha256(trainer.lora(6)), queueing.sha256(trainer.state())
    straight = queueing.trainer(kind, tmp_path / "another", monkeypatch, models=queueing.shared_models(kind))
    straight.queue(dataset=dataset, steps=6, save_every=100, settings=KEPT_OUTSIDE)
    assert resumed == (queueing.sha256(straight.lora(6)), queueing.sha256(straight.state()))


@pytest.mark.parametrize("kind", ["sdxl"])
def test_what_the_trainer_learns_from_is_what_the_dataset_says(trainer, monkeypatch):
    seen = []

    class Seen(Batches):
        def __getitem__(self, number):
            seen.append(super().__getitem__(number))
            return seen[-1]

    monkeypatch.setattr(session, "Batches", Seen)
    with_masks(trainer)
    dataset = joined([regularization(trainer), trainer.dataset(**EVERYTHING)])
    outputs = trainer.queue(dataset=dataset, steps=40, save_every=100)
    assert {weight for batch in seen for weight in batch.weights.tolist()} == {1.0, 0.5}
    assert len({batch.latents.shape[2:].numel() > 64 for batch in seen}) == 2, "both sizes are trained at"
    concept = [batch for batch in seen if batch.weights.item() == 1]
    assert all(0 < batch.masks.mean() < 1 and batch.masks.shape[2:] == batch.latents.shape[2:] for batch in concept)
    assert all(batch.masks is None or batch.masks.min() == 1 for batch in seen if batch.weights.item() != 1)
    with safetensors.safe_open(trainer.lora(40), "pt") as file:
        tags = json.loads(file.metadata()["ss_tag_frequency"])
    assert "a shape" not in json.dumps(tags), "regularization captions are no tags of the concept"
    assert outputs["lora_name"].endswith("star_000040.safetensors")


@pytest.mark.parametrize("kind", ["sdxl"])
def test_masks_weights_and_wordings_decide_which_run_it_is(trainer):
    plain = trainer.dataset()
    assert trainer.queue(dataset=plain, steps=2)["lora_name"].startswith("star")
    changes = [
        replace(plain, wording=Wording(caption_dropout=0.5)),
        replace(plain, augmentation=Augmentation(variants=2, flip=True)),
        replace(plain, examples=tuple(replace(example, weight=0.5) for example in plain.examples)),
    ]
    with_masks(trainer)
    changes.append(trainer.dataset())
    names = {
        trainer.queue(dataset=changed, steps=2)["lora_name"].replace("\\", "/").split("/")[0] for changed in changes
    }
    assert names == {"star_v2", "star_v3", "star_v4", "star_v5"}


@pytest.mark.parametrize("kind", ["sdxl"])
def test_regularization_pictures_alone_are_refused(trainer):
    with pytest.raises(ValueError, match="has no picture to train on"):
        trainer.queue(dataset=regularization(trainer))


@pytest.mark.parametrize("kind", ["sdxl"])
def test_a_mask_changes_what_is_learnt(trainer):
    without = trainer.dataset()
    trainer.queue(dataset=without, steps=2)
    with_masks(trainer)
    trainer.queue(dataset=trainer.dataset(), name="masked", steps=2)
    assert not same_weights(trainer, "star", "masked")


@both_families
def test_nothing_of_what_is_painted_over_reaches_the_file(trainer):
    with_masks(trainer)
    names = ("star", "noisy")
    for name in names:
        trainer.queue(dataset=trainer.dataset(fill_masked=True), name=name, steps=3, settings=KEPT_OUTSIDE)
        for path in trainer.folder.glob("?.png"):
            with Image.open(path) as picture:
                changed = Image.effect_noise(picture.size, 100).convert("RGB")
                left = 0, 0, picture.width // 2, picture.height
                changed.paste(picture.crop(left), left)
            changed.save(path)
    assert same_weights(trainer, *names, step=3)
    trainer.queue(dataset=trainer.dataset(), name="seen", steps=3, settings=KEPT_OUTSIDE)
    assert not same_weights(trainer, "star", "seen", step=3), "unpainted, the network sees it"


@pytest.mark.parametrize("kind", ["sdxl"])
def test_the_base_kept_outside_of_masks_changes_what_is_learnt_with_trained_text_too(trainer):
    with_masks(trainer)
    text = {"text_encoder_rate": 1.0, "new_tokens": 1, "checkpointing": "on"}
    for trained, more in (("network", {}), ("text", text)):
        for weight in (0.0, 1.0):
            settings = replace(KEPT_OUTSIDE, mask_preservation=weight, **more)
            trainer.queue(dataset=trainer.dataset(), name=f"{trained}{weight:.0f}", steps=3, settings=settings)
        assert not same_weights(trainer, f"{trained}0", f"{trained}1", step=3)


def same_weights(trainer, one: str, other: str, step: int = 2) -> bool:
    first, second = (safetensors.torch.load_file(trainer.lora(step, name)) for name in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
