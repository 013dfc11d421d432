"""The Picker that asks, in a real ComfyUI and through its API alone: the queue waits, and goes on with the answer."""

import json
import urllib.error
from dataclasses import dataclass, field

import numpy
import pytest
from asking import picking_graph, random_files
from pictures import pixels

pytestmark = pytest.mark.comfy

FOLDER, PROMPT, STEPS = "asked", "a red circle", (2, 4, 6)
PICKER = "/lora_workbench/picker/picker"


@dataclass
class Asked:
    """A graph that draws with what the Picker hands on, and the answers given to it."""

    server: object
    graph: dict
    answer: object
    states: list[dict] = field(default_factory=list)

    def queue(self):
        self.states.clear()
        return self.server.submit(self.graph, self.on_event)

    def on_event(self, name: str, data: dict) -> None:
        if name == "lora_workbench.picking":
            first = data["status"] == "asking" and not self.asked
            self.states.append(data)
            if first:
                self.answer(data)

    @property
    def asked(self) -> list[dict]:
        return [state for state in self.states if state["status"] == "asking"]

    def state(self) -> dict:
        return json.loads(self.server.get(PICKER))

    def post(self, action: str, body: dict) -> dict:
        return json.loads(self.server.post(f"{PICKER}/{action}", body))


@pytest.fixture(scope="module", autouse=True)
def files(server):
    """The files of the folder, on the server."""
    names = {f"{FOLDER}-{step:06d}": step for step in STEPS}
    random_files(server.folder / "models" / "loras" / FOLDER, names)


@pytest.fixture
def asking(server, request):
    """The graph, whose Picker is new to ComfyUI's cache in every test."""
    graph = picking_graph(PROMPT, at_step=sum(map(ord, request.node.name)), folder=FOLDER)
    graph["name"] = {"class_type": "PreviewAny", "inputs": {"source": ["picker", 3]}}
    return Asked(server, graph, lambda state: None)


def test_the_picture_that_was_chosen_is_the_lora_that_makes_the_next_picture_pixel_for_pixel(asking):
    def choose(state):
        other = next(file["lora"] for file in state["files"] if not file["suggested"])
        assert asking.post("choose", {"lora": other})["chosen"] == other

    asking.answer = choose
    run = asking.queue()
    assert run.status == "success", run.error
    asked, last = asking.asked[0], asking.state()
    chosen = next(file["lora"] for file in asked["files"] if not file["suggested"])
    assert last["picked"] == chosen and last["status"] == "picked"
    assert run.outputs["name"]["text"] == [chosen]
    (cell,) = [cell for cell in asked["cells"] if cell["lora"] == chosen]
    (drawn,) = asking.server.images(run, "images")
    assert numpy.array_equal(pixels(drawn), pixels(asking.server.get(cell["url"])))
    assert len({asking.server.get(cell["url"]) for cell in asked["cells"]}) == len(asked["cells"]) == 4

    calm = asking.queue()
    assert calm.status == "success" and "picker" not in calm.executed() and not asking.asked
    asking.post("again", {})
    assert asking.queue().status == "success" and asking.asked
    kept = asking.post("keep", {"lora": chosen})["kept"]
    folder = asking.server.folder / "models" / "loras"
    assert (folder / kept).read_bytes() == (folder / chosen).read_bytes()
    assert pixels((folder / kept).with_suffix(".preview.png").read_bytes()).shape == pixels(drawn).shape


def test_cancel_while_the_user_is_asked_ends_the_graph_and_nothing_can_be_chosen_any_more(asking):
    asking.answer = lambda state: asking.server.interrupt()
    run = asking.queue()
    assert run.status == "interrupted" and asking.asked and "images" not in run.outputs
    state = asking.state()
    assert (state["status"], state["picked"]) == ("cancelled", None)
    with pytest.raises(urllib.error.HTTPError, match="409"):
        asking.post("choose", {"lora": state["files"][0]["lora"]})


def test_when_nobody_answers_in_time_the_suggestion_goes_on(asking):
    asking.graph["picker"]["inputs"]["ask_minutes"] = 0.02
    run = asking.queue()
    assert run.status == "success" and asking.asked
    suggested = next(file["lora"] for file in asking.state()["files"] if file["suggested"])
    assert run.outputs["name"]["text"] == [suggested]
    assert asking.state()["message"].startswith("Nobody chose within 0.02 minutes")
