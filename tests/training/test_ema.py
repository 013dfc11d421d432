"""Averages of the adapters against their formulas, recomputed from every step."""

import pytest
import torch
from safetensors.torch import save_file
from toys import Batches, Denoiser, equal

from lora_workbench.training.config import TrainConfig
from lora_workbench.training.ema import averaged, decay_at
from lora_workbench.training.loop import train
from lora_workbench.training.validation import validation_loss

RATE = 0.01


def run(config, resume=None, batches=None):
    """A snapshot after every step."""
    denoiser = Denoiser()
    steps = train(denoiser, batches or Batches(), denoiser.adapters, config, resume)
    return [step.snapshot() for step in steps]


def test_the_warm_up_is_one_trainers_formula():
    assert [decay_at(n, 0.999) for n in (0, 1, 90)] == [1 / 10, 2 / 11, 0.91]
    assert decay_at(10**6, 0.999) == 0.999
    assert decay_at(0, 0.05) == 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "schedule-free"])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_the_average_equals_an_offline_recomputation(optimizer, decay):
    snapshots = run(TrainConfig(steps=12, learning_rate=RATE, ema=decay, optimizer=optimizer))
    expected = {name: tensor.double() for name, tensor in Denoiser().adapters.state().items()}
    for n, snapshot in enumerate(snapshots):
        kept = min((1 + n) / (10 + n), decay)
        for name, tensor in expected.items():
            tensor.mul_(kept).add_(snapshot.weights[name].double(), alpha=1 - kept)
            torch.testing.assert_close(snapshot.ema[name].double(), tensor, rtol=1e-5, atol=1e-7)
    assert not equal(snapshots[-1].ema, snapshots[-1].weights)


def test_keeping_an_average_changes_nothing_about_the_weights():
    one, other = (run(TrainConfig(steps=6, learning_rate=RATE, ema=ema))[-1] for ema in (0.0, 0.9))
    assert equal(one.weights, other.weights) and equal(one.optimizer, other.optimizer)
    assert one.ema is None and other.ema is not None


def test_a_skipped_step_is_no_part_of_the_average():
    snapshots = run(TrainConfig(steps=4, learning_rate=RATE, ema=0.9), batches=Batches(broken=(2,)))
    assert equal(snapshots[2].ema, snapshots[1].ema) and not equal(snapshots[3].ema, snapshots[2].ema)


def test_a_snapshot_owns_its_average_and_resuming_does_not_write_into_it():
    config = TrainConfig(steps=6, learning_rate=RATE, ema=0.9)
    snapshot = run(config)[2]
    before = {name: tensor.clone() for name, tensor in snapshot.ema.items()}
    run(config, resume=snapshot)
    assert equal(snapshot.ema, before)


def test_switching_the_average_on_for_a_state_without_one_begins_with_its_weights():
    snapshot = run(TrainConfig(steps=3, learning_rate=RATE))[-1]
    resumed = run(TrainConfig(steps=4, learning_rate=RATE, ema=0.99), resume=snapshot)[-1]
    kept = decay_at(3, 0.99)
    for name, tensor in resumed.ema.items():
        torch.testing.assert_close(tensor, kept * snapshot.weights[name] + (1 - kept) * resumed.weights[name])


def test_the_average_answers_held_out_pictures_no_worse():
    """With a rate that jumps about, where an average is for."""
    config = TrainConfig(steps=150, learning_rate=0.03, ema=0.95)
    last, denoiser = run(config)[-1], Denoiser()
    held_out = [Batches()[number] for number in range(5)]
    found = {}
    for name, weights in (("raw", last.weights), ("average", last.ema)):
        denoiser.adapters.load(weights)
        losses = validation_loss(denoiser, held_out)
        found[name] = sum(map(sum, losses))
    assert found["average"] <= found["raw"]


def written(folder, states):
    paths = [folder / f"{number}.safetensors" for number in range(len(states))]
    for path, tensors in zip(paths, states, strict=True):
        save_file(tensors, path)
    return paths


def test_the_mean_of_checkpoints_is_their_mean_in_the_precision_of_the_last(tmp_path):
    states = [{"a": torch.full((2, 3), float(number)), "b": torch.full((1,), number).half()} for number in (1, 2, 6)]
    paths = written(tmp_path, states)
    assert equal(averaged(paths), {"a": torch.full((2, 3), 3.0), "b": torch.full((1,), 3.0).half()})
    assert equal(averaged(paths[:1]), states[0])


@pytest.mark.parametrize(
    ("states", "words"),
    [([], "no checkpoint"), ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], "different adapters")],
)
def test_what_cannot_be_averaged_is_one_sentence(states, words, tmp_path):
    with pytest.raises(ValueError, match=rf"{words}.*\.$"):
        averaged(written(tmp_path, states))
