"""What the Picker makes of a run, of a folder and of the user's answer; on the checkpoints of a real training."""

import math
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import queueing
import torch

from lora_workbench.nodes import checkpoint_picker, grid, selection
from lora_workbench.nodes.host import choice
from lora_workbench.nodes.host.progress import Progress
from lora_workbench.nodes.measure import Measure
from lora_workbench.nodes.stack_apply import LoraWorkbenchStackApply
from lora_workbench.training import description, picking

pytestmark = pytest.mark.comfy
NODE = "21"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, comfyui):
    with pytest.MonkeyPatch.context() as patch:
        yield queueing.trainer(
            "sdxl", tmp_path_factory.mktemp("selection"), patch, models=queueing.shared_models("sdxl")
        )


@pytest.fixture(scope="module")
def checkpoints(trainer):
    """Four checkpoints, measured on two kept-out pictures."""
    return trainer.queue(save_every=1, dataset=trainer.dataset(hold_out=2))["checkpoints"]


@pytest.fixture
def request_for(trainer):
    def made(checkpoints, **changes) -> selection.Request:
        values = {"effort": "quick", "size": 64, "finds_strength": False, **changes}
        return selection.Request(trainer.model, trainer.clip, trainer.vae, checkpoints, **values)

    return made


def chosen(request: selection.Request, node: str | None = None) -> selection.Selection:
    with choice.Choice(node, request.checkpoints.name) as shown:
        return selection.execute(request, Progress(node, shown), shown)


def test_the_trainers_own_figures_are_taken_where_it_asked_the_same_model(request_for, checkpoints):
    made = chosen(request_for(checkpoints))
    for entry in made.scored:
        assert entry.score.held_out == entry.checkpoint.validation[:2] and len(entry.score.training) == 2
    other = replace(checkpoints, base_validation=[[2 * level for level in row] for row in checkpoints.base_validation])
    for entry in chosen(request_for(other)).scored:
        assert entry.score.held_out != entry.checkpoint.validation[:2]


def test_pictures_that_were_not_trained_on_are_kept_out_ones(request_for, checkpoints, trainer, tmp_path):
    for path in sorted(Path(trainer.folder).glob("*.*")):
        shutil.copy(path, tmp_path / path.name)
    more = replace(trainer.dataset(hold_out=0), held_out=())
    moved = replace(more, examples=tuple(replace(e, path=tmp_path / e.path.name) for e in more.examples))
    held_out, training = selection.pictures_of(request_for(checkpoints, dataset=moved))
    assert held_out == [*checkpoints.dataset.held_out, *moved.concepts]
    assert training == list(checkpoints.dataset.concepts)
    again, _ = selection.pictures_of(request_for(checkpoints, dataset=checkpoints.dataset))
    assert again == list(checkpoints.dataset.held_out)


def test_the_best_strength_is_written_into_the_file_and_stack_apply_tells_it(request_for, checkpoints, trainer):
    made = chosen(request_for(checkpoints, finds_strength=True))
    told = description.read(Path(made.checkpoint.path))["lora_workbench.strength"]
    assert float(told) in picking.STRENGTHS
    assert any("strength" in note for note in made.notes)
    stack = [(made.checkpoint.lora_name, 0.4, 0.4)]
    applied = queueing.run(LoraWorkbenchStackApply, model=trainer.model, clip=trainer.clip, lora_stack=stack)
    assert f"recommended {told}" in applied["report"]
    written = Path(made.checkpoint.path).stat().st_ctime_ns
    chosen(request_for(checkpoints, finds_strength=True))
    assert Path(made.checkpoint.path).stat().st_ctime_ns == written, "what is there already is not written again"


def test_a_file_that_cannot_be_written_is_picked_all_the_same(request_for, checkpoints, monkeypatch):
    def refused(path, **_changes):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(description, "amend", refused)
    monkeypatch.setattr(picking, "recommended_strength", lambda *_: (0.25, ""))
    made = chosen(request_for(checkpoints, finds_strength=True))
    assert made.checkpoint == made.decision.checkpoint
    assert any(note.startswith("That strength could not be written into the file") for note in made.notes)


def test_files_that_were_deleted_are_passed_over(request_for, checkpoints, tmp_path):
    gone = replace(checkpoints.entries[-1], path=str(tmp_path / "gone.safetensors"))
    fewer = replace(checkpoints, entries=(*checkpoints.entries[:-1], gone))
    made = chosen(request_for(fewer, prompts=("zork",), pick=picking.LAST))
    assert made.checkpoint.step == 3 and len(made.grid.cells) == 4
    assert chosen(request_for(fewer)).checkpoint.step < 4
    with pytest.raises(ValueError, match="has no checkpoint left"):
        chosen(request_for(replace(checkpoints, entries=(gone,))))


def test_the_least_bad_of_files_that_all_do_harm_can_be_chosen(request_for, checkpoints):
    worse = [[2 * level for level in row] for row in checkpoints.base_validation]
    harmful = replace(checkpoints, entries=tuple(replace(e, validation=worse) for e in checkpoints.entries))
    made = chosen(request_for(harmful))
    rows = selection.table(made.scored, made.base, made.decision)
    assert [row["broken"][:12] for row in rows] == ["", *["it makes the"] * 3]


def test_ask_me_waits_for_the_answer_and_that_file_goes_on(request_for, checkpoints):
    request = request_for(checkpoints, pick=picking.ASK_ME)
    wanted = checkpoints.entries[1].lora_name

    def answer():
        while choice.state_of(NODE)["status"] != "asking":
            time.sleep(0.02)
        choice.of(NODE).choose(wanted)

    thread = threading.Thread(target=answer)
    thread.start()
    made = chosen(request, NODE)
    thread.join()
    assert made.checkpoint.lora_name == wanted and made.reason.startswith("Step 2 was chosen by eye.")
    assert choice.state_of(NODE)["picked"] == wanted


def test_nobody_answering_in_time_takes_the_suggestion(request_for, checkpoints):
    made = chosen(request_for(checkpoints, pick=picking.ASK_ME, ask_minutes=0.002), NODE)
    assert made.checkpoint == made.decision.checkpoint


def test_a_folder_of_files_is_scored_and_a_broken_one_named_and_left_out(request_for, checkpoints, trainer):
    folder = trainer.loras / "others"
    folder.mkdir()
    for entry in checkpoints.entries[1:]:
        shutil.copy(entry.path, folder / f"mine-{entry.step:06d}.safetensors")
    (folder / "mine-000009.safetensors").write_bytes(b"no LoRA")
    found = checkpoint_picker.files_of(None, "others")
    made = chosen(request_for(found, dataset=checkpoints.dataset))
    assert [entry.checkpoint.lora_name for entry in made.scored if entry.score.broken] == [
        str(Path("others") / "mine-000009.safetensors")
    ]
    own = chosen(request_for(checkpoints)).scored[1:]
    for entry, same in zip(made.scored, own, strict=False):
        torch.testing.assert_close(
            torch.tensor(entry.score.held_out), torch.tensor(same.score.held_out), rtol=1e-3, atol=0
        )
    named = str(Path("others") / "mine-000009.safetensors")
    assert "mine" not in made.reason and f"step 9 ({named}): left out, it cannot be read" in selection.report(made)


def test_of_files_without_pictures_it_is_said_that_nothing_was_measured(request_for, checkpoints):
    made = chosen(request_for(replace(checkpoints, dataset=None, base_validation=None)))
    assert made.checkpoint.step == 4 and made.notes[-1].startswith("Nothing was measured, as there are no pictures")


def test_no_strength_is_recommended_of_a_file_that_is_better_at_none(checkpoints):
    path = Path(checkpoints.entries[0].path)
    for values in ([[1.1], [1.1]], [[math.nan], [1.0]]):
        found = dict.fromkeys(picking.STRENGTHS, values), [[1.0], [1.0]]
        assert selection._strength(SimpleNamespace(by_strength=lambda *_, found=found: found), path, "star") == []


def test_pictures_that_were_moved_since_are_passed_over(request_for, checkpoints):
    dataset = checkpoints.dataset
    gone = replace(dataset.concepts[0], path=dataset.concepts[0].path.with_name("gone.png"))
    moved = replace(checkpoints, dataset=replace(dataset, examples=(gone, *dataset.concepts[1:])))
    held_out, training = selection.pictures_of(request_for(moved))
    assert (held_out, training) == (list(dataset.held_out), list(dataset.concepts[1:]))


def test_the_verdict_is_told_before_the_first_picture_is_drawn(request_for, checkpoints):
    told = []

    class Listening(choice.Choice):
        def drawing(self, prompts):
            told.append(self.state())
            super().drawing(prompts)

    with Listening(None, checkpoints.name) as shown:
        selection.execute(request_for(checkpoints, prompts=("zork",)), Progress(None, shown), shown)
    assert told[0]["verdict"]["kind"] and len(told[0]["files"]) == 4


def test_files_of_a_chosen_folder_cannot_be_deleted(request_for, checkpoints, monkeypatch):
    monkeypatch.setattr(choice, "_choices", OrderedDict())  # what Pickers of earlier tests picked stays as well
    names = [entry.lora_name for entry in checkpoints.entries]
    with choice.Choice(NODE, checkpoints.name, of_one_training=False) as shown:
        made = selection.execute(request_for(checkpoints), Progress(NODE, shown), shown)
    others = [name for name in names if name != made.checkpoint.lora_name]
    with pytest.raises(choice.NotPossible, match="may be anybody's, so none is deleted here"):
        choice.of(NODE).check_deletable(others)
    assert choice.state_of(NODE)["deletable"] is False
    assert chosen(request_for(checkpoints), NODE)
    choice.of(NODE).check_deletable(others)


def test_last_and_at_step_measure_nothing(request_for, checkpoints, trainer):
    def measuring():
        raise AssertionError("the network was asked")

    with queueing.at_forward(trainer.model, 1, measuring, training=False):
        assert chosen(request_for(checkpoints, pick=picking.LAST)).checkpoint.step == 4
        made = chosen(request_for(checkpoints, pick=picking.AT_STEP, at_step=3))
    assert made.checkpoint.step == 3 and "held-out pictures" in selection.report(made)


def test_without_checkpoints_or_folder_the_user_is_told_what_to_connect():
    with pytest.raises(ValueError, match="^There is nothing to choose from: connect 'checkpoints'"):
        checkpoint_picker.files_of(None, "nothing")


def test_strengths_are_numbers_or_a_sentence():
    assert checkpoint_picker.numbers_of("0.6, 0.8;1,") == (0.6, 0.8, 1.0)
    assert checkpoint_picker.numbers_of(" ") == (1.0,)
    for text in ("much", "1, inf", "nan"):
        with pytest.raises(ValueError, match="give numbers separated by commas"):
            checkpoint_picker.numbers_of(text)


def test_the_charts_show_every_picture_that_was_measured(request_for, checkpoints):
    made = chosen(request_for(checkpoints))
    assert len(made.pictures) == 4
    picture = selection.charts(made)
    assert picture.width >= 400 and len(picture.getcolors(1 << 24)) > 10


def test_the_grid_follows_scope_and_strengths(request_for, checkpoints):
    made = chosen(request_for(checkpoints, prompts=("zork",), strengths=(0.5, 1.0), scope=grid.EVERYTHING, pick="last"))
    assert [column.label for column in made.grid.columns][:3] == ["untrained", "step 1 at 0.5", "step 1"]
    assert len(made.grid.cells) == 1 + 2 * 4
    assert torch.is_tensor(checkpoint_picker.to_image(made.grid.picture(made.checkpoint)))


def test_the_model_is_also_asked_without_captions_to_find_those_that_mislead(trainer, checkpoints):
    dataset = checkpoints.dataset
    with Measure(
        trainer.model, trainer.clip, trainer.vae, dataset.held_out, dataset.concepts, "quick", Progress(None), dataset
    ) as measure:
        told, blank = measure.base(), measure.without_captions()
    empty = replace(dataset, examples=tuple(replace(e, caption="") for e in dataset.concepts))
    nothing = tuple(replace(e, caption="") for e in dataset.held_out)
    with Measure(
        trainer.model, trainer.clip, trainer.vae, nothing, empty.concepts, "quick", Progress(None), dataset
    ) as measure:
        expected = measure.base()
    assert (blank.held_out, blank.training) == (expected.held_out, expected.training)
    assert blank.held_out != told.held_out
