"""The report of a run: everything in it, nothing of it elsewhere, and nothing of it taken for markup."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from lora_workbench.training import curve
from lora_workbench.training.loop import Snapshot, Step
from lora_workbench.training.metrics import Point
from lora_workbench.training.run import TrainingRun
from lora_workbench.training.run_report import FILE, MOST_COLUMNS, Findings, page, write
from lora_workbench.training.whole_file import write_atomically

HOSTILE = "<script>alert('x')</script> & \"quotes\""


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def run(tmp_path) -> TrainingRun:
    """Two checkpoints, 200 steps with noise levels, two held-out pictures, a roll-back."""
    run = TrainingRun.open(tmp_path / "runs", tmp_path / "loras", "star & moon", {"model": "toy"})
    run.begin()
    for step in range(1, 201):
        run.metrics.append(Point(step, 0.2 + 0.1 / step, 1.0, 1e-4, 0.5, 0.25))
    run.note_validation(0, [[0.5, 0.4], [0.6, 0.3]])
    for step in (100, 200):
        run.save(Snapshot(step, {"a": torch.ones(2)}, {}, {"a": torch.zeros(2)}), write_lora, 0.21)
        run.note_validation(step, [[0.45 - step / 1000, 0.35], [0.5, 0.25]])
    run.note_validation(200, [[0.25, 0.2], [0.3, 0.15]], "EMA")
    run.add_note(f"Step 50: diverged {HOSTILE}")
    return run


def write_lora(path, snapshot, average=""):
    write_atomically(path, b"a LoRA file")


@pytest.fixture
def findings(run, tmp_path) -> Findings:
    rows = []
    for prompt in ("zork on a hill", HOSTILE):
        row = []
        for step in (0, 100, 200):
            path = tmp_path / f"{len(rows)}_{step}.png"
            Image.new("RGB", (512, 512), (step, 90, 90 * len(rows))).save(path)
            row.append((step, path))
        rows.append((prompt, row))
    return Findings(
        run.result(200, "zork"),
        family="SDXL",
        plan="200 steps at learning rate 0.0001",
        settings={"train": {"steps": 200, "objective": {"loss": "l2"}}, "save_precision": HOSTILE},
        proof="proved: 10 of 10 layers load in ComfyUI",
        previews=rows,
        sheet=Image.new("RGB", (3000, 2000), "gray"),
        dataset=f"6 pictures {HOSTILE}",
        workflow={"1": {"class_type": "LoraWorkbenchTrainer", "inputs": {"name": HOSTILE}}},
    )


def test_the_page_holds_everything_it_shows_and_loads_nothing(run, findings):
    text = page(run, findings)
    tags = Tags(text).tags
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert all(entry["src"].startswith("data:image/") for tag, entry in tags if tag == "img")
    assert not re.search(r"(href|url\(|@import|https?:)", text)
    assert "default-src 'none'" in text


def test_what_users_wrote_is_shown_as_they_wrote_it_and_never_taken_for_markup(run, findings):
    parsed = Tags(page(run, findings))
    text = "".join(parsed.text)
    assert text.count("<script>alert('x')</script>") >= 5
    assert all("script" not in tag for tag, _ in parsed.tags)
    assert "star & moon" in text


def test_it_says_what_was_done_what_came_of_it_and_which_checkpoint_to_use(run, findings):
    text = "".join(Tags(page(run, findings)).text)
    for words in (
        "trigger word “zork”",
        "Step 200 is recommended",
        curve.diagnose([(point.step, point.loss, point.sigma) for point in run.points()]).sentence,
        "Step 50: diverged",
        "star & moon_000100_ema.safetensors",
        "proved: 10 of 10 layers",
        "train · objective · loss",
        "50 s",
        "0.5500",
        "+50.0 %",
    ):
        assert words in text, words


def test_pictures_are_small_enough_to_send(run, findings):
    tags = Tags(page(run, findings)).tags
    sizes = [picture_of(entry["src"]).size for tag, entry in tags if tag == "img"]
    assert sizes[0] == (256, 256) and sizes.count((256, 256)) == 7
    assert (1600, 1066) in sizes or (1600, 1067) in sizes
    assert len(page(run, findings)) < 400_000


def test_the_picked_step_is_always_among_the_previews(tmp_path):
    path = tmp_path / "small.png"
    Image.new("RGB", (8, 8)).save(path)
    previews = [("zork", [(step, path) for step in range(0, 2100, 100)])]
    for picked in range(100, 2100, 100):
        run = TrainingRun.open(tmp_path / "runs", tmp_path / "loras", "plain", {"model": picked})
        run.save(Snapshot(picked, {"a": torch.ones(2)}, {}), write_lora, None)
        text = page(run, Findings(run.result(picked, ""), "SDXL", "", {}, "proved", previews))
        words = [entry["alt"] for tag, entry in Tags(text).tags if tag == "img"]
        steps = [int(word.removeprefix("zork, step ")) for word in words if word.startswith("zork, step ")]
        assert len(steps) == MOST_COLUMNS and {0, picked, 2000} <= set(steps) and steps == sorted(steps)


def picture_of(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))


def test_a_page_that_would_be_the_same_is_not_written_again(run, findings):
    before = write(run, findings).stat().st_mtime_ns
    assert write(run, findings).stat().st_mtime_ns == before
    run.add_note("Something happened.")
    assert "Something happened." in write(run, findings).read_text("utf-8")


def test_a_run_with_nothing_to_compare_still_has_a_report(tmp_path):
    run = TrainingRun.open(tmp_path / "runs", tmp_path / "loras", "plain", {"model": "toy"})
    run.save(Snapshot(1, {"a": torch.ones(2)}, {}), write_lora, None)
    run.log(Step(1, 0.5, 1e-4, False), 0.1)
    findings = Findings(run.result(1, ""), family="FLUX.1", plan="", settings={}, proof="proved")
    path = write(run, findings)
    assert path == run.folder / FILE
    text = "".join(Tags(path.read_text("utf-8")).text)
    assert "no trigger word" in text and "only a guess" in text
    assert "Held-out pictures" not in text and "Previews" not in text and "What happened" not in text
