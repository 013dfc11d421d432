"""The previews of a run: which prompts, which checkpoints, and none made twice."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import queueing
from PIL import Image

from lora_workbench.nodes.previews import MOST_COLUMNS, prompts_of, spread
from lora_workbench.training import description
from lora_workbench.training.checkpoint import Checkpoint
from lora_workbench.training.dataset import REGULARIZATION, Dataset, Example

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])


def request(prompts: str, caption: str = "zork, a star", trigger: str = "zork"):
    pictures = (
        Example(Path("room.png"), "a room", 64, 64, role=REGULARIZATION),
        Example(Path("star.png"), caption, 64, 64, trigger_word=trigger),
    )
    return SimpleNamespace(preview_prompts=prompts, dataset=Dataset(Path(), pictures, trigger_word=trigger))


def test_each_line_is_a_prompt_and_blank_lines_are_none():
    assert prompts_of(request("  zork on a hill \n\n\t\nzork, at night\r\n")) == ["zork on a hill", "zork, at night"]


def test_without_a_prompt_the_first_caption_is_drawn_or_else_the_trigger_word():
    assert prompts_of(request(" \n ")) == ["zork, a star"]
    assert prompts_of(request("", caption="")) == ["zork"]
    assert prompts_of(request("", caption="", trigger="")) == ["a picture"]


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (6, 5), (100, 5), (100, 11), (12, 11)])
def test_of_many_checkpoints_the_first_the_last_and_an_even_spread_are_shown(count, most):
    entries = [Checkpoint(step, "", "") for step in range(count)]
    steps = [entry.step for entry in spread(entries, most)]
    assert len(steps) == min(count, most) == len(set(steps)) and steps == sorted(steps)
    assert steps[0] == 0 and steps[-1] == count - 1
    gaps = {after - before for before, after in zip(steps, steps[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@both_families
def test_the_strip_has_a_column_a_checkpoint_after_the_untrained_one_and_a_row_a_prompt(trainer):
    outputs = trainer.queue(steps=4, preview_prompts="zork\na red circle")
    _, height, width, _ = outputs["previews"].shape
    size, gap = queueing.RESOLUTION, 6
    assert (width, height) == (3 * (size + gap) + gap, 30 + 2 * (size + 26 + gap) + gap)
    strip = (outputs["previews"][0].numpy() * 255).round().astype(np.uint8)
    for row, prompt in enumerate(["zork", "a red circle"]):
        for column, name in enumerate([None, "star/star_000002.safetensors", "star/star_000004.safetensors"]):
            top, left = 30 + 26 + row * (size + 26 + gap), gap + column * (size + gap)
            shown = strip[top : top + size, left : left + size]
            assert np.array_equal(shown, queueing.by_the_graphs_nodes(trainer, prompt, name)), (prompt, name)


@pytest.mark.parametrize("kind", ["sdxl"])
def test_a_strip_never_has_more_columns_than_fit_on_a_screen(trainer):
    outputs = trainer.queue(steps=14, save_every=1, rank=1)
    assert outputs["previews"].shape[2] == MOST_COLUMNS * (queueing.RESOLUTION + 6) + 6
    assert len(outputs["checkpoints"].entries) == 14


@pytest.mark.parametrize("kind", ["sdxl"])
def test_a_strip_of_very_many_prompts_shows_them_smaller(trainer, monkeypatch):
    monkeypatch.setattr("lora_workbench.nodes.previews.MOST_PIXELS", 2 * 2 * 32 * 32)
    outputs = trainer.queue(steps=2, save_every=2, rank=1, preview_prompts="zork\na red circle")
    assert outputs["previews"].shape[1:3] == (30 + 2 * (32 + 26 + 6) + 6, 2 * (32 + 6) + 6)


@both_families
def test_a_deleted_preview_is_made_again_as_it_was_and_no_other(trainer):
    trainer.queue()
    files = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (trainer.runs / "star" / "previews").iterdir()
    }
    lost = next(path for path in files if path.name.startswith("000002"))
    lost.unlink()
    trainer.queue()
    assert lost.read_bytes() == files.pop(lost)[0]
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == facts for path, facts in files.items())


@pytest.mark.parametrize("kind", ["flux"])
def test_a_prompt_that_is_added_later_is_drawn_for_every_checkpoint_and_the_others_stay(trainer):
    trainer.queue(preview_prompts="zork")
    before = set((trainer.runs / "star" / "previews").iterdir())
    trainer.queue(preview_prompts="zork\nzork at night")
    after = set((trainer.runs / "star" / "previews").iterdir())
    assert before < after and sorted(path.name[:6] for path in after - before) == ["000000", "000002", "000004"]
    assert trainer.asked.texts.count("zork at night") == 1


@pytest.mark.parametrize("kind", ["sdxl"])
def test_making_previews_does_not_change_the_training(trainer, tmp_path, monkeypatch):
    trainer.queue(save_every=1, preview_prompts="zork\na red circle")
    shas = description.read(trainer.lora(4))["sshs_model_hash"], queueing.sha256(trainer.state())
    other = queueing.trainer("sdxl", tmp_path / "other", monkeypatch, models=queueing.shared_models("sdxl"))
    other.queue(save_every=4)
    assert shas == (description.read(other.lora(4))["sshs_model_hash"], queueing.sha256(other.state()))


@pytest.mark.parametrize("kind", ["sdxl"])
def test_previews_are_ordinary_pictures_of_the_datasets_size(trainer):
    trainer.queue(steps=1)
    for path in (trainer.runs / "star" / "previews").iterdir():
        assert Image.open(path).size == (queueing.RESOLUTION, queueing.RESOLUTION)
