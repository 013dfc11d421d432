import torch
from toys import equal

from lora_workbench.training.optimizer import adamw, load_state, set_learning_rate, state_of


def parameters():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, generator=random).requires_grad_(), torch.randn(4, generator=random).requires_grad_()]


def step(optimizer, tensors, number, rate=0.1):
    random = torch.Generator().manual_seed(number)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=random)
    set_learning_rate(optimizer, rate)
    optimizer.step()


def test_a_step_is_the_published_update():
    """Loshchilov & Hutter 2019, algorithm 2, at the first step, where both moments are those of one gradient."""
    (tensor, _), rate, decay = parameters(), 0.1, 0.02
    before = tensor.detach().clone()
    optimizer = adamw([tensor], decay)
    step(optimizer, [tensor], 1, rate)
    g = tensor.grad
    torch.testing.assert_close(tensor.detach(), before * (1 - rate * decay) - rate * g / (g.abs() + 1e-8))


def test_continuing_from_a_saved_state_equals_never_having_stopped():
    through = parameters()
    optimizer = adamw(through, 0.01)
    for number in range(3):
        step(optimizer, through, number)
    state, kept = state_of(optimizer), [tensor.detach().clone().requires_grad_() for tensor in through]
    step(optimizer, through, 3)

    resumed = adamw(kept, 0.01)
    load_state(resumed, state)
    step(resumed, kept, 3)
    assert all(map(torch.equal, kept, through))
    assert equal(state_of(resumed), state_of(optimizer))


def test_the_state_is_a_copy_of_plain_tensors_that_later_steps_do_not_change():
    tensors = parameters()
    optimizer = adamw(tensors, 0.01)
    step(optimizer, tensors, 0)
    state = state_of(optimizer)
    before = {name: value.clone() for name, value in state.items()}
    step(optimizer, tensors, 1)
    assert equal(state, before)
    assert set(state) == {f"{n}.{what}" for n in (0, 1) for what in ("step", "exp_avg", "exp_avg_sq")}


def test_a_loaded_state_is_not_shared_with_the_optimizer():
    tensors = parameters()
    optimizer = adamw(tensors, 0.01)
    step(optimizer, tensors, 0)
    state = state_of(optimizer)
    before = {name: value.clone() for name, value in state.items()}
    resumed = adamw(tensors, 0.01)
    load_state(resumed, state)
    step(resumed, tensors, 1)
    assert equal(state, before)


def test_an_optimizer_that_took_no_step_has_nothing_to_save_and_nothing_to_load():
    optimizer = adamw(parameters(), 0.01)
    assert state_of(optimizer) == {}
    load_state(optimizer, {})
    assert state_of(optimizer) == {}


def test_the_rate_is_the_one_set_last_even_after_loading_a_state():
    tensors = parameters()
    optimizer = adamw(tensors, 0.01)
    step(optimizer, tensors, 0, rate=0.5)
    resumed = adamw(tensors, 0.01)
    set_learning_rate(resumed, 0.125)
    load_state(resumed, state_of(optimizer))
    assert [group["lr"] for group in resumed.param_groups] == [0.125]
