"""Each kind of adapter against its formula, against peft, and as part of a network."""

import math
import sys
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Block, BlockInPlace, Network, ResidentWeights, equal, part

from lora_workbench.training.attach import Attachment
from lora_workbench.training.config import DORA, KINDS, LOHA, LOKR, LORA, OFT, LoraConfig
from lora_workbench.training.kinds import KINDS as KINDS_OF_ADAPTERS
from lora_workbench.training.kinds.kind import numbers, peft_shapes
from lora_workbench.training.kinds.lokr import Division, settings_for
from lora_workbench.training.lora import Adapters, trained_values

every_kind = pytest.mark.parametrize("kind", KINDS)
LAYERS = {
    "linear": lambda: nn.Linear(12, 18),
    "linear without bias": lambda: nn.Linear(12, 18, bias=False),
    "linear to fewer": lambda: nn.Linear(12, 8),
    "3 x 3": lambda: nn.Conv2d(12, 18, 3, padding=1),
    "3 x 3 by two": lambda: nn.Conv2d(12, 18, 3, stride=2, padding=1, bias=False),
    "1 x 1": lambda: nn.Conv2d(12, 18, 1),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def frozen_layer(name):
    layer, random = LAYERS[name](), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in layer.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.3)
    return layer.requires_grad_(False)


def adapted(layer, active=True, **config):
    """A network of one adapted layer, its adapter and its attachment."""
    network = nn.ModuleDict({"first": nn.Conv2d(1, 1, 3), "layer": layer, "last": nn.Conv2d(1, 1, 3)})
    config = LoraConfig(**{"rank": 3, "alpha": 2.0, "conv_rank": 2, **config})
    adapters = Adapters.build([part(network, "layer")], config, seed=1)
    attachment = Attachment(network, adapters, ResidentWeights())
    (adapter,) = adapters
    if active:
        activate(adapters)
    return adapters, adapter, attachment


def activate(adapters):
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters:
            for name, tensor in adapter.tensors.items():
                drawn = torch.randn(tensor.shape, generator=random) * 0.3
                tensor.copy_(tensor * (1 + drawn) if name == "magnitude" else drawn)


def question(layer):
    shape = (2, 12, 6, 6) if isinstance(layer, nn.Conv2d) else (2, 5, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()


def weight_of(kind, layer, tensors, scale):
    """The changed weight by the formula of each kind, as ComfyUI's loader computes it from a file."""
    weight, t = layer.weight, tensors
    if kind in (LORA, DORA):
        up = t["up"].flatten(1) if t["up"].ndim == 4 else t["up"].t()
        changed = weight + scale * (up @ t["down"].flatten(1)).view(weight.shape)
        if kind == LORA:
            return changed
        norm = changed.detach().transpose(0, 1).flatten(1).norm(dim=1)
        return changed * t["magnitude"] / norm.view(t["magnitude"].shape)
    if kind == LOHA:
        change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return weight + scale * change.view(weight.shape)
    if kind == LOKR:
        large = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        small = t["lokr_w1"][:, :, None, None] if large.ndim == 4 else t["lokr_w1"]
        return weight + scale * torch.kron(small, large).reshape(weight.shape)
    q = t["oft_blocks"] - t["oft_blocks"].transpose(1, 2)
    if scale and q.norm() > scale:
        q = q * scale / q.norm()
    identity = torch.eye(q.shape[-1])
    turned = torch.einsum(
        "knm,kn...->km...", (identity + q) @ (identity - q).inverse(), weight.unflatten(0, q.shape[:2])
    )
    return turned.flatten(0, 1)


def by_formula(kind, layer, adapter, x):
    tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in adapter.tensors.items()}
    weight = weight_of(kind, layer, tensors, adapter.scale)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding), tensors
    return F.linear(x, weight, layer.bias), tensors


@every_kind
@every_layer
@pytest.mark.parametrize("rank", [3, 9], ids=["low rank", "high rank"])
def test_values_and_gradients_are_those_of_the_formula(kind, name, rank):
    layer = frozen_layer(name)
    adapters, adapter, attachment = adapted(layer, kind=kind, rank=rank, conv_rank=rank)
    x = question(layer)
    expected, tensors = by_formula(kind, layer, adapter, x)
    expected.square().sum().backward()
    expected_x, x.grad = x.grad, None
    with attachment.attached():
        answer = layer(x)
        answer.square().sum().backward()
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-4, atol=1e-4)
    for own, tensor in adapter.tensors.items():
        torch.testing.assert_close(tensor.grad, tensors[own].grad, rtol=1e-4, atol=2e-4, msg=own)
        assert tensor.grad.any(), own
    assert adapters.values.grad.norm() > 0


@every_kind
@every_layer
def test_fresh_adapters_change_nothing(kind, name):
    """Bit for bit, but for OFT's bias: it is added after the turning, and not within the product."""
    layer = frozen_layer(name)
    _, _, attachment = adapted(layer, active=False, kind=kind)
    x = question(layer).detach()
    before = layer(x)
    with attachment.attached():
        if kind == OFT:
            torch.testing.assert_close(layer(x), before, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)


# Against peft


def peft_layer(kind, layer, config):
    """peft's own layer around a copy of ours. DoRA and OFT of the transposed weight: peft's act on the other side."""
    settings = {
        LORA: lambda: peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=["layer"]),
        DORA: lambda: peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=["layer"], use_dora=True),
        LOHA: lambda: peft.LoHaConfig(r=config.rank, alpha=config.alpha, target_modules=["layer"]),
        LOKR: lambda: peft.LoKrConfig(
            r=config.rank, alpha=config.alpha, decompose_factor=config.lokr_factor, target_modules=["layer"]
        ),
        OFT: lambda: peft.OFTConfig(
            r=0, oft_block_size=config.rank, target_modules=["layer"], use_cayley_neumann=False
        ),
    }[kind]()
    if isinstance(layer, nn.Conv2d):
        copy = nn.Conv2d(12, 18, layer.kernel_size, stride=layer.stride, padding=layer.padding, bias=False)
        weight = layer.weight
    else:
        weight = layer.weight.t() if kind in (DORA, OFT) else layer.weight
        copy = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        copy.weight.copy_(weight)
    return peft.inject_adapter_in_model(settings, nn.ModuleDict({"layer": copy}))["layer"]


def effective_weight(layer, into):
    """The matrix (out, in) of a linear layer."""
    return layer(torch.eye(into)).t()


PEFT_NAMES = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}


def peft_tensors(layer):
    """The trained tensors of peft's layer, by our names."""
    own = {theirs: ours for ours, theirs in PEFT_NAMES.items()}
    names = {name: tensor for name, tensor in layer.named_parameters() if "base_layer" not in name}
    return {own.get(name.split(".")[0], name.split(".")[0]): tensor for name, tensor in names.items()}


@pytest.mark.parametrize(
    "settings",
    [{"kind": LORA}, {"kind": LOHA}, {"kind": LOKR, "lokr_factor": -1}, {"kind": LOKR, "lokr_factor": 2}],
    ids=str,
)
@pytest.mark.parametrize("name", ["linear without bias", "3 x 3 by two"])
def test_values_and_gradients_are_those_of_pefts_layer(settings, name):
    layer, kind = frozen_layer(name), settings["kind"]
    adapters, adapter, attachment = adapted(layer, rank=2, conv_rank=2, **settings)
    theirs = peft_layer(kind, layer, adapters.config)
    tensors = peft_tensors(theirs)
    turned = {"up": lambda tensor: tensor.t() if tensor.ndim == 2 else tensor}
    with torch.no_grad():
        for own, tensor in tensors.items():
            tensor.copy_(turned.get(own, lambda same: same)(adapter.tensors[own]))
    x = question(layer).detach()
    expected = theirs(x)
    expected.square().sum().backward()
    with attachment.attached():
        answer = layer(x)
        answer.square().sum().backward()
    torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)
    assert tensors.keys() == adapter.tensors.keys()
    for own, tensor in tensors.items():
        expected = turned.get(own, lambda same: same)(tensor.grad)
        torch.testing.assert_close(adapter.tensors[own].grad, expected, rtol=1e-4, atol=1e-4)


def test_dora_is_pefts_of_the_transposed_weight_since_its_norms_are_per_input():
    layer = frozen_layer("linear without bias")
    adapters, adapter, attachment = adapted(layer, kind=DORA)
    theirs = peft_layer(DORA, layer, adapters.config)
    tensors = peft_tensors(theirs)
    with torch.no_grad():
        # (W + s B A)^T = W^T + s A^T B^T: down and up change places.
        tensors["down"].copy_(adapter.up)
        tensors["up"].copy_(adapter.down.t())
        tensors["magnitude"].copy_(adapter.tensors["magnitude"].flatten())
    target = torch.randn(18, 12, generator=torch.Generator().manual_seed(4))
    expected = effective_weight(theirs, 18).t()
    (expected * target).sum().backward()
    with attachment.attached():
        weight = effective_weight(layer, 12)
        (weight * target).sum().backward()
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.up.grad, tensors["down"].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.down.grad, tensors["up"].grad.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        adapter.tensors["magnitude"].grad.flatten(), tensors["magnitude"].grad, rtol=1e-4, atol=1e-5
    )


def test_oft_is_pefts_of_the_transposed_weight_since_it_turns_outputs():
    layer = frozen_layer("linear without bias")
    adapters, adapter, attachment = adapted(layer, kind=OFT, alpha=0)
    theirs = peft_layer(OFT, layer, adapters.config)
    (vector,) = peft_tensors(theirs).values()
    blocks = adapter.tensors["oft_blocks"]
    rows, columns = torch.triu_indices(3, 3, 1)
    with torch.no_grad():
        blocks.copy_(blocks.triu(1))
        vector.copy_(blocks[:, rows, columns])
    target = torch.randn(18, 12, generator=torch.Generator().manual_seed(4))
    expected = effective_weight(theirs, 18).t()
    (expected * target).sum().backward()
    with attachment.attached():
        weight = effective_weight(layer, 12)
        (weight * target).sum().backward()
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(blocks.grad[:, rows, columns], vector.grad, rtol=1e-4, atol=1e-5)


@every_kind
@pytest.mark.parametrize("name", ["linear", "3 x 3"])
def test_the_tensors_begin_as_pefts_do(kind, name):
    """Zero where peft's are zero, and spread as widely where they are not."""
    layer = nn.Conv2d(96, 160, 3, padding=1) if "x" in name else nn.Linear(96, 160)
    layer.requires_grad_(False)
    _, adapter, _ = adapted(layer, active=False, kind=kind, rank=8, conv_rank=8, lokr_factor=-1)
    if kind == OFT:
        assert not adapter.tensors["oft_blocks"].any()
        return
    torch.manual_seed(0)
    settings = {
        LORA: lambda: peft.LoraConfig(r=8, target_modules=["layer"]),
        DORA: lambda: peft.LoraConfig(r=8, target_modules=["layer"]),
        LOHA: lambda: peft.LoHaConfig(r=8, target_modules=["layer"]),
        LOKR: lambda: peft.LoKrConfig(r=8, target_modules=["layer"], init_weights="lycoris"),
    }[kind]()
    theirs = peft_tensors(peft.inject_adapter_in_model(settings, nn.ModuleDict({"layer": layer}))["layer"])
    for own, tensor in theirs.items():
        ours = adapter.tensors[own]
        assert ours.numel() == tensor.numel()
        assert ours.std().item() == pytest.approx(tensor.std().item(), rel=0.1), own
    if kind == DORA:
        norms = layer.weight.transpose(0, 1).flatten(1).norm(dim=1)
        torch.testing.assert_close(adapter.tensors["magnitude"].flatten(), norms, rtol=1e-5, atol=1e-6)


# Scales


def test_rank_stabilized_is_alpha_over_the_root_of_the_rank():
    """Trap 19: Kalajdzievski 2023, eq. 3, as peft's use_rslora."""
    layer = frozen_layer("linear without bias")
    _, adapter, _ = adapted(layer, rank=4, alpha=2.0, rank_stabilized=True)
    assert adapter.scale == pytest.approx(2.0 / math.sqrt(4))
    assert adapter.kind.alpha(adapter.tensors, LoraConfig(rank=4, alpha=2.0, rank_stabilized=True)) == 2.0 * 2


def test_a_layer_of_another_rank_keeps_alpha_and_so_has_another_scale_as_in_peft():
    layer = frozen_layer("linear")
    _, adapter, _ = adapted(layer, rank=4, alpha=2.0, ranks="layer = 8")
    assert (len(adapter.down), adapter.scale) == (8, 0.25)
    _, adapter, _ = adapted(layer, rank=4, alpha=0, ranks="layer = 8")
    assert adapter.scale == 1.0


def test_lokr_with_a_whole_second_factor_has_no_alpha_as_loaders_take_no_notice_of_it():
    layer, settings = frozen_layer("linear"), {"kind": LOKR, "alpha": 3.0, "lokr_factor": -1}
    assert "lokr_w2" in adapted(layer, rank=9, **settings)[1].tensors
    assert adapted(layer, rank=9, **settings)[1].scale == 1.0
    assert adapted(layer, rank=2, **settings)[1].scale == 1.5


# The room of a LoKr


SIZES = {  # (out, in) of a layer -> lokr_factor at rank 16
    "toy": ((64, 64), 2),
    "SDXL attention": ((640, 640), 5),
    "SDXL attention, wide": ((1280, 1280), 8),
    "SDXL text": ((1280, 2048), 8),
    "SDXL feed-forward": ((10240, 1280), 10),
    "FLUX": ((3072, 3072), 12),
}


@pytest.mark.parametrize(("size", "factor"), SIZES.values(), ids=SIZES)
def test_lokr_takes_the_smallest_factor_with_no_more_numbers_than_a_lora_of_the_rank(size, factor):
    out, into = size
    with torch.device("meta"):
        layer = nn.Linear(into, out)

    def whole(factor):
        return {"lokr_w1": (factor, factor), "lokr_w2": (out // factor, into // factor)}

    room = 16 * (out + into)
    assert KINDS_OF_ADAPTERS[LOKR].shapes(layer, 16, LoraConfig()) == whole(factor)
    assert numbers(whole(factor)) <= room
    smaller = [number for number in range(1, factor) if out % number == into % number == 0]
    assert all(numbers(whole(number)) > room for number in smaller)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (7, 5), (1, 64), (127, 2)], ids=str)
@pytest.mark.parametrize("rank", [1, 16])
def test_lokr_is_whole_on_layers_of_any_size(size, rank):
    layer = nn.Linear(*reversed(size))
    shapes = KINDS_OF_ADAPTERS[LOKR].shapes(layer, rank, LoraConfig())
    assert [small * large for small, large in zip(shapes["lokr_w1"], shapes["lokr_w2"], strict=True)] == list(size)


@pytest.mark.parametrize("rank", [16, 336, 1024])
def test_a_lokr_of_low_rank_is_never_larger_than_the_whole_one(rank):
    """As what other trainers call a full rank: theirs is 1344 or more for this layer of FLUX."""
    with torch.device("meta"):
        layer = nn.Linear(3072, 21504)
    shapes = KINDS_OF_ADAPTERS[LOKR].shapes(layer, rank, LoraConfig(lokr_factor=8))
    whole = {"lokr_w1": (8, 8), "lokr_w2": (2688, 384)}
    assert (shapes == whole) == (rank >= 336) and numbers(shapes) <= numbers(whole)


WIDTHS = {
    "SDXL": [(640, 640), (1280, 1280), (640, 2048), (10240, 1280), (1280, 5120), (320, 640, 3)],
    "FLUX": [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)],
}


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize(("factor", "rank"), [(-1, 16), (4, 1024), (8, 1024), (8, 16), (10, 1024), (0, 16)], ids=str)
def test_the_settings_that_a_lokr_file_calls_for_divide_every_layer_of_a_model_as_the_file_does(widths, factor, rank):
    with torch.device("meta"):
        layers = [nn.Conv2d(into, out, *size) if size else nn.Linear(into, out) for out, into, *size in widths]
    kind, file = KINDS_OF_ADAPTERS[LOKR], []
    for layer in layers:
        shapes = kind.shapes(layer, rank, LoraConfig(lokr_factor=factor))
        file.append((shapes, Division(layer, shapes["lokr_w1"], shapes.get("lokr_w2_b", [None])[0])))
    found = settings_for([division for _, division in file])
    for shapes, division in file:
        own = kind.shapes(division.layer, found[division.setting], LoraConfig(lokr_factor=found["lokr_factor"]))
        assert own == shapes or own["lokr_w1"] == shapes["lokr_w1"] and "lokr_w2" in own and division.rank


def test_a_lokr_file_that_no_settings_make_calls_for_none():
    layer = nn.Linear(64, 64)
    assert settings_for([Division(layer, (4, 8), None)]) is None
    assert settings_for([Division(layer, (4, 4), 2), Division(layer, (2, 2), 2)]) is None


def test_lokrs_room_on_a_convolution_counts_its_window():
    layer = nn.Conv2d(64, 64, 3)
    shapes = KINDS_OF_ADAPTERS[LOKR].shapes(layer, 16, LoraConfig())
    assert shapes == {"lokr_w1": (2, 2), "lokr_w2": (32, 32, 3, 3)}
    assert numbers(shapes) <= 16 * (64 * 9 + 64)


def test_an_adapted_model_counts_the_room_it_takes():
    network = nn.ModuleDict({"layer": frozen_layer("linear")})
    config = LoraConfig(kind=LOKR, rank=3, include="layer")
    (adapter,) = Adapters.build([part(network, "^$")], config, seed=0)
    made = sum(tensor.numel() for tensor in adapter.tensors.values())
    assert trained_values([part(network, "^$")], config) == made <= 3 * (12 + 18)


@pytest.mark.parametrize(
    ("rank", "size"), [(1, 2), (2, 2), (4, 3), (6, 6), (8, 6), (9, 9), (100, 18)], ids=lambda value: str(value)
)
def test_ofts_blocks_are_the_largest_that_divide_the_outputs_and_are_not_above_the_rank(rank, size):
    _, adapter, _ = adapted(frozen_layer("linear"), kind=OFT, rank=rank)
    assert adapter.tensors["oft_blocks"].shape == (18 // size, size, size)


def test_oft_keeps_the_length_of_every_column_of_the_weight():
    layer = frozen_layer("linear without bias")
    _, _, attachment = adapted(layer, kind=OFT, alpha=0)
    with attachment.attached():
        turned = effective_weight(layer, 12)
    torch.testing.assert_close(turned.norm(dim=0), layer.weight.norm(dim=0), rtol=1e-5, atol=1e-5)
    assert (turned - layer.weight).norm() > 0.5


def test_alpha_of_oft_limits_how_far_is_turned():
    layer = frozen_layer("linear without bias")

    def change(alpha):
        _, _, attachment = adapted(layer, kind=OFT, alpha=alpha)
        with attachment.attached():
            return (effective_weight(layer, 12) - layer.weight).norm().item()

    assert change(0.01) < 0.1 * change(0)
    assert change(1000) == pytest.approx(change(0))


# In a network


def step(kind, block, checkpointing, dropout=0.0, dropping=None):
    """The loss and gradients of one question to a network whose every block is adapted, and the network."""
    network = Network(block)
    config = LoraConfig(rank=3, alpha=2.0, kind=kind, include="into\nout", conv_rank=2, dropout=dropout)
    adapters = Adapters.build([part(network)], config, seed=0)
    in_place = issubclass(block, BlockInPlace)
    blocks = ("Block", "BlockInPlace") if checkpointing else ()
    attachment = Attachment(network, adapters, ResidentWeights(), blocks=blocks, adds_in_place=in_place)
    activate(adapters)
    with attachment.attached():
        if dropping is None:
            loss = network(*toys.question()).square().sum()
        else:
            with adapters.dropping(*dropping):
                loss = network(*toys.question()).square().sum()
        loss.backward()
    return loss.item(), adapters, network


@every_kind
@pytest.mark.parametrize("block", [Block, BlockInPlace])
def test_checkpointing_changes_neither_loss_nor_gradients(kind, block):
    (loss, kept, _), (again, recomputed, _) = (step(kind, block, checkpointing) for checkpointing in (False, True))
    assert loss == again and len(kept) == 8
    torch.testing.assert_close(recomputed.values.grad, kept.values.grad, rtol=1e-4, atol=1e-3)


@every_kind
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_afterwards_the_network_is_bit_for_bit_what_it_was(kind, checkpointing):
    _, _, network = step(kind, BlockInPlace, checkpointing)
    fresh = Network(BlockInPlace)
    assert equal(network.state_dict(), fresh.state_dict())
    assert torch.equal(network(*toys.question()), fresh(*toys.question()))
    assert not [name for name, module in network.named_modules() if "forward" in module.__dict__]
    assert not any(tensor.requires_grad for tensor in network.parameters())


@every_kind
def test_the_network_may_hold_inference_tensors(kind):
    with torch.inference_mode():
        network = Network(BlockInPlace)
    adapters = Adapters.build([part(network)], LoraConfig(rank=3, kind=kind, conv_rank=2), seed=0)
    attachment = Attachment(network, adapters, ResidentWeights(), adds_in_place=True)
    activate(adapters)
    with attachment.attached():
        network(*toys.question()).square().sum().backward()
    assert adapters.values.grad.isfinite().all() and adapters.values.grad.any()


@every_kind
@every_layer
def test_nothing_as_large_as_the_weight_is_kept_for_backward(kind, name):
    layer = frozen_layer(name)
    _, _, attachment = adapted(layer, kind=kind)
    kept = []
    with (
        attachment.attached(),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        layer(question(layer))
    assert kept and all(tensor.shape[:2] != layer.weight.shape[:2] for tensor in kept)


@every_kind
def test_in_half_precision_what_is_trained_and_its_gradients_stay_float32(kind):
    layer = frozen_layer("linear without bias").to(torch.bfloat16)
    adapters, adapter, attachment = adapted(layer, active=False, kind=kind)
    x = question(layer).detach().to(torch.bfloat16)
    with attachment.attached():
        layer(x).float().exp().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all() for tensor in adapters.parameters())
    assert adapters.values.grad.any()


# Dropout


@every_kind
@pytest.mark.parametrize("block", [Block, BlockInPlace])
def test_what_is_recomputed_leaves_out_the_same(kind, block):
    runs = [step(kind, block, checkpointing, 0.4, (1, 2)) for checkpointing in (False, True)]
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[1][1].values.grad, runs[0][1].values.grad, rtol=1e-4, atol=1e-3)


@every_kind
def test_dropout_is_a_function_of_seed_and_number_and_off_outside(kind):
    places = ((1, 2), (1, 3), (2, 2), (1, 2, 1), (1, 2, 2), None)
    loss = {dropping: step(kind, Block, False, 0.4, dropping)[0] for dropping in places}
    assert len(set(loss.values())) == len(places), "also the parts of a batch leave out others"
    assert step(kind, Block, False, 0.4, (1, 2, 0))[0] == loss[1, 2]
    assert step(kind, Block, False, 0.4, (1, 2))[0] == loss[1, 2]
    assert loss[None] == pytest.approx(step(kind, Block, False)[0], rel=1e-5)


def test_dropout_leaves_out_its_share_and_makes_up_for_it_and_each_layer_has_its_own():
    network = Network()
    adapters = Adapters.build([part(network)], LoraConfig(dropout=0.25), seed=0)
    first, second, *_ = adapters
    with adapters.dropping(0, 1):
        one, other = (adapters.thinned(adapter, torch.ones(200, 100)) for adapter in (first, second))
    assert (one == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert one.mean().item() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(one, other)
    assert torch.equal(adapters.thinned(first, one), one)


# Norms


class Waits(TorchDispatchMode):
    """Notes what makes a GPU come to rest: a number, or the check of a solution, that the CPU asks for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten._linalg_check_errors):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@every_kind
@every_layer
def test_no_layer_waits_for_the_device(kind, name):
    """There are hundreds a step."""
    layer = frozen_layer(name)
    _, _, attachment = adapted(layer, kind=kind)
    with attachment.attached(), Waits() as waits:
        layer(question(layer)).square().sum().backward()
    assert waits.found == []


@every_kind
@every_layer
def test_the_norm_is_that_of_the_change(kind, name):
    layer = frozen_layer(name)
    _, adapter, _ = adapted(layer, kind=kind, alpha=2.0)
    if kind == OFT:
        # Nothing can be said without the weight but how far R is from I, for small Q.
        with torch.no_grad():
            adapter.tensors["oft_blocks"].mul_(0.01)
        q = adapter.tensors["oft_blocks"] - adapter.tensors["oft_blocks"].transpose(1, 2)
        identity = torch.eye(q.shape[-1])
        expected = ((identity + q) @ (identity - q).inverse() - identity).norm()
    else:
        tensors = {name: tensor.detach() for name, tensor in adapter.tensors.items()}
        formula = LORA if kind == DORA else kind
        expected = (weight_of(formula, layer, tensors, adapter.scale) - layer.weight).norm()
    assert adapter.kind.norm(adapter.tensors, adapter.scale).item() == pytest.approx(expected.item(), rel=1e-3)


@every_kind
def test_changes_above_max_norm_are_cut_to_it_and_others_are_left_alone(kind):
    network = Network()
    adapters = Adapters.build([part(network)], LoraConfig(rank=3, alpha=2.0, kind=kind), seed=0)
    activate(adapters)
    small, *large = adapters
    limit = min(adapter.kind.norm(adapter.tensors, adapter.scale).item() for adapter in large) / 2
    assert adapters.limit_norms() == 0
    adapters.config = replace(adapters.config, max_norm=limit)
    with torch.no_grad():
        for name in small.kind.factors:
            if name in small.tensors:
                small.tensors[name].mul_(0.01)
    before = {name: tensor.clone() for name, tensor in small.tensors.items()}
    assert adapters.limit_norms() == len(large)
    assert all(torch.equal(small.tensors[name], tensor) for name, tensor in before.items())
    for adapter in large:
        norm = adapter.kind.norm(adapter.tensors, adapter.scale).item()
        assert norm == pytest.approx(limit, rel=1e-3)


def test_max_norm_is_sd_scripts_formula():
    """apply_max_norm_regularization: sqrt(min(norm, max) / norm) on both factors."""
    network = Network()
    adapters = Adapters.build([part(network)], LoraConfig(rank=3, alpha=2.0, max_norm=0.4), seed=0)
    activate(adapters)
    expected = {}
    for adapter in adapters:
        norm = (adapter.up.t() @ adapter.down * adapter.scale).norm().clamp(min=0.4 / 2)
        ratio = (norm.clamp(max=0.4) / norm) ** 0.5
        expected[adapter.key] = (adapter.down * ratio, adapter.up * ratio)
    adapters.limit_norms()
    for adapter in adapters:
        torch.testing.assert_close(adapter.down, expected[adapter.key][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.up, expected[adapter.key][1], rtol=1e-4, atol=1e-6)


# Without peft


def test_a_peft_that_cannot_be_loaded_is_said_in_one_sentence(monkeypatch):
    """Such as one that is older than transformers, and asks it for what it no longer has."""
    monkeypatch.setitem(sys.modules, "peft", None)
    peft_shapes.cache_clear()
    with pytest.raises(ImportError, match=r"^The Python package peft cannot be loaded \(.*\): bring it .* restart\.$"):
        Adapters.build([part(Network())], LoraConfig(rank=3), seed=0)


# Files


@every_kind
@every_layer
def test_what_a_file_holds_is_turned_back_into_what_was_trained(kind, name):
    _, adapter, _ = adapted(frozen_layer(name), kind=kind)
    back = adapter.kind.loaded(adapter.kind.saved(adapter.tensors))
    assert back.keys() == adapter.tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in adapter.tensors.items())
