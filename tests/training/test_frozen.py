"""Frozen layers compute what plain layers compute, and leave their weights alone while doing so."""

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn
from toys import ResidentWeights

from lora_workbench.training.frozen import Adapted, AdaptedLinears, forward_of, is_linear

LAYERS = {
    "linear on (B, in)": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "linear on (B, tokens, in)": (lambda: nn.Linear(6, 5), (2, 4, 6)),
    "linear on (B, h, w, in)": (lambda: nn.Linear(6, 5), (2, 3, 4, 6)),
    "linear on (in)": (lambda: nn.Linear(6, 5), (6,)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    "convolution without bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 7, 8)),
    "convolution with stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 9)),
    "convolution with stride over an odd size": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "convolution in groups": (lambda: nn.Conv2d(4, 6, 3, padding=2, groups=2), (2, 4, 7, 8)),
    "convolution with dilation": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), dilation=2), (2, 4, 9, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 6, eps=1e-6), (2, 6, 4, 5)),
    "layer norm": (lambda: nn.LayerNorm(6, eps=1e-3), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 3, 6)),
    "RMS norm": (lambda: nn.RMSNorm(6, eps=1e-3), (2, 3, 6)),
}
cases = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def randomised(layer: nn.Module, seed: int = 0) -> nn.Module:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=random))
    return layer.requires_grad_(False)


def input_of(shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def value_and_gradient(forward, x):
    y = forward(x)
    (gradient,) = torch.autograd.grad(y, x, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return y.detach(), gradient


def addresses(tensors) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@cases
def test_a_frozen_layer_equals_the_plain_one_in_value_and_gradient(make, shape):
    layer = randomised(make())
    plain = value_and_gradient(layer, input_of(shape))
    frozen = value_and_gradient(forward_of(layer, ResidentWeights(), copy_norm_input=False), input_of(shape))
    for ours, theirs in zip(frozen, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@cases
def test_a_frozen_layer_works_on_inference_tensors_where_the_plain_one_cannot(make, shape):
    with torch.inference_mode():
        layer = randomised(make())
    with pytest.raises(RuntimeError, match="[Ii]nference tensors cannot be saved for backward"):
        value_and_gradient(layer, input_of(shape))
    ours = value_and_gradient(forward_of(layer, ResidentWeights(), copy_norm_input=False), input_of(shape))
    theirs = value_and_gradient(randomised(make()), input_of(shape))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@cases
def test_nothing_of_a_weight_is_kept_for_backward(make, shape):
    layer, kept = randomised(make()), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        forward_of(layer, ResidentWeights(), copy_norm_input=False)(input_of(shape))
    assert not addresses(kept) & addresses(layer.parameters())
    assert all(tensor.numel() <= 6 or tensor.shape[0] == shape[0] for tensor in kept), "a copy of a matrix was kept"


@cases
def test_the_weight_may_stay_in_another_dtype_than_the_computation(make, shape):
    layer = randomised(make()).to(torch.float16)
    x = input_of(shape, torch.float32)
    y, gradient = value_and_gradient(forward_of(layer, ResidentWeights(), copy_norm_input=False), x)
    expected = value_and_gradient(copy.deepcopy(layer).float(), input_of(shape))
    assert y.dtype == gradient.dtype == torch.float32
    for ours, theirs in zip((y, gradient), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(tensor.dtype == torch.float16 for tensor in layer.parameters())


@cases
def test_a_gradient_of_a_gradient_free_input_is_not_computed(make, shape):
    x = input_of(shape).detach()
    assert not forward_of(randomised(make()), ResidentWeights(), copy_norm_input=False)(x).requires_grad


class OneBuffer:
    """Weights that pass through a single buffer: what was taken is overwritten as soon as it is given back."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(4096)
        self.taken = 0

    def take(self, layer, like):
        self.taken += 1
        bias = layer.bias if getattr(layer, "bias", None) is not None else None
        sizes = [tensor.numel() for tensor in (layer.weight, bias) if tensor is not None]
        pieces = [self.buffer[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
        weight = pieces[0].view(layer.weight.shape).copy_(layer.weight)
        return weight, None if bias is None else pieces[1].view(bias.shape).copy_(bias), "ticket"

    def give_back(self, layer, weight, bias, ticket):
        assert ticket == "ticket"
        self.taken -= 1
        self.buffer.fill_(torch.nan)


def test_weights_that_are_streamed_through_one_buffer_give_the_right_gradients():
    layers = [
        randomised(layer, seed)
        for seed, layer in enumerate(
            (nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8))
        )
    ]
    down, up = input_of((2, 8)), input_of((2, 8))
    weights = OneBuffer()
    forwards = [forward_of(layer, weights, copy_norm_input=True) for layer in layers]

    def run(chain, last, x):
        for forward in chain:
            x = forward(x)
        return last(x)

    inputs = (input_of((2, 4, 7, 8)), down, up)
    group = joined([(down, up)], [layers[2]], 0.5, weights)
    streamed = run(forwards, lambda x: answers_of(x, group)[0], inputs[0])
    streamed_gradients = [*torch.autograd.grad(streamed.square().sum(), inputs[0]), *gradients_of(group)]
    plain = run(layers, lambda x: layers[2](x) + 0.5 * (x @ down.t()) @ up, inputs[0])
    plain_gradients = torch.autograd.grad(plain.square().sum(), inputs)

    torch.testing.assert_close(streamed, plain, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(streamed_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert weights.taken == 0, "a weight was taken and not given back"


@pytest.mark.parametrize(
    "make", [nn.LayerNorm, nn.RMSNorm, lambda width: nn.LayerNorm(width, elementwise_affine=False)]
)
def test_a_norm_that_copies_its_input_lets_a_block_add_into_it_afterwards(make):
    layer = make(6).requires_grad_(False)

    def block(norm):
        leaf = input_of((2, 3, 6))
        x = leaf * 2
        y = norm(x)
        x += y
        return torch.autograd.grad((x * y).sum(), leaf)[0]

    expected = block(lambda x: layer(x.clone()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(layer)
    torch.testing.assert_close(block(forward_of(layer, ResidentWeights(), copy_norm_input=True)), expected)


@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6), (2, 3, 4, 6)])
@pytest.mark.parametrize("with_adapter", [False, True], ids=["frozen", "adapted"])
def test_what_a_linear_layer_answers_may_be_added_into(shape, with_adapter):
    layer = randomised(nn.Linear(6, 6))
    down, up = input_of((2, 6)), input_of((2, 6))
    frozen = forward_of(layer, ResidentWeights(), copy_norm_input=False)
    x = input_of(shape)
    y = answers_of(x, joined([(down, up)], [layer], 1.0))[0] if with_adapter else frozen(x)
    y += 1
    y.view(-1).mul_(2)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_a_layer_that_keeps_no_weight_needs_no_forward_of_its_own():
    assert forward_of(nn.SiLU(), ResidentWeights(), copy_norm_input=True) is None
    assert forward_of(nn.LayerNorm(6, elementwise_affine=False), ResidentWeights(), copy_norm_input=False) is None


@dataclass
class NotALinear:
    """What a quantised layer looks like from outside."""

    in_features: int = 6
    out_features: int = 5
    weight: object = None


def test_a_linear_layer_is_known_by_what_it_has_and_not_by_its_class():
    assert is_linear(nn.Linear(2, 2)) and is_linear(NotALinear())
    assert not is_linear(nn.Conv2d(2, 2, 1)) and not is_linear(nn.LayerNorm(2))


# The adapted layer against peft's


def joined(pairs, layers, scale, weights=None):
    """Layers that read one input, adapted by pairs of (down, up), with gradients that start at zero."""
    downs, ups = torch.cat([down.detach() for down, _ in pairs]), tuple(up.detach() for _, up in pairs)
    return Adapted(
        tuple(layers),
        downs.requires_grad_(),
        ups,
        torch.zeros_like(downs),
        tuple(torch.zeros_like(up) for up in ups),
        scale,
        weights or ResidentWeights(),
    )


def answers_of(x, group):
    return AdaptedLinears.apply(x, group.downs, group)


def gradients_of(group):
    """Of each down and up, in the order of the layers."""
    downs = group.downs_grad.chunk(len(group.layers))
    return [factor for pair in zip(downs, group.ups_grad, strict=True) for factor in pair]


def peft_layer(layer: nn.Linear, down, up, alpha: float) -> nn.Module:
    config = PeftConfig(r=len(down), lora_alpha=alpha, init_lora_weights=False, target_modules=["layer"])
    reference = inject_adapter_in_model(config, nn.ModuleDict({"layer": layer}))["layer"]
    with torch.no_grad():
        reference.lora_A["default"].weight.copy_(down)
        reference.lora_B["default"].weight.copy_(up.t())
    return reference


def factors(rank=3, width=6, out=5):
    random = torch.Generator().manual_seed(7)
    return (
        torch.randn(rank, width, generator=random).requires_grad_(),
        torch.randn(rank, out, generator=random).requires_grad_(),
    )


@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("alpha", [3.0, 1.0, 24.0], ids=lambda alpha: f"alpha {alpha}")
def test_the_adapted_layer_equals_pefts_in_value_and_gradients(shape, bias, alpha):
    layer, (down, up) = randomised(nn.Linear(6, 5, bias=bias)), factors()
    reference = peft_layer(layer, down, up, alpha)
    theirs = reference(x := input_of(shape))
    answer = torch.linspace(-1, 1, theirs.numel()).view(theirs.shape)
    tensors = (x, reference.lora_A["default"].weight, reference.lora_B["default"].weight)
    their_gradients = torch.autograd.grad(theirs, tensors, answer)

    group = joined([(down, up)], [layer], alpha / len(down))
    (ours,) = answers_of(x := input_of(shape), group)
    (of_x,) = torch.autograd.grad(ours, x, answer)
    of_down, of_up = gradients_of(group)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    for one, other in zip((of_x, of_down, of_up.t()), their_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_adapted_layer_is_as_near_to_the_truth_as_pefts(dtype):
    layer, (down, up) = randomised(nn.Linear(64, 48)), factors(8, 64, 48)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    grad = torch.randn(40, 48, generator=torch.Generator().manual_seed(4)).to(dtype)

    def run(forward, tensors):
        y = forward(x)
        return y, *torch.autograd.grad(y, tensors, grad.to(y.dtype))

    half = copy.deepcopy(layer).to(dtype)
    group = joined([(down, up)], [half], 0.5)
    (y,) = answers_of(x, group)
    y.backward(grad)
    ours = (y.detach(), *gradients_of(group))
    assert ours[0].dtype == dtype and ours[1].dtype == ours[2].dtype == torch.float32

    exact_layer = copy.deepcopy(half).double()
    truth = run(lambda x: exact_layer(x.double()) + 0.5 * (x.double() @ down.double().t()) @ up.double(), (down, up))
    reference = peft_layer(half, down, up, 4.0).float()
    reference.base_layer.to(dtype)
    theirs = run(reference, (reference.lora_A["default"].weight, reference.lora_B["default"].weight))
    theirs = (*theirs[:2], theirs[2].t())
    for one, other, exact in zip(ours, theirs, truth, strict=True):
        ours_off, theirs_off = ((tensor.double() - exact).norm() / exact.norm() for tensor in (one, other))
        assert ours_off < max(1.5 * theirs_off, 2e-3 if dtype == torch.float16 else 1.5e-2)


def test_the_gradients_of_the_adapted_layer_are_those_of_finite_differences():
    layer, answer = randomised(nn.Linear(4, 3)).double(), torch.linspace(-1, 1, 18).view(2, 3, 3).double()
    x = input_of((2, 3, 4), torch.float64).detach().requires_grad_()
    group = joined([tuple(tensor.double() for tensor in factors(2, 4, 3))], [layer], 0.7)
    assert torch.autograd.gradcheck(lambda x: answers_of(x, group), (x,))

    for total in (group.downs_grad, *group.ups_grad):
        total.zero_()
    answers_of(x, group)[0].backward(answer)
    tensors, found = (group.downs, *group.ups), (group.downs_grad, *group.ups_grad)
    with torch.no_grad():
        for tensor, gradient in zip(tensors, found, strict=True):
            for place in itertools.product(*map(range, tensor.shape)):
                both = []
                for nudge in (1e-6, -2e-6):
                    tensor[place] += nudge
                    both.append((answers_of(x, group)[0] * answer).sum().item())
                tensor[place] += 1e-6
                assert gradient[place].item() == pytest.approx((both[0] - both[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_gradients_of_several_backwards_add_up():
    layer, pair = randomised(nn.Linear(6, 5)), factors()
    once, twice = joined([pair], [layer], 0.5), joined([pair], [layer], 0.5)
    for group, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            answers_of(input_of((4, 6)), group)[0].sum().backward()
    for one, two in zip(gradients_of(once), gradients_of(twice), strict=True):
        assert one.any()
        torch.testing.assert_close(two, 2 * one)


def test_the_adapted_layer_keeps_its_input_and_a_rank_wide_product_and_no_weight():
    layer, (down, up), kept = randomised(nn.Linear(6, 5)), factors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        answers_of(input_of((4, 6)), joined([(down, up)], [layer], 1.0))
    assert [tuple(tensor.shape) for tensor in kept] == [(4, 6), (4, 3)]
    assert not addresses(kept) & addresses(layer.parameters())


def test_an_input_without_gradient_still_trains_the_adapter_and_reads_the_weight_once():
    layer, (down, up), weights = randomised(nn.Linear(6, 5)), factors(), OneBuffer()
    reads = []
    weights.take, take = (lambda *args: reads.append(1) or take(*args)), weights.take
    group = joined([(down, up)], [layer], 1.0, weights)
    answers_of(input_of((4, 6)).detach(), group)[0].sum().backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(group))
    assert len(reads) == 1


def test_an_adapter_with_zero_up_changes_nothing():
    layer, (down, up) = randomised(nn.Linear(6, 5)), factors()
    x = input_of((2, 4, 6))
    frozen = forward_of(layer, ResidentWeights(), copy_norm_input=False)
    (answer,) = answers_of(x, joined([(down, torch.zeros_like(up))], [layer], 1.0))
    assert torch.equal(answer, frozen(x))


# Several adapted layers that read one input


def layers_and_pairs():
    layers = tuple(
        randomised(nn.Linear(6, out, bias=bias), seed)
        for seed, (out, bias) in enumerate(((5, True), (7, False), (5, True)))
    )
    random = torch.Generator().manual_seed(8)
    pairs = [
        tuple(torch.randn(3, width, generator=random).requires_grad_() for width in (6, layer.out_features))
        for layer in layers
    ]
    return layers, pairs


@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("alpha", [3.0, 1.0])
def test_layers_that_read_one_input_equal_pefts_one_by_one(shape, alpha):
    layers, pairs = layers_and_pairs()
    references = [peft_layer(layer, *pair, alpha) for layer, pair in zip(layers, pairs, strict=True)]
    x = input_of(shape)
    theirs = [reference(x) for reference in references]
    answers = [torch.linspace(-1, 1, y.numel()).view(y.shape) for y in theirs]
    tensors = [
        reference.get_parameter(f"lora_{part}.default.weight") for reference in references for part in ("A", "B")
    ]
    of_x, *of_factors = torch.autograd.grad(theirs, [x, *tensors], answers)

    group = joined(pairs, layers, alpha / 3)
    ours = answers_of(x := input_of(shape), group)
    (our_x,) = torch.autograd.grad(ours, x, answers)
    for one, other in zip((*ours, our_x), (*theirs, of_x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for number, (one, other) in enumerate(zip(gradients_of(group), of_factors, strict=True)):
        torch.testing.assert_close(one, other.t() if number % 2 else other, rtol=1e-5, atol=1e-5)


def test_a_layer_of_a_group_whose_answer_is_not_used_gets_no_gradient_and_spoils_none():
    layers, pairs = layers_and_pairs()
    x = input_of((2, 4, 6))
    together, alone = joined(pairs, layers, 1.0), joined(pairs[:1], layers[:1], 1.0)
    of_x, expected = (torch.autograd.grad(answers_of(x, group)[0].square().sum(), x)[0] for group in (together, alone))
    first, rest = gradients_of(together)[:2], gradients_of(together)[2:]
    for one, other in zip((of_x, *first), (expected, *gradients_of(alone)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not any(gradient.any() for gradient in rest)


def test_weights_of_a_group_may_pass_through_one_buffer():
    layers, pairs = layers_and_pairs()

    def run(weights):
        x, group = input_of((2, 4, 6)), joined(pairs, layers, 0.5, weights)
        of_x = torch.autograd.grad(sum(y.square().sum() for y in answers_of(x, group)), x)
        return [*of_x, *gradients_of(group)]

    for one, other in zip(run(OneBuffer()), run(ResidentWeights()), strict=True):
        torch.testing.assert_close(one, other)
