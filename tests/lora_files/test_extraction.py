"""Extraction: ranks by energy, what is left out and said, and never more than a few layers in memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_workbench.lora_files.extraction import Pair, Stored, extracted
from lora_workbench.lora_files.layers import layers_of

SIDE, LAYERS, RANK = 64, 24, 2
LAYER_BYTES = SIDE * SIDE * 4


class LiveTensors(TorchDispatchMode):
    """The bytes of all tensors that operations made and that are still there, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def pairs(layers=LAYERS, side=SIDE, rank=RANK):
    for number in range(layers):
        made = torch.Generator().manual_seed(number)
        base = torch.randn(side, side, generator=made)
        up, down = torch.randn(side, rank, generator=made), torch.randn(rank, side, generator=made)
        pair = Pair(f"lora_unet_{number}", base + 0.1 * up @ down, base)
        del base, up, down
        yield pair
        del pair


def peak(make):
    with LiveTensors() as live:
        result = extracted(make(), rank=4)
    written = sum(tensor.nbytes for tensor in result.tensors.values())
    return (live.peak - written) / LAYER_BYTES


def test_memory_stays_near_one_layer_however_many_there_are():
    few, many = peak(lambda: pairs(layers=10)), peak(pairs)
    assert many < 12 and abs(many - few) < 1
    assert peak(lambda: list(pairs())) > 2 * LAYERS, "the measure sees layers that are kept"


def change_of(result, name):
    return layers_of(result.tensors)[name].change()


def made_of(sizes, side=48):
    """A change with these singular values."""
    made = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, len(sizes), generator=made)).Q for _ in range(2))
    return left * torch.tensor(sizes) @ right.t()


def test_energy_gives_each_layer_the_rank_it_needs():
    wide, narrow = made_of([4.0, 3.0, 2.0, 1.0]), made_of([5.0, 0.1])
    zero = torch.zeros_like(wide)
    two = [Pair("wide", wide, zero), Pair("narrow", narrow, zero)]
    assert extracted(two, rank=8).ranks == {"wide": 4, "narrow": 2}
    result = extracted(two, rank=8, energy=0.9)
    assert result.ranks == {"wide": 3, "narrow": 1}
    assert result.kept == pytest.approx(((29 + 25) / (30 + 25.01)) ** 0.5, rel=1e-4)
    assert extracted(two, rank=2, energy=0.9).ranks == {"wide": 2, "narrow": 1}


def test_convolutions_keep_their_shape():
    change = made_of([2.0, 1.0], side=36).view(36, 4, 3, 3)
    result = extracted([Pair("c", change, torch.zeros_like(change))], rank=2)
    assert result.tensors["c.lora_down.weight"].shape == (2, 4, 3, 3)
    assert result.tensors["c.lora_up.weight"].shape == (36, 2, 1, 1) and result.tensors["c.alpha"] == 2
    torch.testing.assert_close(change_of(result, "c"), change.flatten(1), rtol=1e-4, atol=1e-5)


def test_what_a_lora_cannot_change_is_counted_and_said():
    change, ones = made_of([1.0]), torch.ones(8)
    result = extracted(
        [
            Pair("a", change, torch.zeros_like(change)),
            Pair("", ones, torch.zeros(8)),
            Pair("", ones, ones),
            Pair("", change, torch.zeros_like(change)),
            Pair("in", torch.ones(4, 9), torch.ones(4, 4)),
        ],
        rank=2,
    )
    assert result.ranks == {"a": 1}
    assert result.notes == [
        "1 of other shapes left out, such as 'in'.",
        "2 norms, biases and the like differ too; a LoRA cannot change them, so it lacks that.",
    ]


def test_a_layer_that_differs_by_rounding_alone_is_left_out():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    change, half = made_of([3.0], side=64), Stored.of(torch.float16)
    result = extracted([Pair("a", weight + change, weight, half), Pair("b", weight.half(), weight, half)], rank=4)
    assert result.ranks == {"a": 1} and result.notes[-1] == "1 layer differs by no more than rounding and was left out."
    with pytest.raises(ValueError, match="differ by no more than what storing them as float16 rounds"):
        extracted([Pair("b", weight.half(), weight, half)], rank=4)


def test_two_models_rounded_apart_from_one_another_give_the_rank_that_was_trained():
    weight, change = torch.randn(96, 80, generator=torch.Generator().manual_seed(2)), torch.zeros(96, 80)
    change[:, 7] = 0.05
    half = Stored.of(torch.float16)
    assert extracted([Pair("a", (weight + change).half(), weight.half(), half)], rank=16).ranks == {"a": 1}


def test_what_gives_no_lora_is_a_sentence():
    same = torch.ones(4, 4)
    with pytest.raises(ValueError, match="The two models are the same"):
        extracted([Pair("a", same, same)], rank=2)
    with pytest.raises(ValueError, match="differ in no layer that a LoRA can change"):
        extracted([Pair("", torch.ones(4), torch.zeros(4))], rank=2)
    with pytest.raises(ValueError, match="The weight of 'a' is not finite in one of the models"):
        extracted([Pair("a", same * torch.nan, same)], rank=2)
