"""The whole loop in a real ComfyUI, through its API: a folder becomes captions, a LoRA, a pick and a picture."""

import hashlib
import io
import json
import os
import re
import shutil
import urllib.error
from dataclasses import dataclass
from pathlib import Path

import comfy_server
import example
import numpy
import pytest
import safetensors.torch
import workflow
from PIL import Image

from toyworld import drawing

pytestmark = pytest.mark.comfy

STEPS = 6
PROMPT = f"{drawing.TRIGGER} on a green background"
TRAINER = "LoraWorkbenchTrainer"
STRENGTH = "lora_workbench.strength"


@dataclass
class Loop:
    """One family's example workflow on the toy world, to be queued as it is or changed."""

    server: comfy_server.Server
    info: dict
    family: example.Family
    folder: str = "pictures"
    name: str = "loop"

    def saved(self, **trainer) -> dict:
        return example.toy_workflow(
            self.family,
            self.info,
            folder=self.folder,
            trigger_word=drawing.TRIGGER,
            prompt=PROMPT,
            trainer={"name": f"{self.name}_{self.family.name}", "steps": STEPS, "save_every": STEPS // 2, **trainer},
        )

    def queue(self, saved: dict, on_event=lambda name, data: None) -> comfy_server.Run:
        return self.server.submit(workflow.to_api(saved, self.info), on_event, workflow=saved)

    def loras(self) -> list[Path]:
        return sorted(
            (self.server.folder / "models" / "loras" / f"{self.name}_{self.family.name}").glob("*.safetensors")
        )

    def runs(self) -> Path:
        return self.server.folder / "output" / "lora_workbench" / "runs" / f"{self.name}_{self.family.name}"

    def image(self, run: comfy_server.Run, saved: dict, title: str) -> numpy.ndarray:
        """The first picture shown by the node with this title."""
        (first, *_) = self.server.images(run, workflow.titled(saved, title))
        return numpy.asarray(Image.open(io.BytesIO(first)).convert("RGB"))

    def text(self, run: comfy_server.Run, saved: dict, title: str) -> str:
        return "\n".join(map(str, run.outputs[workflow.titled(saved, title)]["text"]))

    def forget(self) -> None:
        """Empties ComfyUI's cache of node outputs, so that queueing again runs every node again."""
        self.server.post("/free", {"unload_models": True, "free_memory": True})
        # It happens before the queue's thread takes the next graph but one, however busy the machine is.
        picture = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
        shown = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
        assert self.server.submit({"1": picture, "2": shown}).status == "success"


@pytest.fixture(params=list(example.FAMILIES))
def family(request) -> example.Family:
    return example.FAMILIES[request.param]


@pytest.fixture
def loop(server, object_info, family, request) -> Loop:
    """A loop of its own for each test, on eight drawn pictures of a concept the toy model has never seen."""
    name = request.node.originalname.removeprefix("test_")[:40]
    folder = f"pictures_{name}"
    drawing.write_training_folder(server.folder / "input" / folder, 8)
    return Loop(server, object_info, family, folder, name)


def trainer_ran(run: comfy_server.Run, saved: dict) -> bool:
    (trainer,) = [str(node["id"]) for node in saved["nodes"] if node["type"] == TRAINER]
    return trainer in run.executed()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_queue_turns_a_folder_into_a_lora_and_a_picture(loop):
    saved = loop.saved()
    before = len(loop.server.log())
    run = loop.queue(saved)
    assert run.status == "success", run.error
    assert len(loop.loras()) == 2
    with_lora, without = (loop.image(run, saved, title) for title in ("With the LoRA", "Without the LoRA"))
    assert with_lora.shape == without.shape == (example.SIZE, example.SIZE, 3)
    assert numpy.isfinite(with_lora).all() and (with_lora != without).any()
    for title in ("Contact sheet", "Loss", "Every checkpoint"):
        assert loop.image(run, saved, title).std() > 0, title
    assert loop.text(run, saved, "Picked file").split("/")[0].split(os.sep)[0] == f"{loop.name}_{loop.family.name}"
    log = loop.server.log()[before:]
    assert "lora key not loaded" not in log and "NOT LOADED" not in log


def test_promise_6_queueing_again_trains_nothing(loop):
    saved = loop.saved()
    assert loop.queue(saved).status == "success"
    files = {path: path.stat().st_mtime_ns for path in loop.loras()}
    assert not trainer_ran(loop.queue(saved), saved)
    loop.forget()
    again = loop.queue(saved)
    assert trainer_ran(again, saved) and "Nothing to train" in loop.text(again, saved, "How training went")
    assert {path: path.stat().st_mtime_ns for path in loop.loras()} == files


def test_promise_6_more_steps_extend_and_other_preview_prompts_do_not_restart(loop):
    assert loop.queue(loop.saved()).status == "success"
    first = {path.name: sha256(path) for path in loop.loras()}
    more = loop.saved(steps=STEPS + STEPS // 2)
    run = loop.queue(more)
    assert f"Trained {STEPS // 2} steps" in loop.text(run, more, "How training went")
    assert first.items() < {path.name: sha256(path) for path in loop.loras()}.items()
    other = loop.saved(steps=STEPS + STEPS // 2, preview_prompts="a red circle")
    assert "Nothing to train" in loop.text(loop.queue(other), other, "How training went")


def test_the_same_workflow_gives_the_same_lora_file(loop):
    hashes = []
    for _ in range(2):
        assert loop.queue(loop.saved()).status == "success"
        hashes.append({path.name: sha256(path) for path in loop.loras()})
        for folder in (loop.loras()[0].parent, loop.runs(), loop.server.folder / "output" / "lora_workbench" / "cache"):
            shutil.rmtree(folder)
        loop.forget()
    assert hashes[0] == hashes[1]


def test_promise_5_cancel_keeps_the_work_and_promise_4_going_on_gives_the_uninterrupted_file(loop):
    saved = loop.saved(steps=400, save_every=400)
    reached = []

    def cancel_in_training(name: str, data: dict) -> None:
        step = re.match(r"Training: step (\d+)", data["text"]) if name == "progress_text" else None
        if step and int(step[1]) >= 5 and not reached:
            reached.append(int(step[1]))
            loop.server.interrupt()

    run = loop.queue(saved, cancel_in_training)
    assert run.status == "interrupted" and reached
    (kept,) = loop.loras()
    stopped_at = int(kept.stem.rsplit("_", 1)[1])
    assert 0 < stopped_at < 400

    longer = loop.saved(steps=stopped_at + 4, save_every=400)
    resumed = loop.queue(longer)
    assert f"Trained 4 steps, up to step {stopped_at + 4}" in loop.text(resumed, longer, "How training went")
    interrupted = loop.loras()[-1].read_bytes()
    for folder in (kept.parent, loop.runs()):
        shutil.rmtree(folder)
    loop.forget()
    assert loop.queue(longer).status == "success"
    assert_same_lora(loop.loras()[-1].read_bytes(), interrupted)


def test_promise_5_finish_now_lets_the_graph_go_on_and_queueing_again_continues(loop):
    saved = loop.saved(steps=400, save_every=400)
    (trainer,) = [str(node["id"]) for node in saved["nodes"] if node["type"] == TRAINER]
    asked = []

    def finish_in_training(name: str, data: dict) -> None:
        step = re.match(r"Training: step (\d+)", data["text"]) if name == "progress_text" else None
        if step and int(step[1]) >= 5 and not asked:
            asked.append(int(step[1]))
            loop.server.post("/lora_workbench/finish", {"node_id": trainer})

    run = loop.queue(saved, finish_in_training)
    assert run.status == "success" and asked, run.error
    assert "Finished early: 400 steps were planned" in loop.text(run, saved, "How training went")
    assert (loop.image(run, saved, "With the LoRA") != loop.image(run, saved, "Without the LoRA")).any()
    (kept,) = loop.loras()
    stopped_at = int(kept.stem.rsplit("_", 1)[1])
    assert asked[0] <= stopped_at < 400
    longer = loop.saved(steps=stopped_at + 2, save_every=400)
    report = loop.text(loop.queue(longer), longer, "How training went")
    assert f"Trained 2 steps, up to step {stopped_at + 2}" in report


def test_a_request_to_finish_that_names_no_node_is_refused(server):
    for body in ({}, {"node_id": 7}, {"node_id": ""}, {"node_id": "x" * 101}, []):
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post("/lora_workbench/finish", body)
        assert refused.value.code == 400 and "node_id must be" in refused.value.read().decode()


def assert_same_lora(one: bytes, other: bytes) -> None:
    """Two LoRA files hold the same bits; when they do not, the message says which layers differ most."""
    first, second = safetensors.torch.load(one), safetensors.torch.load(other)
    assert first.keys() == second.keys()
    apart = {name: (first[name] - second[name]).abs().max().item() for name in first}
    assert {name: value for name, value in apart.items() if value} == {}
    said, otherwise = words_of(one), words_of(other)
    assert {name: (said.get(name), otherwise.get(name)) for name in said.keys() ^ otherwise.keys()} == {}
    assert {name: (said[name], otherwise[name]) for name in said if said[name] != otherwise[name]} == {}


def words_of(file: bytes) -> dict[str, str]:
    """What the trainer says in a LoRA file; the strength is the Picker's, for the file that it took."""
    words = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])["__metadata__"]
    return {name: value for name, value in words.items() if name != STRENGTH}


CAPTIONS = {
    "astronaut.png": "an astronaut in an orange suit smiling in front of a flag",
    "chelsea.png": "a tabby cat lying down, close up",
    "coffee.png": "a cup of coffee on a wooden table",
    "rocket.jpg": "a rocket on the launch pad at night",
    "motorcycle_left.png": "a motorcycle in a garage",
    "hubble_deep_field.jpg": "many galaxies in a dark sky",
    "page.png": "a scanned page of a book",
    "horse.png": "the silhouette of a horse",
    "camera.png": "a man with a camera on a tripod",
}


def test_the_loop_on_real_photographs_of_awkward_sizes(loop):
    """Nine photographs that scikit-image brings along: 9 sizes, 6 shapes, gray and transparent ones among them."""
    skimage = pytest.importorskip("skimage")
    folder = loop.server.folder / "input" / "photographs"
    folder.mkdir(exist_ok=True)
    for name, caption in CAPTIONS.items():
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder / name)
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    loop.folder = "photographs"
    saved = loop.saved(steps=10, save_every=5)
    run = loop.queue(saved)
    assert run.status == "success", run.error
    assert "9" in loop.text(run, saved, "What was found")
    assert loop.image(run, saved, "With the LoRA").shape == (example.SIZE, example.SIZE, 3)
    assert all((folder / name).with_suffix(".txt").read_text().strip() == text for name, text in CAPTIONS.items())


def test_a_folder_without_pictures_is_refused_before_anything_is_encoded(loop):
    (loop.server.folder / "input" / "empty").mkdir(exist_ok=True)
    loop.folder = "empty"
    run = loop.queue(loop.saved())
    assert run.status == "error"
    assert "DatasetLoader" in run.error and "empty" in run.error
    assert not loop.loras()
