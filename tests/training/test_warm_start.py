"""A change in factors is taken over whole where the rank suffices, and cut to its largest part where it does not."""

import pytest
import torch
from torch import nn
from toys import part

from lora_workbench.training.config import DORA, LOHA, LOKR, OFT, LoraConfig
from lora_workbench.training.factors import Factors
from lora_workbench.training.kinds.lora import change
from lora_workbench.training.lora import Adapters
from lora_workbench.training.warm_start import start_low_rank, start_same_kind

LAYERS = {"linear": lambda: nn.Linear(20, 30), "3 x 3": lambda: nn.Conv2d(20, 30, 3)}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adapter_of(layer="linear", **config):
    network = nn.ModuleDict({"layer": LAYERS[layer]()})
    config = LoraConfig(**{"rank": 4, "alpha": 2.0, "include": "layer", **config})
    (adapter,) = Adapters.build([part(network, "^$")], config, seed=0)
    return adapter


def factors(rank, width=20):
    return Factors(drawn(30, rank), drawn(rank, width, seed=1))


def product(these):
    return these.up @ these.down


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [2, 4])
def test_a_change_of_no_higher_rank_is_taken_over_exactly(layer, rank):
    adapter, given = adapter_of(layer), factors(rank, 20 if layer == "linear" else 180)
    kept, whole = start_low_rank(adapter, given)
    torch.testing.assert_close(change(adapter.tensors, adapter.scale), product(given), rtol=1e-4, atol=1e-4)
    assert kept == whole == pytest.approx(product(given).square().sum().item(), rel=1e-4)


def test_what_is_left_of_the_rank_begins_as_in_any_new_lora():
    fresh, adapter = adapter_of(), adapter_of()
    start_low_rank(adapter, factors(2))
    assert torch.equal(adapter.down[2:], fresh.down[2:]) and fresh.down[2:].all()
    assert not adapter.up[2:].any() and adapter.up[:2].all()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_change_of_higher_rank_is_cut_to_its_nearest_of_that_rank(layer):
    """Eckart & Young 1936: the largest singular values."""
    adapter, given = adapter_of(layer), factors(9, 20 if layer == "linear" else 180)
    kept, whole = start_low_rank(adapter, given)
    u, sizes, v = torch.linalg.svd(product(given))
    nearest = (u[:, :4] * sizes[:4]) @ v[:4]
    torch.testing.assert_close(change(adapter.tensors, adapter.scale), nearest, rtol=1e-3, atol=1e-3)
    assert kept / whole == pytest.approx((sizes[:4].square().sum() / sizes.square().sum()).item(), rel=1e-5)


def test_factors_of_more_columns_than_their_product_has_rank_lose_nothing():
    """q, k and v of one down factor, put side by side."""
    adapter, given = adapter_of(), factors(3)
    twice = given.plus(given).plus(given)
    kept, whole = start_low_rank(adapter, twice)
    assert twice.up.shape[1] == 9 and kept == pytest.approx(whole, rel=1e-9)
    torch.testing.assert_close(change(adapter.tensors, adapter.scale), 3 * product(given), rtol=1e-4, atol=1e-4)


# The same kind


def saved(adapter):
    return adapter.kind.saved({name: tensor.detach().clone() for name, tensor in adapter.tensors.items()})


def filled(adapter):
    with torch.no_grad():
        for number, tensor in enumerate(adapter.tensors.values()):
            tensor.copy_(drawn(*tensor.shape, seed=5 + number) * 0.2)
    return adapter


def weight_change(adapter):
    """The change by each kind's own formula."""
    t = adapter.tensors
    if "hada_w1_a" in t:
        return adapter.scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    large = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return adapter.scale * torch.kron(t["lokr_w1"], large.view(len(large), -1))


@pytest.mark.parametrize("kind", [LOHA, LOKR])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("rank", "own"), [(2, 2), (1, 2)], ids=["same rank", "grown"])
def test_loha_and_lokr_are_taken_over_at_their_rank_and_grown(kind, layer, rank, own):
    file = filled(adapter_of(layer, kind=kind, rank=rank, alpha=4.0, lokr_factor=-1))
    adapter = adapter_of(layer, kind=kind, rank=own, alpha=1.0, lokr_factor=-1)
    assert start_same_kind(adapter, saved(file), file.scale)
    torch.testing.assert_close(weight_change(adapter), weight_change(file), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [LOHA, LOKR, DORA])
def test_a_higher_rank_is_not_cut_in_these_kinds_and_nothing_is_changed(kind):
    file, adapter = filled(adapter_of(kind=kind, rank=2)), adapter_of(kind=kind, rank=1)
    before = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    assert not start_same_kind(adapter, saved(file), file.scale)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.tensors.items())


def test_a_lokr_that_is_split_in_the_file_is_multiplied_out_where_it_is_whole_here():
    adapter = adapter_of(kind=LOKR, rank=9, lokr_factor=-1)
    small, large = adapter.tensors["lokr_w1"].shape, adapter.tensors["lokr_w2"].shape
    entries = {
        "lokr_w1_a": drawn(small[0], 2),
        "lokr_w1_b": drawn(2, small[1], seed=1),
        "lokr_w2_a": drawn(large[0], 2, seed=2),
        "lokr_w2_b": drawn(2, large[1], seed=3),
    }
    assert start_same_kind(adapter, entries, 0.5)
    expected = torch.kron(entries["lokr_w1_a"] @ entries["lokr_w1_b"], entries["lokr_w2_a"] @ entries["lokr_w2_b"])
    torch.testing.assert_close(weight_change(adapter), 0.5 * expected, rtol=1e-4, atol=1e-5)


def test_dora_takes_the_magnitude_over_with_the_factors():
    file, adapter = filled(adapter_of(kind=DORA, rank=2, alpha=4.0)), adapter_of(kind=DORA)
    assert start_same_kind(adapter, saved(file), file.scale)
    assert torch.equal(adapter.tensors["magnitude"], file.tensors["magnitude"])
    torch.testing.assert_close(
        change(adapter.tensors, adapter.scale), change(file.tensors, file.scale), rtol=1e-4, atol=1e-5
    )


def test_oft_takes_blocks_of_its_size_over_as_far_as_the_file_lets_them_turn():
    file, adapter = filled(adapter_of(kind=OFT, alpha=0)), adapter_of(kind=OFT, alpha=0)
    assert start_same_kind(adapter, saved(file), 0.1)
    blocks = adapter.tensors["oft_blocks"]
    assert (blocks - blocks.transpose(1, 2)).norm().item() == pytest.approx(0.1, rel=1e-5)
    assert not start_same_kind(adapter_of(kind=OFT, rank=5), saved(file), 0.1)
    assert not start_same_kind(adapter_of(kind=OFT, alpha=0.05), saved(file), 0.1)
