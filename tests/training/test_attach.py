"""A network with adapters on computes what it should, and without them is what it was."""

import copy
import weakref

import pytest
import torch
from toys import Block, BlockInPlace, Network, ResidentWeights, part, question

from lora_workbench.training.attach import Attachment
from lora_workbench.training.config import LoraConfig
from lora_workbench.training.lora import Adapters
from lora_workbench.training.memory import EVERY_BLOCK, EVERY_SECOND_BLOCK, NO_BLOCK

both_blocks = pytest.mark.parametrize("block", [Block, BlockInPlace])


def adapters_of(network, seed=0, alpha=0.0):
    """Adapters that already do something."""
    adapters = Adapters.build([part(network)], LoraConfig(rank=3, alpha=alpha), seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            adapter.up.copy_(torch.randn(adapter.up.shape, generator=random) * 0.3)
    return adapters


def attachment_of(network, adapters, *, checkpointing=False):
    blocks = ("Block", "BlockInPlace") if checkpointing else ()
    in_place = isinstance(network.blocks[0], BlockInPlace)
    return Attachment(network, adapters, ResidentWeights(), blocks=blocks, adds_in_place=in_place)


def fused(network, adapters):
    """The network with W + scale up down in place of each adapted W: the reference for what adapters mean."""
    merged = copy.deepcopy(network)
    for adapter in adapters:
        change = adapter.scale * (adapter.down.t() @ adapter.up).t().detach()
        merged.get_submodule(adapter.name).weight += change
    return merged


def portrait(network):
    """All there is to see of a network: module tree, instance dictionaries, keys, weights, flags, hooks."""
    return {
        name: (
            type(module),
            {key: value for key, value in module.__dict__.items() if not key.startswith("_")},
            {
                key: (id(value), value._version, value.requires_grad)
                for key, value in module._parameters.items()
                if value is not None
            },
            {key: len(value) for key, value in module.__dict__.items() if key.endswith("_hooks")},
        )
        for name, module in network.named_modules()
    }


@both_blocks
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_inside_the_network_computes_with_its_adapters_and_outside_as_before(block, checkpointing, alpha):
    network = Network(block)
    adapters = adapters_of(network, alpha=alpha)
    before = network(*question())
    with attachment_of(network, adapters, checkpointing=checkpointing).attached():
        inside = network(*question())
    torch.testing.assert_close(inside, fused(network, adapters)(*question()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inside, before, atol=1e-2)
    assert torch.equal(network(*question()), before)


def gradients(block, recompute):
    """The gradients of one question, how many blocks ran twice for them, and the answer."""
    network = Network(block)
    adapters, runs = adapters_of(network), [0]

    def counted(*_):
        runs[0] += 1

    for inner in network.blocks:
        inner.text_norm.register_forward_hook(counted)
    in_place = issubclass(block, BlockInPlace)
    attachment = Attachment(
        network,
        adapters,
        ResidentWeights(),
        blocks=("Block", "BlockInPlace"),
        recompute=recompute,
        adds_in_place=in_place,
    )
    with attachment.attached():
        network(*question()).square().sum().backward()
    return adapters.values.grad.clone(), runs[0] - len(network.blocks)


@both_blocks
@pytest.mark.parametrize(("recompute", "again"), [(NO_BLOCK, 0), (EVERY_SECOND_BLOCK, 1), (EVERY_BLOCK, 2)])
def test_as_many_blocks_are_recomputed_as_asked_for_and_the_gradients_stay_what_they_are(block, recompute, again):
    expected, _ = gradients(block, NO_BLOCK)
    found, twice = gradients(block, recompute)
    assert twice == again
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@both_blocks
def test_the_gradients_are_those_of_plain_autograd(block):
    network = Network(block)
    adapters = adapters_of(network)
    with attachment_of(network, adapters).attached():
        network(*question()).square().sum().backward()

    # The same mathematics without any of our forwards: functional_call on weights that depend on the factors.
    plain = Network(Block if block is Block else OutOfPlace)
    factors = [
        (a.name, a.down.detach().clone().requires_grad_(), a.up.detach().clone().requires_grad_()) for a in adapters
    ]
    weights = dict(plain.named_parameters())
    weights |= {f"{name}.weight": weights[f"{name}.weight"] + (down.t() @ up).t() for name, down, up in factors}
    torch.func.functional_call(plain, weights, question()).square().sum().backward()
    for adapter, (_, down, up) in zip(adapters, factors, strict=True):
        torch.testing.assert_close(adapter.down.grad, down.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapter.up.grad, up.grad, rtol=1e-4, atol=1e-4)


class OutOfPlace(BlockInPlace):
    """BlockInPlace on copies, which plain autograd can differentiate."""

    def forward(self, x, text, options):
        options["blocks_seen"] = options.get("blocks_seen", 0) + 1
        x = x + self.attend(self.text_norm(text)).mean(1, keepdim=True)
        x = x + self.narrow(torch.nn.functional.silu(self.widen(self.norm(x))))
        return x, text * 0.5 * options["blocks_seen"]


@both_blocks
def test_checkpointing_changes_neither_loss_nor_gradients(block):
    def loss_and_gradients(checkpointing):
        network = Network(block)
        adapters = adapters_of(network)
        with attachment_of(network, adapters, checkpointing=checkpointing).attached():
            loss = network(*question()).square().sum()
            loss.backward()
        return loss.item(), [tensor.grad for tensor in adapters.parameters()]

    (loss, gradients), (again, recomputed) = loss_and_gradients(False), loss_and_gradients(True)
    assert loss == again
    for kept, made_again in zip(gradients, recomputed, strict=True):
        torch.testing.assert_close(made_again, kept, rtol=1e-5, atol=1e-5)  # sums may run in another order


def test_checkpointing_keeps_the_inputs_of_blocks_and_nothing_inside_them():
    def kept(checkpointing):
        network, saved = Network(), []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.nbytes) or tensor, lambda t: t
        )
        with attachment_of(network, adapters_of(network), checkpointing=checkpointing).attached(), hooks:
            network(*question())
        return sum(saved)

    assert kept(True) < 0.5 * kept(False)


class Cancelled(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@pytest.mark.parametrize("error", [RuntimeError, Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_whatever_is_raised_inside_the_network_is_left_as_it_was(error, checkpointing):
    network = Network()
    before, answer = portrait(network), network(*question())
    with pytest.raises(error), attachment_of(network, adapters_of(network), checkpointing=checkpointing).attached():
        network(*question()).sum().backward()
        raise error
    assert portrait(network) == before
    assert torch.equal(network(*question()), answer)


def test_an_error_in_the_middle_of_a_forward_leaves_the_network_as_it_was():
    network = Network()
    before = portrait(network)

    class Broken(ResidentWeights):
        def take(self, layer, like):
            if layer is network.out:
                raise Cancelled
            return super().take(layer, like)

    with pytest.raises(Cancelled), Attachment(network, adapters_of(network), Broken()).attached():
        network(*question())
    assert portrait(network) == before


def test_while_attached_the_module_tree_keys_weights_flags_and_hooks_are_those_of_before():
    network = Network()
    modules, keys = list(network.named_modules()), list(network.state_dict())
    flags = [tensor.requires_grad for tensor in network.parameters()]
    before = portrait(network)
    with attachment_of(network, adapters_of(network)).attached():
        assert list(network.named_modules()) == modules and list(network.state_dict()) == keys
        assert [tensor.requires_grad for tensor in network.parameters()] == flags
        assert {name: seen[2:] for name, seen in portrait(network).items()} == {
            n: seen[2:] for n, seen in before.items()
        }
    assert portrait(network) == before


def test_a_forward_that_another_pack_had_set_is_set_again():
    network = Network()
    layer = network.blocks[0].widen

    def of_another_pack(x):
        return type(layer).forward(layer, x) * 2

    layer.forward = of_another_pack
    answer = network(*question())
    with attachment_of(network, adapters_of(network)).attached():
        assert layer.__dict__["forward"] is not of_another_pack
    assert layer.__dict__["forward"] is of_another_pack
    assert torch.equal(network(*question()), answer)


def test_the_same_attachment_serves_step_after_step():
    network = Network()
    attachment = attachment_of(network, adapters_of(network))
    with attachment.attached():
        first = network(*question())
    with attachment.attached():
        assert torch.equal(network(*question()), first)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_attachments_nest_and_each_exit_undoes_its_own(checkpointing):
    network = Network()
    bare, before = network(*question()), portrait(network)
    outer, inner = adapters_of(network, seed=1), adapters_of(network, seed=2)
    with attachment_of(network, outer, checkpointing=checkpointing).attached():
        with_outer = network(*question())
        with attachment_of(network, inner, checkpointing=checkpointing).attached():
            torch.testing.assert_close(network(*question()), fused(network, inner)(*question()), rtol=1e-4, atol=1e-5)
        assert torch.equal(network(*question()), with_outer)
    assert torch.equal(network(*question()), bare)
    assert portrait(network) == before


def test_options_and_inputs_that_blocks_write_into_reach_backward_as_they_were_given():
    network = Network(BlockInPlace)
    seen = []
    block = network.blocks[1]
    own = block.forward

    def spying(x, text, options):
        seen.append((x.clone(), text.clone(), dict(options)))
        return own(x, text, options)

    block.forward = spying
    with attachment_of(network, adapters_of(network), checkpointing=True).attached():
        network(*question()).sum().backward()
    (x, text, options), (x_again, text_again, options_again) = seen
    assert torch.equal(x, x_again) and torch.equal(text, text_again) and options == options_again


def test_the_network_may_hold_inference_tensors():
    with torch.inference_mode():
        network = Network(BlockInPlace)
    adapters = adapters_of(network)
    for checkpointing in (False, True):
        with attachment_of(network, adapters, checkpointing=checkpointing).attached():
            network(*question()).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in adapters.parameters())


# Layers that read one input

GROUP = ((".to_q", ".to_k", ".to_v"),)


class Attention(torch.nn.Module):
    """Three layers that, in self-attention, are called in turn with one input; `calls` says with what else."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.ModuleDict({name: torch.nn.Linear(6, 6, bias=False) for name in ("to_q", "to_k", "to_v")})
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.4)
        self.requires_grad_(False)

    def forward(self, x, calls):
        return calls(x, self.part["to_q"], self.part["to_k"], self.part["to_v"])


CALLS = {
    "self-attention": lambda x, q, k, v: q(x) * k(x) + v(x),
    "in another order": lambda x, q, k, v: v(x) * k(x) + q(x),
    "cross-attention": lambda x, q, k, v: q(x) * k(x[:, :1]) + v(x[:, 1:2]),
    "one of them twice": lambda x, q, k, v: q(x) * q(x) + k(x),
    "only one": lambda x, q, k, v: k(x),
    "another input in between": lambda x, q, k, v: q(x) * k(x + 1) + v(x),
    "one after the other": lambda x, q, k, v: v(k(q(x))),
}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("ranks", ["", "to_k = 3", "to_k = 0"], ids=["one rank", "two ranks", "one left out"])
def test_computing_layers_of_one_input_together_changes_nothing(calls, runs, ranks):
    def values_and_gradients(same_input):
        network = Attention()
        adapters = Adapters.build([part(network, "to_")], LoraConfig(rank=2, alpha=3.0, ranks=ranks), 0)
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for adapter in adapters:
                adapter.up.copy_(torch.randn(adapter.up.shape, generator=random))
        attachment = Attachment(network, adapters, ResidentWeights(), same_input=same_input)
        x = torch.randn(2, 3, 6, generator=random).requires_grad_()
        for _ in range(runs):
            with attachment.attached():
                y = network(x, calls)
                y.square().sum().backward()
        gradients = [x.grad, *(tensor.grad for tensor in adapters.parameters())]
        return y, [torch.zeros(1) if gradient is None else gradient for gradient in gradients]

    (together, gradients), (apart, expected) = values_and_gradients(GROUP), values_and_gradients(())
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other.expand_as(one), rtol=1e-4, atol=1e-4)


def test_an_input_that_was_written_into_is_computed_with_again():
    network = Attention()
    adapters = Adapters.build([part(network, "to_")], LoraConfig(rank=2), 0)
    with Attachment(network, adapters, ResidentWeights(), same_input=GROUP).attached(), torch.no_grad():
        x = torch.ones(1, 2, 6)
        network.part["to_q"](x)
        x += 1
        torch.testing.assert_close(network.part["to_k"](x), torch.nn.functional.linear(x, network.part["to_k"].weight))


def test_nothing_of_a_step_is_held_after_it():
    network = Attention()
    adapters = Adapters.build([part(network, "to_")], LoraConfig(rank=2), 0)
    attachment = Attachment(network, adapters, ResidentWeights(), same_input=GROUP)
    with attachment.attached():
        x = torch.randn(2, 3, 6)
        seen = weakref.ref(x), weakref.ref(network(x, CALLS["only one"]))
        del x
    assert [reference() for reference in seen] == [None, None]
