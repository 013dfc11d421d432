import json
import math
import time
from types import SimpleNamespace

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from PIL import Image

from lora_workbench.nodes.host import controls, live, news
from lora_workbench.nodes.host.controls import Controls
from lora_workbench.nodes.host.live import LiveRun, state_of
from lora_workbench.training.loop import Snapshot, Step
from lora_workbench.training.metrics import Point
from lora_workbench.training.run import TrainingRun

pytestmark = pytest.mark.comfy
LISTS = ("loss", "smoothed", "validation", "rate", "previews", "notes")


def step(number, loss=0.5, skipped=False):
    return Step(number, loss, 1e-4, skipped, 1.0, (0.3, 0.7), (loss, loss))


@pytest.fixture(autouse=True)
def forgotten():
    """Every test begins without earlier runs."""
    live._runs.clear()


@pytest.fixture
def events(monkeypatch):
    """What is sent to the pages, with the time of each."""
    sent = []
    time.sleep(1.2 * news.INTERVAL)  # what earlier tests had still to say is out

    def send_sync(name, data, sid=None):
        assert name == "lora_workbench.training" and sid is None
        sent.append((time.monotonic(), json.loads(json.dumps(data, allow_nan=False))))

    monkeypatch.setattr(news, "PromptServer", SimpleNamespace(instance=SimpleNamespace(send_sync=send_sync)))
    return sent


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    return tmp_path / "output"


def draw(output, step):
    path = output / "lora_workbench" / "runs" / "star" / "previews" / f"{step:06d}_abc.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def run_of(output, losses):
    """A run on disk with a step for each loss."""
    runs = output / "lora_workbench" / "runs"
    run = TrainingRun.open(runs, output.parent / "loras", "star", {"of": "a test"})
    run.begin()
    for number, loss in enumerate(losses, start=1):
        run.log(step(number, loss), 0.2)
    run.keep(Snapshot(len(losses), {"a": torch.ones(1)}, {}))
    run.note_validation(0, [[0.4, 0.6]])
    return run


def settled(events):
    """All events, once the last is out."""
    time.sleep(1.5 * news.INTERVAL)
    return [data for _, data in events]


def joined(events):
    """What a page makes of the events: a list in one takes the place of all from its `from` on."""
    state = {}
    for event in events:
        lists = {key: state.get(key, [])[: event[key]["from"]] + event[key]["values"] for key in LISTS if key in event}
        state |= event | lists
    return state


# What is told


def test_the_state_says_step_speed_time_left_rate_and_losses(output):
    run = LiveRun("7", "star")
    with run:
        run.phase("Encoding pictures", 3, 8)
        assert run.state()["status"] == "preparing" and (run.state()["done"], run.state()["of"]) == (3, 8)
        run.opened(run_of(output, []), 10)
        for number in range(1, 5):
            run.step(step(number, 1 / number), 0.5)
        state = run.state()
    assert (state["status"], state["phase"], state["step"], state["total"]) == ("training", "Training", 4, 10)
    assert (state["seconds_per_step"], state["seconds_left"], state["learning_rate"]) == (0.5, 3.0, 1e-4)
    assert state["loss"] == [(1, 1.0), (2, 0.5), (3, 0.333333), (4, 0.25)]
    assert state["memory"]["kind"] == ("RAM" if mm.get_torch_device().type == "cpu" else "GPU")
    assert 0 < state["memory"]["used"] <= state["memory"]["peak"] and state["memory"]["free"] > 0


def test_the_smoothed_curve_does_not_follow_the_noise_levels():
    run = LiveRun("7", "star")
    for number in range(1, 201):
        sigma = 0.1 + 0.8 * (number * 37 % 100) / 100
        run.step(Step(number, 1 / sigma, 1e-4, False, 1.0, (sigma,), (1 / sigma,)), 0.1)
    curve = [loss for _, loss in run.state()["smoothed"]]
    raw = [loss for _, loss in run.state()["loss"]]
    assert len(curve) > 5
    assert max(curve) / min(curve) < 1.15 < 5 < max(raw) / min(raw)


def test_broken_numbers_never_reach_json(events):
    run = LiveRun("7", "star")
    with run:
        run.step(step(1), math.inf)
        run.step(step(2, math.nan, skipped=True), math.nan)
        run.step(step(3, math.inf), 0.1)
        run.validation(3, math.nan)
    json.dumps(run.state(), allow_nan=False)
    assert settled(events) and run.state()["loss"] == [(1, 0.5)] and run.state()["validation"] == []


def test_a_hundred_thousand_steps_are_a_small_answer(output, monkeypatch):
    points = [Point(number, 0.1 + 1 / number, 0.3, 1e-4) for number in range(1, 100_001)]
    monkeypatch.setattr(TrainingRun, "points", lambda _: points)
    run = LiveRun(None)
    run.opened(run_of(output, []), None)
    state = run.state()
    assert 200 <= len(state["loss"]) < 400 and len(state["rate"]) < 100 and 0 < len(state["smoothed"]) <= 60
    assert len(json.dumps(state)) < 20_000


def test_previews_are_addresses_below_the_output_folder_in_order_of_steps(output):
    run = LiveRun("7", "star")
    for number in (2, 0, 2):
        run.preview(number, "a zork", draw(output, number))
    previews = run.state()["previews"]
    assert [(entry["step"], entry["prompt"]) for entry in previews] == [(0, "a zork"), (2, "a zork")]
    file = "/view?filename=000000_abc.png&subfolder=lora_workbench%2Fruns%2Fstar%2Fpreviews&type=output&v="
    assert previews[0]["url"].startswith(file)


def test_a_picture_outside_the_output_folder_is_not_shown(output, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    run = LiveRun("7", "star")
    run.preview(0, "", tmp_path / "secret.png")
    run.preview(0, "", output / "missing.png")
    assert run.state()["previews"] == []


def test_a_preview_that_is_drawn_anew_has_another_address(output):
    run, path = LiveRun("7", "star"), draw(output, 0)
    run.preview(0, "a zork", path)
    before = run.state()["previews"]
    path.touch()
    run.preview(0, "a zork", path)
    assert len(run.state()["previews"]) == 1 and run.state()["previews"] != before


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (None, "finished", "Finished early at step 3 of 10; queue again to go on."),
        (mm.InterruptProcessingException(), "cancelled", "Cancelled. Step 3 is kept; queue again to go on."),
        (ValueError("The rank is 0: raise it."), "failed", "The rank is 0: raise it."),
    ],
)
def test_how_it_ended_is_said_and_stays(output, error, status, message):
    try:
        with LiveRun("7", "star") as run:
            run.opened(run_of(output, []), 10)
            run.step(step(3), 0.1)
            if error is not None:
                raise error
    except (type(error or ValueError()), mm.InterruptProcessingException):
        pass
    state = state_of("7", "star")
    assert (state["status"], state["message"]) == (status, message)
    assert state["memory"] is None and state["possible"] == []


def test_a_whole_training_ends_without_a_word(output):
    with LiveRun("7", "star") as run:
        run.opened(run_of(output, []), 3)
        run.step(step(3), 0.1)
    assert (run.state()["status"], run.state()["message"]) == ("finished", "")


def test_what_is_asked_and_what_can_be_asked_is_part_of_the_state():
    with LiveRun("7", "star") as run, Controls("7", run.touched) as asked:
        run.step(step(1), 0.1)
        assert run.state()["possible"] == ["finish", "save", "preview", "pause"]
        controls.ask("7", "save")
        controls.ask("7", "pause")
        state = run.state()
        assert (state["asked"], state["paused"], state["status"]) == (["save"], True, "training")
        asked.waiting = True
        assert (run.state()["status"], run.state()["phase"]) == ("paused", "Paused")
        assert run.state()["possible"] == ["finish", "resume"]


def test_a_training_that_goes_back_takes_back_what_came_after(events, output):
    with LiveRun("7", "star") as run:
        for number in range(1, 81):
            run.step(step(number, 1 / number), 0.1)
        for number in (0, 40, 80):
            run.validation(number, 0.5)
            run.preview(number, "a zork", draw(output, number))
        time.sleep(1.2 * news.INTERVAL)
        run.back_to(40)
        run.note("It goes on from step 40.")
        state = run.state()
    assert state["step"] == 40
    lengths = {"loss": 40, "rate": 40, "validation": 2, "previews": 2, "notes": 1}
    assert {key: len(state[key]) for key in lengths} == lengths
    assert len(joined(settled(events))["loss"]) == 40


# Events


def test_a_page_that_follows_the_events_sees_the_whole_state(events, output):
    with LiveRun("7", "star") as run:
        run.plan("10 steps at rank 4")
        run.preview(0, "a zork", draw(output, 0))
        for number in range(1, 900):
            run.step(step(number, 1 / number), 0.01)
            if number == 500:
                time.sleep(1.2 * news.INTERVAL)
                run.preview(500, "a zork", draw(output, 500))
                run.note("The rate was halved.")
                run.validation(500, 0.25)
        run.step(step(700, 0.5), 0.01)
    seen, state = joined(settled(events)), json.loads(json.dumps(run.state()))
    assert {key: seen[key] for key in LISTS} == {key: state[key] for key in LISTS}
    assert seen["notes"] == [{"step": 500, "text": "The rate was halved."}]
    assert (seen["status"], seen["step"], seen["plan"]) == ("finished", 700, "10 steps at rank 4")
    assert [event["number"] for event in settled(events)] == list(range(1, len(events) + 1))


def test_events_come_at_most_four_times_a_second_and_carry_what_is_new(events):
    run, started, number = LiveRun("7", "star"), time.monotonic(), 0
    while time.monotonic() < started + 1.0:
        number += 1
        run.step(step(number), 0.01)
        time.sleep(0.005)
    sent = settled(events)
    assert 3 <= len(sent) <= 6
    gaps = [later - earlier for (earlier, _), (later, _) in zip(events, events[1:], strict=False)]
    assert min(gaps) >= 0.95 * news.INTERVAL
    assert [event["loss"]["from"] for event in sent[1:]] == [
        event["loss"]["from"] + len(event["loss"]["values"]) for event in sent[:-1]
    ]


def test_without_a_node_id_nobody_is_told(events):
    with LiveRun(None) as run:
        run.step(step(1), 0.1)
    assert settled(events) == [] and not live._runs


# What stays


def test_a_node_remembers_its_run_of_each_name():
    for name, number in (("star", 1), ("moon", 2)):
        with LiveRun("7", name) as run:
            run.step(step(number), 0.1)
    assert [state_of("7", name)["step"] for name in ("star", "moon", None)] == [1, 2, 2]
    assert state_of("8", None)["status"] == "idle"


def test_only_so_many_runs_are_kept():
    for number in range(live.MOST_RUNS + 5):
        LiveRun(str(number), "star").__enter__()
    assert len(live._runs) == live.MOST_RUNS


def test_after_a_restart_the_panel_is_rebuilt_from_the_run_folder(output):
    run = run_of(output, [1 / number for number in range(1, 41)])
    run.add_note("The rate was halved.")
    for number in (0, 20, 40):
        draw(output, number)
    state = state_of("7", "star")
    assert (state["status"], state["run"], state["step"]) == ("past", "star", 40)
    assert len(state["loss"]) == 40 and len(state["smoothed"]) > 1 and state["validation"] == [(0, 0.5)]
    assert state["rate"][0] == (1, 1e-4)
    assert [entry["step"] for entry in state["previews"]] == [0, 20, 40]
    assert state["notes"] == [{"step": None, "text": "The rate was halved."}]


def test_of_several_runs_of_a_name_the_one_that_was_written_last_is_shown(output):
    run_of(output, [0.5])
    runs = output / "lora_workbench" / "runs"
    second = TrainingRun.open(runs, output.parent / "loras", "star", {"of": "another test"})
    second.begin()
    assert second.name == "star_v2" and state_of("7", "star")["run"] == "star_v2"


def test_capitals_name_the_same_run_only_where_the_disk_says_so(output):
    run = run_of(output, [0.5])
    run.remember(planned=10)
    assert state_of("7", "Star")["status"] == "idle" and live.unfinished("Star") == ""
    # A link under the other spelling answers as a disk does that does not tell capitals apart.
    run.folder.with_name("Star").symlink_to(run.folder)
    assert state_of("7", "Star")["run"] == "star" and live.unfinished("Star") == "star 0 of 10"


def test_every_run_of_a_name_with_something_left_to_do_is_unfinished_also_by_its_own_name(output):
    """Two Trainers may share a name, and a report calls a run `star_v2`, which the user then types."""
    run_of(output, [0.5]).remember(planned=10)
    second = TrainingRun.open(output / "lora_workbench" / "runs", output.parent / "loras", "star", {"of": "another"})
    second.remember(planned=0)
    assert live.unfinished("star") == "star 0 of 10, star_v2 0 of 0"
    assert live.unfinished("star_v2") == "star_v2 0 of 0" and state_of("7", "star_v2")["run"] == "star_v2"


@pytest.mark.parametrize("name", ["", "nothing here", "../moon", "con", "*", "[s]tar"])
def test_a_name_without_a_run_is_idle(output, name):
    run_of(output, [0.5])
    assert state_of("7", name)["status"] == "idle"


def test_a_damaged_record_is_passed_over(output):
    run = run_of(output, [0.5])
    for text in ("{", "[]", "{}", "null"):
        (run.folder / "record.json").write_text(text)
        assert state_of("7", "star")["status"] == "idle"


def test_a_run_that_goes_on_shows_what_it_did_before(output):
    run = run_of(output, [0.5, 0.4])
    with LiveRun("7", "star") as live_run:
        live_run.opened(run, 10)
        live_run.step(step(3, 0.3), 0.1)
        live_run.opened(run, 10)
        live_run.step(step(3, 0.3), 0.1)
        assert live_run.state()["loss"] == [(1, 0.5), (2, 0.4), (3, 0.3)]
        assert live_run.state()["total"] == 10
