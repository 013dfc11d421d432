"""The Trainer node, from its inputs to its outputs, as ComfyUI's executor runs it: the promises it makes."""

import json
import logging
import socket

import comfy.model_management as mm
import numpy as np
import pytest
import queueing
import safetensors.torch
import torch
from PIL import Image

from lora_workbench.nodes.host import controls, loras
from lora_workbench.nodes.host.sampling import PREVIEW_STEPS
from lora_workbench.nodes.pictures import to_picture
from lora_workbench.training import lora_file
from lora_workbench.training.metrics import Metrics
from lora_workbench.training.presets import ExpertSettings

pytestmark = pytest.mark.comfy
KINDS = ("sdxl", "sdxl_vpred", "flux")
every_kind = pytest.mark.parametrize("kind", KINDS)
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])


@pytest.fixture
def another(kind, tmp_path, monkeypatch):
    """Makes a second Trainer on the same pictures, in a ComfyUI of its own."""

    def make():
        return queueing.trainer(kind, tmp_path / "another", monkeypatch, models=queueing.shared_models(kind))

    return make


def preview(trainer, step):
    (path,) = (trainer.runs / "star" / "previews").glob(f"{step:06d}_*.png")
    return np.asarray(Image.open(path))


def cancelled(trainer, forward, *, training=True, **changes):
    """Queues and presses cancel when training, or a preview, asks the network for the `forward`-th time."""
    pressed = queueing.at_forward(trainer.model, forward, queueing.interrupt, training=training)
    with pytest.raises(mm.InterruptProcessingException), pressed:
        trainer.queue(**changes)


def fail():
    raise RuntimeError("the network is broken")


# 1. The model is left as it was


@every_kind
@pytest.mark.parametrize("ending", ["finished", "cancelled", "cancelled in a preview", "failed"])
def test_promise_1_the_model_is_bit_for_bit_what_it_was(kind, ending, tmp_path, monkeypatch, comfyui):
    trainer = queueing.trainer(kind, tmp_path, monkeypatch)
    shown = queueing.by_the_graphs_nodes(trainer, "a red circle", None)
    before = queueing.portrait(trainer.model)
    clip, vae = (
        queueing.hosttoys.digest(part.state_dict())
        for part in (trainer.clip.cond_stage_model, trainer.vae.first_stage_model)
    )
    if ending == "cancelled":
        cancelled(trainer, 4)
    elif ending == "cancelled in a preview":
        cancelled(trainer, PREVIEW_STEPS * 3 // 2, training=False)
    elif ending == "failed":
        with pytest.raises(RuntimeError, match="is broken"), queueing.at_forward(trainer.model, 4, fail):
            trainer.queue()
    else:
        assert trainer.queue()["checkpoints"].entries[-1].step == 4
    assert queueing.portrait(trainer.model) == before
    assert queueing.hosttoys.digest(trainer.clip.cond_stage_model.state_dict()) == clip
    assert queueing.hosttoys.digest(trainer.vae.first_stage_model.state_dict()) == vae
    assert np.array_equal(queueing.by_the_graphs_nodes(trainer, "a red circle", None), shown)


# 2. The preview is the result


@every_kind
def test_promise_2_the_preview_is_what_ksampler_makes_with_load_lora_pixel_for_pixel(trainer):
    trainer.queue(preview_prompts="zork on a (green:1.2) background")
    made = {}
    for step in (0, 2, 4):
        name = f"star/star_{step:06d}.safetensors" if step else None
        made[step] = queueing.by_the_graphs_nodes(trainer, "zork on a (green:1.2) background", name)
        assert np.array_equal(preview(trainer, step), made[step]), f"step {step}"
    assert not np.array_equal(made[0], made[2]) and not np.array_equal(made[2], made[4])


@both_families
def test_the_outputs_are_the_models_with_the_file_on_and_the_file_by_name(trainer):
    outputs = trainer.queue()
    assert outputs["lora_name"] == "star/star_000004.safetensors"
    assert outputs["lora_stack"] == [("star/star_000004.safetensors", 1.0, 1.0)]
    assert [entry.step for entry in outputs["checkpoints"].entries] == [2, 4]
    assert outputs["checkpoints"].trigger_word == "zork"
    expected, _ = loras.apply(trainer.model, trainer.clip, loras.read_lora(trainer.lora(4)), 1.0, 1.0)
    assert outputs["model"].patches.keys() == expected.patches.keys() and len(expected.patches) > 10
    assert not trainer.model.patches
    assert outputs["previews"].shape[0] == 1 and outputs["loss_chart"].shape == (1, 480, 960, 3)
    assert outputs["previews"].min() >= 0 and outputs["previews"].max() <= 1


# 3. The file is proved


@every_kind
def test_promise_3_every_file_is_proved_and_loads_without_a_word_about_missing_keys(trainer, caplog):
    with caplog.at_level(logging.DEBUG):
        outputs = trainer.queue()
        queueing.by_the_graphs_nodes(trainer, "zork", outputs["lora_name"])
    layers = sum(name.endswith(".alpha") for name in loras.read_lora(trainer.lora(4)))
    assert f"File proved: {layers} of {layers} layers load in ComfyUI, effect on the weights " in outputs["report"]
    assert "lora key not loaded" not in caplog.text and "NOT LOADED" not in caplog.text


@every_kind
def test_promise_3_a_doctored_file_is_not_passed_on(trainer):
    trainer.queue()
    tensors = loras.read_lora(trainer.lora(4))
    first = next(name for name in tensors if name.endswith(".alpha")).removesuffix(".alpha")
    doctored = {name.replace(first, "lora_unet_nothing_of_ours"): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(doctored, trainer.lora(4))
    with pytest.raises(ValueError, match=r"star_000004\.safetensors' is NOT PROVED: \d+ of \d+ layers"):
        trainer.queue()


@pytest.mark.parametrize("kind", ["sdxl"])
def test_promise_3_a_damaged_file_is_set_aside_and_written_again(trainer):
    trainer.queue()
    whole = safetensors.torch.load_file(trainer.lora(4))
    trainer.lora(4).write_bytes(trainer.lora(4).read_bytes()[:500])
    report = trainer.queue()["report"]
    assert "\nThe file 'star/star_000004.safetensors' could not be read and is called '….damaged' now.\n" in report
    assert safetensors.torch.load_file(trainer.lora(4)).keys() == whole.keys(), "written again, and proved as any other"


@pytest.mark.parametrize("kind", ["sdxl"])
def test_a_training_whose_file_is_not_there_never_says_that_it_is_done(trainer, monkeypatch):
    """Trap 20: all steps went well, and nothing was written."""
    monkeypatch.setattr(lora_file, "write", lambda *_: None)
    with pytest.raises(ValueError, match=r"^The LoRA file 'star_000002\.safetensors' cannot be read") as error:
        trainer.queue(save_every=2)
    assert "\n" not in str(error.value)
    monkeypatch.undo()


# 4. Resuming equals never having stopped


@every_kind
@pytest.mark.parametrize(
    ("settings", "forward"),
    [(ExpertSettings(), 4), (ExpertSettings(batch_size=2, accumulation=2, warmup=3, checkpointing="on"), 8)],
    ids=["plain", "accumulated"],
)
def test_promise_4_cancelled_and_queued_again_gives_the_file_of_a_run_that_was_never_stopped(
    kind, trainer, another, settings, forward
):
    whole = {"steps": 6, "settings": settings, "save_every": 100}
    cancelled(trainer, forward, **whole)
    stopped_at = json.loads((trainer.runs / "star" / "record.json").read_text())["step"]
    assert stopped_at == 3
    outputs = trainer.queue(**whole)
    assert "Trained 3 steps, up to step 6." in outputs["report"]
    resumed = queueing.sha256(trainer.lora(6)), queueing.sha256(trainer.state())
    straight = another()
    straight.queue(**whole)
    assert resumed == (queueing.sha256(straight.lora(6)), queueing.sha256(straight.state()))


@every_kind
def test_promise_4_three_steps_and_three_more_are_six(trainer, another):
    trainer.queue(steps=3, save_every=100)
    trainer.queue(steps=6, save_every=100)
    extended = queueing.sha256(trainer.lora(6)), queueing.sha256(trainer.state())
    straight = another()
    straight.queue(steps=6, save_every=100)
    assert extended == (queueing.sha256(straight.lora(6)), queueing.sha256(straight.state()))


# 5. Stopping keeps the work


@every_kind
def test_promise_5_cancel_leaves_a_lora_that_loads_and_a_state_to_go_on_from(trainer):
    cancelled(trainer, 4, save_every=100, steps=6)
    assert [path.name for path in trainer.loras.rglob("*.safetensors")] == ["star_000003.safetensors"]
    with_lora = queueing.by_the_graphs_nodes(trainer, "zork", "star/star_000003.safetensors")
    assert not np.array_equal(with_lora, queueing.by_the_graphs_nodes(trainer, "zork", None))
    with safetensors.safe_open(trainer.state(), "pt") as state:
        assert state.metadata()["step"] == "3"
    assert not mm.processing_interrupted()


@pytest.mark.parametrize("kind", ["sdxl"])
def test_promise_5_cancel_before_the_first_step_is_done_leaves_nothing_half_made(trainer):
    cancelled(trainer, 1)
    assert not list(trainer.loras.rglob("*.safetensors")) and not trainer.state().exists()
    assert "Trained 4 steps" in trainer.queue()["report"]


@every_kind
def test_promise_5_an_error_in_the_middle_keeps_the_steps_before_it(trainer):
    with pytest.raises(RuntimeError), queueing.at_forward(trainer.model, 4, fail):
        trainer.queue(save_every=100)
    assert trainer.lora(3).is_file()
    assert "Trained 1 step, up to step 4." in trainer.queue(save_every=100)["report"]


@every_kind
def test_promise_5_finish_now_lets_the_graph_go_on_and_queueing_again_continues(trainer, another):
    with queueing.at_forward(trainer.model, 3, lambda: controls.ask(queueing.NODE_ID, "finish")):
        outputs = trainer.queue(steps=6, save_every=6)
    assert outputs["lora_name"] == "star/star_000003.safetensors"
    assert "Finished early: 6 steps were planned; queue again to go on." in outputs["report"]
    assert np.array_equal(
        preview(trainer, 3), queueing.by_the_graphs_nodes(trainer, "zork, picture 0", outputs["lora_name"])
    )
    again = trainer.queue(steps=6, save_every=6)
    assert "Trained 3 steps, up to step 6." in again["report"] and "Finished early" not in again["report"]
    resumed = queueing.sha256(trainer.lora(6)), queueing.sha256(trainer.state())
    straight = another()
    straight.queue(steps=6, save_every=6)
    assert resumed == (queueing.sha256(straight.lora(6)), queueing.sha256(straight.state()))


# 6. Queueing again continues


@every_kind
def test_promise_6_the_same_inputs_redo_nothing(trainer):
    first = trainer.queue()
    files = {path: path.stat().st_mtime_ns for path in trainer.output.rglob("*")}
    files |= {path: path.stat().st_mtime_ns for path in trainer.loras.rglob("*")}
    with queueing.at_forward(trainer.model, 1, fail):
        again = trainer.queue()
    assert trainer.asked.texts == [] and trainer.asked.pictures == []
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert "Nothing to train: this run already is at step 4." in again["report"]
    assert again["checkpoints"] == first["checkpoints"] and again["lora_name"] == first["lora_name"]
    assert torch.equal(again["previews"], first["previews"]) and torch.equal(again["loss_chart"], first["loss_chart"])


@every_kind
def test_promise_6_more_steps_extend_the_run(trainer):
    trainer.queue()
    before = trainer.files()
    outputs = trainer.queue(steps=6)
    assert "Trained 2 steps, up to step 6." in outputs["report"]
    assert trainer.asked.pictures == []
    assert [entry.step for entry in outputs["checkpoints"].entries] == [2, 4, 6]
    kept = {str(trainer.lora(step)) for step in (2, 4)}
    assert {path: trainer.files()[path] for path in kept} == {path: before[path] for path in kept}


@every_kind
def test_promise_6_other_preview_prompts_are_drawn_without_training(trainer):
    trainer.queue()
    before = trainer.files()
    with queueing.at_forward(trainer.model, 1, fail):
        outputs = trainer.queue(preview_prompts="a blue square\nzork at night")
    assert "Nothing to train" in outputs["report"] and trainer.asked.pictures == []
    after = trainer.files()
    report = str(trainer.runs / "star" / "report.html")
    assert before.pop(report) != after.pop(report)
    assert before.items() <= after.items() and len(after) == len(before) + 2 * 3
    drawn = [np.asarray(Image.open(path)) for path in (trainer.runs / "star" / "previews").glob("000004_*.png")]
    expected = queueing.by_the_graphs_nodes(trainer, "zork at night", "star/star_000004.safetensors")
    assert any(np.array_equal(picture, expected) for picture in drawn)


def recaptioned(trainer):
    (trainer.folder / "1.txt").write_text("zork, something else", encoding="utf-8")
    return {}


def one_picture_more(trainer):
    Image.new("RGB", (128, 128), "pink").save(trainer.folder / "new.png")
    return {}


@both_families
@pytest.mark.parametrize(
    "change",
    [
        recaptioned,
        one_picture_more,
        lambda trainer: {"rank": 3},
        lambda trainer: {"learning_rate": 2e-2},
        lambda trainer: {"seed": 6},
        lambda trainer: {"settings": ExpertSettings(layers="attention")},
    ],
    ids=["caption", "picture", "rank", "learning rate", "seed", "layers"],
)
def test_promise_6_another_training_gets_a_folder_of_its_own_and_touches_nothing(kind, trainer, change):
    trainer.queue(steps=2)
    before = trainer.files()
    outputs = trainer.queue(**change(trainer), steps=2)
    assert outputs["lora_name"] == "star_v2/star_v2_000002.safetensors"
    assert "LoRA 'star_v2'" in outputs["report"] and "Trained 2 steps" in outputs["report"]
    assert "'star' was trained with other values (" in outputs["report"]
    assert before.items() <= trainer.files().items()


@every_kind
def test_promise_6_fewer_steps_give_the_newest_checkpoint_within_them(trainer):
    trainer.queue(steps=6)
    before = trainer.files()
    outputs = trainer.queue(steps=5)
    assert outputs["lora_name"] == "star/star_000004.safetensors"
    assert [entry.step for entry in outputs["checkpoints"].entries] == [2, 4]
    assert "The newest checkpoint within 5 steps is step 4." in outputs["report"]
    assert trainer.files() == before


@pytest.mark.parametrize("kind", ["sdxl"])
def test_promise_6_start_over_trains_anew_beside_it_and_continue_goes_on_with_the_newest(trainer):
    trainer.queue()
    first = trainer.files()
    cancelled(trainer, 4, resume="start over")
    assert "LoRA 'star_v2'" in (report := trainer.queue()["report"]) and "Trained 1 step, up to step 4." in report
    assert first.items() <= trainer.files().items()
    assert queueing.sha256(trainer.lora(4, "star_v2")) != queueing.sha256(trainer.lora(2))


# 8. The objective is right


def told(trainer, **changes):
    """What the network was given and what it answered at each training step."""
    calls = []

    def after(_, args, given, answer):
        if queueing.is_a_step():
            kept = {name: value.detach().clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
            calls.append((args[0].detach().clone(), args[1].detach().clone(), kept, answer.detach().clone()))

    handle = trainer.model.model.diffusion_model.register_forward_hook(after, with_kwargs=True)
    try:
        trainer.queue(**changes)
    finally:
        handle.remove()
    return calls


@pytest.mark.parametrize("kind", ["sdxl", "sdxl_vpred"])
def test_promise_8_sdxl_is_told_the_size_of_each_pictures_own_bucket(trainer):
    calls = told(trainer, steps=4, dataset=trainer.dataset(resolution=queueing.SEVERAL_BUCKETS))
    seen = set()
    for noisy, _, given, _ in calls:
        height, width = (8 * side for side in noisy.shape[-2:])
        numbers = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        angles = numbers[:, None] * torch.exp(-torch.arange(128) * torch.tensor(10000.0).log() / 128)
        expected = torch.cat([angles.cos(), angles.sin()], 1).flatten()
        torch.testing.assert_close(given["y"][0, -6 * 256 :], expected, rtol=1e-4, atol=1e-4)
        seen.add((width, height))
    assert seen == {(128, 128), (256, 64), (64, 256)}


@pytest.mark.parametrize("kind", ["flux"])
def test_promise_8_flux_is_told_a_guidance_of_one(trainer):
    calls = told(trainer, steps=3)
    assert len(calls) == 3 and all(torch.equal(given["guidance"], torch.ones(1)) for _, _, given, _ in calls)


@every_kind
def test_promise_8_the_loss_of_a_step_is_the_published_formula_of_what_went_in_and_came_out(
    kind, tmp_path, monkeypatch
):
    """eps: Ho et al. 2020, eq. 14; v: Salimans & Ho 2022, section 4; flow: Esser et al. 2024, eq. 13, unweighted."""
    trainer = queueing.trainer(kind, tmp_path, monkeypatch, pictures=1, models=queueing.shared_models(kind))
    calls = told(trainer, steps=3)
    (path,) = (trainer.output / "lora_workbench" / "cache" / "latents").iterdir()
    latents = safetensors.torch.load_file(path)["latents"][None]
    sampling = trainer.model.get_model_object("model_sampling")
    points = Metrics(trainer.runs / "star").read(up_to=3)
    for point, (given, time, _, answer) in zip(points, calls, strict=True):
        if kind == "flux":
            noise = (given - (1 - time) * latents) / time
            target = noise - latents
        else:
            sigma = sampling.sigma(time)
            alpha = (1 + sigma**2) ** -0.5
            noise = (given / alpha - latents) / sigma
            target = noise if kind == "sdxl" else alpha * noise - alpha * sigma * latents
        assert point.loss == pytest.approx((answer - target).square().mean().item(), rel=1e-4)


# 9. The cache is honest


@every_kind
def test_promise_9_a_second_training_encodes_nothing_and_a_changed_caption_just_that_text(trainer):
    trainer.queue(steps=2)
    assert len(trainer.asked.pictures) == 4
    assert [text for text in trainer.asked.texts if "picture" in text].count("zork, picture 1") == 1
    trainer.queue(steps=2, rank=3, preview_prompts="a cat")
    assert trainer.asked.pictures == [] and set(trainer.asked.texts) == {"", "a cat"}
    recaptioned(trainer)
    trainer.queue(steps=2, preview_prompts="a cat")
    assert trainer.asked.pictures == []
    assert sorted(trainer.asked.texts) == ["", "", "a cat", "zork, something else"]


@both_families
def test_promise_9_a_changed_picture_and_another_crop_encode_just_what_changed(trainer):
    trainer.queue(steps=2)
    Image.new("RGB", (256, 64), "white").save(trainer.folder / "2.png")
    trainer.queue(steps=2)
    assert len(trainer.asked.pictures) == 1
    trainer.queue(steps=2, dataset=trainer.dataset(resolution=queueing.SEVERAL_BUCKETS))
    assert len(trainer.asked.pictures) == 4 and {"zork, picture 1"} & set(trainer.asked.texts) == set()


@both_families
def test_promise_9_another_clip_encodes_the_texts_again_and_no_picture(trainer):
    trainer.queue(steps=2)
    with torch.inference_mode():
        other = queueing.hosttoys.clip(trainer.kind, seed=9)
    clip, vae, asked = queueing.counted(other, trainer.vae)
    outputs = trainer.queue(steps=2, clip=clip, vae=vae)
    assert asked.pictures == [] and sum("picture" in text for text in asked.texts) >= 4
    assert outputs["lora_name"].startswith("star_v2/")


# 10. No network


@every_kind
def test_promise_10_a_whole_training_opens_no_connection(trainer, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    for name in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    outputs = trainer.queue(dataset=trainer.dataset(hold_out=1), preview_prompts="zork at night")
    trainer.pick(outputs, prompts="zork")
    assert "File proved" in outputs["report"]


# What the user is told


@both_families
def test_held_out_pictures_are_measured_and_not_trained_on(trainer):
    held_out = trainer.dataset(hold_out=1)
    outputs = trainer.queue(dataset=held_out)
    checkpoints = outputs["checkpoints"]
    assert len(checkpoints.base_validation) == 1 and len(checkpoints.base_validation[0]) > 1
    assert all(len(entry.validation) == 1 for entry in checkpoints.entries)
    assert "Pictures: 3 trained, 1 held out." in outputs["report"]
    record = json.loads((trainer.runs / "star" / "record.json").read_text(encoding="utf-8"))
    assert record["held_out"] == [held_out.held_out[0].path.name] and record["settings"].startswith("4 steps")
    (said,) = [line for line in outputs["report"].splitlines() if " kept out of training" in line]
    assert said in (trainer.runs / "star" / "report.html").read_text("utf-8")
    red = np.asarray(to_picture(outputs["loss_chart"][0]))[50:]
    assert ((red == (0xC2, 0x41, 0x0C)).all(-1)).sum() > 100
    trained_on_all = trainer.queue()
    assert trained_on_all["lora_name"].startswith("star_v2/")


@pytest.mark.parametrize("kind", ["sdxl"])
def test_the_report_says_trigger_file_and_settings(trainer):
    lines = trainer.queue()["report"].splitlines()
    assert lines[:2] == ["LoRA 'star'", "Trigger word: zork"]
    assert "Settings: 4 steps at learning rate 0.01, rank 2, " in lines[3]
    assert f"File: {trainer.lora(4)}" in lines
    assert f"Report with pictures: {trainer.runs / 'star' / 'report.html'}" in lines
