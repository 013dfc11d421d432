import math

import pytest
import torch
from torch import nn
from toys import LAYERS, Network, equal, part

from lora_workbench.training.config import KINDS, LoraConfig
from lora_workbench.training.lora import Adapters, trained_values


def build(network=None, *, seed=0, pattern=LAYERS.pattern, **config):
    return Adapters.build([part(network or Network(), pattern)], LoraConfig(**config), seed)


def test_every_layer_whose_name_matches_has_an_adapter_of_the_right_shape():
    adapters = build(rank=4)
    assert list(adapters.members) == [
        f"lora_unet_blocks_{n}_{end}" for n in range(2) for end in ("attend", "widen", "narrow")
    ]
    for adapter in adapters:
        assert adapter.down.shape == (4, adapter.layer.in_features)
        assert adapter.up.shape == (4, adapter.layer.out_features)
    assert len(adapters) == 6 and len(adapters.parameters()) == 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"conv_rank": 2, "ranks": "q = 8"}, {"conv_rank": 2, "exclude": "q"}], ids=str
)
def test_how_many_numbers_are_trained_is_known_before_they_are_made(kind, settings):
    convolutions = {name: nn.Conv2d(8, 8, 3, padding=1) for name in ("first", "middle", "last")}
    parts = [part(nn.ModuleDict({"q": nn.Linear(8, 12), "k": nn.Conv2d(8, 16, 1), **convolutions}), "q|k")]
    config = LoraConfig(kind=kind, rank=4, **settings)
    assert trained_values(parts, config) == Adapters.build(parts, config, 0).values.numel() > 0


def test_the_factors_are_float32_and_trainable_whatever_the_base_is():
    with torch.inference_mode():
        network = Network().to(torch.bfloat16)
    for tensor in build(network).parameters():
        assert tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor.is_inference()


def test_down_is_kaiming_uniform_and_up_is_zero():
    """Hu et al.'s reference code: kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(in)."""
    adapters = build(nn.ModuleDict({"x": nn.Linear(400, 30)}), pattern="x", rank=64)
    (adapter,) = adapters
    bound = 1 / math.sqrt(400)
    assert adapter.down.abs().max() <= bound
    assert adapter.down.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not adapter.up.any()


def test_the_seed_decides_the_start_and_no_two_layers_start_alike():
    assert equal(build(seed=3).state(), build(seed=3).state())
    assert not equal(build(seed=3).state(), build(seed=4).state())
    first, second = (build().members[f"lora_unet_blocks_{n}_widen"].down for n in range(2))
    assert not torch.equal(first, second)


def test_building_draws_no_global_random_number():
    network = Network()
    before = torch.get_rng_state()
    build(network)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_leaves_the_network_as_it_was():
    network = Network()
    before = {name: dict(module.__dict__) for name, module in network.named_modules()}
    build(network)
    assert {name: dict(module.__dict__) for name, module in network.named_modules()} == before


def test_the_adapters_are_no_part_of_the_network():
    network = Network()
    keys = list(network.state_dict())
    adapters = build(network)
    assert list(network.state_dict()) == keys
    assert not {id(tensor) for tensor in adapters.parameters()} & {id(tensor) for tensor in network.parameters()}


class Quantised(nn.Module):
    """A linear layer that does not inherit from nn.Linear and whose weight is no float."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))


def test_a_quantised_layer_is_adapted_like_any_linear_layer():
    network = nn.ModuleDict({"q": Quantised(6, 5), "conv": nn.Conv2d(6, 5, 1), "norm": nn.LayerNorm(6)})
    adapters = build(network, pattern="")
    assert [adapter.name for adapter in adapters] == ["q", "conv"]
    assert adapters.members["lora_unet_q"].up.shape[1] == 5


def test_no_layer_to_adapt_is_one_sentence_with_the_network_and_the_setting():
    with pytest.raises(ValueError, match="^None of the layers of this Network .*'attention'.*: choose .*\\.$"):
        build(pattern="^nothing$", layers="attention")
    with pytest.raises(ValueError, match=r" adapts with exclude and ranks as set: choose "):
        build(exclude=".", ranks=". = 0")


def test_the_state_is_a_copy_that_later_training_does_not_change():
    adapters = build()
    state = adapters.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for tensor in adapters.parameters():
            tensor.add_(1)
    assert equal(state, before)
    assert all(not tensor.requires_grad for tensor in state.values())


def test_a_loaded_state_is_taken_over_and_not_shared():
    trained, fresh = build(seed=1), build(seed=2)
    with torch.no_grad():
        for tensor in trained.parameters():
            tensor.add_(1)
    state = trained.state()
    tensors = fresh.parameters()
    fresh.load(state)
    assert equal(fresh.state(), trained.state())
    assert all(old is new for old, new in zip(tensors, fresh.parameters(), strict=True))
    state["lora_unet_blocks_0_widen.down"].zero_()
    assert equal(fresh.state(), trained.state())


@pytest.mark.parametrize("saved", [{}, build(rank=8).state()], ids=["other layers", "another rank"])
def test_a_state_that_does_not_fit_is_one_sentence_naming_the_layer(saved):
    with pytest.raises(ValueError, match=r"does not fit layer 'blocks\.0\.attend'.*start over\.$"):
        build(rank=4).load(saved)


def test_moving_keeps_the_very_same_parameters():
    adapters = build()
    before = adapters.parameters()
    assert adapters.to(torch.device("cpu")) is adapters
    assert all(old is new for old, new in zip(before, adapters.parameters(), strict=True))
