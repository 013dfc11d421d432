"""What a Picker shows and asks, while its node waits in the executor's thread and answers come from another."""

import json
import threading
import time
from types import SimpleNamespace

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_workbench.nodes.host import choice, news
from lora_workbench.nodes.host.choice import Choice, NotPossible, state_of
from lora_workbench.nodes.host.progress import Progress
from lora_workbench.nodes.keeping import keep
from lora_workbench.training.checkpoint import Checkpoint

pytestmark = pytest.mark.comfy
VERDICT = SimpleNamespace(kind="levelled off", confidence="medium", reason="Step 4 is suggested.")


@pytest.fixture(autouse=True)
def forgotten():
    """Every test begins without earlier choices."""
    choice._choices.clear()
    choice._again.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder = tmp_path / "loras"
    (folder / "star").mkdir(parents=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    return folder


@pytest.fixture
def events(monkeypatch):
    """What is sent to the pages, with the time of each."""
    sent = []

    def send_sync(name, data, sid=None):
        assert name == "lora_workbench.picking" and sid is None
        sent.append((time.monotonic(), json.loads(json.dumps(data, allow_nan=False))))

    monkeypatch.setattr(news, "PromptServer", SimpleNamespace(instance=SimpleNamespace(send_sync=send_sync)))
    return sent


def entries(folder, *steps, **facts):
    """Files of a run, and what a Picker says of them."""
    for step in steps:
        save_file({"a": torch.full((4,), float(step))}, folder / "star" / f"star_{step}.safetensors")
    return [
        {
            "lora": f"star/star_{step}.safetensors",
            "label": f"step {step}",
            "step": step,
            "percent": 1.5 * step,
            "training_percent": None,
            "suggested": step == 4,
            "safe": step > 2,
            "broken": "",
            **facts,
        }
        for step in steps
    ]


class Asking(threading.Thread):
    """A Picker that asks, as the executor's thread runs it."""

    def __init__(self, shown, minutes=0.0) -> None:
        super().__init__(daemon=True)
        self.shown, self.inputs, self.result = shown, ("star/star_4.safetensors", minutes), None
        self.start()
        self.until(lambda: shown.state()["status"] == "asking" or not self.is_alive())

    def run(self) -> None:
        try:
            self.result = self.shown.ask(*self.inputs)
        except mm.InterruptProcessingException as error:
            self.result = error

    def until(self, done) -> None:
        end = time.monotonic() + 5
        while not done() and time.monotonic() < end:
            time.sleep(0.005)

    def answer(self, seconds=5):
        self.join(seconds)
        assert not self.is_alive()
        return self.result


def test_the_users_choice_goes_on_and_nothing_can_be_chosen_before_or_after(folder):
    with Choice("7", "star") as shown:
        shown.files(entries(folder, 2, 4))
        with pytest.raises(NotPossible, match="Node 7 is not asking now"):
            shown.choose("star/star_2.safetensors")
        asking = Asking(shown)
        assert shown.state()["seconds_left"] is None and shown.state()["picked"] is None
        shown.choose("star/star_2.safetensors")
        assert asking.answer() == "star/star_2.safetensors"
        with pytest.raises(NotPossible, match="is not asking now"):
            shown.choose("star/star_4.safetensors")
        shown.picked("star/star_2.safetensors")
    state = state_of("7")
    assert (state["status"], state["picked"], state["message"]) == ("picked", "star/star_2.safetensors", "")


def test_of_two_answers_the_first_counts(folder):
    with Choice("7", "star") as shown:
        shown.files(entries(folder, 2, 4))
        asking, refused = Asking(shown), []

        def choose(lora):
            try:
                shown.choose(lora)
            except NotPossible:
                refused.append(lora)

        names = [f"star/star_{step}.safetensors" for step in (2, 4)]
        threads = [threading.Thread(target=choose, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        answered = asking.answer()
        for thread in threads:
            thread.join(5)
        assert len(refused) == 1 and {answered, *refused} == set(names)


def test_when_the_time_is_over_the_suggestion_goes_on_and_that_is_said(folder):
    with Choice("7", "star") as shown:
        shown.files(entries(folder, 2, 4))
        started = time.monotonic()
        asking = Asking(shown, minutes=0.4 / 60)
        assert 0 < shown.state()["seconds_left"] <= 0.4
        assert asking.answer() == "star/star_4.safetensors" and 0.3 < time.monotonic() - started < 3
        shown.picked("star/star_4.safetensors")
    assert state_of("7")["message"].startswith("Nobody chose within 0.00666667 minutes")
    assert state_of("7")["seconds_left"] is None


def test_cancel_ends_the_question_and_leaves_no_pick(folder):
    with pytest.raises(mm.InterruptProcessingException), Choice("7", "star") as shown:
        shown.files(entries(folder, 2, 4))
        asking = Asking(shown)
        mm.interrupt_current_processing()
        raise asking.answer()
    assert not mm.processing_interrupted()
    state = state_of("7")
    assert (state["status"], state["picked"]) == ("cancelled", None) and "nothing was picked" in state["message"]
    with pytest.raises(NotPossible, match="is not asking now"):
        choice.of("7").choose("star/star_2.safetensors")


def test_an_error_is_shown_on_the_node(folder):
    with pytest.raises(ValueError), Choice("7", "star") as shown:
        shown.picked("star/star_2.safetensors")
        raise ValueError("The file is gone.")
    state = state_of("7")
    assert (state["status"], state["message"], state["picked"]) == ("failed", "The file is gone.", None)


def test_only_a_whole_file_of_this_node_can_be_chosen(folder):
    with Choice("7", "star") as shown:
        shown.files([*entries(folder, 2, 4), *entries(folder, 6, broken="it holds NaN")])
        asking = Asking(shown)
        with pytest.raises(NotPossible, match=r"'star/star_6\.safetensors' cannot be used \(it holds NaN\)"):
            shown.choose("star/star_6.safetensors")
        with pytest.raises(NotPossible, match="none of the files of node 7"):
            shown.choose("../star/star_2.safetensors")
        assert asking.is_alive()
        shown.choose("star/star_4.safetensors")
        asking.answer()


def test_the_state_holds_all_that_the_page_shows(folder, tmp_path):
    picture = tmp_path / "output" / "lora_workbench" / "cache" / "cells" / "a.png"
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    with Choice("2:1", "star") as shown:
        Progress("2:1", shown).encoding("encoding pictures", 3, 8)
        first = state_of("2:1")
        assert [first[key] for key in ("status", "phase", "done", "of")] == ["measuring", "Encoding pictures", 3, 8]
        shown.drawing(["zork", "a red circle"])
        shown.cell(None, 1.0, 0, picture)
        shown.cell("star/star_2.safetensors", 0.6, 1, picture)
        assert state_of("2:1")["status"] == "drawing" and len(state_of("2:1")["cells"]) == 2
        shown.files(entries(folder, 2, 4, percent=float("nan")))
        shown.say(VERDICT)
        state = state_of("2:1")
    size = (folder / "star" / "star_2.safetensors").stat().st_size
    assert state["verdict"] == {"kind": "levelled off", "confidence": "medium", "reason": "Step 4 is suggested."}
    assert state["files"][0] == {
        "lora": "star/star_2.safetensors",
        "label": "step 2",
        "step": 2,
        "percent": None,
        "training_percent": None,
        "suggested": False,
        "safe": False,
        "broken": "",
        "bytes": size,
        "kept": False,
    }
    assert [(cell["lora"], cell["strength"], cell["prompt"]) for cell in state["cells"]] == [
        (None, 1.0, 0),
        ("star/star_2.safetensors", 0.6, 1),
    ]
    address = "/view?filename=a.png&subfolder=lora_workbench%2Fcache%2Fcells&type=output&v="
    assert all(cell["url"].startswith(address) for cell in state["cells"])
    assert state["prompts"] == ["zork", "a red circle"] and (state["node_id"], state["name"]) == ("2:1", "star")
    assert json.loads(json.dumps(state, allow_nan=False)) == state


def test_a_node_that_never_ran_is_idle_and_shows_as_much_as_any_other(folder):
    with Choice("7", "star") as shown:
        pass
    idle = state_of("8")
    assert idle["status"] == "idle" and idle.keys() == shown.state().keys() and idle["node_id"] == "8"


def test_a_file_that_is_gone_is_off_the_list_and_one_that_is_kept_says_so(folder):
    with Choice("7", "star") as shown:
        shown.files(entries(folder, 2, 4, 6))
        for step in (2, 4):
            shown.cell(f"star/star_{step}.safetensors", 1.0, 0, folder / "none.png")
        keep(Checkpoint(4, str(folder / "star" / "star_4.safetensors"), "star/star_4.safetensors"), "star")
        (folder / "star" / "star_2.safetensors").unlink()
        state = shown.state()
    assert [(entry["step"], entry["kept"]) for entry in state["files"]] == [(4, True), (6, False)]
    assert [cell["lora"] for cell in state["cells"]] == ["star/star_4.safetensors"]


def test_what_lies_among_all_loras_cannot_be_deleted(folder):
    with Choice("7", "loras") as shown:
        for name in ("mine.safetensors", "yours.safetensors"):
            save_file({"a": torch.ones(1)}, folder / name)
        shown.files([{"lora": "mine.safetensors", "step": 1}, {"lora": "yours.safetensors", "step": 2}])
        shown.picked("mine.safetensors")
        with pytest.raises(NotPossible, match=r"'yours\.safetensors' lies in the loras folder itself"):
            shown.check_deletable(["yours.safetensors"])
        shown.files(entries(folder, 2))
        shown.check_deletable(["star/star_2.safetensors"])


def test_pages_hear_of_everything_but_at_most_four_times_a_second(folder, events):
    with Choice("7", "star") as shown:
        shown.files(entries(folder, 2, 4))
        for done in range(200):
            shown.phase("Drawing step 2", done, 200)
            time.sleep(0.004)
        asking = Asking(shown)
        time.sleep(0.3)
        shown.choose("star/star_2.safetensors")
        shown.picked(asking.answer())
    time.sleep(0.35)
    number = shown.state()["id"]  # what earlier tests had still to say may be among them
    times, told = zip(*((when, event) for when, event in events if event["id"] == number), strict=True)
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    assert len(told) >= 4 and min(gaps) > 0.2
    assert [event["number"] for event in told] == list(range(1, len(told) + 1))
    assert told[-1] == {**shown.state(), "number": told[-1]["number"]}
    assert [told[-1]["status"], told[-1]["picked"]] == ["picked", "star/star_2.safetensors"]
    assert "asking" in [event["status"] for event in told]


def test_a_picker_without_a_node_is_heard_of_by_nobody(folder, events):
    with Choice(None, "star") as shown:
        shown.phase("Measuring")
        shown.picked("star/star_2.safetensors")
    time.sleep(0.3)
    assert not [event for _, event in events if event["node_id"] is None] and len(choice._choices) == 0


def test_the_newest_run_of_a_node_counts_and_old_nodes_are_forgotten(folder):
    with Choice("0", "first"):
        pass
    with Choice("0", "second"):
        pass
    assert state_of("0")["name"] == "second"
    for number in range(1, choice.MOST_NODES + 1):
        with Choice(str(number)):
            pass
    assert choice.of("0") is None and len(choice._choices) == choice.MOST_NODES


def test_to_ask_again_changes_what_the_result_of_that_node_depends_on():
    assert choice.times_asked_again("7") == choice.times_asked_again(None) == 0
    choice.ask_again("7")
    choice.ask_again("7")
    assert choice.times_asked_again("7") == 2 and choice.times_asked_again("8") == 0
