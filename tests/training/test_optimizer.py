"""Every optimizer against a published or foreign one, and that its state goes on bit for bit."""

from dataclasses import replace

import pytest
import torch
from toys import Denoiser, equal

from lora_workbench.training import optimizer as optimizers
from lora_workbench.training.config import OPTIMIZERS, TrainConfig
from lora_workbench.training.loop import State
from lora_workbench.training.optimizer import (
    load_state,
    optimizer_for,
    require,
    set_learning_rate,
    state_of,
    training_weights,
)

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
DECAY = 0.02


def adapters(rank=4):
    """Adapters that are nowhere zero."""
    made, random = Denoiser(rank=rank).adapters, torch.Generator().manual_seed(7)
    made.values.data.add_(0.1 * torch.randn(made.values.shape, generator=random))
    return made


def made_for(name, over, **settings):
    if name in optimizers.EXTRAS:
        pytest.importorskip(optimizers.EXTRAS[name])
    return optimizer_for(over, TrainConfig(optimizer=name, weight_decay=DECAY, **settings))


def step(optimizer, over, number, rate=0.01, done=0.0):
    random = torch.Generator().manual_seed(number)
    set_learning_rate(optimizer, rate, done)
    with training_weights(optimizer):
        over.values.grad.copy_(torch.randn(over.values.shape, generator=random))
        optimizer.step()


def close(one, other, tolerance=1e-6):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=tolerance)


# Against others


def test_a_step_of_adamw_is_the_published_update():
    """Loshchilov & Hutter 2019, algorithm 2, at the first step, where both moments are those of one gradient."""
    over, rate = adapters(), 0.1
    before, optimizer = over.values.detach().clone(), made_for("adamw", over)
    step(optimizer, over, 1, rate)
    g = over.values.grad
    close(over.values.detach(), before * (1 - rate * DECAY) - rate * g / (g.abs() + 1e-8))


def test_adamw_with_8_bits_stays_near_adamw():
    one, other = adapters(64), adapters(64)
    before = one.values.detach().clone()
    exact, rough = made_for("adamw", one), made_for("adamw 8-bit", other)
    for number in range(5):
        step(exact, one, number)
        step(rough, other, number)
    moved, apart = (one.values - before).norm(), (one.values - other.values).norm()
    assert 0 < apart < 0.1 * moved
    assert {tensor.dtype for name, tensor in state_of(rough).items() if "state" in name} == {torch.uint8}


def foreign(name, parameters):
    """The same optimizer by somebody else."""
    if name == "lion":
        return pytest.importorskip("lion_pytorch").Lion(parameters, lr=0.01, betas=(0.9, 0.99), weight_decay=DECAY)
    if name == "schedule-free":
        return pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=0.01, weight_decay=DECAY)
    if name == "prodigy":
        more = {"use_bias_correction": True, "safeguard_warmup": True}
        return pytest.importorskip("prodigyopt").Prodigy(parameters, lr=0.01, weight_decay=DECAY, **more)
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=DECAY)


@pytest.mark.parametrize("name", ["adamw", "lion", "schedule-free", "prodigy"])
def test_ten_steps_are_those_of_somebody_elses_code(name):
    over = adapters()
    theirs = torch.nn.Parameter(over.values.detach().clone())
    ours, other = made_for(name, over), foreign(name, [theirs])
    for number in range(10):
        step(ours, over, number)
        theirs.grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(number))
        if name == "schedule-free":
            other.train()
        other.step()
        if name == "schedule-free":
            other.eval()
    close(over.values.detach(), theirs.detach(), 2e-6)


def test_adafactor_sees_each_matrix_and_moves_one_that_is_zero_as_far_as_the_others():
    """Shazeer & Stern 2018, algorithm 4, at the first step: the update of a matrix has a root mean square of 1."""
    over, rate = adapters(), 0.01
    over.parameters()[1].data.zero_()
    before = [tensor.detach().clone() for tensor in over.parameters()]
    optimizer = made_for("adafactor", over)
    step(optimizer, over, 1, rate)
    for tensor, was in zip(over.parameters(), before, strict=True):
        g = tensor.grad.square()
        scale = g.mean(1, keepdim=True) * g.mean(0, keepdim=True) / g.mean()
        update = tensor.grad / scale.sqrt()
        update /= max(1.0, update.square().mean().sqrt())
        close(tensor.detach(), was * (1 - rate * DECAY) - rate * update, 1e-5)


def test_adafactor_keeps_less_than_a_tenth_of_what_adamw_keeps():
    sizes = {}
    for name in ("adamw", "adafactor"):
        over = adapters(64)
        optimizer = made_for(name, over)
        step(optimizer, over, 1)
        sizes[name] = sum(tensor.numel() for tensor in state_of(optimizer).values())
    assert sizes["adafactor"] < 0.1 * sizes["adamw"]


# Rates


@every_optimizer
def test_a_rate_of_zero_for_what_is_over_leaves_it_bit_for_bit_and_out_of_the_norm(name):
    over = adapters()
    down = sum(adapter.down.numel() for adapter in over)
    segments = [(slice(0, down), 1.0), (slice(down, None), 0.5)]
    optimizer = made_for(name, _Cut(over, segments))
    step(optimizer, over, 1)
    kept = over.values.detach()[down:].clone()
    step(optimizer, over, 2, done=0.5)
    optimizers.forget_still(optimizer)
    assert torch.equal(over.values.detach()[down:], kept)
    assert not over.values.grad[down:].any() and over.values.grad[:down].all()
    step(optimizer, over, 3, done=0.6)
    assert torch.equal(over.values.detach()[down:], kept)


class _Cut:
    """Adapters whose segments end at given times."""

    def __init__(self, over, segments):
        self._over, self._segments = over, segments

    def parameters(self):
        return self._over.parameters()

    def segments(self, config):
        from lora_workbench.training.lora import Segment

        cut = []
        for where, until in self._segments:
            values = torch.nn.Parameter(self._over.values.data[where])
            values.grad = self._over.values.grad[where]
            cut.append(Segment(values, 1.0, until, config.weight_decay))
        return cut


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_lora_plus_moves_the_up_factors_that_much_faster(name):
    moves = {}
    for ratio in (1.0, 8.0):
        over = adapters()
        before = {key: tensor.clone() for key, tensor in over.state().items()}
        optimizer = optimizer_for(over, TrainConfig(optimizer=name, weight_decay=0.0, lora_plus=ratio))
        step(optimizer, over, 1)
        moves[ratio] = {key: (tensor - before[key]).norm().item() for key, tensor in over.state().items()}
    for key, moved in moves[8.0].items():
        assert moved == pytest.approx(moves[1.0][key] * (8 if key.endswith(".up") else 1), rel=1e-3), key


# State


@every_optimizer
def test_four_steps_and_four_more_are_eight_bit_for_bit(name):
    through = adapters(64)
    optimizer = made_for(name, through)
    for number in range(4):
        step(optimizer, through, number)
    state, weights = state_of(optimizer), through.state()
    for number in range(4, 8):
        step(optimizer, through, number)

    again = adapters(64)
    again.load(weights)
    resumed = made_for(name, again)
    load_state(resumed, state)
    for number in range(4, 8):
        step(resumed, again, number)
    assert torch.equal(again.values, through.values)
    assert equal(state_of(resumed), state_of(optimizer))


@every_optimizer
def test_the_state_is_a_copy_of_plain_tensors_that_later_steps_do_not_change(name):
    over = adapters()
    optimizer = made_for(name, over)
    step(optimizer, over, 0)
    state = state_of(optimizer)
    before = {key: value.clone() for key, value in state.items()}
    resumed = made_for(name, over)
    load_state(resumed, state)
    step(optimizer, over, 1)
    step(resumed, over, 1)
    assert equal(state, before)
    assert state and all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in state.values())


@every_optimizer
def test_an_optimizer_that_took_no_step_has_nothing_of_weight_to_save(name):
    optimizer = made_for(name, adapters())
    state = state_of(optimizer)
    assert sum(tensor.numel() for tensor in state.values()) < 10
    load_state(optimizer, state)
    load_state(optimizer, {})
    assert equal(state_of(optimizer), state)


def test_the_rate_is_the_one_set_last_even_after_loading_a_state():
    over = adapters()
    optimizer = made_for("adamw", over)
    step(optimizer, over, 0, rate=0.5)
    resumed = made_for("adamw", over)
    set_learning_rate(resumed, 0.125)
    load_state(resumed, state_of(optimizer))
    assert [group["lr"] for group in resumed.param_groups] == [0.125]


# Schedule-free: two sets of weights


def test_between_steps_the_adapters_hold_the_average_and_gradients_are_taken_elsewhere():
    over = adapters()
    optimizer = made_for("schedule-free", over)
    for number in range(3):
        step(optimizer, over, number)
    average = over.values.detach().clone()
    for _ in range(100):
        with training_weights(optimizer):
            assert not torch.equal(over.values, average)
    assert torch.equal(over.values, average)
    with pytest.raises(KeyboardInterrupt), training_weights(optimizer):
        raise KeyboardInterrupt
    assert torch.equal(over.values, average)


@pytest.mark.parametrize("name", ["adamw", "lion", "prodigy", "adafactor", "adamw 8-bit"])
def test_other_optimizers_have_one_set_of_weights(name):
    over = adapters()
    optimizer = made_for(name, over)
    step(optimizer, over, 0)
    before = over.values.detach().clone()
    with training_weights(optimizer):
        assert torch.equal(over.values, before)


# What cannot be had


@pytest.mark.parametrize(("name", "package"), optimizers.EXTRAS.items())
def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch, name, package):
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"^optimizer '{name}' needs .*'python -m pip install {package}' .*\.$"):
        require(name)
    with pytest.raises(ValueError, match=package):
        optimizer_for(adapters(), TrainConfig(optimizer=name))


@pytest.mark.parametrize("name", ["adamw", "lion", "schedule-free"])
def test_some_need_no_package(monkeypatch, name):
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    require(name)


def test_a_device_without_the_kernels_is_one_sentence(monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def broken(self):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", broken)
    with pytest.raises(ValueError, match=r"^optimizer 'adamw 8-bit' does not work here \(no kernel\): choose .*\.$"):
        optimizer_for(adapters(), TrainConfig(optimizer="adamw 8-bit"))


def test_a_prodigy_with_weight_decay_prints_nothing(capsys):
    (group,) = made_for("prodigy", adapters()).param_groups
    assert group["weight_decay"] == DECAY and capsys.readouterr().out == ""


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "prodigy"])
def test_what_has_a_decay_of_its_own_is_pulled_by_that(name):
    class Two(_Cut):
        def segments(self, config):
            first, second = super().segments(config)
            return [replace(first, decay=0.0), second]

    over, half = adapters(), slice(0, 32)
    pulled, free = over.values.detach()[32:64].norm(), over.values.detach()[half].norm()
    optimizer = made_for(name, Two(over, [(half, 1.0), (slice(32, 64), 1.0)]))
    set_learning_rate(optimizer, 1.0)
    with training_weights(optimizer):
        over.values.grad.zero_()
        optimizer.step()
    assert over.values.detach()[half].norm() == free
    assert over.values.detach()[32:64].norm() < pulled


def test_a_state_that_is_being_changed_is_not_taken():
    over = adapters()
    state = State.begin(over, TrainConfig(steps=4), None)
    state.optimizer.step = lambda: (_ for _ in ()).throw(MemoryError)
    with pytest.raises(MemoryError):
        state.change(0)
    with pytest.raises(RuntimeError, match="gone"):
        state.snapshot(0)
