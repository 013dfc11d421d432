"""What goes around the loop of a training, through the Trainer node: limits of time, averages, requests, trouble."""

import json
from dataclasses import replace

import comfy.model_management as mm
import folder_paths
import numpy as np
import pytest
import queueing
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_workbench.nodes import previews, session, time_limit
from lora_workbench.nodes.host import controls, loras
from lora_workbench.nodes.host.memory import OUT_OF_MEMORY
from lora_workbench.nodes.trainer import LoraWorkbenchTrainer
from lora_workbench.training import spoiling
from lora_workbench.training.embeddings import embedding_names, worded
from lora_workbench.training.presets import ExpertSettings

pytestmark = [pytest.mark.comfy, pytest.mark.parametrize("kind", ["sdxl"])]


@pytest.fixture
def trainer(kind, tmp_path, monkeypatch, comfyui) -> queueing.Trainer:
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path / "embeddings")], {".safetensors"})
    )
    return queueing.trainer(kind, tmp_path, monkeypatch, models=queueing.shared_models(kind))


def steps_of(outputs) -> list[int]:
    return [entry.step for entry in outputs["checkpoints"].entries]


def preview(trainer, step):
    (path,) = (trainer.runs / "star" / "previews").glob(f"{step:06d}_*.png")
    return np.asarray(Image.open(path))


def same_tensors(one, other) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def as_slow_as(seconds, monkeypatch):
    """Every trial step is said to take so many seconds."""
    real = session.preflight
    monkeypatch.setattr(session, "preflight", lambda *given: replace(real(*given), seconds=seconds))


# Limits of time


def test_a_limit_of_time_fits_the_steps_to_the_speed_that_was_measured(trainer, monkeypatch):
    as_slow_as(600.0, monkeypatch)
    outputs = trainer.queue(steps=1000, save_every=0, stop_after=65.0)
    assert steps_of(outputs)[-1] == 6
    assert "6 of 1000 steps fit into 65 minutes." in outputs["report"]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_keeps_the_steps_its_limit_came_to_and_ends_as_if_it_was_never_stopped(
    trainer, tmp_path, monkeypatch, schedule
):
    as_slow_as(600.0, monkeypatch)
    limited = {"steps": 1000, "save_every": 0, "stop_after": 65.0, "settings": ExpertSettings(schedule=schedule)}
    with queueing.at_forward(trainer.model, 2, queueing.interrupt), pytest.raises(mm.InterruptProcessingException):
        trainer.queue(**limited)
    as_slow_as(6.0, monkeypatch)
    assert steps_of(trainer.queue(**limited))[-1] == 6
    stopped = queueing.sha256(trainer.lora(6))
    as_slow_as(600.0, monkeypatch)
    whole = queueing.trainer("sdxl", tmp_path / "whole", monkeypatch, models=queueing.shared_models("sdxl"))
    whole.queue(**limited)
    assert queueing.sha256(whole.lora(6)) == stopped


def test_a_limit_counts_what_is_left_and_more_steps_are_fitted_anew(trainer, monkeypatch):
    assert steps_of(trainer.queue(steps=4)) == [2, 4]
    as_slow_as(600.0, monkeypatch)
    limited = trainer.queue(steps=1000, save_every=0, stop_after=35.0)
    assert steps_of(limited)[-1] == 7 and "3 of 996 steps fit into 35 minutes." in limited["report"]
    as_slow_as(0.01, monkeypatch)
    assert steps_of(trainer.queue(steps=9, stop_after=35.0))[-1] == 9


def test_a_limit_too_short_for_one_step_is_said_before_training(trainer, monkeypatch):
    as_slow_as(600.0, monkeypatch)
    with pytest.raises(ValueError, match=r"stop_after is 1 minutes, but one step and one checkpoint take"):
        trainer.queue(stop_after=1.0)


def test_an_earlier_queueings_previews_and_validation_count_in_a_later_limit(trainer, monkeypatch):
    dataset = trainer.dataset(hold_out=1)
    trainer.queue(steps=4, dataset=dataset)
    record = trainer.runs / "star" / "record.json"
    facts = json.loads(record.read_text("utf-8"))
    assert 0 < facts["seconds_per_validation"] < 60
    facts |= {"seconds_per_validation": 200.0, "seconds_per_preview": 100.0}
    record.write_text(json.dumps(facts), "utf-8")
    as_slow_as(60.0, monkeypatch)
    with pytest.raises(ValueError, match="one step and one checkpoint take 6.0 minutes"):
        trainer.queue(steps=1000, dataset=dataset, stop_after=5.9)
    limited = trainer.queue(steps=1000, dataset=dataset, save_every=500, stop_after=8.5)
    assert "3 of 996 steps fit into 8.5 minutes." in limited["report"]


def test_a_machine_that_becomes_slower_ends_in_time_and_goes_on_when_queued_again(trainer, monkeypatch):
    as_slow_as(0.0, monkeypatch)
    monkeypatch.setattr(time_limit, "OVERRUN", 0.0)
    outputs = trainer.queue(steps=4, stop_after=1.0)
    assert steps_of(outputs) == [1] and "The 1 minutes of stop_after were over at step 1 of 4: " in outputs["report"]
    monkeypatch.setattr(time_limit, "OVERRUN", 1.1)
    assert steps_of(trainer.queue(steps=4, stop_after=1.0)) == [1, 2, 4]


# Beginning with another LoRA


def test_a_training_can_begin_with_a_lora_of_another_rank(trainer):
    first = trainer.queue(name="first", rank=2, steps=4)
    outputs = trainer.queue(name="second", rank=4, steps=1, learning_rate=1e-8, start_from=first["lora_name"])
    assert "first_000004.safetensors" in outputs["report"]

    def change(name):
        patched, _ = loras.apply(trainer.model, trainer.clip, loras.read_lora(name), 1.0, 1.0)
        key = sorted(patched.patches)[0]
        adapter = patched.patches[key][0][1]
        up, down, alpha = adapter.weights[:3]
        return (alpha / down.shape[0]) * up.float() @ down.float()

    before, after = change(trainer.lora(4, "first")), change(trainer.lora(1, "second"))
    assert before.norm() > 0
    assert torch.allclose(after, before, atol=2e-3 * float(before.abs().max()))


# Text encoders and new words


def test_the_preview_of_trained_text_encoders_is_what_load_lora_makes_with_model_and_clip(trainer):
    outputs = trainer.queue(settings=ExpertSettings(text_encoder_rate=1.0), preview_prompts="zork on a hill")
    layers = {name.split(".")[0] for name in loras.read_lora(trainer.lora(4))}
    assert {name[:9] for name in layers} == {"lora_unet", "lora_te1_", "lora_te2_"}
    assert f"File proved: {len(layers)} of {len(layers)} layers load in ComfyUI" in outputs["report"]
    made = queueing.by_the_graphs_nodes(trainer, "zork on a hill", outputs["lora_name"])
    assert np.array_equal(preview(trainer, 4), made)


def test_a_new_word_is_an_embedding_that_prompts_can_use_at_once(trainer, tmp_path):
    outputs = trainer.queue(settings=ExpertSettings(new_tokens=2), preview_prompts="zork on a hill")
    written = tmp_path / "embeddings" / "star" / "star_000004.safetensors"
    embedding = load_file(written)
    assert {name: tuple(tensor.shape)[0] for name, tensor in embedding.items()} == {"clip_l": 2, "clip_g": 2}
    bundled = load_file(trainer.lora(4))
    assert torch.equal(bundled["bundle_emb.zork.clip_l"], embedding["clip_l"])
    prompt = worded("zork on a hill", embedding_names(["zork"], outputs["lora_name"]))
    assert "embedding:star/star_000004" in prompt
    assert np.array_equal(preview(trainer, 4), queueing.by_the_graphs_nodes(trainer, prompt, outputs["lora_name"]))
    assert not np.array_equal(
        preview(trainer, 4), queueing.by_the_graphs_nodes(trainer, "zork on a hill", outputs["lora_name"])
    )
    assert "In prompts write embedding:star/star_000004 where you mean zork." in outputs["report"]


def test_a_training_that_begins_with_a_lora_goes_on_with_its_words_also_when_queued_again(trainer):
    settings = ExpertSettings(new_tokens=2, token_rate=30.0)
    first = trainer.queue(name="first", steps=2, learning_rate=0.01, settings=settings)["lora_name"]
    more = {"settings": settings, "start_from": first, "save_every": 1, "learning_rate": 1e-6, "seed": 6}
    outputs = trainer.queue(name="halves", steps=1, **more)
    assert "The word 'zork' goes on with its embedding." in outputs["report"]
    before, after = load_file(trainer.lora(2, "first")), load_file(trainer.lora(1, "halves"))
    for name in ("bundle_emb.zork.clip_l", "bundle_emb.zork.clip_g"):
        torch.testing.assert_close(after[name], before[name], rtol=0.01, atol=1e-3)
    trainer.queue(name="halves", steps=2, **more)
    trainer.queue(name="whole", steps=2, **more)
    assert same_tensors(trainer.lora(2, "halves"), trainer.lora(2, "whole"))


def test_a_lora_that_fits_nothing_is_refused_before_anything_is_encoded(trainer):
    other = trainer.loras / "other.safetensors"
    other.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"lora_unet_no.lora_up.weight": torch.ones(2, 1), "lora_unet_no.lora_down.weight": torch.ones(1, 2)}, other
    )
    with pytest.raises(ValueError, match=r"^'other\.safetensors' has no layer that fits this model"):
        trainer.queue(start_from="other.safetensors")
    assert not trainer.asked.pictures and not trainer.asked.texts


def test_a_kind_that_begins_as_its_own_alone_is_refused_before_anything_is_encoded(trainer):
    first = trainer.queue(steps=1)["lora_name"]
    trainer.asked.pictures.clear(), trainer.asked.texts.clear()
    for kind in ("loha", "lokr", "oft"):
        with pytest.raises(ValueError, match=rf"^'star_000001.safetensors' holds no {kind}, .*: set the kind to lora"):
            trainer.queue(name=kind, start_from=first, settings=ExpertSettings(kind=kind))
    assert not trainer.asked.pictures and not trainer.asked.texts
    trainer.queue(name="dora", steps=1, start_from=first, settings=ExpertSettings(kind="dora"))


def test_the_picker_draws_trained_text_and_new_words_as_the_previews_do(trainer, caplog):
    settings = ExpertSettings(new_tokens=1, text_encoder_rate=1.0)
    trained = trainer.queue(settings=settings, preview_prompts="zork on a hill")
    grid = (trainer.pick(trained, prompts="zork on a hill")["grid"][0].numpy() * 255).round().astype(np.uint8)
    size, gap, top = queueing.RESOLUTION, 6, 30 + 26
    for column, step in enumerate((0, 2, 4)):
        left = gap + column * (size + gap)
        assert np.array_equal(grid[top : top + size, left : left + size], preview(trainer, step)), step
    assert "lora key not loaded" not in caplog.text


def test_trained_text_goes_through_in_parts_and_with_preservation_too(trainer):
    settings = ExpertSettings(
        text_encoder_rate=1.0, new_tokens=1, preservation=0.5, class_words="star", batch_size=2, checkpointing="on"
    )

    def smaller():
        raise OUT_OF_MEMORY[0]("the device is full")

    with queueing.at_forward(trainer.model, 2, smaller):
        outputs = trainer.queue(steps=2, settings=settings)
    assert steps_of(outputs)[-1] == 2
    assert "memory ran out; the batch now goes through the model in 2 parts" in outputs["report"]


# Averages


def test_averages_are_written_proved_and_handed_on(trainer):
    outputs = trainer.queue(
        steps=6, settings=ExpertSettings(ema=0.9, average_last=2), dataset=trainer.dataset(hold_out=1)
    )
    averages = outputs["checkpoints"].averages
    assert sorted((entry.average, entry.step) for entry in averages) == [
        *(("EMA", step) for step in (2, 4, 6)),
        ("last 2", 6),
    ]
    raw, mean = load_file(trainer.lora(6)), load_file(trainer.loras / "star" / "star_last2.safetensors")
    earlier = load_file(trainer.lora(4))
    name = next(name for name in raw if name.endswith("up.weight"))
    assert torch.allclose(mean[name].float(), (raw[name].float() + earlier[name].float()) / 2, atol=1e-3)
    assert all(entry.validation for entry in averages if entry.average == "EMA")


# What the user asks for while it runs


def test_save_now_writes_a_checkpoint_that_changes_nothing_about_the_others(trainer):
    with queueing.at_forward(trainer.model, 3, lambda: controls.ask(queueing.NODE_ID, "save")):
        outputs = trainer.queue(save_every=100)
    assert steps_of(outputs) == [3, 4]
    trainer.queue(save_every=100, resume="start over")
    assert same_tensors(trainer.lora(4), trainer.lora(4, "star_v2"))


def test_preview_now_draws_the_step_and_leaves_no_file(trainer, tmp_path):
    settings = ExpertSettings(new_tokens=1)
    with queueing.at_forward(trainer.model, 3, lambda: controls.ask(queueing.NODE_ID, "preview")):
        outputs = trainer.queue(save_every=100, settings=settings)
    assert steps_of(outputs) == [4]
    assert len(list((trainer.runs / "star" / "previews").glob("000003_*.png"))) == 1
    assert not list(trainer.runs.rglob("preview.safetensors"))
    assert [path.name for path in (tmp_path / "embeddings").rglob("*.safetensors")] == ["star_000004.safetensors"]


def test_a_pause_gives_the_memory_back_and_changes_nothing(trainer, monkeypatch):
    seen = []

    def wait(asked):
        if asked.paused():
            held = [loaded.model for loaded in mm.current_loaded_models if loaded.model is not None]
            seen.append(sum(trainer.model.is_clone(patcher) for patcher in held))
            asked.ask("resume")

    monkeypatch.setattr(controls.Controls, "wait", wait)
    with queueing.at_forward(trainer.model, 2, lambda: controls.ask(queueing.NODE_ID, "pause")):
        trainer.queue()
    assert seen == [0]
    trainer.queue(resume="start over")
    assert same_tensors(trainer.lora(4), trainer.lora(4, "star_v2"))


def test_a_pause_that_is_cancelled_is_a_cancel(trainer, monkeypatch):
    def wait(asked):
        if asked.paused():
            queueing.interrupt()
            mm.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(controls.Controls, "wait", wait)
    pausing = queueing.at_forward(trainer.model, 3, lambda: controls.ask(queueing.NODE_ID, "pause"))
    with pausing, pytest.raises(mm.InterruptProcessingException):
        trainer.queue(dataset=trainer.dataset(hold_out=1))
    assert trainer.lora(3).is_file()
    assert steps_of(trainer.queue(dataset=trainer.dataset(hold_out=1)))[-1] == 4


def test_previews_are_drawn_as_often_as_was_asked_for(trainer):
    trainer.queue(save_every=1, settings=ExpertSettings(preview_every=2))
    assert sorted(int(path.name[:6]) for path in (trainer.runs / "star" / "previews").glob("*.png")) == [0, 2, 4]


def test_queueing_the_same_graph_goes_on_until_it_is_done(trainer):
    asked = LoraWorkbenchTrainer.fingerprint_inputs
    assert asked(name="star", model=None) == [""]
    with queueing.at_forward(trainer.model, 2, lambda: controls.ask(queueing.NODE_ID, "finish")):
        trainer.queue()
    assert asked(name="star") == ["star 2 of 4"]
    trainer.queue()
    assert asked(name="star") == [""]
    assert asked(name=None) != asked(name=None), "a wired name is known only when the node runs"
    trainer.lora(4).unlink()
    assert asked(name="star") == ["star 2 of 4"]


def test_another_file_to_begin_with_of_the_same_name_is_another_training(trainer):
    def told(rank):
        save_file({"x.lora_up.weight": torch.ones(rank, 2)}, trainer.loras / "begin.safetensors")
        return LoraWorkbenchTrainer.fingerprint_inputs(name="star", start_from="begin.safetensors")

    trainer.loras.mkdir(parents=True, exist_ok=True)
    assert told(2) != told(4)


# Trouble


def test_when_memory_runs_out_it_goes_on_from_the_last_step_to_the_same_file(trainer):
    def full():
        raise OUT_OF_MEMORY[0]("the device is full")

    with queueing.at_forward(trainer.model, 3, full):
        outputs = trainer.queue()
    assert "Step 2: memory ran out; every second block is now recomputed in backward." in outputs["report"]
    trainer.queue(resume="start over")
    assert same_tensors(trainer.lora(4), trainer.lora(4, "star_v2"))


def breaking_at(number, monkeypatch):
    """The first training to reach a step breaks there."""
    real, broken = session.train, []

    def breaking(denoiser, batches, adapters, config, resume, slowdown):
        for step in real(denoiser, batches, adapters, config, resume, slowdown):
            if step.number == number and not broken:
                broken.append(number)
                raise FloatingPointError("The loss was not a finite number for 3 steps in a row.")
            yield step

    monkeypatch.setattr(session, "train", breaking)


def test_a_training_that_breaks_goes_back_slows_down_and_says_so(trainer, monkeypatch):
    breaking_at(3, monkeypatch)
    outputs = trainer.queue()
    assert steps_of(outputs)[-1] == 4
    assert "goes on at 0.5 times the learning rate" in outputs["report"]
    points = (trainer.runs / "star" / "metrics.csv").read_text().splitlines()
    assert "0.005" in points[-1]


def test_a_model_that_is_spoilt_within_ten_steps_is_given_back_and_the_reason_said(trainer, monkeypatch):
    """The pictures are asked about before training and after the tenth step of each of the two tries."""
    losses, asked = iter((0.1, 0.3, 0.1)), []

    def measured(denoiser, pictures, config):
        asked.append([batch.names for batch in pictures])
        return [next(losses)] * 8

    monkeypatch.setattr(spoiling, "losses_of", measured)
    report = trainer.queue(steps=12, save_every=6)["report"]
    assert "Step 9: The loss on the same pictures and noise is 3.0 times what it was before training" in report
    assert "Trained 12 steps, up to step 12." in report
    assert next(losses, None) is None and len(asked[0]) == 2 and asked[0] == asked[1] == asked[2]


def test_levels_that_take_too_much_memory_together_are_asked_one_by_one(trainer, monkeypatch):
    changes = {"steps": 2, "save_every": 1, "dataset": trainer.dataset(hold_out=1)}
    trainer.queue(name="together", **changes)
    real, full, asked = session.validation_loss, OUT_OF_MEMORY[-1], []

    def narrow(*given, levels=None):
        asked.append(levels)
        if levels is None:
            raise full("out of memory")
        return real(*given, levels=levels)

    monkeypatch.setattr(session, "validation_loss", narrow)
    outputs = trainer.queue(name="apart", **changes)
    assert asked.count(None) == 1 and "memory ran out" not in outputs["report"]
    measured = (
        json.loads((trainer.runs / name / "record.json").read_text("utf-8"))["validations"]
        for name in ("together", "apart")
    )
    for (_, one), (_, other) in zip(*measured, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_previews_of_steps_that_were_undone_are_drawn_again(trainer, monkeypatch):
    breaking_at(3, monkeypatch)
    outputs = trainer.queue(preview_prompts="zork")
    assert np.array_equal(
        preview(trainer, 2), queueing.by_the_graphs_nodes(trainer, "zork", "star/star_000002.safetensors")
    )
    assert outputs["lora_name"] == "star/star_000004.safetensors"


def test_a_preview_that_is_open_elsewhere_does_not_end_a_training_that_goes_back(trainer, monkeypatch):
    def refuse(change):
        raise PermissionError("used by another process")

    monkeypatch.setattr(previews, "patiently", refuse)
    breaking_at(3, monkeypatch)
    assert "Trained 4 steps" in trainer.queue(preview_prompts="zork")["report"]


def test_a_plan_of_the_users_own_is_followed(trainer):
    outputs = trainer.queue(steps=1, settings=ExpertSettings(checkpointing="every second block"))
    assert "every second block recomputed in backward" in outputs["report"]
