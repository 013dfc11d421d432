"""The Picker that asks, in a real ComfyUI and through its API alone: the queue waits, and goes on with the answer."""

import io
import json
import urllib.error
from dataclasses import dataclass, field

import example
import hosttoys
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_workbench.nodes.host.architecture import family_of
from lora_workbench.training import lora_file
from lora_workbench.training.config import LoraConfig

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


@pytest.fixture(scope="module")
def family(server):
    """The family of the toy model, for which the server now has LoRA files of random weights."""
    model = hosttoys.model("sdxl")
    adapters = hosttoys.attach(hosttoys.loaded(model), active=False)
    folder = server.folder / "models" / "loras" / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for step in STEPS:
        random = torch.Generator().manual_seed(step)
        tensors = lora_file.file_tensors(adapters.state(), LoraConfig(rank=2, alpha=1.0), torch.float32)
        for key, tensor in tensors.items():
            if not key.endswith(".alpha"):
                tensors[key] = 0.2 * torch.randn(tensor.shape, generator=random)
        save_file(tensors, folder / f"{FOLDER}-{step:06d}.safetensors")
    return family_of(model)


@pytest.fixture
def asking(server, family, request):
    """The graph, whose Picker is new to ComfyUI's cache in every test."""
    toy = example.FAMILIES["sdxl"]
    graph = example.sampling_graph(toy, PROMPT, seed=5)
    widgets = {"pick": "ask me", "at_step": 0, "preference": "balanced", "prompts": PROMPT, "seed": 5}
    wires = {"model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2]}
    unique = {"at_step": sum(map(ord, request.node.name)), "size": example.SIZE, "folder": FOLDER}
    graph["picker"] = {"class_type": "LoraWorkbenchCheckpointPicker", "inputs": {**wires, **widgets, **unique}}
    graph["sampler"]["inputs"] |= {"model": ["picker", 0], "cfg": family.cfg}
    graph["sampler"]["inputs"] |= {"sampler_name": family.sampler, "scheduler": family.scheduler}
    for node in ("positive", "negative"):
        graph[node]["inputs"]["clip"] = ["picker", 1]
    graph["name"] = {"class_type": "PreviewAny", "inputs": {"source": ["picker", 3]}}
    return Asked(server, graph, lambda state: None)


def pixels(data: bytes) -> numpy.ndarray:
    return numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


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
