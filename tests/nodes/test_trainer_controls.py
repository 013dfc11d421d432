"""Steering a training that runs, as the panel's buttons and programs do, and what can be seen of it meanwhile."""

import threading

import pytest
import queueing

from lora_workbench.nodes import session
from lora_workbench.nodes.host import controls
from lora_workbench.nodes.host.live import state_of
from lora_workbench.nodes.host.progress import Cancelled
from lora_workbench.training import state

pytestmark = pytest.mark.comfy
NODE = queueing.NODE_ID


@pytest.fixture
def trainer(tmp_path, monkeypatch, comfyui) -> queueing.Trainer:
    return queueing.trainer("sdxl", tmp_path, monkeypatch, models=queueing.shared_models("sdxl"))


def asked_in_step(trainer, step, *actions, **changes):
    """Queues, and asks for the actions while that step is computed."""

    def ask():
        for action in actions:
            controls.ask(NODE, action)

    with queueing.at_forward(trainer.model, step, ask):
        return trainer.queue(**{"steps": 6, "save_every": 6, **changes})


def steps_of(folder, pattern):
    return sorted(int(path.stem.removeprefix("star_").split("_")[0]) for path in folder.glob(pattern))


def test_save_now_writes_a_file_of_that_step_and_trains_on_to_the_same_end(trainer):
    asked_in_step(trainer, 3, "save")
    assert steps_of(trainer.loras / "star", "*.safetensors") == [3, 6]
    saved = queueing.sha256(trainer.lora(6))
    trainer.queue(steps=6, save_every=6, resume="start over")
    assert queueing.sha256(trainer.lora(6, "star_v2")) == saved


def test_preview_now_draws_that_step_and_leaves_no_file(trainer):
    asked_in_step(trainer, 3, "preview")
    assert steps_of(trainer.runs / "star" / "previews", "*.png") == [0, 3, 6]
    assert steps_of(trainer.loras / "star", "*.safetensors") == [6]
    assert not list((trainer.runs / "star").glob("preview*.safetensors"))
    state = state_of(NODE, "star")
    assert [(entry["step"], entry["prompt"]) for entry in state["previews"]] == [
        (step, "zork, picture 0") for step in (0, 3, 6)
    ]


def test_a_pause_changes_nothing_about_the_result(trainer):
    trainer.queue(steps=6, save_every=6)
    straight = queueing.sha256(trainer.lora(6)), queueing.sha256(trainer.state())
    seen = []

    def watch():
        waited = threading.Event()
        while not (controls.of(NODE) and controls.of(NODE).waiting):
            waited.wait(0.02)
        seen.append(state_of(NODE, "star"))
        controls.ask(NODE, "resume")

    watching = threading.Thread(target=watch)
    watching.start()
    asked_in_step(trainer, 3, "pause", resume="start over")
    watching.join()
    (state,) = seen
    assert (state["status"], state["step"], state["possible"]) == ("paused", 3, ["finish", "resume"])
    assert (queueing.sha256(trainer.lora(6, "star_v2")), queueing.sha256(trainer.state("star_v2"))) == straight


def test_a_pause_writes_what_would_be_lost_if_nobody_came_back(trainer):
    """People leave a training paused over night, and the machine restarts."""
    seen = []

    def watch():
        waited = threading.Event()
        while not (controls.of(NODE) and controls.of(NODE).waiting):
            waited.wait(0.02)
        seen.append(state.step_of(trainer.runs / "star"))
        controls.ask(NODE, "resume")

    watching = threading.Thread(target=watch)
    watching.start()
    asked_in_step(trainer, 3, "pause")
    watching.join()
    assert seen == [3]


def test_finish_now_is_heard_while_pictures_are_still_encoded(trainer, monkeypatch):
    encode = session.encode

    def encoding(*given, **more):
        controls.ask(NODE, "finish")
        return encode(*given, **more)

    monkeypatch.setattr(session, "encode", encoding)
    assert "Trained 1 step, up to step 1. Finished early" in trainer.queue(steps=6)["report"]


def test_where_every_queueing_starts_over_going_on_needs_continue(trainer):
    said = asked_in_step(trainer, 3, "finish", resume="start over")["report"]
    assert "set resume to continue, then queue again to go on." in said
    assert "set resume to continue, then queue again to go on." in state_of(NODE, "star")["message"]
    assert "Trained 3 steps, up to step 6." in trainer.queue(steps=6, save_every=6)["report"]


def test_cancel_in_a_pause_keeps_the_work(trainer):
    threading.Thread(target=_cancel_in_the_pause).start()
    with pytest.raises(queueing.mm.InterruptProcessingException):
        asked_in_step(trainer, 3, "pause")
    assert steps_of(trainer.loras / "star", "*.safetensors") == [3]
    assert state_of(NODE, "star")["message"] == "Cancelled. Step 3 is kept; queue again to go on."
    assert "Trained 3 steps, up to step 6." in trainer.queue(steps=6, save_every=6)["report"]


def _cancel_in_the_pause():
    waited = threading.Event()
    while not (controls.of(NODE) and controls.of(NODE).waiting):
        waited.wait(0.02)
    queueing.interrupt()


def test_a_training_tells_all_of_itself(trainer):
    trainer.queue(steps=6, save_every=3, dataset=trainer.dataset(hold_out=1))
    state = state_of(NODE, "star")
    assert (state["status"], state["step"], state["total"], state["run"]) == ("finished", 6, 6, "star")
    assert [step for step, _ in state["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in state["validation"]] == [0, 3, 6]
    assert [step for step, _ in state["rate"]] == [1, 2, 3, 4, 5, 6] and state["smoothed"]
    assert [entry["step"] for entry in state["previews"]] == [0, 3, 6]
    assert "6 steps at learning rate 0.01, rank 2" in state["plan"]


def test_a_run_that_is_cancelled_before_it_goes_on_says_how_far_it_was(trainer, monkeypatch):
    trainer.queue()

    def cancelled(*_, **__):
        raise Cancelled

    monkeypatch.setattr(session, "encode", cancelled)
    with pytest.raises(Cancelled):
        trainer.queue(steps=8)
    state = state_of(NODE, "star")
    assert (state["status"], state["step"], len(state["loss"])) == ("cancelled", 4, 4)
    assert state["message"] == "Cancelled. Step 4 is kept; queue again to go on."


def test_a_training_that_cannot_begin_says_why(trainer):
    with pytest.raises(ValueError) as error:
        trainer.queue(name="con")
    state = state_of(NODE, "con")
    assert (state["status"], state["message"]) == ("failed", str(error.value))


def test_queueing_again_shows_the_run_although_nothing_is_trained(trainer):
    trainer.queue()
    trainer.queue()
    state = state_of(NODE, "star")
    assert state["status"] == "finished" and len(state["loss"]) == 4
    assert [(entry["step"], entry["prompt"]) for entry in state["previews"]] == [
        (step, "zork, picture 0") for step in (0, 2, 4)
    ]
