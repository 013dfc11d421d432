"""The Checkpoint Picker node, on the checkpoints of a real training."""

import re
from dataclasses import replace

import numpy as np
import pytest
import queueing
import torch

from lora_workbench.nodes.host import loras
from lora_workbench.training.scores import percent_better

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])


@pytest.fixture
def trained(trainer):
    """Four checkpoints, measured on two kept-out pictures."""
    return trainer.queue(save_every=1, dataset=trainer.dataset(hold_out=2))


@both_families
def test_the_suggested_one_is_the_best_on_the_kept_out_pictures_and_goes_on_in_the_same_queue(trainer, trained):
    outputs = trainer.pick(trained)
    checkpoints = trained["checkpoints"]
    gains = {entry.step: percent_better(entry.validation, checkpoints.base_validation) for entry in checkpoints.entries}
    assert outputs["step"] == max(gains, key=gains.get)
    name = f"star/star_{outputs['step']:06d}.safetensors"
    assert outputs["lora_name"] == name and outputs["lora_stack"] == [(name, 1.0, 1.0)]
    assert outputs["model"].patches and not trainer.model.patches
    assert outputs["report"].count("\nstep ") == 4 and outputs["report"].count("than the base\n") >= 3


@both_families
def test_the_picked_model_draws_what_load_lora_with_the_picked_name_draws(trainer, trained):
    outputs = trainer.pick(trained, pick="at step", at_step=3)
    expected = queueing.by_the_graphs_nodes(trainer, "zork", outputs["lora_name"])
    with_model = queueing.by_the_graphs_nodes(replace(trainer, model=outputs["model"]), "zork", None)
    assert outputs["step"] == 3 and np.array_equal(with_model, expected)


@pytest.mark.parametrize("kind", ["sdxl"])
def test_without_kept_out_pictures_it_guesses_from_the_training_pictures_and_says_so(trainer):
    report = trainer.pick(trainer.queue())["report"]
    assert re.match("No pictures were kept out, so step [1-4] is a rough guess from the training pictures", report)
    assert "Confidence: low" in report


@pytest.mark.parametrize("kind", ["sdxl"])
def test_without_any_pictures_the_last_is_given_as_a_guess(trainer, trained):
    bare = {**trained, "checkpoints": replace(trained["checkpoints"], dataset=None)}
    outputs = trainer.pick(bare)
    assert outputs["step"] == 4
    assert outputs["report"].startswith("No pictures were kept out of training, so step 4, the last, is only a guess.")


@pytest.mark.parametrize("kind", ["sdxl"])
def test_the_last_and_the_one_at_a_step_can_be_asked_for(trainer, trained):
    assert trainer.pick(trained, pick="last")["step"] == 4
    assert trainer.pick(trained, pick="at step", at_step=2)["step"] == 2
    with pytest.raises(ValueError, match=r"no checkpoint at step 7: choose one of 1, 2, 3, 4\.$"):
        trainer.pick(trained, pick="at step", at_step=7)


@both_families
def test_the_grid_shows_what_ksampler_draws_with_each_file(trainer, trained):
    outputs = trainer.pick(trained, prompts="zork\n\na (red:1.3) circle")
    size, gap = 64, 6
    grid = (outputs["grid"][0].numpy() * 255).round().astype(np.uint8)
    assert grid.shape == (30 + 2 * (size + 26 + gap) + gap, 5 * (size + gap) + gap, 3)
    for row, prompt in enumerate(["zork", "a (red:1.3) circle"]):
        for column in (0, 2, 4):
            name = f"star/star_{column:06d}.safetensors" if column else None
            top, left = 30 + 26 + row * (size + 26 + gap), gap + column * (size + gap)
            shown = grid[top : top + size, left : left + size]
            assert np.array_equal(shown, queueing.by_the_graphs_nodes(trainer, prompt, name, size=size)), (prompt, name)


@pytest.mark.parametrize("kind", ["sdxl"])
def test_without_prompts_nothing_is_drawn(trainer, trained):
    def drawing():
        raise AssertionError("a picture was made")

    with queueing.at_forward(trainer.model, 1, drawing, training=False):
        outputs = trainer.pick(trained, prompts=" \n", pick="last")
    assert outputs["grid"].shape == (1, 64, 64, 3) and torch.equal(outputs["grid"], torch.ones(1, 64, 64, 3))


@pytest.mark.parametrize("kind", ["sdxl"])
def test_cancel_works_while_the_grid_is_drawn(trainer, trained):
    import comfy.model_management as mm

    pressed = queueing.at_forward(trainer.model, 25, queueing.interrupt, training=False)
    with pytest.raises(mm.InterruptProcessingException), pressed:
        trainer.pick(trained, prompts="zork")


@pytest.mark.parametrize("kind", ["sdxl"])
def test_a_picked_file_that_is_damaged_is_named(trainer, trained):
    trainer.lora(2).write_bytes(b"no LoRA")
    with pytest.raises(ValueError, match=r"^The LoRA file 'star_000002\.safetensors' cannot be read"):
        trainer.pick(trained, pick="at step", at_step=2)
    assert loras.read_lora(trainer.lora(3))


@pytest.mark.parametrize("kind", ["sdxl"])
def test_a_worse_loss_is_called_worse(trainer, trained):
    checkpoints = trained["checkpoints"]
    for entry in checkpoints.entries:
        entry.validation[:] = [[2 * level for level in levels] for levels in checkpoints.base_validation]
    report = trainer.pick(trained)["report"]
    assert report.startswith("Every file makes the pictures much worse than the base model does") and " -" not in report
    assert "step 2 (star/star_000002.safetensors): left out, it makes the loss 100 % higher" in report
